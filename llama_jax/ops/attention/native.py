"""Attention of one query a row over a KV cache on a CPU, by the native kernel (ops/cpu): only live keys are read.

Letters: B batch, N query heads, K key/value heads, S cache slots, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama_jax.cache import Leaf, QCache
from llama_jax.ops import cpu

_HEAD = 16  # the kernel takes heads of a multiple of this
_DTYPES = (jnp.float32, jnp.bfloat16)


def takes(q_BTNH: jax.Array, k: Leaf) -> bool:
    """True if the kernel supports these shapes and dtypes and can be used here (`cpu.ready`)."""
    one = q_BTNH.shape[1] == 1 and q_BTNH.shape[-1] % _HEAD == 0 and q_BTNH.dtype in _DTYPES
    return one and (isinstance(k, QCache) or k.dtype in (*_DTYPES, jnp.uint16)) and cpu.ready()


def attention(q_B1NH: jax.Array, k: Leaf, v: Leaf, positions_B1: jax.Array) -> jax.Array:
    """Attention of one query a row to the keys of slots 0 up to its position: (B, 1, N, H) in the dtype of q.

    It has no gradient.

    Args:
        q_B1NH: rotated queries.
        k: keys of the cache; slot s holds position s.
        v: values of the cache, in the same order.
        positions_B1: position of each query.
    """
    lengths_B = positions_B1[:, 0] + 1
    if isinstance(k, QCache) and isinstance(v, QCache):
        scales = (k.scales_BKS, v.scales_BKS)
        return cpu.attend(q_B1NH[:, 0], k.values_BKSH, v.values_BKSH, lengths_B, scales)[:, None]
    assert not isinstance(k, QCache) and not isinstance(v, QCache)
    return cpu.attend(q_B1NH[:, 0], k, v, lengths_B)[:, None]
