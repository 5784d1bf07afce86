"""Compile a recipe's steps, or the 8B decode loop, for TPUs that are not present; print their memory as JSON.

    TPU_LIBRARY_PATH=.../libtpu.so TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu PYTHONPATH=.:tests \\
        python -m helpers.aot_compile configs/llama31_8b_qlora.py [TOPOLOGY [KEY=VALUE ...]]

Without a topology it is the one that the recipe's docstring names. tests/project/test_aot.py runs it in a process of
its own, because libtpu reads its environment when jax starts.
"""

import ast
import dataclasses
import json
import re
import runpy
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from llama_jax import parallel
from llama_jax.config import size
from llama_jax.run_config import RunConfig


def stated(path):
    """The topology and peak memory (GiB) of a recipe, stated as "(v6e:2x4" and "19.0 GiB a chip at its peak"."""
    text = " ".join(ast.get_docstring(ast.parse(Path(path).read_text())).split())
    topology, peak = re.search(r"\((v\w+:[\dx]+)\b", text), re.search(r"([\d.]+) GiB a chip at its peak", text)
    return topology[1], float(peak[1])


def tpu_mesh(topology, sizes):
    bounds = (1, 1, 1) if topology.endswith((":1x1", ":1x1x1")) else (2, 2, 1)
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, chips_per_host_bounds=bounds, num_slices=1
    ).devices
    return parallel.make_mesh(sizes, devices)


def with_published_shape(run, path):
    """The run of a recipe with the shape of the model that its file is named after, e.g. llama31_8b_lora.py."""
    name = re.match(r"llama(\d)(\d)_(\d+b)", Path(path).stem)
    return run.with_shape(size(f"llama{name[1]}.{name[2]}-{name[3]}")) if run.init_from else run


def train(path, topology=None, *changes):
    """The steps of a recipe: training, and evaluation where it has any."""
    from llama_jax.train.program import Program

    config = runpy.run_path(path)["get_config"]()
    for change in changes:
        key, _, value = change.partition("=")
        config.update_from_flattened_dict({key: ast.literal_eval(value)})
    run = with_published_shape(RunConfig.from_dict(config.to_dict()), path)
    mesh = tpu_mesh(topology or stated(path)[0], dataclasses.asdict(run.mesh))
    program = Program.make(run, mesh)
    steps = [program.train_step.lower(program.state, program.frozen, program.batch)]
    if run.data.validation:
        steps.append(program.eval_step.lower(program.state.params, program.frozen, program.batch))
    return mesh, steps, {"kernels": steps[0].as_text().count("@tpu_custom_call")}


def decode():
    """The loop that `generate` runs: bfloat16 weights and cache, 8 rows of 8,192 positions, tensor parallelism over 8
    chips.
    """
    from llama_jax.infer.program import Program

    config, rows, capacity = size("llama3.1-8b"), 8, 8192
    mesh = tpu_mesh("v5e:2x4", {"tensor": 8})
    program = Program.make(config, mesh=mesh, dtype=jnp.bfloat16)
    whole = parallel.replicated(mesh)
    steer = {
        "alive_B": jax.ShapeDtypeStruct((rows,), bool, sharding=whole),
        "limit": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        "least": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        "drafts_B": jax.ShapeDtypeStruct((rows,), bool, sharding=whole),
    }
    state = program.abstract_state(rows=rows, capacity=capacity)
    step = program.decode.lower(program.abstract_params(), state, steer, bound=capacity, top=0, guesses=0, drafter="")
    cache_bytes = rows * capacity * config.cache_bytes_per_token(2)
    return mesh, [step], {"cache_bytes": cache_bytes}


def main():
    started = time.monotonic()
    mesh, steps, more = decode() if sys.argv[1] == "decode" else train(*sys.argv[1:])
    # As a run is: with less effort (exec_time_optimization_effort) memory comes out up to 8 % off.
    memory = [lowered.compile().memory_analysis() for lowered in steps]
    found = {
        "devices": mesh.size,
        "peak_bytes": max(m.peak_memory_in_bytes for m in memory),
        "peak_bytes_of_each": [m.peak_memory_in_bytes for m in memory],
        "aliased_bytes": memory[0].alias_size_in_bytes,
        "seconds": round(time.monotonic() - started, 1),
        **more,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
