"""The one table of names: where each weight stands in our tree, and what each file format calls it.

Every matrix is stored (out, in) in all of these formats, as it is here, so that only names differ, and one permutation:
a head's rotary pairs are rows (i, i + H/2) here and in Hugging Face's files, but (2i, 2i + 1) in Meta's. Another format
is another column of the table and a word in FORMATS.

Letters: N heads, K key/value heads, H head dim, D embedding, F ffn, V vocab. No jax here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from llama_jax.config import ConfigError, ModelConfig, nearest

# The columns of the table, and whether the format interleaves the rotary pairs of q and k.
FORMATS: dict[str, bool] = {"huggingface": False, "meta": True}
# Names with these ends are not weights: frequencies that follow from the config, kept in some older files.
BUFFERS = ("rotary_emb.inv_freq", "rope.freqs")

Path = tuple[str | int, ...]


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
    # ours, its shape, and what it is called by Hugging Face and by Meta
    Row(("embed",), _vocab, per_layer=False, names=(
        "model.embed_tokens.weight", "tok_embeddings.weight")),
    Row(("attention_norm", "scale"), _norm, names=(
        "model.layers.{}.input_layernorm.weight", "layers.{}.attention_norm.weight")),
    Row(("attention", "q"), _heads, rotary=True, names=(
        "model.layers.{}.self_attn.q_proj.weight", "layers.{}.attention.wq.weight")),
    Row(("attention", "k"), _kv_heads, rotary=True, names=(
        "model.layers.{}.self_attn.k_proj.weight", "layers.{}.attention.wk.weight")),
    Row(("attention", "v"), _kv_heads, names=(
        "model.layers.{}.self_attn.v_proj.weight", "layers.{}.attention.wv.weight")),
    Row(("attention", "o"), _heads_out, names=(
        "model.layers.{}.self_attn.o_proj.weight", "layers.{}.attention.wo.weight")),
    Row(("ffn_norm", "scale"), _norm, names=(
        "model.layers.{}.post_attention_layernorm.weight", "layers.{}.ffn_norm.weight")),
    Row(("ffn", "gate"), _ffn, names=(
        "model.layers.{}.mlp.gate_proj.weight", "layers.{}.feed_forward.w1.weight")),
    Row(("ffn", "up"), _ffn, names=(
        "model.layers.{}.mlp.up_proj.weight", "layers.{}.feed_forward.w3.weight")),
    Row(("ffn", "down"), _ffn_out, names=(
        "model.layers.{}.mlp.down_proj.weight", "layers.{}.feed_forward.w2.weight")),
    Row(("norm", "scale"), _norm, per_layer=False, names=(
        "model.norm.weight", "norm.weight")),
    Row(("unembed",), _vocab, per_layer=False, names=(
        "lm_head.weight", "output.weight")),
)
# fmt: on


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of one model in one format: where it goes, what the file calls it, and its shape (the same in both).

    Attributes:
        path: into the unrolled tree, e.g. ("layers", 3, "attention", "q").
        name: in the format.
        shape: (out, in) of a matrix, (D,) of a norm.
        pairs: head dim, where the format interleaves the rotary pairs of these rows; 0 where nothing is to be done.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    pairs: int

    def rows(self, part: slice | None = None) -> np.ndarray | None:
        """Which of the file's rows make up our rows `part` (all by default), or None where they are the same."""
        if not self.pairs:
            return None
        ours = np.arange(self.shape[0])[part if part is not None else slice(None)]
        return _interleaved(ours, self.pairs)


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
    column, interleaves = list(FORMATS).index(format), FORMATS[format]

    def one(row: Row, layer: int | None) -> Weight:
        return Weight(
            path=row.path if layer is None else ("layers", layer, *row.path),
            name=row.names[column].format(layer),
            shape=row.shape(config),
            pairs=config.head_dim if row.rotary and interleaves else 0,
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


def _interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of a half-split matrix to the same rows of an interleaved one: i to 2i, and i + H/2 to 2i + 1."""
    head, within = np.divmod(rows, head_dim)
    half, pair = np.divmod(within, head_dim // 2)
    return head * head_dim + 2 * pair + half


def to_halves(matrix: Any, head_dim: int) -> Any:
    """A matrix (N H, D) with interleaved rotary pairs, as Meta's files have it, in our order. Numpy or jax."""
    N = matrix.shape[0] // head_dim
    pairs = matrix.reshape(N, head_dim // 2, 2, *matrix.shape[1:])
    return pairs.swapaxes(1, 2).reshape(matrix.shape)


def to_pairs(matrix: Any, head_dim: int) -> Any:
    """The inverse of `to_halves`: our matrix (N H, D) with its rotary pairs interleaved."""
    N = matrix.shape[0] // head_dim
    halves = matrix.reshape(N, 2, head_dim // 2, *matrix.shape[1:])
    return halves.swapaxes(1, 2).reshape(matrix.shape)


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
