"""Kernels for NVIDIA GPUs in CUDA C++, which XLA launches: layers of a decode step, and products of few rows.

A decode step is as fast as its weights are read. For one row, one launch computes many layers (layers.py). For 2 to 8
rows, one launch multiplies the inputs by up to three quantized weights, such as q, k and v; it can normalize the
inputs first and add the residual (products.py). Tensor cores multiply the integers of quantized weights, which takes
few enough instructions to read packed weights at the speed of memory.

Each kind is compared with XLA, and timed with the kernels that it replaces, once for each machine (check.py). Kinds
that are not faster there are not used.
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
from llama_jax.ops.gpu import layers, products, verdict
from llama_jax.ops.gpu.products import linears
from llama_jax.ops.native import Unavailable
from llama_jax.ops.quant import QTensor

__all__ = ["faster", "layers", "linears", "products", "takes", "takes_layers"]

_log = logging.getLogger(__name__)


def takes(x: jax.Array, weights: Sequence[jax.Array | QTensor]) -> bool:
    """True if the kernel multiplies x (..., in) and weights (out, in) of one kind faster than other kernels."""
    first = weights[0]
    return isinstance(first, QTensor) and products.takes(x, weights) and faster(products.kind(first.bits))


def takes_layers(config: ModelConfig, weights: Sequence[Mapping[str, Any]], x: jax.Array, cache: KVCache) -> bool:
    """True if one launch runs several layers of a decode step faster than other kernels.

    Args:
        config: the model's shape.
        weights: the weights of each layer.
        x: hidden state before the layers (B, T, D).
        cache: keys and values of each layer.
    """
    if parallel.device_platform() != "cuda" or x.shape[:2] != (1, 1):
        return False
    reason = layers.refuses(config, weights, x, cache)
    if not reason and _has_multi_process_service():
        reason = "CUDA's multi-process service may run only some of its blocks at a time"
    if reason:
        _log_once(f"decode steps of one row do not run the kernel for whole layers, because {reason}")
    return not reason and faster(layers.kind_of(weights, cache))


def _has_multi_process_service() -> bool:
    """True if kernels of several processes may run on the GPU at the same time."""
    return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control").exists()


@functools.cache
def _log_once(text: str) -> None:
    _log.info(text)


def faster(kind: str) -> bool:
    """True if kernels of this kind can be used on the devices in use, and were the faster ones in the check.

    The first call may run the check.
    """
    layout = parallel.active()
    if (layout is not None and (layout.mesh.size > 1 or layout.rules == "train")) or parallel.compute_capability() < 80:
        return False
    return _gain(getattr(parallel.device(), "device_kind", ""), kind) > 1


@functools.cache
def _gain(device_kind: str, kind: str) -> float:
    try:
        return verdict.gain(device_kind, kind)
    except Unavailable as error:
        _log.warning("decoding is slower than it could be on this GPU: %s", error)
        return 0.0
