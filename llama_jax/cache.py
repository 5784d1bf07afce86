"""The KV cache: keys and values of the tokens so far, for the tokens after them. This module alone decides which slot a
token is stored in.

A forward pass with a cache makes one `Window`, which says where each token is written and how much of the cache is
read. Each layer then calls `write` and `read` with its own arrays. Programs make, copy, park and resize rows with the
functions of this file, and know no axis of its arrays. A cache of another kind (paged, say) changes this file only
(docs/architecture/inference.md#how-to-add).

Letters: B batch, K key/value heads, S slots, T new tokens, H head dim, R rows of one call.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import parallel
from llama_jax.config import ModelConfig

_AXES = ("batch", "kv_heads", "slots", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QCache:
    """Keys or values in 8 bits, with one scale per row, head and slot: value = values * scale.

    Attributes:
        values_BKSH: int8, from -127 to 127.
        scales_BKS: float16 scale of each vector of H values: its largest magnitude / 127.
    """

    values_BKSH: jax.Array
    scales_BKS: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (B, K, S, H) of the values."""
        return self.values_BKSH.shape


Leaf = jax.Array | QCache
# On a CPU, 16-bit floats are stored as uint16, whose updates XLA makes in place. For floats of 16 bits
# it would convert the whole cache to float32 and back in every step.
_BITS = jnp.uint16
# Steps of at most so many tokens are written head by head on TPUs. XLA otherwise lays the heads of a slot next to one
# another, and copies the whole cache in every step (docs/measurements/tpu-compiler.md#quantized-decoding).
_FEW_TOKENS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Rotated keys and values. Slot s of a row holds position s of that row.

    Lengths are not stored. A query attends to the slots up to its own position, so later slots are never read before
    they are overwritten. A row that is used again therefore needs no clearing, and a rejected draft no repair. One
    array a layer lets a decode step update a donated cache in place; a stacked cache carried through a scan would be
    copied whole.

    Attributes:
        k: keys, one array or QCache of shape (B, K, S, H) for each layer.
        v: values, in the same form as the keys.
    """

    k: tuple[Leaf, ...]
    v: tuple[Leaf, ...]

    @property
    def rows(self) -> int:
        """Number of rows (B)."""
        return self.k[0].shape[0]

    @property
    def capacity(self) -> int:
        """Number of positions that a row can hold (S)."""
        return self.k[0].shape[2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """The part of a cache that one forward pass writes and reads, shared by all layers.

    Attributes:
        positions_BT: int32 position of each new token.
        slots_BT: int32 slot that each token is written to; tokens with a slot beyond the capacity are dropped.
        bound: number of slots that are read. It is static, so that a step costs what the cache holds instead of what it
            could hold.
    """

    positions_BT: jax.Array
    slots_BT: jax.Array
    bound: int = dataclasses.field(metadata={"static": True})

    @property
    def key_positions_BS(self) -> jax.Array:
        """int32 position of each key that `read` returns."""
        return jnp.broadcast_to(jnp.arange(self.bound), (self.positions_BT.shape[0], self.bound))


def kv_heads(heads: int, parts: int) -> int:
    """Key/value heads with their repetitions, for tensor parallelism of `parts` devices.

    More devices than there are heads hold each head several times, so that every device has the one that its query
    heads read.
    """
    return parts if parts > heads and parts % heads == 0 else heads


def init_cache(config: ModelConfig, *, batch: int, capacity: int, dtype: jnp.dtype, kv: str = "compute") -> KVCache:
    """An empty cache for `batch` rows of `capacity` positions. Traced under `parallel.use`, it is sharded.

    Args:
        config: the model's shape.
        batch: number of rows.
        capacity: positions that a row can hold.
        dtype: dtype of keys and values for kv="compute".
        kv: one of KV_TYPES: "compute" keeps the dtype of the activations; "int8" stores one byte for each value, and a
            scale of two bytes for each vector of H values.
    """
    shape = (batch, kv_heads(config.num_kv_heads, parallel.axis_size("kv_heads")), capacity, config.head_dim)

    def empty() -> Leaf:
        if kv == "int8":
            return constrained(QCache(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:3], _stored(jnp.float16))))
        return constrained(jnp.zeros(shape, _stored(dtype)))

    layers = range(config.num_layers)
    return KVCache(k=tuple(empty() for _ in layers), v=tuple(empty() for _ in layers))


def _stored(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which a cache of `dtype` is stored: 16-bit floats become uint16 bits on a CPU."""
    on_cpu = parallel.device_platform() == "cpu"
    return jnp.dtype(_BITS if on_cpu and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) else dtype)


def constrained(tree: Any) -> Any:
    """The arrays of a cache, or of a part of it, with their shardings constrained."""
    return jax.tree.map(lambda a: parallel.constrain(a, *_AXES[: a.ndim]), tree)


def shardings(layout: parallel.Layout, shapes: Any) -> Any:
    """The sharding of each array of a cache; `shapes` are its arrays or their ShapeDtypeStructs."""
    return jax.tree.map(lambda a: layout.sharding(_AXES[: a.ndim], a.shape), shapes)


def window(cache: KVCache, positions_BT: jax.Array, live_BT: jax.Array | None, *, bound: int | None = None) -> Window:
    """The window of a forward pass.

    Args:
        cache: the cache.
        positions_BT: position of each new token.
        live_BT: bool, False for padding, whose keys and values are not kept; None for no padding.
        bound: number of slots to read, greater than every position of a live token; by default the capacity.
    """
    slots_BT = positions_BT if live_BT is None else jnp.where(live_BT, positions_BT, cache.capacity)
    return Window(positions_BT, slots_BT, cache.capacity if bound is None else min(bound, cache.capacity))


def write(leaf: Leaf, new_BTKH: jax.Array, at: Window) -> Leaf:
    """Writes new keys or values to the slots of their positions. Slots outside 0..S-1 (padding) are dropped."""
    repeats = leaf.shape[1] // new_BTKH.shape[2]
    if repeats > 1:
        new_BTKH = jnp.repeat(new_BTKH, repeats, axis=2)
    if not isinstance(leaf, QCache):
        return constrained(_scatter(leaf, _as_stored(new_BTKH, leaf, _half(new_BTKH.dtype)), at.slots_BT))
    largest_BTK = jnp.max(jnp.abs(new_BTKH.astype(jnp.float32)), axis=-1)
    scales_BTK = jnp.maximum(largest_BTK / 127, jnp.finfo(jnp.float16).tiny).astype(jnp.float16)
    scaled_BTKH = new_BTKH / scales_BTK[..., None].astype(jnp.float32)
    values_BTKH = jnp.clip(jnp.round(scaled_BTKH), -127, 127).astype(jnp.int8)
    scales_BTK = _as_stored(scales_BTK, leaf.scales_BKS, jnp.float16)
    return constrained(
        QCache(_scatter(leaf.values_BKSH, values_BTKH, at.slots_BT), _scatter(leaf.scales_BKS, scales_BTK, at.slots_BT))
    )


def read(leaf: Leaf, at: Window, dtype: jnp.dtype) -> jax.Array:
    """The first `at.bound` slots of keys or values, (B, K, bound, H). A QCache is dequantized to `dtype`."""
    if not isinstance(leaf, QCache):
        return _as_float(leaf[:, :, : at.bound], _half(dtype))
    values_BKSH = leaf.values_BKSH[:, :, : at.bound].astype(jnp.float32)
    scales_BKS = _as_float(leaf.scales_BKS[:, :, : at.bound], jnp.float16)
    return (values_BKSH * scales_BKS[..., None].astype(jnp.float32)).astype(dtype)


def dtype_in_place(leaf: Leaf) -> jnp.dtype | None:
    """The dtype of stored keys or values, for kernels that read slot s of row b as position s of that row.

    A cache that stores positions elsewhere returns None, and such kernels refuse it.
    """
    return jnp.dtype(leaf.values_BKSH.dtype if isinstance(leaf, QCache) else leaf.dtype)


def _half(dtype: jnp.dtype) -> jnp.dtype:
    """The 16-bit float whose bits a leaf of uint16 holds, for activations of `dtype`."""
    return jnp.dtype(jnp.float16 if dtype == jnp.float16 else jnp.bfloat16)


def _as_stored(new: jax.Array, leaf: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Converts new values to the dtype in which a leaf is stored; a leaf of uint16 stores the bits of `dtype`."""
    return jax.lax.bitcast_convert_type(new.astype(dtype), _BITS) if leaf.dtype == _BITS else new.astype(leaf.dtype)


def _as_float(leaf: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The stored values of a leaf as floats; a leaf of uint16 holds the bits of `dtype`."""
    return jax.lax.bitcast_convert_type(leaf, dtype) if leaf.dtype == _BITS else leaf


def take_rows(cache: KVCache, rows_R: jax.Array, *, bound: int) -> KVCache:
    """The first `bound` positions of the rows with these indices, as a cache of its own.

    An index beyond the last row selects the last row.
    """
    return constrained(jax.tree.map(lambda a: jnp.take(a[:, :, :bound], rows_R, axis=0, mode="clip"), cache))


def put_rows(cache: KVCache, part: KVCache, rows_R: jax.Array) -> KVCache:
    """The cache with `part` written to the first positions of these rows. What does not fit is dropped."""

    def put(a: jax.Array, b: jax.Array) -> jax.Array:
        bound = min(a.shape[2], b.shape[2])
        return a.at[rows_R, :, :bound].set(b[:, :, :bound], mode="drop")

    return constrained(jax.tree.map(put, cache, part))


def resized(part: Any, rows_R: jax.Array, *, capacity: int) -> Any:
    """Arrays of a cache with `capacity` slots, made of the rows with these indices.

    Added slots are zeros, and so is a row whose index is beyond the last row.
    """

    def resize(a: jax.Array) -> jax.Array:
        a = jnp.take(a[:, :, :capacity], rows_R, axis=0, mode="fill", fill_value=0)
        return jnp.pad(a, [(0, 0), (0, 0), (0, capacity - a.shape[2]), (0, 0)][: a.ndim])

    return constrained(jax.tree.map(resize, part))


def _scatter(slots_BKS: jax.Array, new_BTK: jax.Array, slots_BT: jax.Array) -> jax.Array:
    """Writes new_BTK (and its trailing axes) to the slots of each row."""
    rows_B1 = jnp.arange(slots_BKS.shape[0])[:, None]
    index: Any = (rows_B1, slice(None), slots_BT)
    if parallel.device_platform() == "tpu" and slots_BT.shape[1] <= _FEW_TOKENS:
        index = (rows_B1[..., None], jnp.arange(slots_BKS.shape[1]), slots_BT[..., None])
    return slots_BKS.at[index].set(new_BTK, mode="drop", wrap_negative_indices=False)
