"""Grouped-query attention in plain XLA. It runs everywhere, and the kernels are tested against it.

The query heads that share a key/value head are merged into the rows of one product, and long inputs are split into
chunks of queries. Without a cache a chunk multiplies only the keys before its end, which halves the work of a causal
pass. The compiler's schedule decides how many chunks have scores in memory at a time: few on a TPU, all on a CPU
(docs/measurements/cpu-products.md#attention-in-chunks). If the length axis is sharded there are no chunks, and a device
holds the scores of all its queries.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, G = N / K, H head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax import parallel
from llama_jax.cache import QCache, read
from llama_jax.ops.attention.call import Call, Target

# Query rows of a causal chunk, and the most chunks. Short chunks skip more keys and long ones multiply faster; the
# values were measured on a CPU (docs/measurements/cpu-products.md#attention-in-chunks).
_CAUSAL_CHUNK = 128
_MAX_CAUSAL_CHUNKS = 16
_MAX_SCORE_BYTES = 1 << 28  # float32 scores of one chunk of queries and all keys, on all devices together


class _Queries(NamedTuple):
    """The queries (B, K, G, T, H), with the positions and segments (or None) that their mask needs."""

    q_BKGTH: jax.Array
    positions_BT: jax.Array
    segments_BT: jax.Array | None


class _Keys(NamedTuple):
    """The keys and values (B, K, S, H), with the positions and segments (or None) that their mask needs."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    positions_BS: jax.Array
    segments_BS: jax.Array | None


def refuses(call: Call, target: Target) -> str:
    """Nothing is refused: the result is ""."""
    return ""


def attend(call: Call) -> jax.Array:
    """The attention of any call, (B, T, N, H) in the dtype of q. The softmax is computed in float32."""
    B, T, N, H = call.q_BTNH.shape
    K = call.k.shape[1]
    q_BKGTH = call.q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    queries = _Queries(q_BKGTH, call.positions_BT, call.segments_BT)
    if call.window is not None:
        k_BKSH, v_BKSH = (read(leaf, call.window, call.q_BTNH.dtype) for leaf in (call.k, call.v))
        out_BKGTH = _all_keys(queries, _Keys(k_BKSH, v_BKSH, call.window.key_positions_BS, None))
    else:
        assert not isinstance(call.k, QCache) and not isinstance(call.v, QCache)
        keys = _Keys(call.k, call.v, call.positions_BT, call.segments_BT)
        if parallel.axis_size("length") > 1:
            out_BKGTH = _split_length(queries, keys)
        elif T > _CAUSAL_CHUNK:
            out_BKGTH = _causal_prefixes(queries, keys)
        else:
            out_BKGTH = _all_keys(queries, keys)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _split_length(queries: _Queries, keys: _Keys) -> jax.Array:
    """Attention of rows whose length is sharded: each device's own queries, in chunks, to all keys of the row."""
    tokens = ("batch", "length")
    arrays: list[tuple[jax.Array, tuple[str | None, ...]]] = [
        (queries.q_BKGTH, ("batch", "kv_heads", None, "length", None)),
        (queries.positions_BT, tokens),
        (keys.k_BKSH, ("batch", "kv_heads", "length", None)),
        (keys.v_BKSH, ("batch", "kv_heads", "length", None)),
        (keys.positions_BS, tokens),
    ]
    if queries.segments_BT is not None and keys.segments_BS is not None:
        arrays += [(queries.segments_BT, tokens), (keys.segments_BS, tokens)]

    def own(
        q: jax.Array,
        q_positions: jax.Array,
        k: jax.Array,
        v: jax.Array,
        k_positions: jax.Array,
        q_segments: jax.Array | None = None,
        k_segments: jax.Array | None = None,
    ) -> jax.Array:
        k, v = (parallel.all_gathered(a, "length", 2) for a in (k, v))
        positions = parallel.all_gathered(k_positions, "length", 1)
        segments = None if k_segments is None else parallel.all_gathered(k_segments, "length", 1)
        return _all_keys(_Queries(q, q_positions, q_segments), _Keys(k, v, positions, segments))

    return parallel.on_each_part(own, *arrays)


def _causal_prefixes(queries: _Queries, keys: _Keys) -> jax.Array:
    """Attention of whole rows in chunks of queries, each with the keys up to its end: (B, K, G, T, H)."""
    T = queries.positions_BT.shape[1]
    size = max(_CAUSAL_CHUNK, -(-T // _MAX_CAUSAL_CHUNKS))
    # With many chunks, keeping all their scores for the backward pass would take too much memory: recompute them.
    attend = jax.checkpoint(_masked) if T > _CAUSAL_CHUNK * _MAX_CAUSAL_CHUNKS else _masked
    outputs = []
    for start in range(0, T, size):
        end = min(start + size, T)
        chunk = _Queries(
            queries.q_BKGTH[:, :, :, start:end],
            queries.positions_BT[:, start:end],
            None if queries.segments_BT is None else queries.segments_BT[:, start:end],
        )
        prefix = _Keys(
            keys.k_BKSH[:, :, :end],
            keys.v_BKSH[:, :, :end],
            keys.positions_BS[:, :end],
            None if keys.segments_BS is None else keys.segments_BS[:, :end],
        )
        outputs.append(attend(chunk, prefix))
    return jnp.concatenate(outputs, axis=3)


def _all_keys(queries: _Queries, keys: _Keys) -> jax.Array:
    """Attention of every query to all keys: (B, K, G, T, H).

    The queries are scanned in as many chunks as keep the scores of one below _MAX_SCORE_BYTES.
    """
    B, K, G, T, H = queries.q_BKGTH.shape
    S = keys.positions_BS.shape[1]
    chunks = 1
    while T % (2 * chunks) == 0 and B * K * G * (T // chunks) * S * 4 > _MAX_SCORE_BYTES:
        chunks *= 2
    if chunks == 1:
        return _masked(queries, keys)

    def split(a: jax.Array, axis: int) -> jax.Array:
        return jnp.moveaxis(a.reshape(*a.shape[:axis], chunks, T // chunks, *a.shape[axis + 1 :]), axis, 0)

    segments = None if queries.segments_BT is None else split(queries.segments_BT, 1)
    stacked = _Queries(split(queries.q_BKGTH, 3), split(queries.positions_BT, 1), segments)
    out = lax.map(jax.checkpoint(lambda chunk: _masked(chunk, keys)), stacked)
    return jnp.moveaxis(out, 0, 3).reshape(B, K, G, T, H)


def _masked(queries: _Queries, keys: _Keys) -> jax.Array:
    """Attention of one chunk of queries under the mask of positions and segments."""
    mask_BTS = keys.positions_BS[:, None, :] <= queries.positions_BT[:, :, None]
    if keys.segments_BS is not None and queries.segments_BT is not None:
        mask_BTS &= keys.segments_BS[:, None, :] == queries.segments_BT[:, :, None]
    return _attend(queries.q_BKGTH, keys.k_BKSH, keys.v_BKSH, mask_BTS)


def _attend(q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Softmax of the masked scores, times the values."""
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
    """Attention of one float32 query by elementwise products and sums.

    It is as fast as two matrix products, for which XLA on a CPU would copy the cache of a row four times a step.
    """
    H = q_BKG1H.shape[-1]
    k_BK1SH, v_BK1SH = (a[:, :, None].astype(jnp.float32) for a in (k_BKSH, v_BKSH))
    scores_BKGS = jnp.sum(q_BKG1H * k_BK1SH, axis=-1) * H**-0.5
    scores_BKGS = jnp.where(mask_B1S[:, None], scores_BKGS, jnp.finfo(jnp.float32).min)
    weights_BKGS = jax.nn.softmax(scores_BKGS, axis=-1)
    return jnp.sum(weights_BKGS[..., None] * v_BK1SH, axis=3)[:, :, :, None]
