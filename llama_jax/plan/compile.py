"""Compiles the training step of a run, or the programs of inference, for devices that are not present.

    python -m llama_jax.plan.compile < request.json

It reads a request as JSON from standard input and prints the answer as the last line of standard output. libtpu and the
CUDA plugin read their environment when jax starts, so `planner` starts this program as a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from llama_jax import parallel
from llama_jax.errors import ConfigError, one_line
from llama_jax.plan import inference
from llama_jax.plan.devices import Devices
from llama_jax.plan.facts import facts_of
from llama_jax.run_config import RunConfig
from llama_jax.train.program import Program


def topology(devices: Devices) -> list[Any]:
    """The jax devices that describe a group of accelerators, which need not be attached."""
    if devices.chip.platform == "cuda":
        target = (Path(__file__).parent / "targets" / f"{devices.kind}.txtpb").read_text()
        shape = f"1x{devices.shape[0]}x{devices.shape[1]}"
        return topologies.get_topology_desc(
            platform="cuda", topology_name=devices.kind, target_config=target, topology=shape
        ).devices
    host = [min(2, n) for n in devices.shape[:2]] + [1]
    name = f"{devices.kind}:{'x'.join(map(str, devices.shape))}"
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=name, chips_per_host_bounds=tuple(host), num_slices=devices.slices
        ).devices
    except Exception as error:  # libtpu's own classes
        raise ConfigError(
            f"libtpu knows no grid {name} of chips: {one_line(error)[:200]}; --closed plans without it"
        ) from None


def compiled(run: RunConfig, devices: Devices, sizes: dict[str, int]) -> dict[str, Any]:
    """Facts about the compiled training step, as a JSON-able dict (see `facts_of`)."""
    mesh = parallel.make_mesh(sizes, topology(devices))
    program = Program.make(run, mesh)
    with _for_kernels(mesh, devices):
        lowered = program.train_step.lower(program.state, program.frozen, program.batch)
    facts = {"compiler_options": program.compiler_options, "libraries": _libraries(devices)}
    return facts | facts_of(lowered, devices, _islands(mesh))


def _islands(mesh: jax.sharding.Mesh) -> list[int]:
    """The host of each GPU, or the slice of each TPU, in the order of the mesh: a slower network connects these."""
    return [getattr(one, "slice_index", 0) if one.platform == "tpu" else one.process_index for one in mesh.devices.flat]


def _for_kernels(mesh: jax.sharding.Mesh, devices: Devices) -> contextlib.AbstractContextManager[Any]:
    """From jax 0.11 on, Pallas looks for the GPU to compile for in the mesh in use, or else on this machine."""
    return jax.set_mesh(mesh) if devices.chip.platform == "cuda" else contextlib.nullcontext()


def _libraries(devices: Devices) -> dict[str, str]:
    """Versions of the libraries that the result depends on."""
    import jaxlib

    return {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "platform": devices.chip.platform}


def main() -> None:
    """Reads the request on standard input, and prints the answer."""
    request = json.load(sys.stdin)
    kind, shape, slices = request["devices"]
    devices = Devices(kind, tuple(shape), slices)
    if "serving" in request:
        mesh = parallel.make_mesh(request["mesh"], topology(devices))
        with _for_kernels(mesh, devices):
            facts = inference.compiled(inference.Serving.from_dict(request["serving"]), devices, mesh)
    else:
        facts = compiled(RunConfig.from_dict(request["run"]), devices, request["mesh"])
    seconds = sum(os.times()[:4])  # of one core, by all threads and children of this process
    print(json.dumps(facts | {"seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
