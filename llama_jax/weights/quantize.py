"""Quantization of a model's weights: the number of bits of each weight, and lazy tensors rounded to them.

At 8 bits every matrix is rounded. At 4 bits a tied embedding keeps 8, since it is also the unembedding, which rounding
affects most. A separate unembedding has 4 bits: otherwise Llama 3.1 8B would not fit in 4.7 GB, nor 70B in 40 GB
(docs/decisions/exported-quantization.md).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError
from llama_jax.ops import quant
from llama_jax.ops.quant import QTensor
from llama_jax.weights import name_table
from llama_jax.weights.tensor import LazyTensor, QuantizedParts, of_array

BITS = {"int8": 8, "int4": 4}
_LAYERS = {f"{name}_layers": bits for name, bits in BITS.items()}
_AT_ONCE = 1 << 22  # values that are rounded at a time


def layers_only(quantize: str) -> str:
    """The name of a quantization that rounds the layers, and not the embedding and the unembedding (QLoRA)."""
    return f"{quantize}_layers" if quantize in BITS else quantize


def bits_of(config: ModelConfig, quantize: str | None) -> dict[name_table.Path, int]:
    """The number of bits, by path, of each weight that "int8" or "int4" (or `layers_only` of them) rounds.

    Matrices whose row length is not a multiple of 32 are left out.
    """
    bits = {**BITS, **_LAYERS}.get(quantize or "", 0)
    chosen: dict[name_table.Path, int] = {}
    for weight in name_table.weights(config, "huggingface") if bits else ():
        in_layers = weight.path[0] == "layers"
        if len(weight.shape) == 2 and weight.shape[-1] % quant.GROUP == 0 and (in_layers or quantize in BITS):
            shared = weight.path == ("embed",) and config.tied_embeddings
            chosen[weight.path] = 8 if shared else bits
    return chosen


def check(config: ModelConfig, quantize: str | None) -> None:
    """Raises ConfigError if the row length of a matrix is not a multiple of 32, the group size of quantization."""
    widths = {
        "embed_dim": config.embed_dim,
        "num_heads x head_dim": config.num_heads * config.head_dim,
        "ffn_dim": config.ffn_dim,
    }
    bad = [f"{key}={width}" for key, width in widths.items() if width % quant.GROUP]
    name = (quantize or "").removesuffix("_layers")
    if bad and name in BITS:
        raise ConfigError(f"{name} needs rows of a multiple of 32 numbers, but the model has {', '.join(bad)}")


def nbytes(config: ModelConfig, quantize: str) -> int:
    """The size in bytes of a model's weights with this quantization. Weights that are not rounded are bfloat16."""
    bits = bits_of(config, quantize)
    sizes = {8: quant.GROUP + 2, 4: quant.GROUP // 2 + 2}
    return sum(
        math.prod(w.shape) * 2 if w.path not in bits else math.prod(w.shape) // quant.GROUP * sizes[bits[w.path]]
        for w in name_table.weights(config, "huggingface")
    )


def rounded(leaf: LazyTensor, bits: int) -> LazyTensor:
    """Adds quantized parts to a lazy matrix: those that it is stored in, if they have `bits` bits, or else rounded by
    `quant.fit`.

    The values and the scales are computed together when either is first read, and cached until the next matrix is read.
    """
    if leaf.quantized is not None and leaf.quantized.bits == bits:
        return leaf
    parts = functools.partial(_fitted, leaf, bits)
    out, size = leaf.shape
    width, dtype = (size // 2, np.dtype(np.uint8)) if bits == 4 else (size, np.dtype(np.int8))
    values = of_array(lambda: parts()[0], dtype, (out, width))
    scales = of_array(lambda: parts()[1], np.dtype(np.float16), (out, size // quant.GROUP))
    return dataclasses.replace(leaf, quantized=QuantizedParts(bits, values, scales))


_latest: dict[int, tuple[LazyTensor, tuple[np.ndarray, np.ndarray]]] = {}


def _fitted(leaf: LazyTensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads a matrix and quantizes it. Returns values and scales as numpy arrays; the last result is cached.

    Raises:
        FloatingPointError: the matrix has values that are not finite.
    """
    if id(leaf) not in _latest:
        _latest.clear()
        rows = max(1, _AT_ONCE // leaf.shape[1])
        fit = rounder(bits)
        parts = []
        for low in range(0, leaf.shape[0], rows):
            block = fit(leaf.read((slice(low, low + rows),), np.dtype(np.float32)))
            parts.append(jax.tree.map(np.asarray, (block.values, block.scales)))
        values, scales = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        if not np.isfinite(scales).all():
            raise FloatingPointError
        _latest[id(leaf)] = leaf, (values, scales)
    return _latest[id(leaf)][1]


@functools.lru_cache(maxsize=64)
def rounder(bits: int, places: QTensor | None = None) -> Callable[..., QTensor]:
    """The compiled function `quant.fit` for 8 or 4 bits. On one device it works on blocks of rows, to save memory.

    Args:
        bits: 8 or 4.
        places: shardings of the result; None for one device.
    """

    def fit(w: jax.Array) -> QTensor:
        out, size = w.shape
        blocks = next(n for n in range(1, out + 1) if out % n == 0 and (n == out or out // n * size <= _AT_ONCE))
        if places is not None or blocks == 1:
            return quant.fit(w, bits)
        parts = jax.lax.map(lambda block: quant.fit(block, bits), w.reshape(blocks, -1, size))
        return jax.tree.map(lambda a: jnp.reshape(a, (out, -1)), parts)

    return jax.jit(fit, out_shardings=places)
