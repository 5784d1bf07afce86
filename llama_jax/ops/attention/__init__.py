"""Attention and the choice of its backend. Only the plain XLA backend builds masks, from positions and segments."""

from __future__ import annotations

import functools

import jax
from jax import lax

from llama_jax.ops.attention import xla

__all__ = ["attention"]


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

    Whole rows (`aligned`) on a TPU run the splash kernel if it takes their shapes and dtype (`splash.takes`). All else
    runs plain XLA. So does a length axis that is sharded (mesh.context), because the kernel needs all keys on each
    device.
    """
    plain = functools.partial(
        xla.attention,
        q_positions_BT=q_positions_BT,
        k_positions_BS=k_positions_BS,
        q_segments_BT=q_segments_BT,
        k_segments_BS=k_segments_BS,
        aligned=aligned,
        unsplit=unsplit,
    )
    if aligned and unsplit:
        from llama_jax.ops.attention import splash  # importing Pallas takes 0.2 s; sampling does not need it

        if splash.takes(q_BTNH, k_BKSH):
            kernel = functools.partial(splash.attention, segments_BT=q_segments_BT)
            return lax.platform_dependent(q_BTNH, k_BKSH, v_BKSH, tpu=kernel, default=plain)
    return plain(q_BTNH, k_BKSH, v_BKSH)
