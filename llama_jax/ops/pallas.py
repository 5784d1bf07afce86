"""Helpers of all Pallas kernels."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import pallas as pl

from llama_jax import parallel


def interpreted() -> bool:
    """True if Pallas kernels run as XLA operations, slowly: on CPUs, where nothing but a test calls them."""
    return parallel.device_platform() == "cpu"


def masked(size: int, number: jax.Array) -> Any:
    """The first `size` indices of a dimension that may have fewer, for masked loads.

    The start is computed from a number of the kernel, because jax 0.12 refuses slices of which it knows that they go
    beyond an array.
    """
    return pl.ds(number * 0, size)
