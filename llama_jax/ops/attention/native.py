"""Attention on a CPU by native kernels (ops/cpu): one for one query a row, and one for many. They read live keys only.

Letters: B batch, T queries, N query heads, K key/value heads, S cache slots, H head dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.cache import QCache
from llama_jax.ops import cpu
from llama_jax.ops.attention import xla
from llama_jax.ops.attention.call import Call, Target

_HEAD = 16  # the kernel of one query takes heads of a multiple of this
_DTYPES = (jnp.float32, jnp.bfloat16)


def refuses(call: Call, target: Target) -> str:
    """The reason why the kernels do not take a call; "" if one does. The first call may compile them."""
    if call.q_BTNH.dtype not in _DTYPES or call.cache_dtype not in (*_DTYPES, jnp.uint16, jnp.int8):
        return f"it takes float32 and bfloat16, not {call.q_BTNH.dtype} with keys in {call.cache_dtype}"
    return "" if cpu.ready() else "the native CPU kernels cannot be used here"


def attend(call: Call) -> jax.Array:
    """Attention of each query to the keys of its document up to its position. The gradient is that of plain XLA."""
    if call.window is not None:
        return _over_cache(call)
    arrays = [a for a in (call.q_BTNH, call.k, call.v, call.positions_BT, call.segments_BT) if a is not None]
    return _whole_rows(*arrays)


def _over_cache(call: Call) -> jax.Array:
    B, T, _, H = call.q_BTNH.shape
    assert call.window is not None
    k, v, scales = call.k, call.v, None
    if isinstance(k, QCache) and isinstance(v, QCache):
        scales = k.scales_BKS, v.scales_BKS
        k, v = k.values_BKSH, v.values_BKSH
    assert not isinstance(k, QCache) and not isinstance(v, QCache)
    # Padding has a slot beyond the cache, and no keys.
    ends_BT = jnp.where(call.window.slots_BT < call.k.shape[2], call.positions_BT + 1, 0)
    if T == 1 and H % _HEAD == 0:
        return cpu.attend(call.q_BTNH[:, 0], k, v, ends_BT[:, 0], scales)[:, None]
    return cpu.attend_many(call.q_BTNH, k, v, jnp.zeros((B, T), jnp.int32), ends_BT, scales)


def _call(
    q: jax.Array, k: jax.Array, v: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None = None
) -> Call:
    return Call(q, k, v, positions_BT, segments_BT)


@jax.custom_vjp
def _whole_rows(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Attention of whole rows. A query's keys are those from the first of its document to its own."""
    B, T = positions_BT.shape
    at_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    starts_BT = jnp.zeros_like(at_BT)
    if segments_BT is not None:
        changes_BT = segments_BT != jnp.roll(segments_BT, 1, axis=1)
        starts_BT = jax.lax.cummax(jnp.where(changes_BT.at[:, 0].set(True), at_BT, 0), axis=1)
    return cpu.attend_many(q_BTNH, k_BKSH, v_BKSH, starts_BT, at_BT + 1)


def _whole_rows_forward(*arrays: Any) -> Any:  # kernels have no gradient
    return jax.vjp(lambda *arrays: xla.attend(_call(*arrays)), *arrays)


_whole_rows.defvjp(_whole_rows_forward, lambda pullback, g: pullback(g))
