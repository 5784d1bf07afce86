"""Kernels for NVIDIA GPUs in CUDA C++, which XLA launches: products of few rows, and attention of a decode step.

A decode step is as fast as its weights are read. One launch multiplies up to three weights of the same inputs, such as
q, k and v, normalizes the inputs or applies SwiGLU to them, and adds the residual. Another does all of attention. A
layer of one row has five launches. Tensor cores multiply the integers of quantized weights, which takes few enough
instructions to read packed weights at the speed of memory.

The kernels are compared with XLA, and timed beside the kernels that take their place, once for each machine (check.py).
Those that are not faster there are not used.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence

import jax

from llama_jax import parallel
from llama_jax.ops.gpu import decode, products, verdict
from llama_jax.ops.gpu.products import linears
from llama_jax.ops.native import Unavailable
from llama_jax.ops.quant import QTensor

__all__ = ["decode", "faster", "gains", "linears", "products", "takes"]

_log = logging.getLogger(__name__)


def takes(x: jax.Array, weights: Sequence[jax.Array | QTensor]) -> bool:
    """True if the kernel multiplies x (..., in) and weights (out, in) of one kind faster than other kernels."""
    if products.refuses(x, weights):
        return False
    bits = weights[0].bits if isinstance(weights[0], QTensor) else 16
    return faster(products.kind(bits, x.size // x.shape[-1]))


def faster(kind: str) -> bool:
    """True if kernels of this kind can be used on the devices in use, and were the faster ones in the check.

    The first call may run the check.
    """
    layout = parallel.active()
    if (layout is not None and (layout.mesh.size > 1 or layout.rules == "train")) or parallel.compute_capability() < 80:
        return False
    return gains().get(kind, 0.0) > 1


def gains() -> Mapping[str, float]:
    """The speed of each kind of kernel on the GPU in use, as a multiple of that of the kernels that it replaces.

    It is empty where they cannot be used, which is logged once.
    """
    return _gains(getattr(parallel.device(), "device_kind", ""))


@functools.cache
def _gains(device_kind: str) -> Mapping[str, float]:
    try:
        found = verdict.gains(device_kind)
    except Unavailable as error:
        _log.warning("decoding is slower than it could be on this GPU: %s", error)
        return {}
    for kind, reason in found.failed.items():
        _log.warning("decoding is slower than it could be on this GPU (%s): %s", kind, reason)
    return found.gains
