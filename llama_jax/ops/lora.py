"""LoRA: a frozen weight and the product of two trained low-rank matrices (Hu et al., arXiv:2106.09685), as one leaf.

x W^T becomes x W^T + scale (x a^T) b^T. A LoraTensor is a leaf of params instead of the plain weight, like a quantized
weight, so that the code of the model does not change. Its base may itself be quantized, which is QLoRA
(arXiv:2305.14314). DoRA (arXiv:2402.09353) multiplies the rows of the sum by factors, which `dora_factor` computes.

A matrix pair has three types: LazyLora for files (weights/adapters.py), LoraWeights for arrays, LoraTensor for a leaf.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax.ops import quant
from llama_jax.ops.quant import QTensor

Axes = tuple[str | None, ...]


Part = Any  # an array, or what stands for one in a tree of axes, shapes or tensors of a file


class LoraWeights(NamedTuple):
    """The arrays that LoRA adds to a weight (..., out, in): scale * b a.

    Attributes:
        a: the first matrix (..., rank, in), float32 or the compute dtype.
        b: the second matrix (..., out, rank), in the dtype of a.
        scale: factor (...), float32: alpha / rank, or alpha / sqrt(rank) for rank-stabilized LoRA (arXiv:2312.03732).
            It is not trained.
        magnitude: DoRA's trained norms, float32: row norms (..., out, 1), or for an embedding column norms
            (..., 1, in). None for plain LoRA.
    """

    a: Part
    b: Part
    scale: Part
    magnitude: Part = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["key"], meta_fields=["rate"])
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout of the activations that enter LoRA's first matrix (Srivastava et al., 2014).

    Attributes:
        key: raw uint32 key data (..., 2), one key for each weight and step.
        rate: the probability that an activation becomes zero, below 1.
    """

    key: jax.Array
    rate: float

    def __call__(self, x: jax.Array) -> jax.Array:
        """x after dropout: random elements are zero and the others are divided by 1 - rate, in the dtype of x."""
        kept = jax.random.bernoulli(jax.random.wrap_key_data(self.key), 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraTensor:
    """A weight with LoRA, as one leaf of params. `shape` and `dtype` are those of the base.

    `ops.linear` multiplies by it and looks up its rows. Gradients flow to a and b. They also flow to a base that is an
    array, unless the base is closed over or constant. For stacked layers, every part has a leading axis, including the
    scale.

    Attributes:
        base: the frozen weight (..., out, in).
        a: the first matrix (..., rank, in), as in LoraWeights.
        b: the second matrix (..., out, rank).
        scale: the factor (...) of b a.
        dropout: dropout of the activations that enter a, never of those that enter the base; used in training only.
        factor: DoRA's factors (..., out, 1) or (..., 1, in), float32, which multiply base + scale * b a; None for
            plain LoRA. They are constants: DoRA cannot be trained here.
    """

    base: jax.Array | QTensor
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    dropout: Dropout | None = None
    factor: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's shape, (..., out, in)."""
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The base's dtype."""
        return self.base.dtype

    @property
    def rank(self) -> int:
        """The rank of the product b a."""
        return self.a.shape[-2]

    def dropped(self, x: jax.Array) -> jax.Array:
        """The input of the first LoRA matrix: x (..., in) after LoRA dropout."""
        return x if self.dropout is None else self.dropout(x)

    def scaled(self, x: jax.Array) -> jax.Array:
        """The product scale * x in the dtype of x (..., rank). Scaling is cheapest at the width of the rank."""
        return (x * lax.stop_gradient(self.scale)).astype(x.dtype)

    def merged(self, dtype: jnp.dtype) -> jax.Array:
        """The merged weight factor * (base + scale * b a) in `dtype`, computed in float32."""
        total = lora_sum(self.base, LoraWeights(self.a, self.b, self.scale))
        return (total if self.factor is None else self.factor * total).astype(dtype)

    def part_axes(self, axes: Axes) -> dict[str, Axes]:
        """The logical axes of each part, derived from those of the weight; `parallel.shardings` calls it."""
        parts = part_axes(axes)
        columns = self.factor is not None and self.factor.shape[-1] > 1
        factor = (*axes[:-2], None, axes[-1]) if columns else parts.magnitude
        return {"base": axes, "a": parts.a, "b": parts.b, "scale": parts.scale, "factor": factor}


def part_axes(axes: Axes) -> LoraWeights:
    """The logical axes of a, b, scale and row magnitudes, derived from those of the weight. The rank is not sharded."""
    *lead, out, inner = axes
    return LoraWeights(a=(*lead, None, inner), b=(*lead, out, None), scale=(*lead,), magnitude=(*lead, out, None))


def lora_sum(base: jax.Array | QTensor, lora: LoraWeights) -> jax.Array:
    """The sum base + scale * b a in float32, (..., out, in)."""
    dense = quant.dequantize(base, jnp.float32) if isinstance(base, QTensor) else base.astype(jnp.float32)
    product = jnp.matmul(lora.b.astype(jnp.float32), lora.a.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return dense + lora.scale[..., None, None] * product


def dora_factor(base: jax.Array | QTensor, lora: LoraWeights) -> jax.Array:
    """DoRA's factors: magnitude / norm of base + scale * b a, float32 (arXiv:2402.09353, equation 5).

    The norms are taken along the axis on which `lora.magnitude` has length 1, and the result has its shape.
    """
    axis = -1 if lora.magnitude.shape[-1] == 1 else -2
    return lora.magnitude / jnp.linalg.norm(lora_sum(base, lora), axis=axis, keepdims=True)


def base_of(leaf: jax.Array | QTensor | LoraTensor) -> jax.Array | QTensor:
    """The base of a LoraTensor; any other leaf itself."""
    return leaf.base if isinstance(leaf, LoraTensor) else leaf
