"""Adapters: reads their tensors onto devices and applies them to params, or merges them into lazy tensors.

An adapter changes weights in three ways, in this order: `whole` weights replace weights of the base, `rows` replace
single rows (of new tokens, for example), and LoRA adds to the result. An adapter may enlarge the vocabulary, and it may
untie the embeddings of a tied model by changing only one of the two. `Adapter.config` is the config of the model with
the adapter applied.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.ops import quant
from llama_jax.ops.lora import LoraTensor, LoraWeights, base_of, dora_factor, part_axes
from llama_jax.ops.quant import QTensor
from llama_jax.parallel import Layout
from llama_jax.params import Params, logical_axes
from llama_jax.weights import name_table
from llama_jax.weights.load import place
from llama_jax.weights.tensor import Index, LazyTensor, row_blocks

EMBED, UNEMBED = ("embed",), ("unembed",)


class LazyLora(NamedTuple):
    """One matrix pair of LoRA as lazy tensors. The fields are those of ops.lora.LoraWeights."""

    a: LazyTensor
    b: LazyTensor
    scale: LazyTensor
    magnitude: LazyTensor | None = None


class LazyRows(NamedTuple):
    """Rows (n, in) that replace rows of a weight: rows[i] replaces row ids[i]."""

    ids: tuple[int, ...]
    rows: LazyTensor


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter as lazy tensors. Keys are paths of unrolled params.

    Attributes:
        config: config of the model with the adapter. Its vocabulary may be larger, and its embeddings may be untied.
        lora: LoRA's matrix pairs.
        whole: weights that replace weights of the base.
        rows: rows of the embedding and unembedding that replace rows of the base or are appended to them.
        folder: the folder that the adapter was opened from, or None.
    """

    config: ModelConfig
    lora: Mapping[name_table.Path, LazyLora]
    whole: Mapping[name_table.Path, LazyTensor] = dataclasses.field(default_factory=dict)
    rows: Mapping[name_table.Path, LazyRows] = dataclasses.field(default_factory=dict)
    folder: Path | None = None

    def tensors(self) -> Iterator[tuple[name_table.Path, LazyTensor]]:
        """Every tensor of the adapter with the path of its weight, in a fixed order."""
        for path, lazy in self.lora.items():
            yield from ((path, part) for part in lazy if part is not None)
        yield from self.whole.items()
        yield from ((path, lazy.rows) for path, lazy in self.rows.items())


class AdapterWeights(NamedTuple):
    """An adapter as arrays on the devices. Keys are paths of unrolled params.

    Attributes:
        config: config of the model with the adapter.
        lora: LoRA's arrays.
        whole: weights that replace weights of the base.
        rows: ids, and an array (n, in) of the rows that replace these rows of the base or are appended to them.
    """

    config: ModelConfig
    lora: Mapping[name_table.Path, LoraWeights]
    whole: Mapping[name_table.Path, jax.Array] = {}
    rows: Mapping[name_table.Path, tuple[tuple[int, ...], jax.Array]] = {}


def read_adapter(adapter: Adapter, *, layout: Layout | None, dtype: jnp.dtype) -> AdapterWeights:
    """Reads an adapter onto the devices.

    Args:
        adapter: the adapter to read.
        layout: the sharding layout; None means the first device.
        dtype: dtype of all arrays but scales and magnitudes, which are float32.
    """
    axes, dtype = logical_axes(adapter.config, stacked=False), np.dtype(dtype)

    def lora(path: name_table.Path, lazy: LazyLora) -> LoraWeights:
        names = part_axes(name_table.get(axes, path))
        a, b = place(lazy.a, names.a, dtype, layout), place(lazy.b, names.b, dtype, layout)
        scale = place(lazy.scale, names.scale, np.dtype(np.float32), layout)
        if lazy.magnitude is None:
            return LoraWeights(a, b, scale)
        its = names.magnitude if lazy.magnitude.shape[-1] == 1 else (None, name_table.get(axes, path)[-1])
        return LoraWeights(a, b, scale, place(lazy.magnitude, its, np.dtype(np.float32), layout))

    return AdapterWeights(
        adapter.config,
        {path: lora(path, lazy) for path, lazy in adapter.lora.items()},
        {path: place(lazy, name_table.get(axes, path), dtype, layout) for path, lazy in adapter.whole.items()},
        {
            path: (lazy.ids, place(lazy.rows, (None, name_table.get(axes, path)[-1]), dtype, layout))
            for path, lazy in adapter.rows.items()
        },
    )


def with_adapter(config: ModelConfig, params: Params, adapter: AdapterWeights | None) -> Params:
    """Unrolled params with this adapter applied instead of any other LoRA. None removes LoRA.

    Weights that the adapter does not change are shared, not copied.

    Args:
        config: config of the model with the adapter.
        params: unrolled params, with or without LoRA.
        adapter: the adapter, or None.
    """
    adapter = adapter or AdapterWeights(config, {})

    def leaf(path: name_table.Path) -> jax.Array | QTensor | LoraTensor:
        base: jax.Array | QTensor | None = adapter.whole.get(path)
        if base is None:
            source = EMBED if path == UNEMBED and "unembed" not in params else path  # the adapter unties a tied model
            base = base_of(name_table.get(params, source))
        if path in adapter.rows:
            base = _with_rows(base, *adapter.rows[path])
        if path not in adapter.lora:
            return base
        lora = adapter.lora[path]
        factor = None if lora.magnitude is None else jax.jit(dora_factor)(base, lora)
        return LoraTensor(base, lora.a, lora.b, lora.scale, factor=factor)

    paths = [weight.path for weight in name_table.weights(config, "huggingface")]
    return name_table.build(config, ((path, leaf(path)) for path in paths))


def has_lora(params: Params) -> bool:
    """True if at least one leaf of params is a LoraTensor."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, LoraTensor))
    return any(isinstance(leaf, LoraTensor) for leaf in leaves)


def merge_adapter(leaves: name_table.Leaves, adapter: Adapter) -> name_table.Leaves:
    """The lazy tensors of a model with the adapter merged into them, for a model of `adapter.config`.

    A merged tensor is computed in float32 when it is read. It has the dtype of the base tensor, or float32 if that is
    quantized.
    """

    def leaf(path: name_table.Path) -> LazyTensor:
        base = leaves[EMBED if path == UNEMBED and UNEMBED not in leaves else path]
        if path in adapter.whole:
            base = _as_base(adapter.whole[path], base)
        if path in adapter.rows:
            base = _merge_rows(base, adapter.rows[path])
        return merge_lora(base, adapter.lora[path]) if path in adapter.lora else base

    return {weight.path: leaf(weight.path) for weight in name_table.weights(adapter.config, "huggingface")}


def merge_lora(base: LazyTensor, lora: LazyLora) -> LazyTensor:
    """The lazy tensor base + scale * b a, times DoRA's factors if there are any, in the dtype of the base."""

    def fill(out: np.ndarray, index: Index) -> None:
        total = functools.partial(_lora_rows, base, lora, columns=index[1])
        for at, part in row_blocks(index, 4):
            block = total(part[0])
            if factor is not None:
                factors = factor()
                block *= factors[:, index[1]] if factors.shape[0] == 1 else factors[part[0]]
            np.copyto(out[at], block, casting="unsafe")

    factor = None if lora.magnitude is None else functools.cache(functools.partial(_lazy_factor, base, lora))
    return dataclasses.replace(base, fill=fill, kind=base.dtype.name, quantized=None)


def _lora_rows(base: LazyTensor, lora: LazyLora, rows: slice, *, columns: slice) -> np.ndarray:
    """Rows of base + scale * b a in float32."""
    a, scale = lora.a.read((slice(None), columns), np.float32), lora.scale.read(dtype=np.float32)
    block = base.read((rows, columns), np.float32)
    block += scale * (lora.b.read((rows,), np.float32) @ a)
    return block


def _lazy_factor(base: LazyTensor, lora: LazyLora) -> np.ndarray:
    """DoRA's factors by the formula of `ops.lora.dora_factor`, computed one block of rows at a time."""
    assert lora.magnitude is not None
    by_rows, whole = lora.magnitude.shape[-1] == 1, tuple(slice(0, n) for n in base.shape)
    squares = []
    for _, part in row_blocks(whole, 4):
        block = np.square(_lora_rows(base, lora, part[0], columns=whole[1]), dtype=np.float64)
        squares.append(block.sum(axis=1 if by_rows else 0, keepdims=True))
    norms = np.sqrt(np.concatenate(squares) if by_rows else sum(squares))
    return (lora.magnitude.read(dtype=np.float32) / norms).astype(np.float32)


def _with_rows(base: jax.Array | QTensor, ids: tuple[int, ...], rows: jax.Array) -> jax.Array:
    """The weight with rows replaced. Rows are appended if an id is beyond its last row."""
    if isinstance(base, QTensor):
        base = quant.dequantize(base, rows.dtype)
    more = max(0, max(ids) + 1 - base.shape[0])
    out = jnp.pad(base, ((0, more), (0, 0))).at[jnp.array(ids)].set(rows.astype(base.dtype))
    return out if more else jax.device_put(out, base.sharding)


def _as_base(whole: LazyTensor, base: LazyTensor) -> LazyTensor:
    """The adapter's whole weight, cast to the dtype of the base tensor that it replaces."""
    return dataclasses.replace(whole, dtype=base.dtype, kind=base.dtype.name, quantized=None)


def _merge_rows(base: LazyTensor, new: LazyRows) -> LazyTensor:
    rows = {i: number for number, i in enumerate(new.ids)}
    shape = (max(base.shape[0], max(new.ids) + 1), *base.shape[1:])

    def fill(out: np.ndarray, index: Index) -> None:
        start, stop = index[0].start, index[0].stop
        there = min(stop, base.shape[0])
        if start < there:
            out[: there - start] = base.read((slice(start, there), index[1]), out.dtype)
        replaced = [i for i in rows if start <= i < stop]
        if replaced:
            held = new.rows.read((slice(None), index[1]))
            out[np.array(replaced) - start] = held[[rows[i] for i in replaced]].astype(out.dtype)

    return dataclasses.replace(base, shape=shape, fill=fill, kind=base.dtype.name, quantized=None)
