"""Attention and the choice of its backend. Only the plain XLA backend builds masks, from positions and segments."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax import parallel
from llama_jax.cache import Leaf, Window, read
from llama_jax.ops.attention import native, xla

__all__ = ["attention", "cached_attention"]


def cached_attention(q_BTNH: jax.Array, k: Leaf, v: Leaf, at: Window) -> jax.Array:
    """Attention of new tokens to a KV cache that holds their keys and values already, (B, T, N, H) in the dtype of q.

    One query a row on a CPU runs the native kernel, which reads the live keys only (`native.takes`). Everything else
    runs plain XLA over the slots of the window.

    Args:
        q_BTNH: queries, already rotated.
        k: keys of all slots of the layer.
        v: values of all slots of the layer.
        at: the window of the pass.
    """
    if native.takes(q_BTNH, k):
        return native.attention(q_BTNH, k, v, at.positions_BT)
    return xla.attention(
        q_BTNH,
        read(k, at, q_BTNH.dtype),
        read(v, at, q_BTNH.dtype),
        q_positions_BT=at.positions_BT,
        k_positions_BS=at.key_positions_BS,
        q_segments_BT=None,
        k_segments_BS=None,
        aligned=False,
        unsplit=parallel.axis_size("length") == 1,
    )


def attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    *,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array | None,
    k_segments_BS: jax.Array | None,
    aligned: bool,
    unsplit: bool = True,
) -> jax.Array:
    """Attention with the arguments and results of `xla.attention`, by the best backend for them.

    Whole rows (`aligned`) on a TPU run the splash kernel if it takes their shapes and dtype (`splash.takes`).
    Everything else runs plain XLA. If the length axis is sharded, both gather the keys and values of a row on each of
    its devices.
    """
    if aligned:
        k_BKSH, v_BKSH = _repeated(k_BKSH), _repeated(v_BKSH)
    plain = functools.partial(
        xla.attention,
        q_positions_BT=q_positions_BT,
        k_positions_BS=k_positions_BS,
        q_segments_BT=q_segments_BT,
        k_segments_BS=k_segments_BS,
        aligned=aligned,
        unsplit=unsplit,
    )
    if aligned:
        from llama_jax.ops.attention import splash  # importing Pallas takes 0.2 s; sampling does not need it

        if splash.takes(q_BTNH, k_BKSH):
            kernel = functools.partial(splash.attention, segments_BT=q_segments_BT)
            return lax.platform_dependent(q_BTNH, k_BKSH, v_BKSH, tpu=kernel, default=plain)
    return plain(q_BTNH, k_BKSH, v_BKSH)


def _repeated(k_BKSH: jax.Array) -> jax.Array:
    """The key/value heads, repeated if tensor parallelism has more parts than heads, so that each part has one."""
    parts, K = parallel.axis_size("heads"), k_BKSH.shape[1]
    if parts <= K or parts % K:
        return k_BKSH
    return parallel.constrain(jnp.repeat(k_BKSH, parts // K, axis=1), "batch", "kv_heads", "length", None)
