"""The table of names: the name of every weight of `params.WEIGHTS` in each file format.

Formats differ in two more ways. The rotary pairs of a head are rows (i, i + H/2) here and in Hugging Face's files, but
(2i, 2i + 1) in Meta's files and in GGUF. The old Flax files store kernels as (in, out); all others, and this package,
store (out, in). A new format is a new column of the table and a new entry of FORMATS.

Letters: H head dim, D embedding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError, nearest
from llama_jax.params import WeightSpec, weight_specs
from llama_jax.weights.tensor import LazyTensor, reordered, transposed


@dataclasses.dataclass(frozen=True)
class Format:
    """The layout of a format's arrays where it differs from that of our params.

    Attributes:
        interleaved: True if the two rows of a rotary pair of q and k are neighbors.
        transposed: suffix of the names of matrices that are stored as (in, out); None if all are (out, in).
    """

    interleaved: bool
    transposed: str | None = None


# The columns of the table.
FORMATS: dict[str, Format] = {
    "huggingface": Format(interleaved=False),
    "meta": Format(interleaved=True),
    "gguf": Format(interleaved=True),
    "flax": Format(interleaved=False, transposed="kernel"),
}
# Names with these ends are not weights: frequencies that follow from the config, kept in some older files.
BUFFERS = ("rotary_emb.inv_freq", "rope.freqs", "rope_freqs.weight")

Path = tuple[str | int, ...]
Leaves = Mapping[Path, LazyTensor]  # the tensors of a model by their paths in unrolled params, not read yet


# Names of each weight of `params.WEIGHTS`, by its path, in the order of FORMATS; {} is the layer's number.
# fmt: off
NAMES: dict[tuple[str, ...], tuple[str, ...]] = {
    # Hugging Face, Meta, GGUF, the old Flax Llama
    ("embed",): (
        "model.embed_tokens.weight", "tok_embeddings.weight",
        "token_embd.weight", "model/embed_tokens/embedding"),
    ("attention_norm", "scale"): (
        "model.layers.{}.input_layernorm.weight", "layers.{}.attention_norm.weight",
        "blk.{}.attn_norm.weight", "model/layers/{}/input_layernorm/weight"),
    ("attention", "q"): (
        "model.layers.{}.self_attn.q_proj.weight", "layers.{}.attention.wq.weight",
        "blk.{}.attn_q.weight", "model/layers/{}/self_attn/q_proj/kernel"),
    ("attention", "k"): (
        "model.layers.{}.self_attn.k_proj.weight", "layers.{}.attention.wk.weight",
        "blk.{}.attn_k.weight", "model/layers/{}/self_attn/k_proj/kernel"),
    ("attention", "v"): (
        "model.layers.{}.self_attn.v_proj.weight", "layers.{}.attention.wv.weight",
        "blk.{}.attn_v.weight", "model/layers/{}/self_attn/v_proj/kernel"),
    ("attention", "o"): (
        "model.layers.{}.self_attn.o_proj.weight", "layers.{}.attention.wo.weight",
        "blk.{}.attn_output.weight", "model/layers/{}/self_attn/o_proj/kernel"),
    ("ffn_norm", "scale"): (
        "model.layers.{}.post_attention_layernorm.weight", "layers.{}.ffn_norm.weight",
        "blk.{}.ffn_norm.weight", "model/layers/{}/post_attention_layernorm/weight"),
    ("ffn", "gate"): (
        "model.layers.{}.mlp.gate_proj.weight", "layers.{}.feed_forward.w1.weight",
        "blk.{}.ffn_gate.weight", "model/layers/{}/mlp/gate_proj/kernel"),
    ("ffn", "up"): (
        "model.layers.{}.mlp.up_proj.weight", "layers.{}.feed_forward.w3.weight",
        "blk.{}.ffn_up.weight", "model/layers/{}/mlp/up_proj/kernel"),
    ("ffn", "down"): (
        "model.layers.{}.mlp.down_proj.weight", "layers.{}.feed_forward.w2.weight",
        "blk.{}.ffn_down.weight", "model/layers/{}/mlp/down_proj/kernel"),
    ("norm", "scale"): (
        "model.norm.weight", "norm.weight",
        "output_norm.weight", "model/norm/weight"),
    ("unembed",): (
        "lm_head.weight", "output.weight",
        "output.weight", "lm_head/kernel"),
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of a model in one format: its path in the params, its name in the format and its layout there.

    Attributes:
        path: path in the unrolled params, e.g. ("layers", 3, "attention", "q").
        name: name of the weight in the format.
        shape: shape in our params: (out, in) for a matrix, (D,) for a norm.
        pairs: head dim if the format interleaves the rotary pairs of these rows, else 0.
        transposed: True if the format stores the matrix as (in, out).
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    pairs: int
    transposed: bool

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in the format's files."""
        return self.shape[::-1] if self.transposed else self.shape

    def from_disk(self, tensor: LazyTensor) -> LazyTensor:
        """Converts the format's tensor to the layout of our params."""
        if self.transposed:
            tensor = transposed(tensor)
        return reordered(tensor, self.pairs, halves_order(self.pairs)) if self.pairs else tensor

    def to_disk(self, tensor: LazyTensor) -> LazyTensor:
        """Converts a tensor of our params to the format's layout: the inverse of `from_disk`."""
        if self.pairs:
            tensor = reordered(tensor, self.pairs, pairs_order(self.pairs))
        return transposed(tensor) if self.transposed else tensor


def weights(config: ModelConfig, format: str) -> tuple[Weight, ...]:
    """All weights of a model in one format, in the order of the table, layer by layer.

    A tied model has no unembedding. Raises ConfigError for a format that is not one of FORMATS.
    """
    return _weights(config, format)


@functools.lru_cache(maxsize=32)
def _weights(config: ModelConfig, format: str) -> tuple[Weight, ...]:
    if format not in FORMATS:
        raise ConfigError(
            f"unknown weight format {format!r}{nearest(format, list(FORMATS)) or '.'} Allowed: {', '.join(FORMATS)}"
        )
    column, differs = list(FORMATS).index(format), FORMATS[format]

    def one(spec: WeightSpec, layer: int | None) -> Weight:
        name = NAMES[spec.path][column].format(layer)
        return Weight(
            path=spec.path if layer is None else ("layers", layer, *spec.path),
            name=name,
            shape=spec.shape(config),
            pairs=config.head_dim if spec.rotary and differs.interleaved else 0,
            transposed=differs.transposed is not None and name.endswith(differs.transposed),
        )

    specs = weight_specs(config)
    per_layer = [spec for spec in specs if spec.per_layer]
    first = specs.index(per_layer[0])
    return (
        *(one(spec, None) for spec in specs[:first]),
        *(one(spec, layer) for layer in range(config.num_layers) for spec in per_layer),
        *(one(spec, None) for spec in specs[first:] if not spec.per_layer),
    )


def tied_names(format: str) -> tuple[str, str]:
    """The names of the embedding and of the unembedding in a format."""
    column = list(FORMATS).index(format)
    return NAMES["embed",][column], NAMES["unembed",][column]


def halves_order(head_dim: int) -> np.ndarray:
    """The order of rows that turns interleaved rotary pairs into halves: 0, 2, ..., then 1, 3, ..."""
    return np.arange(head_dim).reshape(-1, 2).T.reshape(-1)


def pairs_order(head_dim: int) -> np.ndarray:
    """The order of rows that interleaves the rotary pairs of halves: 0, H/2, 1, ...; the inverse of `halves_order`."""
    return np.arange(head_dim).reshape(2, -1).T.reshape(-1)


def get(params: dict[str, Any], path: Path) -> Any:
    """The leaf of unrolled params at `path`."""
    leaf: Any = params
    for key in path:
        leaf = leaf[key]
    return leaf


def build(config: ModelConfig, leaves: Iterable[tuple[Path, Any]]) -> dict[str, Any]:
    """Unrolled params made of (path, leaf) pairs."""
    params: dict[str, Any] = {"layers": tuple({} for _ in range(config.num_layers))}
    for path, leaf in leaves:
        node: Any = params
        for key in path[:-1]:
            node = node.setdefault(key, {}) if isinstance(node, dict) else node[key]
        node[path[-1]] = leaf
    return params
