"""LoRA: a weight that stays as it is, and beside it a product of two thin matrices (Hu et al., arXiv:2106.09685).

x W^T becomes x W^T + scale (x a^T) b^T. It is a typed leaf, as a quantized weight is: the model does not know of it,
and the weight within may itself be quantized, which is QLoRA (arXiv:2305.14314).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax.ops import quant
from llama_jax.ops.quant import QTensor

Axes = tuple[str | None, ...]


class Update(NamedTuple):
    """What LoRA adds to a weight (..., out, in): scale * b a.

    Attributes:
        a: (..., rank, in), float32 or the dtype of the computation.
        b: (..., out, rank), likewise.
        scale: (...), float32: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (arXiv:2312.03732). Not
            learned.
    """

    a: jax.Array
    b: jax.Array
    scale: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["key"], meta_fields=["rate"])
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Which numbers of a step's activations are zeroed, and the rest scaled up for (Srivastava et al., 2014).

    Attributes:
        key: raw uint32 key data (..., 2), one of each weight and step.
        rate: the part of all numbers that is zeroed, below 1.
    """

    key: jax.Array
    rate: float

    def __call__(self, x: jax.Array) -> jax.Array:
        """x with its zeros, in its type."""
        kept = jax.random.bernoulli(jax.random.wrap_key_data(self.key), 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraTensor:
    """A weight with a LoRA update. Its `shape` and `dtype` are those of the weight it stands for.

    `ops.linear` multiplies by it. Gradients flow to a and b, and to an array as base unless it is closed over or held
    constant. Stacked layers have a leading axis in every part, the scale included.

    Attributes:
        base: the weight, (..., out, in).
        a: (..., rank, in), as in Update.
        b: (..., out, rank).
        scale: (...).
        dropout: of the x that meets a, never of the x that meets the base; only training has it.
    """

    base: jax.Array | QTensor
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    dropout: Dropout | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: (..., out, in)."""
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of the weight."""
        return self.base.dtype

    @property
    def rank(self) -> int:
        """Of the update."""
        return self.a.shape[-2]

    def dropped(self, x: jax.Array) -> jax.Array:
        """What of x (..., in) meets a."""
        return x if self.dropout is None else self.dropout(x)

    def narrowed(self, x: jax.Array) -> jax.Array:
        """scale * x, in the type of x, where x (..., rank) has met a: the scale meets the fewest numbers there."""
        return (x * lax.stop_gradient(self.scale)).astype(x.dtype)

    def merged(self, dtype: jnp.dtype) -> jax.Array:
        """base + scale * b a as one array, computed in float32."""
        base = quant.dequantize(self.base, jnp.float32) if isinstance(self.base, QTensor) else self.base
        update = jnp.matmul(self.b.astype(jnp.float32), self.a.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        return (base.astype(jnp.float32) + self.scale[..., None, None] * update).astype(dtype)

    def part_axes(self, axes: Axes) -> dict[str, Axes]:
        """The logical axes of each part, from those of the weight: what `parallel.shardings` asks such a leaf."""
        return {"base": axes, **part_axes(axes)._asdict()}


def part_axes(axes: Axes) -> Update:
    """The logical axes of an update's parts, from those of its weight; no device splits the rank."""
    *lead, out, inner = axes
    return Update(a=(*lead, None, inner), b=(*lead, out, None), scale=(*lead,))


def base_of(leaf: jax.Array | QTensor | LoraTensor) -> jax.Array | QTensor:
    """The weight without its update, if it has one."""
    return leaf.base if isinstance(leaf, LoraTensor) else leaf
