"""Attention of one query a row over a KV cache on a CPU, by the native kernel (ops/cpu): only live keys are read.

Letters: B batch, N query heads, K key/value heads, S cache slots, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama_jax.cache import QCache
from llama_jax.ops import cpu
from llama_jax.ops.attention.call import Call, Target

_HEAD = 16  # the kernel takes heads of a multiple of this
_DTYPES = (jnp.float32, jnp.bfloat16)


def refuses(call: Call, target: Target) -> str:
    """The reason why the kernel does not take a call; "" if it does. The first call may compile the kernels."""
    _, T, _, H = call.q_BTNH.shape
    if call.window is None or T != 1:
        return "it takes one query a row and a KV cache"
    if H % _HEAD or call.q_BTNH.dtype not in _DTYPES or call.cache_dtype not in (*_DTYPES, jnp.uint16, jnp.int8):
        return f"it takes heads of a multiple of {_HEAD} in float32 or bfloat16, not {H} in {call.q_BTNH.dtype}"
    return "" if cpu.ready() else "the native CPU kernels cannot be used here"


def attend(call: Call) -> jax.Array:
    """Attention of one query a row to the keys of slots 0 up to its position. It has no gradient."""
    q_BNH, lengths_B = call.q_BTNH[:, 0], call.positions_BT[:, 0] + 1
    k, v = call.k, call.v
    if isinstance(k, QCache) and isinstance(v, QCache):
        return cpu.attend(q_BNH, k.values_BKSH, v.values_BKSH, lengths_B, (k.scales_BKS, v.scales_BKS))[:, None]
    assert not isinstance(k, QCache) and not isinstance(v, QCache)
    return cpu.attend(q_BNH, k, v, lengths_B)[:, None]
