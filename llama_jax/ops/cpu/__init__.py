"""Native kernels for CPUs: products with weights, attention over the live keys, and whole layers of a decode step.

A decode step reads every weight once and computes little, and XLA's products of 1 to 16 rows are slower than memory
(docs/measurements/cpu-kernels.md#products-of-few-rows). XLA's attention of a prompt writes all scores to memory. Both
have kernels of their own, which are compiled at first use (build.py). Where they cannot be used, XLA computes the same
results, and one line of the log says why.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llama_jax import parallel
from llama_jax.cache import KVCache
from llama_jax.config import ModelConfig
from llama_jax.ops.cpu import build, calls, layers
from llama_jax.ops.cpu.build import ENV, Unavailable
from llama_jax.ops.cpu.calls import (
    attend,
    attend_many,
    attend_many_backward,
    attend_many_forward,
    linears,
    loss,
    loss_gradient,
    product,
    rotate,
    rows,
    takes_weight,
)

__all__ = [
    "ENV",
    "attend",
    "attend_many",
    "attend_many_backward",
    "attend_many_forward",
    "calls",
    "layers",
    "linears",
    "loss",
    "loss_gradient",
    "multiplies",
    "product",
    "ready",
    "rotate",
    "rows",
    "takes_layers",
    "takes_weight",
]

_log = logging.getLogger(__name__)


def ready() -> bool:
    """True if the kernels can be used in the function that is being traced: on one CPU device, with a library that
    passed its check.

    The first call may build the library. If the kernels cannot be used, the reason is logged once.
    $LLAMA_JAX_CPU_KERNELS=off turns them off.
    """
    if parallel.device_platform() != "cpu":
        return False
    layout = parallel.active()
    if layout is not None and layout.mesh.size > 1:
        _say_once(f"the arrays are sharded over {layout.mesh.size} devices")
        return False
    return _loaded() is not None


def multiplies(rows: int) -> bool:
    """True if products of this number of rows with weights should use the kernels.

    Those of more than 16 rows do where they were faster than XLA when the library was built.
    """
    return rows > 0 and ready() and (rows <= calls.FEW_ROWS or _gain_of_many_rows() > 1)


def takes_layers(config: ModelConfig, weights: Sequence[Mapping[str, Any]], x: jax.Array, cache: KVCache) -> bool:
    """True if one call computes all layers of a step; the arguments are those of `layers.takes`."""
    return layers.takes(config, weights, x, cache) and ready()


@functools.cache
def _loaded() -> Path | None:
    """The library, once it is registered. None if it cannot be used, which is logged."""
    if os.environ.get(ENV, "").lower() in ("off", "0", "false"):
        return None
    try:
        library = build.library()
        build.register(library)
    except (Unavailable, OSError, AttributeError) as error:
        _say_once(str(error))
        return None
    return library


@functools.cache
def _gain_of_many_rows() -> float:
    library = _loaded()
    return 0.0 if library is None else build.gain_of_many_rows(library)


@functools.cache
def _say_once(reason: str) -> None:
    _log.warning("plain XLA is used, which is slower on a CPU than the CPU kernels: %s", reason)
