"""Grouped-query attention in plain XLA: runs everywhere, and is what the kernels are tested against.

Query heads that share a key/value head are merged into the rows of one product, and long inputs are cut into chunks of
queries. Without a cache a chunk multiplies only the keys before its end, which halves the work of a causal pass. How
many chunks' scores exist at a time is up to the compiler's schedule: on a TPU few (docs/design.md), on a CPU all.
Where the length axis is split over devices there are no chunks, and a device holds the scores of all its queries.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, G = N / K, H head dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

# Chunks are a compromise measured on a CPU (docs/design.md): short ones skip more, long ones multiply faster.
_CAUSAL_CHUNK = 128
_MAX_CAUSAL_CHUNKS = 16
_MAX_SCORE_BYTES = 1 << 28  # of one chunk of queries against all keys, on all devices together


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
    """softmax(q k^T / sqrt(H)) v, where a query sees the keys of its segment at positions up to its own.

    Args:
        q_BTNH: queries, already rotated.
        k_BKSH: keys, already rotated.
        v_BKSH: values.
        q_positions_BT: positions within the segment (or within the sequence, where there are no segments).
        k_positions_BS: the same of the keys.
        q_segments_BT: document numbers of a packed row, or None.
        k_segments_BS: the same of the keys.
        aligned: query i and key i are the same token, so that key j > i is never seen (training).
        unsplit: the length axis lies on one device, so that slicing it is free.

    Returns:
        (B, T, N, H) in the type of q; the softmax is float32.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)

    def chunk(q, q_positions, q_segments, k, v, k_positions, k_segments):
        mask = k_positions[:, None, :] <= q_positions[:, :, None]
        if k_segments is not None:
            mask &= k_segments[:, None, :] == q_segments[:, :, None]
        return _chunk(q, k, v, mask)

    if aligned and unsplit and _CAUSAL_CHUNK < T:
        size = max(_CAUSAL_CHUNK, -(-T // _MAX_CAUSAL_CHUNKS))
        # Beyond a few chunks their scores would all wait for the backward pass: recompute them there.
        each = jax.checkpoint(chunk) if T > _CAUSAL_CHUNK * _MAX_CAUSAL_CHUNKS else chunk
        parts = []
        for start in range(0, T, size):
            end = min(start + size, T)
            rows = slice(start, end)
            parts.append(
                each(
                    q_BKGTH[:, :, :, rows],
                    q_positions_BT[:, rows],
                    None if q_segments_BT is None else q_segments_BT[:, rows],
                    k_BKSH[:, :, :end],
                    v_BKSH[:, :, :end],
                    k_positions_BS[:, :end],
                    None if k_segments_BS is None else k_segments_BS[:, :end],
                )
            )
        out_BKGTH = jnp.concatenate(parts, axis=3)
    else:
        every = functools.partial(chunk, k=k_BKSH, v=v_BKSH, k_positions=k_positions_BS, k_segments=k_segments_BS)
        segments = jnp.zeros_like(q_positions_BT) if q_segments_BT is None else q_segments_BT
        chunks = 1
        while unsplit and T % (2 * chunks) == 0 and B * N * (T // chunks) * S * 4 > _MAX_SCORE_BYTES:
            chunks *= 2
        if chunks == 1:
            out_BKGTH = every(q_BKGTH, q_positions_BT, segments)
        else:
            split = [
                jnp.moveaxis(a.reshape(*a.shape[:axis], chunks, T // chunks, *a.shape[axis + 1 :]), axis, 0)
                for a, axis in ((q_BKGTH, 3), (q_positions_BT, 1), (segments, 1))
            ]
            out = lax.map(lambda args: jax.checkpoint(every)(*args), tuple(split))
            out_BKGTH = jnp.moveaxis(out, 0, 3).reshape(B, K, N // K, T, H)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _chunk(q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Scores, softmax and values of one chunk of queries."""
    B, K, G, T, H = q_BKGTH.shape
    S = k_BKSH.shape[2]
    if T == 1 and q_BKGTH.dtype == jnp.float32:
        return _one_query(q_BKGTH, k_BKSH, v_BKSH, mask_BTS)
    precision = lax.Precision.HIGHEST if q_BKGTH.dtype == jnp.float32 else None
    batch = ((0, 1), (0, 1))
    scores = lax.dot_general(
        q_BKGTH.reshape(B, K, G * T, H),
        k_BKSH.astype(q_BKGTH.dtype),
        (((3,), (3,)), batch),
        precision=precision,
        preferred_element_type=jnp.float32,
    ).reshape(B, K, G, T, S)
    scores = jnp.where(mask_BTS[:, None, None], scores * H**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q_BKGTH.dtype)
    out = lax.dot_general(
        weights.reshape(B, K, G * T, S),
        v_BKSH.astype(q_BKGTH.dtype),
        (((3,), (2,)), batch),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return out.reshape(B, K, G, T, H).astype(q_BKGTH.dtype)


def _one_query(q_BKG1H: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_B1S: jax.Array) -> jax.Array:
    """The same for one float32 query, by multiplying and summing.

    As fast as two products, and XLA on a CPU copies a cache of one row four times a step to feed it to a product.
    """
    H = q_BKG1H.shape[-1]
    k_BK1SH, v_BK1SH = (a[:, :, None].astype(jnp.float32) for a in (k_BKSH, v_BKSH))
    scores_BKGS = jnp.sum(q_BKG1H * k_BK1SH, axis=-1) * H**-0.5
    scores_BKGS = jnp.where(mask_B1S[:, None], scores_BKGS, jnp.finfo(jnp.float32).min)
    weights_BKGS = jax.nn.softmax(scores_BKGS, axis=-1)
    return jnp.sum(weights_BKGS[..., None] * v_BK1SH, axis=3)[:, :, :, None]
