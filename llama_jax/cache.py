"""The KV cache: keys and values of the tokens so far, for the tokens after them.

Letters: B batch, K key/value heads, S positions, T new tokens, H head dim.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llama_jax import parallel
from llama_jax.config import ModelConfig

_AXES = ("batch", "kv_heads", None, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Rotated keys and values. Slot s of a row holds position s of that row.

    Lengths are not stored. A query attends to the slots up to its own position, so later slots are never read before
    they are overwritten. One array a layer lets a decode step update a donated cache in place; a stacked cache carried
    through a scan would be copied whole.

    Attributes:
        k: one array (B, K, S, H) a layer.
        v: likewise.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]

    @property
    def capacity(self) -> int:
        """Number of positions that a row can hold (S)."""
        return self.k[0].shape[2]


def init_cache(config: ModelConfig, *, batch: int, capacity: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache for `batch` rows of `capacity` positions. Traced under `parallel.use`, it is sharded."""
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)

    def empty() -> tuple[jax.Array, ...]:
        return tuple(parallel.constrain(jnp.zeros(shape, dtype), *_AXES) for _ in range(config.num_layers))

    return KVCache(k=empty(), v=empty())


def write(slots_BKSH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Writes new keys or values to the slots of their positions. Positions outside 0..S-1 (padding) are dropped."""
    new_BTKH = new_BTKH.astype(slots_BKSH.dtype)
    if slots_BKSH.dtype == jnp.bfloat16:
        out = jax.lax.platform_dependent(slots_BKSH, new_BTKH, positions_BT, cpu=_scatter_bits, default=_scatter)
    else:
        out = _scatter(slots_BKSH, new_BTKH, positions_BT)
    return parallel.constrain(out, *_AXES)


def _scatter(slots_BKSH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    rows = jnp.arange(slots_BKSH.shape[0])[:, None]
    return slots_BKSH.at[rows, :, positions_BT].set(new_BTKH, mode="drop", wrap_negative_indices=False)


def _scatter_bits(slots_BKSH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """The scatter on 16-bit integers. XLA on a CPU would scatter into a float32 copy of the whole cache."""
    slots, new = (jax.lax.bitcast_convert_type(a, jnp.uint16) for a in (slots_BKSH, new_BTKH))
    return jax.lax.bitcast_convert_type(_scatter(slots, new, positions_BT), jnp.bfloat16)
