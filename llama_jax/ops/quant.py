"""Quantized weights: typed leaves that stand in a tree of params where an array would, and are multiplied as they are.

A weight (out, in) is cut along `in` into groups of 32 numbers, each with one float16 scale: number = integer * scale.
That is what GGUF calls Q8_0 and Q4_0, so that such files are held exactly.

Letters: G groups of a row (in / 32).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llama_jax import parallel

GROUP = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized weight. Its `shape` is that of the weight it stands for, not that of the arrays it is kept in.

    Attributes:
        values: int8 (..., in), or uint8 (..., in / 2) of two 4-bit numbers a byte. Byte j of a group's 16 holds number
            j in its low half and number j + 16 in its high half, each 8 too large.
        scales: float16 (..., G).
    """

    values: jax.Array
    scales: jax.Array

    @property
    def bits(self) -> int:
        """Bits of one number: 8 or 4."""
        return 4 if self.values.dtype == jnp.uint8 else 8

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: (..., in)."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * GROUP)

    @property
    def dtype(self) -> jnp.dtype:
        """In which its numbers are exact: float32."""
        return jnp.dtype(jnp.float32)


def quantize(w: jax.Array, bits: int) -> QTensor:
    """A weight (..., in) rounded to groups of 8 or 4 bits, by the rules that ggml has for Q8_0 and Q4_0.

    8 bits: scale = max |w| / 127. 4 bits: scale = (the first w of the largest size) / -8, so that this number is exact
    and integers go from -8 to 7. Integers come of the scale before it is rounded to float16.

    Args:
        w: any float type; `in` a multiple of 32.
        bits: 8 or 4.
    """
    groups = w.astype(jnp.float32).reshape(*w.shape[:-1], -1, GROUP)
    size = jnp.abs(groups)
    if bits == 8:
        scales = size.max(axis=-1, keepdims=True) / 127
    else:
        scales = jnp.take_along_axis(groups, size.argmax(axis=-1, keepdims=True), axis=-1) / -8
    inverse = jnp.where(jnp.isfinite(1 / scales), 1 / scales, 0)  # a group of zeros, or as good as that, is zeros
    if bits == 8:
        scaled = groups * inverse
        values = (jnp.sign(scaled) * jnp.floor(jnp.abs(scaled) + 0.5)).astype(jnp.int8)
    else:
        nibbles = jnp.minimum((groups * inverse + 8.5).astype(jnp.uint8), 15)
        values = nibbles[..., : GROUP // 2] | nibbles[..., GROUP // 2 :] << 4
    return QTensor(values.reshape(*w.shape[:-1], -1), scales[..., 0].astype(jnp.float16))


def planes(w: QTensor) -> tuple[jax.Array, ...]:
    """The integers as int8 (..., G, n): all 32 of a group for 8 bits; for 4 bits the low 16 and the high 16."""
    grouped = w.values.reshape(*w.scales.shape, -1)
    if w.bits == 8:
        return (grouped,)
    return (grouped & 15).astype(jnp.int8) - 8, (grouped >> 4).astype(jnp.int8) - 8


def inputs_of_planes(w: QTensor, x: jax.Array) -> tuple[jax.Array, ...]:
    """What of x (..., in) each of `planes` multiplies, as (..., G n)."""
    if w.bits == 8:
        return (x,)
    halves = x.reshape(*x.shape[:-1], -1, 2, GROUP // 2)
    return tuple(halves[..., i, :].reshape(*x.shape[:-1], -1) for i in range(2))


def scaled(plane: jax.Array, scales: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Integers (..., G, n) times their group's scale: (..., G n), computed in float32."""
    numbers = plane.astype(jnp.float32) * scales.astype(jnp.float32)[..., None]
    return numbers.reshape(*plane.shape[:-2], -1).astype(dtype)


def dequantize(w: QTensor, dtype: jnp.dtype) -> jax.Array:
    """The weight as an array; exact in float32."""
    return scaled(jnp.concatenate(planes(w), axis=-1), w.scales, dtype)


def take(table: QTensor, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of a table (V, D) for ids (...): (..., D) in dtype. Ids outside 0..V-1 give NaN."""
    values = parallel.constrain(table.values, "vocab", None)
    scales = parallel.constrain(table.scales, "vocab", None)
    rows = QTensor(
        jnp.take(values, ids, axis=0, mode="clip"),
        jnp.take(scales, ids, axis=0, mode="fill", fill_value=jnp.nan),
    )
    return dequantize(rows, dtype)
