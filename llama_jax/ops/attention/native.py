"""Attention on a CPU by native kernels (ops/cpu): one for one query a row, one for many, and one for the gradient of
that. They read live keys only.

Letters: B batch, T queries, N query heads, K key/value heads, S cache slots, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.cache import QCache
from llama_jax.ops import cpu
from llama_jax.ops.attention.call import Call, Target
from llama_jax.ops.remat import ATTENTION


def refuses(call: Call, target: Target) -> str:
    """The reason why the kernels do not take a call; "" if one does. The first call may compile them."""
    if call.q_BTNH.dtype not in cpu.calls.DTYPES or call.cache_dtype not in (*cpu.calls.DTYPES, jnp.uint16, jnp.int8):
        return f"it takes float32 and bfloat16, not {call.q_BTNH.dtype} with keys in {call.cache_dtype}"
    return "" if cpu.ready() else "the native CPU kernels cannot be used here"


def attend(call: Call) -> jax.Array:
    """Attention of each query to the keys of its document up to its position."""
    if call.window is not None:
        return _over_cache(call)
    assert not isinstance(call.k, QCache) and not isinstance(call.v, QCache)
    B, T = call.positions_BT.shape
    at_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    starts_BT = jnp.zeros_like(at_BT)
    if call.segments_BT is not None:
        changes_BT = call.segments_BT != jnp.roll(call.segments_BT, 1, axis=1)
        starts_BT = jax.lax.cummax(jnp.where(changes_BT.at[:, 0].set(True), at_BT, 0), axis=1)
    return _whole_rows(call.q_BTNH, call.k, call.v, starts_BT, at_BT + 1)


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
    if T == 1 and H % cpu.calls.HEAD == 0:
        return cpu.attend(call.q_BTNH[:, 0], k, v, ends_BT[:, 0], scales)[:, None]
    return cpu.attend_many(call.q_BTNH, k, v, jnp.zeros((B, T), jnp.int32), ends_BT, scales)


@jax.custom_vjp
def _whole_rows(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, low_BT: jax.Array, high_BT: jax.Array
) -> jax.Array:
    """Attention of each query to the keys low_BT to high_BT - 1."""
    return cpu.attend_many(q_BTNH, k_BKSH, v_BKSH, low_BT, high_BT)


def _whole_rows_forward(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, low_BT: jax.Array, high_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out_BTNH, lse_BTN = cpu.attend_many_forward(q_BTNH, k_BKSH, v_BKSH, low_BT, high_BT)
    out_BTNH, lse_BTN = (checkpoint_name(a, ATTENTION) for a in (out_BTNH, lse_BTN))
    return out_BTNH, (q_BTNH, k_BKSH, v_BKSH, low_BT, high_BT, out_BTNH, lse_BTN)


def _whole_rows_backward(saved: tuple[jax.Array, ...], g_BTNH: jax.Array) -> tuple[jax.Array | None, ...]:
    q_BTNH, k_BKSH, v_BKSH, low_BT, high_BT, out_BTNH, lse_BTN = saved
    d_q, d_k, d_v = cpu.attend_many_backward(q_BTNH, k_BKSH, v_BKSH, low_BT, high_BT, out_BTNH, lse_BTN, g_BTNH)
    return d_q, d_k.astype(k_BKSH.dtype), d_v.astype(v_BKSH.dtype), None, None  # integers have none


_whole_rows.defvjp(_whole_rows_forward, _whole_rows_backward)
