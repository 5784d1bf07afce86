"""Attention of one query a row over a KV cache on a CPU, by the native kernel (ops/cpu): only live keys are read.

Letters: B batch, N query heads, K key/value heads, S cache slots, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama_jax.ops import cpu

_HEAD = 16  # the kernel takes heads of a multiple of this
_DTYPES = (jnp.float32, jnp.bfloat16)


def takes(q_B1NH: jax.Array, k_BKSH: jax.Array) -> bool:
    """Returns whether the kernel takes these shapes and dtypes, and can be used here (`cpu.ready`)."""
    one = q_B1NH.shape[1] == 1 and q_B1NH.shape[-1] % _HEAD == 0
    return one and q_B1NH.dtype in _DTYPES and k_BKSH.dtype in _DTYPES and cpu.ready()


def attention(q_B1NH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, positions_B1: jax.Array) -> jax.Array:
    """Attention of the query at each position to the keys of slots 0 up to it: (B, 1, N, H) in the dtype of q.

    Slot s must hold the key of position s, as in a KV cache. It has no gradient. Arguments as `xla.attention` has them.
    """
    return cpu.attend(q_B1NH[:, 0], k_BKSH, v_BKSH, positions_B1[:, 0] + 1)[:, None]
