"""Placement of weights: tensors are read from files part by part, straight into each device's shards."""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError
from llama_jax.ops import quant
from llama_jax.ops.lora import LoraTensor
from llama_jax.ops.quant import QTensor
from llama_jax.parallel import Layout, shardings
from llama_jax.params import Params, logical_axes
from llama_jax.weights import name_table
from llama_jax.weights.tensor import Index, LazyTensor, aligned, row_blocks

_BITS = {"int8": 8, "int4": 4}
QUANTIZE = ("none", *_BITS)  # what load_leaves takes by name
_AT_ONCE = 2  # tensors in flight: what the host holds beyond what its devices do
_QUIET = 3.0  # seconds before a bar appears

Bounds = tuple[tuple[int, int], ...]  # (start, stop) of each dimension


def load_leaves(
    leaves: name_table.Leaves,
    config: ModelConfig,
    *,
    layout: Layout | None,
    dtype: jnp.dtype | None,
    quantize: str | None,
) -> Params:
    """Weights in the unrolled layout, each read straight into its shards: a process reads what its devices hold.

    Args:
        leaves: the model's tensors by path, as `validate.match_tensors` returns them.
        config: of the model.
        layout: where the shards go, or None for one device.
        dtype: to cast to; each tensor's own by default.
        quantize: None keeps what is stored in groups of 8 or 4 bits as QTensors; "none" makes arrays of it; "int8" and
            "int4" make QTensors of the matrices of all layers, rounding those that are not stored so.

    Raises:
        ConfigError: "int8" or "int4" of a model whose rows are no multiple of 32.
    """
    axes = logical_axes(config, stacked=False)
    bits = group_bits(config, quantize)

    def load(path: name_table.Path) -> jax.Array | QTensor:
        entry, names = leaves[path], name_table.get(axes, path)
        pieces, rounded = entry.quantized, bits is not None and _is_block_matrix(path, entry.shape)
        if pieces is not None and (pieces.bits == bits if rounded else quantize is None):
            leaf = QTensor(*(place(piece, names, piece.dtype, layout) for piece in (pieces.values, pieces.scales)))
        else:
            leaf = place(entry, names, entry.dtype if dtype is None or rounded else np.dtype(dtype), layout)
            leaf = _quantized(leaf, bits, names, layout) if rounded else leaf
        leaf = jax.block_until_ready(leaf)
        bar.update(entry.nbytes)
        return leaf

    total = sum(entry.nbytes for entry in leaves.values())
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="loading", delay=_QUIET, mininterval=1, leave=False) as bar,
        concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool,
    ):
        futures = {path: pool.submit(load, path) for path in leaves}
        try:
            return name_table.build(config, ((path, future.result()) for path, future in futures.items()))
        finally:  # after an error the rest need not be read
            pool.shutdown(wait=True, cancel_futures=True)


def group_bits(config: ModelConfig, quantize: str | None) -> int | None:
    """The bits that "int8" and "int4" stand for, and None for None and "none".

    Raises:
        ConfigError: the rows of the model's matrices cannot be cut into groups of 32 numbers.
    """
    widths = {
        "embed_dim": config.embed_dim,
        "num_heads x head_dim": config.num_heads * config.head_dim,
        "ffn_dim": config.ffn_dim,
    }
    bad = [f"{key}={width}" for key, width in widths.items() if width % quant.GROUP]
    if quantize in _BITS and bad:
        raise ConfigError(f"{quantize} takes rows of a multiple of 32 numbers, but the model has {', '.join(bad)}")
    return _BITS.get(quantize)


def quantize_layers(config: ModelConfig, params: Params, quantize: str | None, layout: Layout | None) -> Params:
    """Placed unrolled params with the matrices of all layers in groups, where `quantize` is "int8" or "int4"."""
    bits = group_bits(config, quantize)
    if bits is None:
        return params
    axes = logical_axes(config, stacked=False)

    def leaf(path: name_table.Path) -> jax.Array | QTensor:
        found = name_table.get(params, path)
        if not _is_block_matrix(path, found.shape) or isinstance(found, QTensor):
            return found
        return _quantized(found, bits, name_table.get(axes, path), layout)

    return name_table.build(
        config, ((weight.path, leaf(weight.path)) for weight in name_table.weights(config, "huggingface"))
    )


def merge_updates(params: Params) -> Params:
    """Placed params whose LoRA updates are added to their weights, which stay where they lie and in their dtype."""

    def leaf(weight: jax.Array | LoraTensor) -> jax.Array:
        if not isinstance(weight, LoraTensor):
            return weight
        return jax.jit(lambda w: w.merged(w.dtype), out_shardings=weight.base.sharding)(weight)

    return jax.tree.map(leaf, params, is_leaf=lambda x: isinstance(x, LoraTensor))


def _is_block_matrix(path: name_table.Path, shape: tuple[int, ...]) -> bool:
    return path[0] == "layers" and len(shape) == 2


def _quantized(weight: jax.Array, bits: int, names: tuple[str | None, ...], layout: Layout | None) -> QTensor:
    if layout is None:
        return _quantizer(bits, None)(weight)
    shapes = jax.eval_shape(functools.partial(quant.quantize, bits=bits), weight)
    return _quantizer(bits, shardings(layout, names, shapes))(weight)


@functools.lru_cache(maxsize=64)
def _quantizer(bits: int, places: QTensor | None) -> Callable[[jax.Array], QTensor]:
    return jax.jit(functools.partial(quant.quantize, bits=bits), out_shardings=places)


def place(entry: LazyTensor, names: tuple[str | None, ...], to: np.dtype, layout: Layout | None) -> jax.Array:
    """A tensor in the dtype `to` where its logical axes belong; no layout is the first device."""
    if layout is None:
        where: jax.sharding.Sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    else:
        where = layout.sharding(names, entry.shape)
    bounds = functools.partial(_bounds, entry.shape)
    parts = _parts(entry, set(map(bounds, where.addressable_devices_indices_map(entry.shape).values())), to)
    return jax.make_array_from_callback(entry.shape, where, lambda index: parts[bounds(index)])


def _bounds(shape: tuple[int, ...], index: Index) -> Bounds:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _parts(entry: LazyTensor, wanted: set[Bounds], dtype: np.dtype) -> dict[Bounds, np.ndarray]:
    """The parts of a tensor that the devices of this process hold, each read once.

    Parts that have their rows in common are read together, a block of rows at a time: the pieces of a row that go to
    different devices are often too short to be read one by one, and what is packed would be unpacked for each.
    """
    rows: dict[Bounds, list[Bounds]] = {}
    for part in wanted:
        rows.setdefault(part[:1], []).append(part)
    found: dict[Bounds, np.ndarray] = {}
    for together in rows.values():
        if len(together) == 1:
            found[together[0]] = entry.read(_slices(together[0]), dtype)
            continue
        for part in together:
            found[part] = aligned(tuple(stop - start for start, stop in part), dtype)
        around = tuple(
            (min(starts), max(stops))
            for starts, stops in (zip(*axis, strict=True) for axis in zip(*together, strict=True))
        )
        for at, block in row_blocks(_slices(around), entry.dtype.itemsize):
            scratch = entry.read(block, dtype)
            for part in together:
                inner = [slice(a - low, b - low) for (a, b), (low, _) in zip(part[1:], around[1:], strict=True)]
                found[part][at] = scratch[(slice(None), *inner)]
    return found


def _slices(bounds: Bounds) -> Index:
    return tuple(slice(start, stop) for start, stop in bounds)
