"""The one table of names: where each weight stands in our tree, and what each file format calls it.

Names differ, and two things beside: a head's rotary pairs are rows (i, i + H/2) here and in Hugging Face's files, but
(2i, 2i + 1) in Meta's and in GGUF; and the old Flax files keep their kernels as (in, out), where all others, as we do,
have (out, in). Another format is another column of the table and another entry of FORMATS.

Letters: N heads, K key/value heads, H head dim, D embedding, F ffn, V vocab. No jax here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError, nearest
from llama_jax.weights.tensor import LazyTensor, reordered, transposed


@dataclasses.dataclass(frozen=True)
class Format:
    """How a format's arrays differ from ours.

    Attributes:
        interleaved: the rotary pairs of q and k are neighbours.
        transposed: matrices whose name ends with this word are (in, out); None where all are (out, in).
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
Leaves = Mapping[Path, LazyTensor]  # a model that has not been read yet, in our layout


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table: a weight of every layer where `per_layer`, else of the model.

    Attributes:
        path: keys within the tree of params (within a layer's own, where `per_layer`).
        shape: of one layer's array.
        names: what each of FORMATS calls it, in the order of FORMATS; {} stands for the layer's number.
        rotary: its rows are heads whose pairs are rotated (q and k).
    """

    path: tuple[str, ...]
    shape: Callable[[ModelConfig], tuple[int, ...]]
    names: tuple[str, ...]
    per_layer: bool = True
    rotary: bool = False


def _vocab(c: ModelConfig) -> tuple[int, ...]:
    return (c.vocab_size, c.embed_dim)


def _norm(c: ModelConfig) -> tuple[int, ...]:
    return (c.embed_dim,)


def _heads(c: ModelConfig) -> tuple[int, ...]:
    return (c.num_heads * c.head_dim, c.embed_dim)


def _kv_heads(c: ModelConfig) -> tuple[int, ...]:
    return (c.num_kv_heads * c.head_dim, c.embed_dim)


def _heads_out(c: ModelConfig) -> tuple[int, ...]:
    return (c.embed_dim, c.num_heads * c.head_dim)


def _ffn(c: ModelConfig) -> tuple[int, ...]:
    return (c.ffn_dim, c.embed_dim)


def _ffn_out(c: ModelConfig) -> tuple[int, ...]:
    return (c.embed_dim, c.ffn_dim)


# fmt: off
TABLE: tuple[Row, ...] = (
    # ours, its shape, and what it is called by Hugging Face, by Meta, in GGUF and by the old Flax Llama
    Row(("embed",), _vocab, per_layer=False, names=(
        "model.embed_tokens.weight", "tok_embeddings.weight",
        "token_embd.weight", "model/embed_tokens/embedding")),
    Row(("attention_norm", "scale"), _norm, names=(
        "model.layers.{}.input_layernorm.weight", "layers.{}.attention_norm.weight",
        "blk.{}.attn_norm.weight", "model/layers/{}/input_layernorm/weight")),
    Row(("attention", "q"), _heads, rotary=True, names=(
        "model.layers.{}.self_attn.q_proj.weight", "layers.{}.attention.wq.weight",
        "blk.{}.attn_q.weight", "model/layers/{}/self_attn/q_proj/kernel")),
    Row(("attention", "k"), _kv_heads, rotary=True, names=(
        "model.layers.{}.self_attn.k_proj.weight", "layers.{}.attention.wk.weight",
        "blk.{}.attn_k.weight", "model/layers/{}/self_attn/k_proj/kernel")),
    Row(("attention", "v"), _kv_heads, names=(
        "model.layers.{}.self_attn.v_proj.weight", "layers.{}.attention.wv.weight",
        "blk.{}.attn_v.weight", "model/layers/{}/self_attn/v_proj/kernel")),
    Row(("attention", "o"), _heads_out, names=(
        "model.layers.{}.self_attn.o_proj.weight", "layers.{}.attention.wo.weight",
        "blk.{}.attn_output.weight", "model/layers/{}/self_attn/o_proj/kernel")),
    Row(("ffn_norm", "scale"), _norm, names=(
        "model.layers.{}.post_attention_layernorm.weight", "layers.{}.ffn_norm.weight",
        "blk.{}.ffn_norm.weight", "model/layers/{}/post_attention_layernorm/weight")),
    Row(("ffn", "gate"), _ffn, names=(
        "model.layers.{}.mlp.gate_proj.weight", "layers.{}.feed_forward.w1.weight",
        "blk.{}.ffn_gate.weight", "model/layers/{}/mlp/gate_proj/kernel")),
    Row(("ffn", "up"), _ffn, names=(
        "model.layers.{}.mlp.up_proj.weight", "layers.{}.feed_forward.w3.weight",
        "blk.{}.ffn_up.weight", "model/layers/{}/mlp/up_proj/kernel")),
    Row(("ffn", "down"), _ffn_out, names=(
        "model.layers.{}.mlp.down_proj.weight", "layers.{}.feed_forward.w2.weight",
        "blk.{}.ffn_down.weight", "model/layers/{}/mlp/down_proj/kernel")),
    Row(("norm", "scale"), _norm, per_layer=False, names=(
        "model.norm.weight", "norm.weight",
        "output_norm.weight", "model/norm/weight")),
    Row(("unembed",), _vocab, per_layer=False, names=(
        "lm_head.weight", "output.weight",
        "output.weight", "lm_head/kernel")),
)
# fmt: on


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of one model in one format: where it goes, what the file calls it, and how it lies there.

    Attributes:
        path: into the unrolled tree, e.g. ("layers", 3, "attention", "q").
        name: in the format.
        shape: ours: (out, in) of a matrix, (D,) of a norm.
        pairs: head dim, where the format interleaves the rotary pairs of these rows; 0 where nothing is to be done.
        transposed: the format has it as (in, out).
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

    def ours(self, theirs: LazyTensor) -> LazyTensor:
        """The format's tensor as we have it."""
        if self.transposed:
            theirs = transposed(theirs)
        return reordered(theirs, self.pairs, halves_order(self.pairs)) if self.pairs else theirs

    def theirs(self, ours: LazyTensor) -> LazyTensor:
        """Our tensor as the format has it: the inverse of `ours`."""
        if self.pairs:
            ours = reordered(ours, self.pairs, pairs_order(self.pairs))
        return transposed(ours) if self.transposed else ours


def weights(config: ModelConfig, format: str) -> tuple[Weight, ...]:
    """Every weight of a model as `format` has it, in the order of the table, layer by layer.

    A tied model has no unembedding of its own. Raises ConfigError for a format that is not one of FORMATS.
    """
    return _weights(config, format)


@functools.lru_cache(maxsize=32)
def _weights(config: ModelConfig, format: str) -> tuple[Weight, ...]:
    if format not in FORMATS:
        raise ConfigError(
            f"unknown weight format {format!r}{nearest(format, list(FORMATS))} Allowed: {', '.join(FORMATS)}"
        )
    column, differs = list(FORMATS).index(format), FORMATS[format]

    def one(row: Row, layer: int | None) -> Weight:
        name = row.names[column].format(layer)
        return Weight(
            path=row.path if layer is None else ("layers", layer, *row.path),
            name=name,
            shape=row.shape(config),
            pairs=config.head_dim if row.rotary and differs.interleaved else 0,
            transposed=differs.transposed is not None and name.endswith(differs.transposed),
        )

    first = [row for row in TABLE if row.per_layer]
    before = TABLE.index(first[0])
    after = [row for row in TABLE[before:] if not row.per_layer]
    if config.tied_embeddings:
        after = [row for row in after if row.path != ("unembed",)]
    return (
        *(one(row, None) for row in TABLE[:before]),
        *(one(row, layer) for layer in range(config.num_layers) for row in first),
        *(one(row, None) for row in after),
    )


def tied_names(format: str) -> tuple[str, str]:
    """What a format calls the embedding and the unembedding."""
    column = list(FORMATS).index(format)
    return TABLE[0].names[column], TABLE[-1].names[column]


def halves_order(head_dim: int) -> np.ndarray:
    """Of a head with interleaved pairs, the rows that make it half-split: 0, 2, ..., then 1, 3, ..."""
    return np.arange(head_dim).reshape(-1, 2).T.reshape(-1)


def pairs_order(head_dim: int) -> np.ndarray:
    """Of a half-split head, the rows that interleave it: 0, H/2, 1, H/2 + 1, ...; the inverse of `halves_order`."""
    return np.arange(head_dim).reshape(2, -1).T.reshape(-1)


def get(params: dict[str, Any], path: Path) -> Any:
    """The leaf of an unrolled tree of params at `path`."""
    for key in path:
        params = params[key]
    return params


def build(config: ModelConfig, leaves: Iterable[tuple[Path, Any]]) -> dict[str, Any]:
    """The unrolled tree of params of (path, leaf) pairs: the inverse of `get` for all of them."""
    params: dict[str, Any] = {"layers": tuple({} for _ in range(config.num_layers))}
    for path, leaf in leaves:
        node: Any = params
        for key in path[:-1]:
            node = node.setdefault(key, {}) if isinstance(node, dict) else node[key]
        node[path[-1]] = leaf
    return params
