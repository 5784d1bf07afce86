"""Placement of weights: tensors are read from files part by part, straight into each device's shards."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax import remote_files
from llama_jax.config import ModelConfig
from llama_jax.ops import quant
from llama_jax.ops.lora import LoraTensor
from llama_jax.ops.quant import QTensor
from llama_jax.parallel import Layout, on_device, processes, shardings
from llama_jax.params import Params, logical_axes
from llama_jax.progress import progress_bar
from llama_jax.weights import name_table
from llama_jax.weights.huge_pages import HugePages
from llama_jax.weights.quantize import bits_of, check, rounder
from llama_jax.weights.tensor import Empty, Index, LazyTensor, aligned, row_blocks

_AT_ONCE = 2  # tensors in flight; the host holds these besides what is on its devices

Bounds = tuple[tuple[int, int], ...]  # (start, stop) of each dimension


def load_leaves(
    leaves: name_table.Leaves,
    config: ModelConfig,
    *,
    layout: Layout | None,
    dtype: jnp.dtype | None,
    quantize: str | None,
) -> Params:
    """Reads weights as unrolled params, each straight into its shards. A process reads only the shards of its devices.

    Args:
        leaves: the model's tensors by path, as `validate.match_tensors` returns them.
        config: the model's shape.
        layout: placement of the shards; None is the first device. Its `memory` is that of the layers' weights.
        dtype: dtype of the params; None keeps each tensor's own.
        quantize: None keeps weights that are stored in groups of 8 or 4 bits as QTensors; "none" dequantizes them;
            "int8" and "int4" make QTensors of the matrices (`quantize.bits_of`) and round those that are stored in
            another type.

    Raises:
        ConfigError: quantize is "int8" or "int4", and the rows of a matrix are not a multiple of 32 long; or a file
            that is read in place has changed meanwhile.
    """
    axes = logical_axes(config, stacked=False)
    check(config, quantize)
    all_bits = bits_of(config, quantize)
    home, layout = layout, layout and dataclasses.replace(layout, memory=None)

    in_rows = layout is not None and remote_files.in_parts()
    memory = HugePages()

    def read(path: name_table.Path) -> jax.Array | QTensor:
        entry, names = leaves[path], name_table.get(axes, path)
        pieces, bits = entry.quantized, all_bits.get(path)
        leaf: jax.Array | QTensor
        if pieces is not None and (pieces.bits == bits or quantize is None):
            parts = (pieces.values, pieces.scales)
            leaf = QTensor(*(place(p, names, p.dtype, layout, in_rows=in_rows, empty=memory.empty) for p in parts))
        else:
            wanted = entry.dtype if dtype is None or bits else np.dtype(dtype)
            leaf = place(entry, names, wanted, layout, in_rows=in_rows, empty=aligned if bits else memory.empty)
        return leaf if in_rows else finish(path, leaf)

    def finish(path: name_table.Path, leaf: jax.Array | QTensor) -> jax.Array | QTensor:
        names, bits = name_table.get(axes, path), all_bits.get(path)
        if in_rows and layout is not None:
            leaf = jax.tree.map(lambda array: _spread(array, layout.sharding(names, array.shape)), leaf)
        if bits and not isinstance(leaf, QTensor):
            leaf = memory.copied(_quantized(leaf, bits, names, layout))
        leaf = jax.block_until_ready(_moved(leaf, home) if path[0] == "layers" else leaf)
        bar.update(leaves[path].nbytes)
        return leaf

    def last(path: name_table.Path, leaf: jax.Array | QTensor) -> jax.Array | QTensor:
        return finish(path, leaf) if in_rows else leaf  # collectives run in one order in all processes

    with (
        progress_bar(sum(entry.nbytes for entry in leaves.values()), "loading") as bar,
        concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool,
    ):
        ahead = _AT_ONCE if in_rows else len(leaves)  # leaves that are not finished take memory of devices
        found = _read_ahead(pool, read, leaves, ahead)
        try:
            params = name_table.build(config, ((path, last(path, leaf)) for path, leaf in found))
        finally:  # after an error, the rest is not read
            pool.shutdown(wait=True, cancel_futures=True)
    remote_files.check_unchanged()
    return params


def _read_ahead(
    pool: concurrent.futures.Executor,
    read: Callable[[name_table.Path], jax.Array | QTensor],
    paths: Iterable[name_table.Path],
    ahead: int,
) -> Iterator[tuple[name_table.Path, jax.Array | QTensor]]:
    """The leaves of the paths, in their order, of which the pool reads as many as `ahead` before they are taken."""
    rest = iter(paths)
    waiting = collections.deque((path, pool.submit(read, path)) for path in itertools.islice(rest, ahead))
    while waiting:
        path, future = waiting.popleft()
        future.result()
        waiting.extend((following, pool.submit(read, following)) for following in itertools.islice(rest, 1))
        yield path, future.result()
        del future  # which holds the leaf


def quantize_placed(config: ModelConfig, params: Params, quantize: str | None, layout: Layout | None) -> Params:
    """Quantizes unrolled params on devices to "int8" or "int4" (the matrices of `quantize.bits_of`)."""
    check(config, quantize)
    all_bits = bits_of(config, quantize)
    if not all_bits:
        return params
    axes = logical_axes(config, stacked=False)

    def leaf(path: name_table.Path) -> jax.Array | QTensor:
        weight = name_table.get(params, path)
        if path not in all_bits or isinstance(weight, QTensor):
            return weight
        return _quantized(weight, all_bits[path], name_table.get(axes, path), layout)

    return name_table.build(
        config, ((weight.path, leaf(weight.path)) for weight in name_table.weights(config, "huggingface"))
    )


def merge_updates(params: Params) -> Params:
    """Merges LoRA updates into params on devices, whose bases are not quantized. Shardings and dtypes stay the same."""

    def leaf(weight: jax.Array | LoraTensor) -> jax.Array:
        if not isinstance(weight, LoraTensor):
            return weight
        assert not isinstance(weight.base, QTensor)
        return jax.jit(lambda w: on_device(w).merged(w.dtype), out_shardings=weight.base.sharding)(weight)

    return jax.tree.map(leaf, params, is_leaf=lambda x: isinstance(x, LoraTensor))


def _quantized(weight: jax.Array, bits: int, names: tuple[str | None, ...], layout: Layout | None) -> QTensor:
    if layout is None:
        return rounder(bits)(weight)
    shapes = jax.eval_shape(functools.partial(quant.fit, bits=bits), weight)
    return rounder(bits, shardings(layout, names, shapes))(weight)


def place(
    entry: LazyTensor,
    names: tuple[str | None, ...],
    to: np.dtype,
    layout: Layout | None,
    *,
    in_rows: bool = False,
    empty: Empty = aligned,
) -> jax.Array:
    """Reads a tensor in the dtype `to` onto devices, sharded by its logical axes; no layout means the first device.

    With `in_rows`, each device has some of the rows instead, if their number allows it. A process then reads one range
    of bytes of a file.
    """
    if layout is None:
        sharding: jax.sharding.Sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    elif in_rows and len(entry.shape) > 1 and entry.shape[0] % layout.mesh.size == 0:
        sharding = NamedSharding(layout.mesh, PartitionSpec(layout.mesh.axis_names))
    else:
        sharding = layout.sharding(names, entry.shape)
    bounds = functools.partial(_bounds, entry.shape)
    indices = sharding.addressable_devices_indices_map(entry.shape).values()
    parts = _parts(entry, {bounds(index) for index in indices if index is not None}, to, empty)
    return jax.make_array_from_callback(entry.shape, sharding, lambda index: parts[bounds(index or ())])


def _moved(leaf: jax.Array | QTensor, layout: Layout | None) -> jax.Array | QTensor:
    """The leaf in the memory of a layout."""
    memory = None if layout is None else layout.memory
    if memory is None:
        return leaf
    return jax.tree.map(lambda array: jax.device_put(array, array.sharding.with_memory_kind(memory)), leaf)


def _spread(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The array with another sharding. Every process must call it; none runs a program before all have compiled it."""
    if array.sharding == sharding:
        return array
    move = _mover(jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), sharding)
    processes.meet("a weight is read")
    return move(array)


@functools.lru_cache(maxsize=64)
def _mover(array: jax.ShapeDtypeStruct, sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """A compiled program that gives an array another sharding."""
    return jax.jit(lambda x: x, out_shardings=sharding).lower(array).compile()


def _bounds(shape: tuple[int, ...], index: Index) -> Bounds:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _parts(entry: LazyTensor, wanted: set[Bounds], dtype: np.dtype, empty: Empty) -> dict[Bounds, np.ndarray]:
    """The parts of a tensor that the devices of this process hold, each read once.

    Parts with the same rows are read together, a block of rows at a time. The pieces of a row that go to different
    devices are often too short to be read one by one, and packed numbers would be unpacked for each of them.
    """
    rows: dict[Bounds, list[Bounds]] = {}
    for part in wanted:
        rows.setdefault(part[:1], []).append(part)
    arrays: dict[Bounds, np.ndarray] = {}
    for together in rows.values():
        if len(together) == 1:
            arrays[together[0]] = entry.read(_slices(together[0]), dtype, empty)
            continue
        for part in together:
            arrays[part] = empty(tuple(stop - start for start, stop in part), dtype)
        around = tuple(
            (min(starts), max(stops))
            for starts, stops in (zip(*axis, strict=True) for axis in zip(*together, strict=True))
        )
        for at, block in row_blocks(_slices(around), entry.dtype.itemsize):
            scratch = entry.read(block, dtype)
            for part in together:
                inner = [slice(a - low, b - low) for (a, b), (low, _) in zip(part[1:], around[1:], strict=True)]
                arrays[part][at] = scratch[(slice(None), *inner)]
    return arrays


def _slices(bounds: Bounds) -> Index:
    return tuple(slice(start, stop) for start, stop in bounds)
