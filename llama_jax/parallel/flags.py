"""Compiler options of a mesh: asynchronous collectives, so that all-gathers and reduce-scatters overlap products, and
vectors of 512 bits on CPUs with avx512_bf16.

They apply to single programs, and not to the whole process. A compiler that does not know an option refuses the
program, so that each option is first compiled with an empty program.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from llama_jax.parallel.platform import cpu_features

Options = dict[str, bool | int | str]

# Sources: MaxText's benchmarks/xla_flags_library.py (TPU), and the 70B and 405B recipes of AI-Hypercomputer/gpu-recipes
# with the names of 2026 (GPU). What they do to a program is in docs/measurements/tpu-compiler.md.
OPTIONS: dict[str, Options] = {
    "tpu": {
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
        "xla_enable_async_all_gather": True,
        "xla_tpu_prefer_async_allgather_to_allreduce": True,
        # It would cast the stacked weights of all layers before the scan, which holds them twice.
        "xla_jf_bf16_propagation": False,
    },
    "cuda": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_reduce_scatter": True,
        "xla_gpu_enable_pipelined_all_reduce": True,
        # The same for compilers of August 2026 and later.
        "xla_gpu_pipeline_all_gather": "on",
        "xla_gpu_pipeline_reduce_scatter": "on",
        "xla_gpu_pipeline_all_reduce": "on",
        "xla_gpu_enable_while_loop_double_buffering": True,
        "xla_gpu_all_gather_combine_threshold_bytes": 134217728,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 67108864,
    },
}


# XLA's own choice for all CPUs is 256 bits (docs/measurements/finetuning-speed.md#steps-of-a-small-model-on-a-cpu).
_WIDE: Options = {"xla_cpu_prefer_vector_width": 512}


def compiler_options(mesh: Mesh) -> Options:
    """The options for programs on a mesh that its compiler supports; empty for one accelerator."""
    # One of this process's own, since a program of another's device would not compile here: all hosts must agree.
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    device = (own or list(mesh.devices.flat))[0]
    platform = {"gpu": "cuda"}.get(device.platform, device.platform)
    options = OPTIONS.get(platform, {}) if mesh.size > 1 else {}
    if platform == "cpu" and "avx512_bf16" in cpu_features() and jax.process_count() == 1:
        options = options | _WIDE
    return {name: value for name, value in options.items() if _known(device, name, value)}


@functools.lru_cache(maxsize=256)
def _known(device: jax.Device, name: str, value: bool | int | str) -> bool:
    """True if the compiler of a device takes an option."""
    nothing = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x).lower(nothing).compile(compiler_options={name: cast(Any, value)})
    except Exception:  # each platform has its own class of errors here
        return False
    return True
