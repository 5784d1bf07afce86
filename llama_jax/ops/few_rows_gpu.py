"""Products of few rows on NVIDIA GPUs, in Pallas for Triton.

A decode step multiplies one or few rows, and is as fast as its weights are read. Two kernels do that
(docs/measurements/gpu.md#products-of-few-rows):

- For one row of bfloat16 or float16 weights, and one or two rows of quantized ones, each program sums the products of
  whole rows of weights. Several weights of the same inputs, such as q, k and v, share one launch, which also adds the
  residual and, for quantized weights, normalizes the inputs. Each of these would be a launch of its own.
- For more rows of quantized weights, blocks of weights are dequantized in registers and multiplied by tensor cores.
  XLA would write the dequantized weight to memory and read it again. Its products with arrays need no help.

Letters: R rows, O outputs, K inputs, G groups of a quantized weight, n columns of a group in a plane (32 for 8 bits, 16
for 4 bits).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llama_jax import parallel
from llama_jax.ops import quant
from llama_jax.ops.norm import rms_norm
from llama_jax.ops.pallas import interpreted, masked
from llama_jax.ops.quant import GROUP, QTensor

Norm = tuple[jax.Array, float]

MAX_ROWS = 64  # for more, dequantizing once costs less than dequantizing for every block of rows
_VECTOR_ROWS = 2  # rows of quantized weights for which sums of products are faster than tensor cores
_PROCESSORS = 132  # of an H100; programs are counted in multiples of it
_ALIGNED = 8  # outputs of a weight are a multiple of this
_DTYPES = (jnp.bfloat16, jnp.float16)


def takes(x: jax.Array, weights: Sequence[jax.Array | QTensor]) -> bool:
    """True if the kernels multiply x (..., in) and weights (out, in) of one kind on the devices in use."""
    layout = parallel.active()
    rows = x.size // x.shape[-1] if x.size else 0
    if (layout is not None and layout.mesh.size > 1) or parallel.compute_capability() < 80 or x.dtype not in _DTYPES:
        return False
    if not 0 < rows <= (MAX_ROWS if isinstance(weights[0], QTensor) else 1):
        return False
    kinds = all(isinstance(w, QTensor) or w.dtype == x.dtype for w in weights)
    return kinds and all(_shape_fits(w, rows) for w in weights)


def _shape_fits(w: jax.Array | QTensor, rows: int) -> bool:
    if len(w.shape) != 2 or w.shape[0] % _ALIGNED or w.shape[1] % GROUP:
        return False
    if not isinstance(w, QTensor) or _by_vectors(rows, w.shape[1]):
        return True
    return w.shape[0] % _BLOCK_OUT == 0 and w.shape[1] % (_BLOCK_GROUPS * GROUP) == 0


def _by_vectors(rows: int, width: int) -> bool:
    """True if so many rows of so many inputs fit in the registers of a program of the kernel of sums."""
    return rows <= _VECTOR_ROWS and _warps(rows, width) <= 8


def _warps(rows: int, width: int) -> int:
    """Warps of a program that keeps rows of inputs in registers: 4, or as many as leave a thread 128 inputs."""
    groups = pl.next_power_of_2(width // GROUP)
    return max(rows * groups // 128, min(4, max(1, groups // 32)))


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

    Args:
        x: activations (R, K), bfloat16 or float16.
        weights: weights (O, K) of one kind: arrays in the dtype of x, or quantized with equal bits.
        dtype: dtype of the results.
        norm: scale (K,) and eps of an RMSNorm of x.
        up: f(x) is silu(x) * up, with `up` (R, K). It excludes `norm`.
        plus: (R, O) to add to the product of a single weight, in `dtype`.
    """
    if up is not None:
        x = jax.nn.silu(x) * up
    quantized = [w for w in weights if isinstance(w, QTensor)]
    if quantized and _by_vectors(*x.shape):
        return _quantized_vectors(x, quantized, jnp.dtype(dtype), norm, plus)
    if norm is not None:  # in the kernel of arrays, it would take longer than in a launch of its own
        x = rms_norm(x, norm[0], eps=norm[1])
    if not quantized:
        return _array_vectors(x, [w for w in weights if not isinstance(w, QTensor)], jnp.dtype(dtype), plus)
    products = [_blocks(x, w).astype(dtype) for w in quantized]
    return products if plus is None else [plus + products[0]]


_ARRAY_OUTPUTS = 4  # outputs of a program of the kernel of arrays


def _array_vectors(
    x: jax.Array, weights: Sequence[jax.Array], dtype: jnp.dtype, plus: jax.Array | None
) -> list[jax.Array]:
    """The products of one row, (1, O) each. Each program has one block of outputs of one of the weights."""
    counts = [w.shape[0] // _ARRAY_OUTPUTS for w in weights]
    starts = [sum(counts[:i]) for i in range(len(counts))]

    def kernel(x_ref: Any, *refs: Any) -> None:
        weight_refs, out_refs = refs[: len(weights)], refs[-len(weights) :]
        plus_ref = refs[len(weights)] if plus is not None else None
        for start, count, w_ref, out_ref in zip(starts, counts, weight_refs, out_refs, strict=True):
            at = pl.program_id(0) - start
            once = functools.partial(_array_block, x_ref, w_ref, out_ref, plus_ref)
            if len(weights) == 1:
                once(0, at)
            else:
                lax.fori_loop(0, ((at >= 0) & (at < count)).astype(jnp.int32), once, at)

    operands = [x, *weights, *([] if plus is None else [plus])]
    return _launch(kernel, operands, [w.shape[0] for w in weights], dtype, programs=sum(counts), warps=4)


def _array_block(x_ref: Any, w_ref: Any, out_ref: Any, plus_ref: Any, _: Any, at: jax.Array) -> jax.Array:
    """The sums of block `at` of the outputs of a weight. The inputs are multiplied piece by piece."""
    outputs = pl.ds(at * _ARRAY_OUTPUTS, _ARRAY_OUTPUTS)
    sums: dict[int, jax.Array] = {}
    for start, size in _pieces(x_ref.shape[1], 2048):
        columns = pl.ds(start, size)
        products = w_ref[outputs, columns].astype(jnp.float32) * x_ref[0, columns].astype(jnp.float32)[None, :]
        sums[size] = sums[size] + products if size in sums else products
    total = functools.reduce(jnp.add, (jnp.sum(a, axis=1) for a in sums.values()))
    _finish(total, out_ref, plus_ref, 0, outputs)
    return at


def _pieces(length: int, most: int) -> list[tuple[int, int]]:
    """Start and size of pieces of a length; sizes are powers of two up to `most`."""
    pieces, at = [], 0
    while at < length:
        size = min(most, 1 << int(math.log2(length - at)))
        pieces.append((at, size))
        at += size
    return pieces


def _launch(
    kernel: Callable[..., None],
    operands: Sequence[jax.Array],
    outputs: Sequence[int],
    dtype: jnp.dtype,
    *,
    programs: int,
    warps: int,
) -> list[jax.Array]:
    """A launch of a kernel that reads whole operands and writes whole results (R, O), one for each of `outputs`."""
    shapes = [jax.ShapeDtypeStruct((operands[0].shape[0], count), dtype) for count in outputs]
    return pl.pallas_call(
        kernel,
        grid=(programs,),
        in_specs=[pl.BlockSpec(a.shape, lambda p, n=a.ndim: (0,) * n) for a in operands],
        out_specs=[pl.BlockSpec(s.shape, lambda p: (0, 0)) for s in shapes],
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpreted(),
        name="few_rows",
    )(*operands)


def _finish(total: jax.Array, out_ref: Any, plus_ref: Any, row: int, outputs: Any) -> None:
    """Stores the sums (outputs,) of one row."""
    total = total.astype(out_ref.dtype)
    out_ref[row, outputs] = total if plus_ref is None else plus_ref[row, outputs] + total


def _quantized_vectors(
    x: jax.Array, weights: Sequence[QTensor], dtype: jnp.dtype, norm: Norm | None, plus: jax.Array | None
) -> list[jax.Array]:
    """The products of rows, (R, O) each. Programs take blocks of outputs of the first weight, the second and so on."""
    (R, K), bits = x.shape, weights[0].bits
    G = K // GROUP
    groups = pl.next_power_of_2(G)
    warps = _warps(R, K)
    outputs, most = _tiling(bits, max(1, groups // (32 * warps)))
    counts = [w.shape[0] // outputs for w in weights]
    programs = min(sum(counts), most)
    inputs = (G, 2, GROUP // 2)
    before = [x.reshape(R, *inputs)] + [a.reshape(inputs) for a in (norm or ())[:1]] + ([] if plus is None else [plus])
    operands = list(before)
    for w in weights:
        halves = (2, GROUP // 2) if bits == 8 else (GROUP // 2,)
        operands += [w.values.reshape(w.shape[0], G, *halves), w.scales]

    def kernel(*refs: Any) -> None:
        out_refs, refs = refs[-len(weights) :], refs[: -len(weights)]
        work: list[_Work] = []
        start = 0
        for i, (count, out_ref) in enumerate(zip(counts, out_refs, strict=True)):
            at = len(before) + 2 * i
            first = lax.rem(pl.program_id(0) + jnp.int32(-start % programs), jnp.int32(programs))
            turns = lax.div(jnp.int32(count + programs - 1) - first, jnp.int32(programs))
            work.append(_Work(refs[at], refs[at + 1], out_ref, first, turns))
            start += count
        scale_ref = refs[1] if norm is not None else None
        plus_ref = refs[len(before) - 1] if plus is not None else None
        eps = 0.0 if norm is None else norm[1]
        tile = _Tile(bits, G, groups, outputs, programs)
        _quantized_kernel(refs[0], scale_ref, eps, plus_ref, work, tile)

    return _launch(kernel, operands, [w.shape[0] for w in weights], dtype, programs=programs, warps=warps)


def _tiling(bits: int, of_thread: int) -> tuple[int, int]:
    """Outputs of a block, and the most programs, for so many groups of a thread; as measured for 4,096 and 14,336
    inputs."""
    most = 4 if bits == 4 else 2
    return max(1, min(most, 2 * most // of_thread)), _PROCESSORS * (8 if of_thread == 1 else 4)


class _Work(NamedTuple):
    """The blocks of one weight that a program multiplies: the first, and each `programs` after it, `turns` in all."""

    values: Any
    scales: Any
    out: Any
    first: jax.Array
    turns: jax.Array


class _Tile(NamedTuple):
    """Sizes of the kernel of quantized weights.

    Attributes:
        bits: bits of a value.
        G: groups of a row.
        groups: the same rounded up to a power of two, as Triton's blocks are. Groups beyond the last are masked.
        outputs: outputs of a block.
        programs: number of programs.
    """

    bits: int
    G: int
    groups: int
    outputs: int
    programs: int


def _quantized_kernel(
    x_ref: Any, scale_ref: Any, eps: float, plus_ref: Any, work: Sequence[_Work], tile: _Tile
) -> None:
    """The sums of all rows for the weights of one program, which keeps the inputs in registers."""
    loaded = _loaded(work[0], jnp.int32(0), tile)  # on its way while the inputs are prepared
    inputs = [_halves(x_ref, tile, jnp.int32(r)) for r in range(x_ref.shape[0])]
    if scale_ref is not None:
        scale = _halves(scale_ref, tile)
        for r, parts in enumerate(inputs):
            factor = lax.rsqrt(sum(jnp.sum(part * part) for part in parts) / (tile.G * GROUP) + eps)
            inputs[r] = [part * factor * s for part, s in zip(parts, scale, strict=True)]
    # Unpacked 4-bit values are too large by 136, which is subtracted once for all values of a group.
    excess = [136.0 * (jnp.sum(a, axis=1) + jnp.sum(b, axis=1)) if tile.bits == 4 else None for a, b in inputs]
    for w in work:
        if w is not work[0]:
            loaded = _loaded(w, jnp.int32(0), tile)

        def turn(i: jax.Array, loaded: Any, w: _Work = w) -> Any:
            following = _loaded(w, i + 1, tile)
            packed, scales = loaded
            for r, (first, second) in enumerate(inputs):
                total = jnp.sum(_pair_products(packed, first, second), axis=2)
                more = excess[r]
                total = total if more is None else total - more[None, :]
                total = jnp.sum(total * scales.astype(jnp.float32), axis=1)
                _finish(total, w.out, plus_ref, r, pl.ds((w.first + i * tile.programs) * tile.outputs, tile.outputs))
            return following

        lax.fori_loop(0, w.turns, turn, loaded)


def _halves(ref: Any, tile: _Tile, *row: Any) -> list[jax.Array]:
    """The first and the second 16 inputs of every group, (groups, 16) each in float32."""
    mask = jnp.broadcast_to((jnp.arange(tile.groups) < tile.G)[:, None], (tile.groups, GROUP // 2))
    indices = ((*row, masked(tile.groups, pl.program_id(0)), jnp.int32(half), slice(None)) for half in range(2))
    return [plgpu.load(ref.at[index], mask=mask, other=0).astype(jnp.float32) for index in indices]


def _loaded(w: _Work, turn: jax.Array, tile: _Tile) -> tuple[list[jax.Array], jax.Array]:
    """The packed values and the scales of the block of a turn. After the last turn, nothing is read."""
    start = (w.first + turn * tile.programs) * tile.outputs
    wanted = turn < w.turns
    rows, every = pl.ds(start, tile.outputs), masked(tile.groups, start)
    live = (jnp.arange(tile.groups) < tile.G) & wanted
    mask = jnp.broadcast_to(live[None, :, None], (tile.outputs, tile.groups, GROUP // 2))
    indices: list[Any] = [(rows, every, slice(None))]
    if tile.bits == 8:
        indices = [(rows, every, jnp.int32(half), slice(None)) for half in range(2)]
    packed = [plgpu.load(w.values.at[index], mask=mask, other=0) for index in indices]
    # Triton gives adjacent indices of a load to one thread. The minimum hides that they are adjacent, so that each
    # thread loads the scales of the groups whose values it has, and none are exchanged.
    shape = (tile.outputs, tile.groups)
    group = jnp.broadcast_to(jnp.minimum(jnp.arange(tile.groups), tile.G - 1)[None, :], shape)
    output = jnp.broadcast_to((start + jnp.arange(tile.outputs))[:, None], shape)
    return packed, plgpu.load(w.scales.at[output, group], mask=jnp.broadcast_to(wanted, shape), other=0)


# Four values of a word become four floats by one permutation of bytes each: with the exponent in the upper byte, a
# 4-bit value v in the third byte is the float 128 + v, and an 8-bit value v + 128 in the second is 32768 + 128 + v.
# Triton compiles a product and a sum to two instructions, so that the second product of a pair is written as one, too.
_FLOAT = {4: ("0x43000000", "0x7{i}44"), 8: ("0x47000000", "0x74{i}4")}


def _assembly(bits: int) -> str:
    """PTX that multiplies the values of four pairs: results $0 to $3, then the packed values, then the inputs."""
    exponent, selector = _FLOAT[bits]
    inputs = 5 if bits == 4 else 6
    lines = [".reg .b32 a, b; .reg .f32 v, w, s;"]
    if bits == 4:
        lines.append("and.b32 a, $4, 0x0f0f0f0f; shr.b32 b, $4, 4; and.b32 b, b, 0x0f0f0f0f;")
    else:
        lines.append("xor.b32 a, $4, 0x80808080; xor.b32 b, $5, 0x80808080;")
    for i in range(4):
        place = selector.format(i=i)
        lines.append(f"prmt.b32 v, a, {exponent}, {place}; prmt.b32 w, b, {exponent}, {place};")
        if bits == 8:
            lines.append("add.f32 v, v, 0fC7008000; add.f32 w, w, 0fC7008000;")  # -32896
        lines.append(f"mul.f32 s, v, ${inputs + i}; fma.rn.f32 ${i}, w, ${inputs + 4 + i}, s;")
    return "{ " + " ".join(lines) + " }"


def _pair_products(packed: Sequence[jax.Array], first: jax.Array, second: jax.Array) -> jax.Array:
    """The sums of the two products of each pair of values of a group, (O, G, 16) in float32.

    Args:
        packed: values (O, G, 16): one array for 4 bits, with a pair in each byte, and two arrays for 8 bits.
        first: inputs (G, 16) of the first value of each pair.
        second: inputs of the second.
    """
    shape = packed[0].shape
    first, second = (jnp.broadcast_to(a[None], shape) for a in (first, second))
    bits = 4 if len(packed) == 1 else 8
    if interpreted():
        if bits == 4:
            p = packed[0].astype(jnp.int32)
            return ((p & 15) + 128).astype(jnp.float32) * first + ((p >> 4) + 128).astype(jnp.float32) * second
        return packed[0].astype(jnp.float32) * first + packed[1].astype(jnp.float32) * second
    (products,) = plgpu.elementwise_inline_asm(
        _assembly(bits),
        args=[*packed, first, second],
        constraints=",".join(["=f"] * 4 + ["r"] * len(packed) + ["f"] * 8),
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return products


_BLOCK_ROWS = 16  # smallest block of a product in Triton
_BLOCK_OUT = 64  # outputs of a program: the rows of a product of Hopper's tensor cores
_BLOCK_GROUPS = 4  # groups that are dequantized at once


def _blocks(x: jax.Array, w: QTensor) -> jax.Array:
    """The product x w^T in float32, (R, O). Blocks of w are dequantized to the dtype of x."""
    out, width = w.shape
    count = x.shape[0]
    rows = max(_BLOCK_ROWS, pl.next_power_of_2(count))
    planes = [jnp.pad(part, [(0, rows - count), (0, 0)]) for part in quant.inputs_of_planes(w, x)]
    columns = planes[0].shape[1]  # of a plane; also bytes of a row of packed values
    blocks = width // (_BLOCK_GROUPS * GROUP)
    parts = min(blocks, pl.cdiv(2 * _PROCESSORS, out // _BLOCK_OUT))
    partial_PRO = pl.pallas_call(
        functools.partial(_blocks_kernel, bits=w.bits, blocks=blocks, parts=parts),
        grid=(out // _BLOCK_OUT, parts),
        in_specs=[
            *(pl.BlockSpec((rows, columns), lambda o, p: (0, 0)) for _ in planes),
            pl.BlockSpec((_BLOCK_OUT, columns), lambda o, p: (o, 0)),
            pl.BlockSpec((_BLOCK_OUT, width // GROUP), lambda o, p: (o, 0)),
        ],
        out_specs=pl.BlockSpec((None, rows, _BLOCK_OUT), lambda o, p: (p, 0, o)),
        out_shape=jax.ShapeDtypeStruct((parts, rows, out), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpreted(),
        name="quantized_product",
    )(*planes, w.values, w.scales)
    return jnp.sum(partial_PRO, axis=0)[:count]


def _blocks_kernel(*refs: Any, bits: int, blocks: int, parts: int) -> None:
    """The products of all rows with one block of outputs, over one part of the inputs."""
    *x_refs, values_ref, scales_ref, out_ref = refs
    n = GROUP if bits == 8 else GROUP // 2
    each = -(-blocks // parts)
    low = pl.program_id(1) * each
    high = jnp.minimum(low + each, blocks)

    def body(block: jax.Array, total: jax.Array) -> jax.Array:
        columns = pl.ds(block * (_BLOCK_GROUPS * n), _BLOCK_GROUPS * n)
        values = values_ref[:, columns]
        scales = scales_ref[:, pl.ds(block * _BLOCK_GROUPS, _BLOCK_GROUPS)].astype(jnp.float32)
        wide = jnp.broadcast_to(scales[:, :, None], (_BLOCK_OUT, _BLOCK_GROUPS, n)).reshape(
            _BLOCK_OUT, _BLOCK_GROUPS * n
        )
        if bits == 8:
            planes = [values.astype(jnp.float32)]
        else:
            packed = values.astype(jnp.int32)
            planes = [((packed & 15) - 8).astype(jnp.float32), ((packed >> 4) - 8).astype(jnp.float32)]
        for x_ref, plane in zip(x_refs, planes, strict=True):
            x = x_ref[:, columns]
            total += plgpu.dot((plane * wide).astype(x.dtype), x.T)  # from registers; on the right, from memory
        return total

    out_ref[...] = lax.fori_loop(low, high, body, jnp.zeros(out_ref.shape[::-1], jnp.float32)).T
