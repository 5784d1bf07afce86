"""Quantized weights: typed leaves that take the place of an array in a tree of params.

A weight (out, in) is split along `in` into groups of 32 values with one float16 scale each: value = integer * scale.
GGUF calls these formats Q8_0 and Q4_0, so weights from such files are stored exactly.

Letters: G groups of a row (in / 32), n values of a group.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llama_jax import parallel

GROUP = 32
_STEPS = 10  # scales of each sign that `fit` tries
_LARGEST = 65504.0  # the largest float16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized weight. Its `shape` is the logical shape of the weight, not the shape of the packed arrays.

    Attributes:
        values: int8 (..., in) for 8 bits. For 4 bits uint8 (..., in / 2): byte j of the 16 bytes of a group holds
            value j in its low half and value j + 16 in its high half, each plus 8.
        scales: one scale a group, float16 (..., G).
    """

    values: jax.Array
    scales: jax.Array

    @property
    def bits(self) -> int:
        """Bits of one value: 8 or 4."""
        return 4 if self.values.dtype == jnp.uint8 else 8

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape of the weight, (..., in)."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * GROUP)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of dequantized values: float32, in which they are exact."""
        return jnp.dtype(jnp.float32)


def quantize(w: jax.Array, bits: int) -> QTensor:
    """Rounds a weight (..., in) to groups of 8 or 4 bits, by ggml's rules for Q8_0 and Q4_0.

    8 bits: scale = max |w| / 127. 4 bits: scale = w* / -8, where w* is the first value of the largest magnitude. This
    value is exact then, and the integers range from -8 to 7. Integers are computed from the scale before it is rounded
    to float16.

    Args:
        w: weight of any float dtype; `in` must be a multiple of 32.
        bits: 8 or 4.
    """
    groups = w.astype(jnp.float32).reshape(*w.shape[:-1], -1, GROUP)
    size = jnp.abs(groups)
    if bits == 8:
        scales = size.max(axis=-1, keepdims=True) / 127
    else:
        scales = jnp.take_along_axis(groups, size.argmax(axis=-1, keepdims=True), axis=-1) / -8
    scaled = groups * jnp.where(jnp.isfinite(1 / scales), 1 / scales, 0)  # a group whose scale underflows becomes zeros
    halves = scales[..., 0].astype(jnp.float16)
    if bits == 4:
        return packed(jnp.minimum((scaled + 8.5).astype(jnp.uint8), 15).astype(jnp.int8) - 8, halves)
    values = (jnp.sign(scaled) * jnp.floor(jnp.abs(scaled) + 0.5)).astype(jnp.int8)
    return QTensor(values.reshape(*w.shape[:-1], -1), halves)


def fit(w: jax.Array, bits: int, importance: jax.Array | None = None) -> QTensor:
    """Rounds a weight (..., in) to groups, with scales that keep the squared error small.

    8 bits are rounded as `quantize` rounds them. For 4 bits, each group is rounded with 2 _STEPS + 1 scales. Least
    squares then finds the best scale for the integers of each, and the one with the smallest error is taken. This is
    the search of ggml's make_qx_quants, done for scales of both signs, because the integers reach -8 but not 8.

    Args:
        w: weight of any float dtype; `in` must be a multiple of 32.
        bits: 8 or 4.
        importance: weight of the squared error of each input (in,), such as the mean square of its activations; equal
            weights by default.
    """
    if bits == 8:
        return quantize(w, bits)
    groups = w.astype(jnp.float32).reshape(*w.shape[:-1], -1, GROUP)
    cost = jnp.ones(GROUP) if importance is None else importance.astype(jnp.float32).reshape(-1, GROUP)
    # A group whose inputs never occur is rounded with equal weights.
    cost = jnp.where(cost.sum(axis=-1, keepdims=True) > 0, cost, 1.0)
    size = jnp.abs(groups)
    largest = jnp.take_along_axis(groups, size.argmax(axis=-1, keepdims=True), axis=-1)

    def attempt(step: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        inverse = _inverse(step, largest)
        integers = jnp.clip(jnp.round(groups * inverse), -8, 7)
        product = (cost * groups * integers).sum(axis=-1, keepdims=True)
        square = (cost * integers * integers).sum(axis=-1, keepdims=True)
        gain = jnp.where(square > 0, product * product / square, 0)  # the error is sum(cost w^2) minus this
        better = gain > best[0] * (1 + 1e-6)  # of equal ones the first, whose scale float16 holds best
        return jnp.where(better, gain, best[0]), jnp.where(better, step, best[1])

    _, step = jax.lax.fori_loop(
        0, 2 * _STEPS + 1, attempt, (jnp.zeros_like(largest), jnp.zeros(largest.shape, jnp.int32))
    )
    integers = jnp.clip(jnp.round(groups * _inverse(step, largest)), -8, 7)
    square = (cost * integers * integers).sum(axis=-1)
    scales = jnp.where(square > 0, (cost * groups * integers).sum(axis=-1) / square, 0)
    scales = jnp.clip(scales, -_LARGEST, _LARGEST).astype(jnp.float16)
    return packed(integers, scales)


def packed(integers: jax.Array, scales: jax.Array) -> QTensor:
    """The weight of 4 bits with these integers -8 to 7 (any shape of (..., in) values) and float16 scales (..., G)."""
    nibbles = (integers + 8).astype(jnp.uint8).reshape(*scales.shape, GROUP)
    values = nibbles[..., : GROUP // 2] | nibbles[..., GROUP // 2 :] << 4
    return QTensor(values.reshape(*scales.shape[:-1], -1), scales)


def _inverse(step: jax.Array, largest: jax.Array) -> jax.Array:
    """The reciprocal of the scale of attempt `step`: the largest value becomes 8, and in later attempts 6.2 to 8.9."""
    steps = jnp.where(step == 0, 8.0, 6.2 + 0.3 * ((step - 1) % _STEPS))
    inverse = jnp.where(step <= _STEPS, -steps, steps) / largest
    return jnp.where(jnp.isfinite(inverse), inverse, 0)


def planes(w: QTensor) -> tuple[jax.Array, ...]:
    """The integers of a weight as int8 arrays (..., G, n).

    8 bits give one array with n = 32. 4 bits give two with n = 16: values 0-15 and values 16-31 of every group.
    """
    grouped = w.values.reshape(*w.scales.shape, -1)
    if w.bits == 8:
        return (grouped,)
    return (grouped & 15).astype(jnp.int8) - 8, (grouped >> 4).astype(jnp.int8) - 8


def inputs_of_planes(w: QTensor, x: jax.Array) -> tuple[jax.Array, ...]:
    """The columns of x (..., in) that each plane multiplies, as arrays (..., G n).

    For 4 bits these are inputs 0-15 and inputs 16-31 of every group.
    """
    if w.bits == 8:
        return (x,)
    halves = x.reshape(*x.shape[:-1], -1, 2, GROUP // 2)
    return tuple(halves[..., i, :].reshape(*x.shape[:-1], -1) for i in range(2))


def scaled(plane: jax.Array, scales: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The dequantized values of integers (..., G, n), computed in float32 and cast to `dtype`."""
    return (plane.astype(jnp.float32) * scales.astype(jnp.float32)[..., None]).astype(dtype)


def dequantize(w: QTensor, dtype: jnp.dtype) -> jax.Array:
    """The weight as an array of `dtype`; exact in float32."""
    return scaled(jnp.concatenate(planes(w), axis=-1), w.scales, dtype).reshape(w.shape)


def float16_of_bits(bits: jax.Array) -> jax.Array:
    """The float32 values of finite float16 numbers that are given by their bits (int16), for kernels without float16.

    No number on the way is subnormal in float32, which TPUs would replace by zero.
    """
    bits = bits.astype(jnp.int32)
    exponent, fraction = (bits >> 10) & 31, bits & 1023
    integer = jnp.where(exponent > 0, fraction + 1024, fraction).astype(jnp.float32)
    power = jax.lax.bitcast_convert_type((jnp.maximum(exponent, 1) + 102) << 23, jnp.float32)  # 2^(exponent - 25)
    return jnp.where(bits < 0, -1.0, 1.0) * integer * power


def take(table: QTensor, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of a quantized table (V, D) for ids (...), as (..., D) in `dtype`. Ids outside 0..V-1 give NaN."""
    values = parallel.constrain(table.values, "vocab", None)
    scales = parallel.constrain(table.scales, "vocab", None)
    rows = QTensor(
        jnp.take(values, ids, axis=0, mode="clip"),
        jnp.take(scales, ids, axis=0, mode="fill", fill_value=jnp.nan),
    )
    return dequantize(rows, dtype)
