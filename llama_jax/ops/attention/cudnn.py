"""Causal attention of whole rows without documents by cuDNN's flash attention, through `jax.nn.dot_product_attention`.

The public function does not support documents. The private function that does gives wrong results for fewer key/value
than query heads in jax up to 0.11.0 (docs/decisions/attention-on-nvidia.md).

Letters: B batch, T length, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from llama_jax import parallel
from llama_jax.cache import QCache
from llama_jax.errors import one_line
from llama_jax.ops.attention.call import Call, Target, refuses_mesh

_DTYPES = (jnp.bfloat16, jnp.float16)


def refuses(call: Call, target: Target) -> str:
    """The reason why cuDNN does not take a call on a target; "" if it does."""
    _, T, N, H = call.q_BTNH.shape
    if call.window is not None:
        return "it takes whole rows without a KV cache"
    if call.segments_BT is not None:
        return "it knows no documents"
    if target.capability < 80:
        return "it takes GPUs of compute capability 8.0 and above"
    if call.q_BTNH.dtype not in _DTYPES:
        return f"it takes bfloat16 and float16, not {call.q_BTNH.dtype}"
    most = 256 if target.capability >= 90 else 128
    if H % 8 or H > most:
        return f"it takes heads of a multiple of 8 up to {most}, not {H}"
    if target.length > 1:
        return "the length of a row is shared by several devices"
    if parallel.device_platform() == "cuda":  # a plan for absent GPUs has none to ask
        reason = _no_plan(parallel.device(), jnp.dtype(call.q_BTNH.dtype), T, N // call.k.shape[1], H)
        if reason:
            return reason
    return refuses_mesh(call, target)


def attend(call: Call) -> jax.Array:
    """The attention of whole rows, (B, T, N, H) in the dtype of q. Each device computes its own rows and heads."""
    assert not isinstance(call.k, QCache) and not isinstance(call.v, QCache)
    return parallel.on_each_part(
        _causal,
        (call.q_BTNH, ("batch", "length", "heads", None)),
        (call.k, ("batch", "kv_heads", "length", None)),
        (call.v, ("batch", "kv_heads", "length", None)),
    )


def _causal(q_BTNH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array) -> jax.Array:
    k_BTKH, v_BTKH = k_BKTH.swapaxes(1, 2), v_BKTH.swapaxes(1, 2)
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn")


@functools.lru_cache(maxsize=64)
def _no_plan(device: jax.Device, dtype: jnp.dtype, T: int, group: int, H: int) -> str:
    """The reason why cuDNN compiles no forward and backward pass of one key/value head on a device; "" if it does.

    Some versions of cuDNN have no plan for a shape; older ones have none at all on CUDA 13. They say so when a program
    is compiled.
    """
    sharding = SingleDeviceSharding(device)
    q = jax.ShapeDtypeStruct((1, T, group, H), dtype, sharding=sharding)
    k = jax.ShapeDtypeStruct((1, 1, T, H), dtype, sharding=sharding)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> tuple[jax.Array, ...]:
        out, back = jax.vjp(_causal, q, k, v)
        return (out, *back(d_out))

    try:
        jax.jit(both).lower(q, k, k, q).compile()
    except Exception as error:  # jax's, XLA's and cuDNN's own classes
        return f"cuDNN has no plan here ({one_line(error)[:120]})"
    return ""
