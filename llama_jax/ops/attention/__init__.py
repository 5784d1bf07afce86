"""Attention. Masks follow from positions and segments, and are built only in the plain XLA backend."""

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
    """As `xla.attention` says, by the backend that suits.

    That is the splash kernel on a TPU, for whole rows (`aligned`) of shapes that it takes (`splash.takes`), and the
    plain one for all else. Where the length axis is split over devices (mesh.context) it is the plain one too: the
    kernel would need all keys on each device, or a ring of its own.
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
        from llama_jax.ops.attention import splash  # importing Pallas takes 0.2 s, which sampling can do without

        if splash.takes(q_BTNH, k_BKSH):
            kernel = functools.partial(splash.attention, segments_BT=q_segments_BT)
            return lax.platform_dependent(q_BTNH, k_BKSH, v_BKSH, tpu=kernel, default=plain)
    return plain(q_BTNH, k_BKSH, v_BKSH)
