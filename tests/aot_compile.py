"""Compile a program of the 8B model for a TPU topology and print what the compiler says of its memory, as JSON.

Run by test_aot.py in a process of its own: libtpu wants its environment set before jax starts.
"""

import dataclasses
import json
import runpy
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from llama_jax import model, parallel
from llama_jax.config import size
from llama_jax.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[1]


def tpu_mesh(topology, sizes):
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, chips_per_host_bounds=(2, 2, 1), num_slices=1
    ).devices
    return parallel.make_mesh(sizes, devices)


def train():
    """configs/llama31_8b.py: float32 weights and moments, bfloat16 products, 8 rows of 8,192 tokens, fsdp over 8."""
    return _train_step("v6e:2x4", recipe())


def train_long():
    """The same with 4 rows of 131,072 tokens, fsdp over 4 and tensor over 8."""
    values = recipe()
    values["model"]["max_seq_len"] = values["data"]["sequence_length"] = 131072
    values["data"]["batch_size"] = 4
    values["mesh"] |= {"fsdp": 4, "tensor": 8}
    return _train_step("v5p:4x4x2", values)


def recipe():
    return runpy.run_path(str(ROOT / "configs/llama31_8b.py"))["get_config"]().to_dict()


def _train_step(topology, values):
    from llama_jax.train.program import Program

    run = RunConfig.from_dict(values)
    mesh = tpu_mesh(topology, dataclasses.asdict(run.mesh))
    program = Program.make(run, mesh)
    lowered = program.train_step.lower(program.state, program.frozen, program.batch)
    return mesh, lowered, {"kernels": lowered.as_text().count("@tpu_custom_call")}


def decode():
    """bfloat16 weights and cache, 8 rows of 8,192 positions, tensor over 8: the loop that `generate` runs."""
    from llama_jax.cache import init_cache
    from llama_jax.infer import engine as engines
    from llama_jax.ops.sampling import SamplingParams

    config, rows, capacity = size("llama3.1-8b"), 8, 8192
    mesh = tpu_mesh("v5e:2x4", {"tensor": 8})
    layout = engines.layout(config, mesh)
    whole = parallel.replicated(mesh)

    params = model.abstract_params(config, stacked=False, dtype=jnp.bfloat16)
    params = parallel.abstract(params, parallel.shardings(layout, model.logical_axes(config, stacked=False), params))
    engine = engines.Engine(config, params, mesh=mesh, dtype=jnp.bfloat16)
    cache = jax.eval_shape(lambda: init_cache(config, batch=rows, capacity=capacity, dtype=jnp.bfloat16))
    heads = layout.sharding(("batch", "kv_heads", None, None))
    request = engines.Request(tokens=[1], max_new_tokens=64, sampling=SamplingParams(), seed=0)
    fresh = engine._fresh([request] * rows, jnp.zeros((rows, 2), jnp.int32), [1] * rows, [1, 2, 3])
    fresh["seen_BV"] = jax.ShapeDtypeStruct((rows, config.vocab_size), bool)
    fresh = parallel.abstract(fresh, jax.tree.map(lambda _: whole, fresh))
    state = engines.State(cache=parallel.abstract(cache, jax.tree.map(lambda _: heads, cache)), **fresh)
    limit = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    cache_bytes = rows * capacity * config.cache_bytes_per_token(2)
    return mesh, engine._decode.lower(params, state, limit), {"cache_bytes": cache_bytes}


def main():
    started = time.monotonic()
    mesh, lowered, more = {"train": train, "train_long": train_long, "decode": decode}[sys.argv[1]]()
    compiled = lowered.compile(compiler_options={"exec_time_optimization_effort": -1.0})
    memory = compiled.memory_analysis()
    found = {
        "devices": mesh.size,
        "peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "seconds": round(time.monotonic() - started, 1),
        **more,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
