"""LoRA adapters by our own paths: what each adds to which weight, read onto devices or merged into entries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.ops.lora import LoraTensor, Update, base_of, part_axes
from llama_jax.parallel import Layout
from llama_jax.params import Params, logical_axes
from llama_jax.weights import name_table
from llama_jax.weights.load import place
from llama_jax.weights.tensor import Index, LazyTensor, row_blocks


class Stored(NamedTuple):
    """An update (ops/lora.py) that has not been read yet: a (rank, in), b (out, rank), and their scale ()."""

    a: LazyTensor
    b: LazyTensor
    scale: LazyTensor


Adapter = Mapping[name_table.Path, Stored]  # by the paths of unrolled params


def read(
    adapter: Adapter, config: ModelConfig, *, layout: Layout | None, dtype: jnp.dtype
) -> dict[name_table.Path, Update]:
    """The updates on the devices, a and b in `dtype`; no layout is the first device."""
    axes = logical_axes(config, stacked=False)

    def one(path: name_table.Path, stored: Stored) -> Update:
        names = part_axes(name_table.get(axes, path))
        a, b = (place(stored[i], names[i], np.dtype(dtype), layout) for i in range(2))
        return Update(a, b, place(stored.scale, names.scale, np.dtype(np.float32), layout))

    return {path: one(path, stored) for path, stored in adapter.items()}


def applied(config: ModelConfig, params: Params, updates: Mapping[name_table.Path, Update]) -> Params:
    """Unrolled params under these updates, and no others; the weights themselves are shared, not copied."""

    def leaf(path: name_table.Path) -> object:
        base = base_of(name_table.get(params, path))
        return LoraTensor(base, *updates[path]) if path in updates else base

    return name_table.build(config, ((w.path, leaf(w.path)) for w in name_table.weights(config, "huggingface")))


def is_adapted(params: Params) -> bool:
    """Whether some weights have updates beside them."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, LoraTensor))
    return any(isinstance(leaf, LoraTensor) for leaf in leaves)


def merge(leaves: name_table.Leaves, adapter: Adapter) -> name_table.Leaves:
    """A model's tensors with the adapter's updates added to them, each when it is read."""
    return {path: merged(entry, adapter[path]) if path in adapter else entry for path, entry in leaves.items()}


def merged(base: LazyTensor, update: Stored) -> LazyTensor:
    """base + scale * b a, computed in float32, in the dtype of the base; float32 where that is quantized."""

    def fill(out: np.ndarray, index: Index) -> None:
        a, scale = update.a.read((slice(None), index[1]), np.float32), update.scale.read(dtype=np.float32)
        for at, part in row_blocks(index, 4):
            block = base.read(part, np.float32)
            block += scale * (update.b.read(part[:1], np.float32) @ a)
            np.copyto(out[at], block, casting="unsafe")

    return dataclasses.replace(base, fill=fill, kind=base.dtype.name, quantized=None)
