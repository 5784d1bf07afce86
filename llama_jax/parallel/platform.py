"""What the devices compute best in."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp


def fast_bfloat16() -> bool:
    """Whether the default devices multiply bfloat16 faster than float32: all but CPUs without AMX."""
    if jax.default_backend() != "cpu":
        return True
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of a config's `float32`, `bfloat16` or `auto` (bfloat16 where it is fast)."""
    if name == "auto":
        name = "bfloat16" if fast_bfloat16() else "float32"
    return jnp.dtype(name)
