"""Grouped-query attention in plain XLA. It runs everywhere, and the kernels are tested against it.

The query heads that share a key/value head are merged into the rows of one product, and long inputs are split into
chunks of queries. Without a cache a chunk multiplies only the keys before its end, which halves the work of a causal
pass. The compiler's schedule decides how many chunks have scores in memory at a time: few on a TPU, all on a CPU
(docs/measurements/cpu-products.md#attention-in-chunks). If the length axis is sharded there are no chunks, and a device
holds the scores of all its queries.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, G = N / K, H head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from llama_jax import parallel
from llama_jax.cache import QCache, read
from llama_jax.ops.attention.call import Call, Target
from llama_jax.ops.remat import ATTENTION

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


class _Residuals(NamedTuple):
    """The arrays that the backward pass reads; lse_BKGT1 is the log-sum-exp of the scores of each query."""

    queries: _Queries
    keys: _Keys
    out_BKGTH: jax.Array
    lse_BKGT1: jax.Array


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
        k_BKSH, v_BKSH = _in_memory((call.k, call.v))
        keys = _Keys(k_BKSH, v_BKSH, call.positions_BT, call.segments_BT)
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
        outputs.append(_attend(chunk, prefix))
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
        return _attend(queries, keys)

    def split(a: jax.Array, axis: int) -> jax.Array:
        return jnp.moveaxis(a.reshape(*a.shape[:axis], chunks, T // chunks, *a.shape[axis + 1 :]), axis, 0)

    segments = None if queries.segments_BT is None else split(queries.segments_BT, 1)
    stacked = _Queries(split(queries.q_BKGTH, 3), split(queries.positions_BT, 1), segments)
    out = lax.map(lambda chunk: _attend(chunk, keys), stacked)
    return jnp.moveaxis(out, 0, 3).reshape(B, K, G, T, H)


def _mask(queries: _Queries, keys: _Keys) -> jax.Array:
    """True for the keys that a query attends to, (B, T, S): those of its segment up to its position."""
    mask_BTS = keys.positions_BS[:, None, :] <= queries.positions_BT[:, :, None]
    if keys.segments_BS is not None and queries.segments_BT is not None:
        mask_BTS &= keys.segments_BS[:, None, :] == queries.segments_BT[:, :, None]
    return mask_BTS


def _attend(queries: _Queries, keys: _Keys) -> jax.Array:
    """Softmax of the masked scores, times the values, for one chunk of queries."""
    q = queries.q_BKGTH
    if q.shape[3] == 1 and q.dtype == jnp.float32:
        return _one_query(q, keys.k_BKSH, keys.v_BKSH, _mask(queries, keys))
    return _attention(queries, keys._replace(k_BKSH=keys.k_BKSH.astype(q.dtype), v_BKSH=keys.v_BKSH.astype(q.dtype)))


@jax.custom_vjp
def _attention(queries: _Queries, keys: _Keys) -> jax.Array:
    """The attention of queries that each have a key. The gradient would be wrong for a query without one."""
    return _attention_forward(queries, keys)[0]


def _attention_forward(queries: _Queries, keys: _Keys) -> tuple[jax.Array, _Residuals]:
    scores = _masked_scores(queries, keys)
    peak = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    dtype = queries.q_BKGTH.dtype
    out = (_products(weights.astype(dtype), keys.v_BKSH, 2) / total).astype(dtype)
    out, lse = (checkpoint_name(a, ATTENTION) for a in (out, peak + jnp.log(total)))
    return out, _Residuals(queries, keys, out, lse)


def _attention_backward(saved: _Residuals, g_BKGTH: jax.Array) -> tuple[_Queries, _Keys]:
    """The gradient from weights that are computed again (Dao, arXiv:2307.08691, algorithm 2)."""
    (q, *_), (k, v, *_), out, lse = saved
    weights = jnp.exp(_masked_scores(saved.queries, saved.keys) - lse)
    mean = jnp.sum(g_BKGTH.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_scores = (weights * (_products(g_BKGTH, v, 3) - mean) * q.shape[-1] ** -0.5).astype(q.dtype)
    d_q = _products(d_scores, k, 2).astype(q.dtype)
    d_k = _summed_over_queries(d_scores, q).astype(k.dtype)
    d_v = _summed_over_queries(weights.astype(q.dtype), g_BKGTH).astype(v.dtype)
    return _Queries(d_q, None, None), _Keys(d_k, d_v, None, None)  # type: ignore[arg-type]  # integers have none


_attention.defvjp(_attention_forward, _attention_backward)


def _masked_scores(queries: _Queries, keys: _Keys) -> jax.Array:
    """The scores in float32, (B, K, G, T, S)."""
    q = queries.q_BKGTH
    scores = _products(q, keys.k_BKSH, 3) * q.shape[-1] ** -0.5
    return jnp.where(_mask(queries, keys)[:, None, None], scores, jnp.finfo(jnp.float32).min)


def _products(a_BKGTx: jax.Array, b_BKSH: jax.Array, axis: int) -> jax.Array:
    """The products of each query's vector with the keys or values, summed over `axis` of these, in float32."""
    B, K, G, T, _ = a_BKGTx.shape
    product = lax.dot_general(
        a_BKGTx.reshape(B, K, G * T, -1),
        b_BKSH,
        (((3,), (axis,)), ((0, 1), (0, 1))),
        precision=_precision(a_BKGTx.dtype),
        preferred_element_type=jnp.float32,
    )
    return product.reshape(B, K, G, T, -1)


def _summed_over_queries(a_BKGTS: jax.Array, b_BKGTH: jax.Array) -> jax.Array:
    """The products of numbers (T, S) with vectors (T, H), summed over all queries: (B, K, S, H) in float32.

    XLA on a CPU has no bfloat16 product whose first operand is transposed. It transposes the first operand in memory
    if two axes are summed, so the narrow one goes first, and the barrier keeps it there.
    """
    precision = _precision(b_BKGTH.dtype)
    axes = (((2, 3), (2, 3)), ((0, 1), (0, 1)))
    sums_BKHS = lax.dot_general(b_BKGTH, a_BKGTS, axes, precision=precision, preferred_element_type=jnp.float32)
    return _in_memory(sums_BKHS).swapaxes(2, 3)


def _in_memory(arrays: Any) -> Any:
    """The arrays, which XLA on a CPU transposes in memory before a product and not in it.

    It has no bfloat16 product with a transposed operand, and would widen both to float32.
    """
    return lax.optimization_barrier(arrays) if parallel.device_platform() == "cpu" else arrays


def _precision(dtype: jnp.dtype) -> lax.Precision | None:
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


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
