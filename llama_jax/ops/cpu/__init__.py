"""Native kernels for few rows on a CPU: products with weights, and attention over the live keys.

A decode step reads every weight once and computes little. XLA's products of 1 to 16 rows are slower than memory on a
CPU (docs/measurements/cpu-kernels.md#products-of-few-rows), so these rows have kernels of their own. They are compiled
at first use (build.py). Where they cannot be used, XLA computes the same results, and one line of the log says why.
"""

from __future__ import annotations

import functools
import logging
import os

import jax

from llama_jax import parallel
from llama_jax.ops.cpu import build, calls
from llama_jax.ops.cpu.build import ENV, Unavailable
from llama_jax.ops.cpu.calls import attend, linears

__all__ = ["ENV", "MAX_ROWS", "attend", "calls", "ready", "linears"]

MAX_ROWS = 16
_log = logging.getLogger(__name__)


def ready() -> bool:
    """True if the kernels can be used in the function that is being traced: on one CPU device, with a library that
    passed its check.

    The first call may build the library. If the kernels cannot be used, the reason is logged once.
    $LLAMA_JAX_CPU_KERNELS=off turns them off.
    """
    layout = parallel.active()
    platform = jax.default_backend() if layout is None else layout.mesh.devices.flat[0].platform
    if platform != "cpu":
        return False
    if layout is not None and layout.mesh.size > 1:
        _say_once(f"the arrays are sharded over {layout.mesh.size} devices")
        return False
    return _loaded()


@functools.cache
def _loaded() -> bool:
    if os.environ.get(ENV, "").lower() in ("off", "0", "false"):
        return False
    try:
        build.register(build.library())
    except (Unavailable, OSError, AttributeError) as error:
        _say_once(str(error))
        return False
    return True


@functools.cache
def _say_once(reason: str) -> None:
    _log.warning("decoding runs in plain XLA, which is slower on a CPU than the CPU kernels: %s", reason)
