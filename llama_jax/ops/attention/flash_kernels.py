"""Flash attention for GPUs (Dao, arXiv:2307.08691), forward and backward, in Pallas for Triton.

Each query attends to one range of keys, from a first to a last one. Ranges express packed documents (from the start of
the document to the query), whole rows, and a chunk of a prompt over a KV cache (slots up to the position). A block of
queries visits only the blocks of keys between the smallest first and the largest last key of its queries, and a block
of keys in the backward pass only the queries that may see it. Blocks in which every pair attends skip the mask. The
query heads of a key/value head share it without a copy.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, G = N / K, H head dim, I blocks of
queries, J blocks of keys.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_HIDDEN = -1e30  # score of a masked pair; finite, so that a row without keys gives no NaN
_LOG2E = math.log2(math.e)  # GPUs compute powers of two, so that scores are multiplied by log2(e)


class Blocks(NamedTuple):
    """The tiling of the kernels. Products of Triton need blocks of at least 16.

    Attributes:
        queries: queries of a block in the forward pass.
        keys: keys that are multiplied at once in the forward pass.
        backward: queries and keys of a block in the backward pass.
        stages: blocks of keys that are in flight from memory in the forward pass.
        interpret: run as plain XLA operations, slowly, on any platform.
    """

    queries: int = 64
    keys: int = 64
    backward: int = 64
    stages: int = 3
    interpret: bool = False


def attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    first_BT: jax.Array,
    last_BT: jax.Array,
    blocks: Blocks,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the keys first..last of each query: (B, T, N, H) in the dtype of q.

    Lengths that are no multiples of the blocks, and head dimensions that are no powers of two, are padded with zeros.

    Args:
        q_BTNH: queries, already rotated.
        k_BKSH: keys, already rotated.
        v_BKSH: values.
        first_BT: int32 index of the first key of each query.
        last_BT: int32 index of the last key of each query. A query whose last key is before its first gets an arbitrary
            result.
        blocks: the tiling.
    """
    T, S, H = q_BTNH.shape[1], k_BKSH.shape[2], q_BTNH.shape[3]
    blocks = blocks._replace(
        queries=min(blocks.queries, max(16, pl.next_power_of_2(T))),
        keys=min(blocks.keys, max(16, pl.next_power_of_2(S))),
        backward=min(blocks.backward, max(16, pl.next_power_of_2(max(T, S)))),
    )
    width = max(16, pl.next_power_of_2(H)) - H
    more_T = -T % max(blocks.queries, blocks.backward)
    more_S = -S % max(blocks.keys, blocks.backward)
    q = jnp.pad(q_BTNH, [(0, 0), (0, more_T), (0, 0), (0, width)])
    k, v = (jnp.pad(a, [(0, 0), (0, 0), (0, more_S), (0, width)]) for a in (k_BKSH, v_BKSH))
    first = jnp.pad(first_BT, [(0, 0), (0, more_T)], constant_values=S)
    last = jnp.pad(jnp.minimum(last_BT, S - 1), [(0, 0), (0, more_T)], constant_values=-1)
    return _padded(q, k, v, first, last, H**-0.5, blocks)[:, :T, :, :H]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _padded(
    q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, last: jax.Array, scale: float, blocks: Blocks
) -> jax.Array:
    """The attention of arrays whose lengths are multiples of the blocks."""
    return _forward(q, k, v, first, last, scale, blocks)[0]


def _with_residuals(
    q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, last: jax.Array, scale: float, blocks: Blocks
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out, lse = _forward(q, k, v, first, last, scale, blocks)
    # remat="dots", "attention" and "offload" (ops/remat.py) keep both, so that the forward kernel runs once.
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, (q, k, v, first, last, out, lse)


# A jit of its own: jax 0.10 drops an unused jit when it recomputes a layer, but no unused kernel.
@functools.partial(jax.jit, static_argnums=(5, 6))
def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, last: jax.Array, scale: float, blocks: Blocks
) -> tuple[jax.Array, jax.Array]:
    """The result, and the base-2 logarithm of each query's sum of exponentials, (B, N, T) in float32."""
    B, T, N, H = q.shape
    K, S = k.shape[1], k.shape[2]
    bounds_BI4 = _visited_keys(first, last, blocks.queries, blocks.keys)
    per_block = pl.BlockSpec((None, blocks.queries), lambda i, n, b: (b, i))
    rows = pl.BlockSpec((None, blocks.queries, None, H), lambda i, n, b: (b, i, n, 0))
    keys = pl.BlockSpec((None, None, S, H), lambda i, n, b: (b, n // (N // K), 0, 0))
    return pl.pallas_call(
        functools.partial(_forward_kernel, scale=scale, step=blocks.keys),
        grid=(T // blocks.queries, N, B),
        in_specs=[rows, keys, keys, per_block, per_block, pl.BlockSpec((None, None, 4), lambda i, n, b: (b, i, 0))],
        out_specs=[rows, pl.BlockSpec((None, None, blocks.queries), lambda i, n, b: (b, n, i))],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=blocks.stages),
        interpret=blocks.interpret,
        name="flash_forward",
    )(q, k, v, first, last, bounds_BI4)


def _forward_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    first_ref: Any,
    last_ref: Any,
    bounds_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    scale: float,
    step: int,
) -> None:
    """One block of queries of one head."""
    q, first, last = q_ref[...], first_ref[...], last_ref[...]

    def body(
        j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array], masked: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        out, largest, total = carry
        k = k_ref[pl.ds(j * step, step), :]
        scores = plgpu.dot(q, k.T) * (scale * _LOG2E)
        if masked:
            scores = jnp.where(_seen(first, last, j * step, step), scores, _HIDDEN)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=1))
        correction = jnp.exp2(largest - new_largest)
        weights = jnp.exp2(scores - new_largest[:, None])
        v = v_ref[pl.ds(j * step, step), :]
        out = out * correction[:, None] + plgpu.dot(weights.astype(v.dtype), v)
        return out, new_largest, total * correction + jnp.sum(weights, axis=1)

    rows, H = q.shape
    start = (
        jnp.zeros((rows, H), jnp.float32),
        jnp.full((rows,), _HIDDEN, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    out, largest, total = _in_stages(bounds_ref, body, start)
    total = jnp.where(total == 0, 1.0, total)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = largest + jnp.log2(total)


def _backward(
    scale: float, blocks: Blocks, residuals: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array | None, ...]:
    """The gradients of queries, keys and values, by one kernel for the queries and one for keys and values."""
    q, k, v, first, last, out, lse = residuals
    B, T, N, H = q.shape
    K, S, size = k.shape[1], k.shape[2], blocks.backward
    G = N // K
    delta = jnp.einsum("btnh,btnh->bnt", out, d_out, preferred_element_type=jnp.float32)
    parameters = plgpu.CompilerParams(num_warps=4, num_stages=2)

    rows = pl.BlockSpec((None, size, None, H), lambda i, n, b: (b, i, n, 0))
    keys = pl.BlockSpec((None, None, S, H), lambda i, n, b: (b, n // G, 0, 0))
    per_query = pl.BlockSpec((None, None, size), lambda i, n, b: (b, n, i))
    per_block = pl.BlockSpec((None, size), lambda i, n, b: (b, i))
    bounds = pl.BlockSpec((None, None, 4), lambda i, n, b: (b, i, 0))
    dq = pl.pallas_call(
        functools.partial(_queries_kernel, scale=scale, step=size),
        grid=(T // size, N, B),
        in_specs=[rows, keys, keys, rows, per_query, per_query, per_block, per_block, bounds],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=parameters,
        interpret=blocks.interpret,
        name="flash_backward_queries",
    )(q, k, v, d_out, lse, delta, first, last, _visited_keys(first, last, size, size))

    group = pl.BlockSpec((None, T, G, H), lambda j, n, b: (b, 0, n, 0))
    block = pl.BlockSpec((None, None, size, H), lambda j, n, b: (b, n, j, 0))
    per_query = pl.BlockSpec((None, G, T), lambda j, n, b: (b, n, 0))
    whole = pl.BlockSpec((None, T), lambda j, n, b: (b, 0))
    bounds = pl.BlockSpec((None, None, 4), lambda j, n, b: (b, j, 0))
    dk, dv = pl.pallas_call(
        functools.partial(_keys_kernel, scale=scale, step=size, group=G),
        grid=(S // size, K, B),
        in_specs=[group, block, block, group, per_query, per_query, whole, whole, bounds],
        out_specs=[block, block],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=parameters,
        interpret=blocks.interpret,
        name="flash_backward_keys",
    )(q, k, v, d_out, lse, delta, first, last, _visiting_queries(first, last, size, S // size))
    return dq, dk, dv, None, None


_padded.defvjp(_with_residuals, _backward)


def _queries_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    d_out_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    first_ref: Any,
    last_ref: Any,
    bounds_ref: Any,
    dq_ref: Any,
    *,
    scale: float,
    step: int,
) -> None:
    """The gradient of one block of queries of one head."""
    q, d_out, lse, delta = q_ref[...], d_out_ref[...], lse_ref[...], delta_ref[...]
    first, last = first_ref[...], last_ref[...]

    def body(j: jax.Array, dq: jax.Array, masked: bool) -> jax.Array:
        k, v = k_ref[pl.ds(j * step, step), :], v_ref[pl.ds(j * step, step), :]
        scores = plgpu.dot(q, k.T) * (scale * _LOG2E)
        if masked:
            scores = jnp.where(_seen(first, last, j * step, step), scores, _HIDDEN)
        weights = jnp.exp2(scores - lse[:, None])
        d_scores = weights * (plgpu.dot(d_out, v.T) - delta[:, None])
        return dq + plgpu.dot(d_scores.astype(k.dtype), k)

    dq = _in_stages(bounds_ref, body, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _keys_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    d_out_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    first_ref: Any,
    last_ref: Any,
    bounds_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    scale: float,
    step: int,
    group: int,
) -> None:
    """The gradients of one block of keys and values, summed over the query heads of their group."""
    k, v = k_ref[...], v_ref[...]
    start = pl.program_id(0) * step

    def body(
        i: jax.Array, carry: tuple[jax.Array, jax.Array], masked: bool, head: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        dk, dv = carry
        rows = pl.ds(i * step, step)
        q, d_out = q_ref[rows, head, :], d_out_ref[rows, head, :]
        lse, delta = lse_ref[head, rows], delta_ref[head, rows]
        scores = plgpu.dot(k, q.T) * (scale * _LOG2E)
        if masked:
            seen = _seen(first_ref[rows], last_ref[rows], start, step, transposed=True)
            scores = jnp.where(seen, scores, _HIDDEN)
        weights = jnp.exp2(scores - lse[None, :])
        dv += plgpu.dot(weights.astype(d_out.dtype), d_out)
        d_scores = weights * (plgpu.dot(v, d_out.T) - delta[None, :])
        return dk + plgpu.dot(d_scores.astype(q.dtype), q), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = _in_stages(bounds_ref, body, (zeros, zeros), heads=group)
    dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _in_stages(bounds_ref: Any, body: Callable[..., Any], carry: Any, heads: int = 0) -> Any:
    """Runs body(block, carry, masked) over the blocks of a range of four bounds (see `_range`).

    With `heads`, each stage runs over the blocks of every head, and body gets the head as its last argument.
    """
    for stage, masked in ((0, True), (1, False), (2, True)):
        low, high = bounds_ref[stage], bounds_ref[stage + 1]

        def of_head(at: jax.Array, carry: Any, low: Any = low, count: Any = high - low, masked: bool = masked) -> Any:
            return body(low + lax.rem(at, count), carry, masked, lax.div(at, count))

        if heads:
            carry = lax.fori_loop(0, (high - low) * heads, of_head, carry)
        else:
            carry = lax.fori_loop(low, high, functools.partial(body, masked=masked), carry)
    return carry


def _seen(first: jax.Array, last: jax.Array, start: jax.Array, count: int, *, transposed: bool = False) -> jax.Array:
    """The mask (queries, keys) of the pairs of a block that attend; (keys, queries) if transposed."""
    keys = start + jnp.arange(count, dtype=jnp.int32)
    if transposed:
        return (first[None, :] <= keys[:, None]) & (keys[:, None] <= last[None, :])
    return (first[:, None] <= keys[None, :]) & (keys[None, :] <= last[:, None])


def _block_ranges(first_BT: jax.Array, last_BT: jax.Array, queries: int, keys: int) -> tuple[jax.Array, jax.Array]:
    """The first block of keys of each block of queries, and the one after its last: (B, I) each, int32."""
    B, T = first_BT.shape
    some = first_BT <= last_BT
    first_BI = jnp.where(some, first_BT, jnp.iinfo(jnp.int32).max).reshape(B, T // queries, queries).min(axis=2)
    last_BI = jnp.where(some, last_BT, -1).reshape(B, T // queries, queries).max(axis=2)
    return jnp.where(last_BI < 0, 0, first_BI // keys), jnp.where(last_BI < 0, 0, last_BI // keys + 1)


def _range(low: jax.Array, full: jax.Array, full_end: jax.Array, high: jax.Array) -> jax.Array:
    """Ranges of blocks low..high as four bounds, int32. Every pair of the blocks full..full_end attends."""
    full = jnp.clip(full, low, high)
    return jnp.stack([low, full, jnp.clip(full_end, full, high), high], axis=-1).astype(jnp.int32)


def _visited_keys(first_BT: jax.Array, last_BT: jax.Array, queries: int, keys: int) -> jax.Array:
    """The range of blocks of keys that each block of queries visits: (B, I, 4)."""
    B, T = first_BT.shape
    low_BI, high_BI = _block_ranges(first_BT, last_BT, queries, keys)
    full_BI = -(-first_BT.reshape(B, T // queries, queries).max(axis=2) // keys)
    full_end_BI = (last_BT.reshape(B, T // queries, queries).min(axis=2) + 1) // keys
    return _range(low_BI, full_BI, full_end_BI, high_BI)


def _visiting_queries(first_BT: jax.Array, last_BT: jax.Array, size: int, blocks: int) -> jax.Array:
    """The range of blocks of queries that may attend to each of the blocks of keys: (B, J, 4)."""
    B, T = first_BT.shape
    low_BI, high_BI = _block_ranges(first_BT, last_BT, size, size)
    order = jnp.arange(blocks)
    meets_BIJ = (low_BI[:, :, None] <= order) & (order < high_BI[:, :, None])
    first_BJ = jnp.argmax(meets_BIJ, axis=1)
    end_BJ = low_BI.shape[1] - jnp.argmax(meets_BIJ[:, ::-1], axis=1)
    end_BJ = jnp.where(jnp.any(meets_BIJ, axis=1), end_BJ, first_BJ)
    from_BI = first_BT.reshape(B, T // size, size).max(axis=2)
    to_BI = last_BT.reshape(B, T // size, size).min(axis=2)
    full_BIJ = (from_BI[:, :, None] <= order * size) & (to_BI[:, :, None] >= order * size + size - 1)
    full_BJ = jnp.where(jnp.any(full_BIJ, axis=1), jnp.argmax(full_BIJ, axis=1), T // size)
    # The first run of such blocks; the queries of a row in another order may have more.
    ends_BIJ = ~full_BIJ & (jnp.arange(T // size)[:, None] > full_BJ[:, None, :])
    full_end_BJ = jnp.where(jnp.any(ends_BIJ, axis=1), jnp.argmax(ends_BIJ, axis=1), T // size)
    return _range(first_BJ, full_BJ, full_end_BJ, end_BJ)
