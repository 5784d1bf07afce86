"""Products of few rows with quantized weights on TPUs, in Pallas.

XLA dequantizes a weight before it multiplies: it transposes packed values in memory, and writes the whole unembedding
in bfloat16. This kernel reads packed blocks of outputs, dequantizes them in the chip's vector memory, and multiplies
them there, so that a decode step reads nothing but the packed weights
(docs/measurements/tpu-compiler.md#few-rows-of-quantized-weights).

Letters: R rows, O outputs, K inputs, G groups of a row of the weight, n columns of a group in a plane (32 for 8 bits,
16 for 4 bits).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llama_jax import parallel
from llama_jax.ops import quant
from llama_jax.ops.pallas import interpreted
from llama_jax.ops.quant import GROUP, QTensor

MAX_ROWS = 128  # more rows would not fit in the vector memory beside the blocks; XLA's products are good at them
_ROWS = 16  # rows of activations are a multiple of a tile of bfloat16
_OUTPUTS = (256, 128)  # outputs of a block: the first that fits
_COLUMNS = 1024  # columns of a plane that are dequantized at once
_GROUPS = 128  # groups whose scales are spread over their columns by one product
_MEMORY = 15_500_000  # bytes of vector memory; the compiler gives a kernel 16 MiB
_CORES = 2  # of a chip whose cores share a program, as those of v5p do


def takes(x: jax.Array, w: QTensor, axes: tuple[str | None, ...] | None) -> bool:
    """True if the kernel multiplies x (..., in) and a weight (out, in) with these logical axes."""
    if x.dtype != jnp.bfloat16 or len(w.shape) != 2 or not x.size:
        return False
    parts = parallel.axis_size(axes[1]) if axes and axes[1] else 1
    width, rest = divmod(w.shape[1], parts)
    rows = x.size // x.shape[-1]
    rows //= math.gcd(x.shape[0], parallel.axis_size("batch"))  # of one device
    return rest == width % GROUP == 0 and rows <= MAX_ROWS and _block_outputs(rows, width, w.bits) > 0


def _block_outputs(rows: int, width: int, bits: int) -> int:
    """The outputs of a block so that blocks, inputs and dequantized values fit in the vector memory; 0 if none do."""
    rows += -rows % _ROWS
    spread = 2 * _GROUPS * _GROUPS * (GROUP if bits == 8 else GROUP // 2)

    def needed(outputs: int) -> int:  # blocks are there twice: one is fetched while the other is multiplied
        weights = 2 * outputs * (width * bits // 8 + 2 * width // GROUP)
        return weights + 2 * rows * width + 2 * 4 * rows * outputs + 2 * 4 * outputs * _COLUMNS + spread

    return next((outputs for outputs in _OUTPUTS if needed(outputs) <= _MEMORY), 0)


def product(x: jax.Array, w: QTensor, axes: tuple[str | None, ...] | None) -> jax.Array:
    """The product x w^T in float32, (..., O). The dequantized weight is rounded to the dtype of x, as elsewhere.

    Args:
        x: activations (..., K), bfloat16.
        w: weight (O, K).
        axes: logical axes of w. Each device multiplies its own shard, and sums over a sharded K.
    """
    out_axis, in_axis = axes or (None, None)
    rows = ("batch", *(None,) * (x.ndim - 2))
    arrays = [(x, (*rows, in_axis)), (w.values, (out_axis, in_axis)), (w.scales, (out_axis, in_axis))]

    def own_part(x: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
        products = _product(x.reshape(-1, x.shape[-1]), QTensor(values, scales))
        return parallel.summed(products.reshape(*x.shape[:-1], -1), in_axis, w.shape[1])

    return parallel.on_each_part(own_part, *arrays, out=((*x.shape[:-1], w.shape[0]), (*rows, out_axis)))


def _product(x: jax.Array, w: QTensor) -> jax.Array:
    """The product of one device, (R, K) times (O, K), as (R, O) in float32."""
    # Kernels of TPUs load no float16, so that scales come as their bits, which XLA copies. Behind the barrier it copies
    # them when they are needed, into the chip's memory.
    x, scales = lax.optimization_barrier((x, w.scales))
    operands = [w.values, lax.bitcast_convert_type(scales, jnp.int16)]
    (count, K), every = x.shape, w.shape[0]
    rows = count + -count % _ROWS
    planes = [jnp.pad(part, [(0, rows - count), (0, 0)]) for part in quant.inputs_of_planes(w, x)]
    columns = planes[0].shape[1]  # also bytes of a row of packed values
    n = columns * GROUP // K
    outputs = min(_block_outputs(count, K, w.bits), every)
    blocks = pl.cdiv(every, outputs)
    cores = min(_CORES, blocks)
    steps = pl.cdiv(blocks, cores)

    def block(core: Any, step: Any) -> Any:  # the last core may repeat the last block, which changes nothing
        return jnp.minimum(core * steps + step, blocks - 1)

    out = pl.pallas_call(
        functools.partial(_kernel, bits=w.bits),
        grid=(cores, steps),
        in_specs=[
            *(pl.BlockSpec((rows, columns), lambda c, s: (0, 0)) for _ in planes),
            *(pl.BlockSpec((outputs, a.shape[1]), lambda c, s: (block(c, s), 0)) for a in operands),
        ],
        out_specs=pl.BlockSpec((rows, outputs), lambda c, s: (0, block(c, s))),
        out_shape=jax.ShapeDtypeStruct((rows, every), jnp.float32),
        scratch_shapes=[pltpu.VMEM((_GROUPS, _GROUPS * n), jnp.bfloat16)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * every * K,
            transcendentals=0,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*operands, *planes)) + 4 * rows * every,
        ),
        interpret=interpreted(),
        name="few_rows",
    )(*planes, *operands)
    return out[:count]


def _kernel(*refs: Any, bits: int) -> None:
    """The product of all rows with one block of outputs."""
    *x_refs, values_ref, scales_ref, out_ref, spread_ref = refs
    n = GROUP if bits == 8 else GROUP // 2
    G = scales_ref.shape[1]

    @pl.when(pl.program_id(1) == 0)
    def _start() -> None:
        """The matrix of zeros and ones that copies the scale of each group to its columns."""
        shape = spread_ref.shape
        group, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
        spread_ref[...] = (lax.div(column, n) == group).astype(jnp.float32).astype(jnp.bfloat16)

    total = jnp.zeros(out_ref.shape, jnp.float32)
    for first in range(0, G, _GROUPS):
        groups = min(_GROUPS, G - first)
        scales = quant.float16_of_bits(scales_ref[:, first : first + groups])
        # A float16 scale is the sum of two bfloat16 numbers, which the products copy exactly.
        high = scales.astype(jnp.bfloat16)
        low = (scales - high.astype(jnp.float32)).astype(jnp.bfloat16)
        for at in range(0, groups * n, _COLUMNS):
            size = min(_COLUMNS, groups * n - at)
            spread = spread_ref[:groups, at : at + size]
            wide = _dot(high, spread, 0) + _dot(low, spread, 0)
            columns = slice(first * n + at, first * n + at + size)
            for x_ref, plane in zip(x_refs, _planes(values_ref[:, columns], bits), strict=True):
                weights = (plane.astype(jnp.float32) * wide).astype(jnp.bfloat16)
                total += _dot(x_ref[:, columns], weights, 1)
    out_ref[...] = total


def _planes(values: jax.Array, bits: int) -> list[jax.Array]:
    """The integers of packed values, as int32 arrays; see `quant.planes`."""
    integers = values.astype(jnp.int32)
    return [integers] if bits == 8 else [(integers & 15) - 8, (integers >> 4) - 8]


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """The product of a (M, K) and b, which has K along `axis`, in float32."""
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
