"""Products of few rows with weights on NVIDIA GPUs: the calls of products.cu.

Letters: R rows, O outputs, K inputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.ops.gpu import build
from llama_jax.ops.norm import rms_norm
from llama_jax.ops.quant import GROUP, QTensor

Norm = tuple[jax.Array, float]

MAX_ROWS = 64  # of quantized weights; for more, dequantizing once costs less
_MAX_ROWS_OF_ARRAYS = 8  # for more, XLA's products are as fast
_MAX_WEIGHTS = 3
_NORM_ROWS, _SWIGLU_ROWS = 8, 2  # each block prepares all inputs, which costs too much for more rows
_UNIT = 128  # bytes of a row that a warp multiplies at once
_DTYPES = (jnp.bfloat16, jnp.float16)


def refuses(x: jax.Array, weights: Sequence[jax.Array | QTensor]) -> bool:
    """True if the kernel does not multiply x (..., in) and weights (out, in) of one kind."""
    rows = x.size // x.shape[-1] if x.size else 0
    quantized = isinstance(weights[0], QTensor)
    if x.dtype not in _DTYPES or not 0 < rows <= (MAX_ROWS if quantized else _MAX_ROWS_OF_ARRAYS):
        return True
    multiple = 2 * GROUP if quantized else 8
    fit = all(len(w.shape) == 2 and w.shape[1] % multiple == 0 for w in weights)
    kinds = all(isinstance(w, QTensor) or w.dtype == x.dtype for w in weights)
    return not (fit and kinds) or len(weights) > _MAX_WEIGHTS


def kind(bits: int, rows: int) -> str:
    """The kind of a product, as the check of the kernels names it."""
    return f"{bits} bits, {'one row' if rows == 1 else 'up to 8 rows' if rows <= 8 else 'up to 64 rows'}"


class Tiling(NamedTuple):
    """The division of the work of a kernel: constants of products.cu with these names.

    Attributes:
        warps: warps that share the inputs of a tile.
        tiles: tiles of 16 outputs of a block at once.
        stages: units in shared memory, of which all but one are on their way.
        parts: parts of the inputs, each with blocks of its own.
        blocks: blocks of a processor.
    """

    warps: int
    tiles: int
    stages: int
    parts: int
    blocks: int


def tiling(bits: int, rows: int, width: int, chip: build.Chip) -> Tiling:
    """The tiling for rows of inputs (R, K) on a GPU."""
    parts = range(1, math.ceil(width * bits / 8 / _UNIT) + 1)
    if rows <= 8:  # few parts matter most, since each adds a result, and then two blocks
        tried = [(8, 1, 4, p, blocks) for p in parts for blocks in (2, 1)]
    else:  # enough warps matter most
        tried = [(w, t, s, p, 1) for w, t, s in ((2, 4, 4), (2, 4, 3), (2, 4, 2), (1, 2, 2)) for p in parts]
    for chosen in itertools.starmap(Tiling, tried):
        if (shared_bytes(bits, rows, width, chosen) + 1024) * chosen.blocks <= chip.shared:
            return chosen
    raise AssertionError("one unit of the inputs fits")


def shared_bytes(bits: int, rows: int, width: int, tiling: Tiling) -> int:
    """Bytes of shared memory of a block, as products.cu uses it."""
    groups = _UNIT * 8 // bits // GROUP  # of a unit
    units = math.ceil(math.ceil(width * bits / 8 / _UNIT) / tiling.parts)
    columns = math.ceil(rows / 8)
    stage = 16 * (_UNIT + (0 if bits == 16 else 2 * groups))
    inputs = rows * (2 * units * groups * GROUP + 64)
    excess = 4 * math.ceil(units * groups * (1 if rows == 1 else 8 * columns) / 4) * 4 if bits == 4 else 0
    return tiling.warps * tiling.tiles * (tiling.stages * stage + 2 * columns * 512) + inputs + excess


def linears(
    x: jax.Array,
    weights: Sequence[jax.Array | QTensor],
    *,
    dtype: jnp.dtype,
    norm: Norm | None = None,
    up: jax.Array | None = None,
    plus: jax.Array | None = None,
) -> list[jax.Array]:
    """The products f(x) w^T of weights of the same inputs, each (R, O) in `dtype`, accumulated in float32.

    Integers of quantized weights are multiplied exactly, and the scale of a group multiplies their sum.

    Args:
        x: activations (R, K), bfloat16 or float16.
        weights: one to three weights (O, K) of one kind: arrays in the dtype of x, or quantized with equal bits.
        dtype: dtype of the results: float32 or that of x.
        norm: scale (K,) and eps of an RMSNorm of x.
        up: f(x) is silu(x) * up, with `up` (R, K) in the dtype of x. It excludes `norm`.
        plus: (R, O) to add to the product of a single weight, in `dtype`.
    """
    first = weights[0]
    bits = first.bits if isinstance(first, QTensor) else 16
    chosen = tiling(bits, x.shape[0], x.shape[1], build.chip())
    if norm is not None and x.shape[0] > _NORM_ROWS:
        x, norm = rms_norm(x, norm[0], eps=norm[1]), None
    if up is not None and x.shape[0] > _SWIGLU_ROWS:
        x, up = jax.nn.silu(x) * up, None
    apart = chosen.parts > 1  # the sums of parts are added afterwards
    other = norm[0].astype(x.dtype) if norm is not None else up
    out = _launch(
        x,
        weights,
        bits,
        jnp.dtype(jnp.float32 if apart else dtype),
        chosen,
        other,
        norm and norm[1],
        None if apart else plus,
    )
    if apart:
        out = [jnp.sum(parts, axis=0).astype(dtype) for parts in out]
        out = out if plus is None else [plus + out[0]]
    return out


def _launch(
    x: jax.Array,
    weights: Sequence[jax.Array | QTensor],
    bits: int,
    dtype: jnp.dtype,
    tiling: Tiling,
    other: jax.Array | None,
    eps: float | None,
    plus: jax.Array | None,
) -> list[jax.Array]:
    """The product with each weight, (R, O), or (parts, R, O) for several parts."""
    R, K = x.shape
    outputs = [w.shape[0] for w in weights]
    operands = [x, x if other is None else other, x if plus is None else plus]
    for w in weights:
        operands += [w.values, w.scales] if isinstance(w, QTensor) else [w, w]
    counts = outputs + (_MAX_WEIGHTS - len(outputs)) * [0]
    constants = {
        "BITS": bits,
        "HALF": int(x.dtype == jnp.float16),
        "ROWS": R,
        "INPUTS": K,
        **{f"OUTPUTS_{i}": count for i, count in enumerate(counts)},
        "PARTS": tiling.parts,
        "BEFORE": 0 if other is None else 2 if eps is None else 1,
        "EPS": build.float32(eps or 0.0),
        "RESIDUAL": int(plus is not None),
        "OUT_FLOAT": int(dtype == jnp.float32),
        "WARPS": tiling.warps,
        "TILES": tiling.tiles,
        "STAGES": tiling.stages,
    }
    tiles = math.ceil(sum(math.ceil(count / 16) for count in outputs) / tiling.tiles)
    blocks = min(tiles, max(1, build.chip().processors * tiling.blocks // tiling.parts))
    leading = (R,) if tiling.parts == 1 else (tiling.parts, R)
    return build.call(
        "products",
        constants,
        operands,
        [jax.ShapeDtypeStruct((*leading, count), dtype) for count in outputs],
        grid=(blocks, tiling.parts),
        threads=32 * tiling.warps * tiling.tiles,
        shared=shared_bytes(bits, R, K, tiling),
    )
