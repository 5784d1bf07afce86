"""Native kernels for CPUs: products with weights, and attention over the live keys.

A decode step reads every weight once and computes little, and XLA's products of 1 to 16 rows are slower than memory
(docs/measurements/cpu-kernels.md#products-of-few-rows). XLA's attention of a prompt writes all scores to memory. Both
have kernels of their own, which are compiled at first use (build.py). Where they cannot be used, XLA computes the same
results, and one line of the log says why.
"""

from __future__ import annotations

import functools
import logging
import os

import jax

from llama_jax import parallel
from llama_jax.ops.cpu import build, calls
from llama_jax.ops.cpu.build import ENV, Unavailable
from llama_jax.ops.cpu.calls import attend, attend_many, linears, rows

__all__ = ["ENV", "attend", "attend_many", "calls", "linears", "multiplies", "ready", "rows"]

_FEW_ROWS = 16
_log = logging.getLogger(__name__)


def ready() -> bool:
    """True if the kernels can be used in the function that is being traced: on one CPU device, outside of training,
    with a library that passed its check. Training has gradients, which no kernel computes.

    The first call may build the library. If the kernels cannot be used, the reason is logged once.
    $LLAMA_JAX_CPU_KERNELS=off turns them off.
    """
    layout = parallel.active()
    platform = jax.default_backend() if layout is None else layout.mesh.devices.flat[0].platform
    if platform != "cpu" or (layout is not None and layout.rules == "train"):
        return False
    if layout is not None and layout.mesh.size > 1:
        _say_once(f"the arrays are sharded over {layout.mesh.size} devices")
        return False
    return _loaded()


def multiplies(rows: int) -> bool:
    """True if products of this number of rows with weights should use the kernels.

    More than 16 rows use them on processors that multiply bfloat16 in vectors. Others were not measured, and AMX is
    used by XLA alone.
    """
    features = build.features()
    faster = rows <= _FEW_ROWS or ("avx512_bf16" in features and "amx_bf16" not in features)
    return rows > 0 and faster and ready()


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
    _log.warning("generation runs in plain XLA, which is slower on a CPU than the CPU kernels: %s", reason)
