"""Choices that depend on the platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh


def compute_dtype(name: str, mesh: Mesh | None = None) -> jnp.dtype:
    """The dtype for a config value of `float32`, `bfloat16` or `auto`.

    `auto` is bfloat16 on accelerators and float32 on CPUs. In float32 a run gives the same losses on any mesh and any
    CPU. bfloat16 trains 1.6 times as fast on a CPU with avx512_bf16 (benchmarks/training.py).

    Args:
        name: the config value.
        mesh: the devices; None for the default ones. A plan is made for devices that are not present.
    """
    if name == "auto":
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def named_dtype(name: str) -> jnp.dtype:
    """The compute dtype of a config value on an accelerator."""
    return jnp.dtype("bfloat16" if name == "auto" else name)
