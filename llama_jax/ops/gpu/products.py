"""Products of few rows with quantized weights on NVIDIA GPUs: the calls of products.cu.

Letters: R rows, O outputs, K inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.ops.gpu import build
from llama_jax.ops.quant import GROUP, QTensor
from llama_jax.ops.swiglu import swiglu

Norm = tuple[jax.Array, float]

MAX_ROWS = 8  # rows that tensor cores multiply at once
_MAX_WEIGHTS = 3
_UNIT = 128  # bytes of a row that a warp multiplies at once
_DTYPES = (jnp.bfloat16, jnp.float16)


def takes(x: jax.Array, weights: Sequence[jax.Array | QTensor]) -> bool:
    """True if the kernel multiplies x (..., in) and weights (out, in) of one kind.

    For one row and for arrays it would be as fast as other kernels (docs/measurements/gpu.md).
    """
    rows = x.size // x.shape[-1] if x.size else 0
    if x.dtype not in _DTYPES or not 1 < rows <= MAX_ROWS or len(weights) > _MAX_WEIGHTS:
        return False
    return all(isinstance(w, QTensor) and len(w.shape) == 2 and w.shape[1] % (2 * GROUP) == 0 for w in weights)


def kind(bits: int) -> str:
    """The kind of a product, as the check of the kernels names it."""
    return f"{MAX_ROWS} rows of {bits} bits"


class Tiling(NamedTuple):
    """The division of the work of a kernel: constants of products.cu with these names.

    Attributes:
        warps: warps that share the inputs of a tile.
        tiles: tiles of 16 outputs of a block at once.
        stages: units in shared memory, of which all but one are on their way.
        parts: parts of the inputs, each with blocks of its own.
    """

    warps: int
    tiles: int
    stages: int
    parts: int


def tiling(bits: int, rows: int, width: int, chip: build.Chip) -> Tiling:
    """The tiling for rows of inputs (R, K) on a GPU."""
    parts = range(1, math.ceil(width * bits / 8 / _UNIT) + 1)
    # Few parts matter most, since each adds a result, and then two tiles at once.
    for chosen in (Tiling(8, tiles, 3, p) for p in parts for tiles in (2, 1)):
        if shared_bytes(bits, rows, width, chosen) + 1024 <= chip.shared:
            return chosen
    raise AssertionError("one unit of the inputs fits")


def shared_bytes(bits: int, rows: int, width: int, tiling: Tiling) -> int:
    """Bytes of shared memory of a block, as products.cu uses it."""
    groups = _UNIT * 8 // bits // GROUP  # of a unit
    units = math.ceil(math.ceil(width * bits / 8 / _UNIT) / tiling.parts)
    inputs = rows * (2 * units * groups * GROUP + 64)
    excess = 32 * units * groups if bits == 4 else 0
    stages = tiling.stages * 16 * (_UNIT + 2 * groups)
    return tiling.warps * tiling.tiles * (stages + 2 * 512) + inputs + excess


def linears(
    x: jax.Array,
    weights: Sequence[QTensor],
    *,
    dtype: jnp.dtype,
    norm: Norm | None = None,
    up: jax.Array | None = None,
    plus: jax.Array | None = None,
) -> list[jax.Array]:
    """The products f(x) w^T of weights of the same inputs, each (R, O) in `dtype`, accumulated in float32.

    Integers are multiplied exactly, and the scale of a group multiplies their sum.

    Args:
        x: activations (R, K), bfloat16 or float16.
        weights: one to three weights (O, K) with equal bits.
        dtype: dtype of the results: float32 or that of x.
        norm: scale (K,) and eps of an RMSNorm of x.
        up: f(x) is silu(x) * up, with `up` (R, K) in the dtype of x. It excludes `norm`.
        plus: (R, O) to add to the product of a single weight, in `dtype`.
    """
    if up is not None:
        x = swiglu(x, up)
    chosen = tiling(weights[0].bits, x.shape[0], x.shape[1], build.chip())
    if chosen.parts == 1:
        return _launch(x, weights, jnp.dtype(dtype), chosen, norm, plus)
    parts = _launch(x, weights, jnp.dtype(jnp.float32), chosen, norm, None)
    out = [jnp.sum(part, axis=0).astype(dtype) for part in parts]
    return out if plus is None else [plus + out[0]]


def _launch(
    x: jax.Array,
    weights: Sequence[QTensor],
    dtype: jnp.dtype,
    tiling: Tiling,
    norm: Norm | None,
    plus: jax.Array | None,
) -> list[jax.Array]:
    """The product with each weight, (R, O), or (parts, R, O) for several parts."""
    (R, K), bits = x.shape, weights[0].bits
    outputs = [w.shape[0] for w in weights]
    operands = [x, x if norm is None else norm[0].astype(x.dtype), x if plus is None else plus]
    operands += [array for w in weights for array in (w.values, w.scales)]
    counts = outputs + (_MAX_WEIGHTS - len(outputs)) * [0]
    constants: dict[str, str | int] = {
        "BITS": bits,
        "HALF": int(x.dtype == jnp.float16),
        "ROWS": R,
        "INPUTS": K,
        **{f"OUTPUTS_{i}": count for i, count in enumerate(counts)},
        "PARTS": tiling.parts,
        "NORM": int(norm is not None),
        "EPS": build.float32(norm[1] if norm else 0.0),
        "RESIDUAL": int(plus is not None),
        "OUT_FLOAT": int(dtype == jnp.float32),
        "WARPS": tiling.warps,
        "TILES": tiling.tiles,
        "STAGES": tiling.stages,
    }
    tiles = math.ceil(sum(math.ceil(count / 16) for count in outputs) / tiling.tiles)
    blocks = min(tiles, max(1, build.chip().processors // tiling.parts))
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
