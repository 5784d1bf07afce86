"""What the devices compute in."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of a config's `float32`, `bfloat16` or `auto`.

    `auto` is bfloat16 on accelerators and float32 on CPUs, where the same run then gives the same losses on any mesh,
    whatever the CPU. (bfloat16 trains 1.6 times as fast on one with avx512_bf16: benchmarks/training.py.)
    """
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
