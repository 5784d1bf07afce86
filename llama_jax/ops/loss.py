"""Cross-entropy from hidden states, one chunk of the vocabulary at a time, so that the full logits never exist.

Letters: B batch, T length, D embedding, V vocab; C chunks of n vocabulary rows on each of P devices.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax import parallel

_HIGHEST = lax.Precision.HIGHEST


def cross_entropy(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, *, vocab_chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of each target, and log-sum-exp of the logits; both float32 (B, T).

    The logits are hidden table^T. The vocabulary is scanned in chunks with a running maximum and sum (Milakov and
    Gimelshein, arXiv:1805.02867), and the backward pass computes each chunk's logits again. If one chunk holds the
    whole vocabulary, its logits are kept for the backward pass instead.

    Args:
        hidden_BTD: hidden states after the final norm.
        table_VD: the unembedding, of any float dtype. Products have operands in the dtype of the hidden states and
            accumulate in float32.
        targets_BT: token ids to predict.
        vocab_chunk: vocabulary rows a chunk on each device; 0 takes the whole vocabulary at once.
    """
    V = table_VD.shape[0]
    num_shards = parallel.axis_size("vocab")
    num_shards = num_shards if V % num_shards == 0 else 1
    num_chunks = 1 if vocab_chunk == 0 else -(-(V // num_shards) // vocab_chunk)
    return _cross_entropy(hidden_BTD, table_VD, targets_BT, num_shards, num_chunks)


def _chunks(table_VD: jax.Array, num_shards: int, num_chunks: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """The table in chunks (C, P, n, D), and the ids of their rows (C, P, n), which are -1 for padding.

    Each device's own shard is cut into chunks, so that no chunk is communicated.
    """
    V, D = table_VD.shape
    shard = V // num_shards
    n = -(-shard // num_chunks)
    table = jnp.pad(table_VD.astype(dtype).reshape(num_shards, shard, D), ((0, 0), (0, num_chunks * n - shard), (0, 0)))
    column = jnp.arange(num_chunks * n)
    ids = jnp.where(column < shard, jnp.arange(num_shards)[:, None] * shard + column, -1)

    def split(a: jax.Array) -> jax.Array:
        return a.reshape(num_shards, num_chunks, n, *a.shape[2:]).swapaxes(0, 1)

    return split(table), split(ids)


def _logits(hidden: jax.Array, table: jax.Array, ids: jax.Array) -> jax.Array:
    """The logits of one chunk, float32 (B, T, P, n); -inf for padding."""
    precision = _HIGHEST if hidden.dtype == jnp.float32 else None
    logits = lax.dot_general(
        hidden, table, (((2,), (2,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    logits = parallel.constrain(logits, "batch", "length", "vocab", None)
    return jnp.where(ids >= 0, logits, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _cross_entropy(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, num_shards: int, num_chunks: int
) -> tuple[jax.Array, jax.Array]:
    return _forward(hidden, table, targets, num_shards, num_chunks)[0]


def _forward(hidden, table, targets, num_shards, num_chunks):
    tables, ids = _chunks(table, num_shards, num_chunks, hidden.dtype)

    def scan_chunk(carry, chunk):
        peak, total, score = carry
        logits = _logits(hidden, *chunk)
        new_peak = jnp.maximum(peak, logits.max(axis=(2, 3)))
        total = total * jnp.exp(peak - new_peak) + jnp.exp(logits - new_peak[..., None, None]).sum(axis=(2, 3))
        hit = chunk[1] == targets[..., None, None]
        score = score + jnp.where(hit, logits, 0.0).sum(axis=(2, 3))
        return (new_peak, total, score), logits if num_chunks == 1 else None

    low = jnp.full(targets.shape, jnp.finfo(jnp.float32).min)
    zero = jnp.zeros(targets.shape, jnp.float32)
    (peak, total, score), kept = lax.scan(scan_chunk, (low, zero, zero), (tables, ids))
    lse = peak + jnp.log(total)
    return (lse - score, lse), (hidden, table, targets, lse, kept)


def _backward(num_shards, num_chunks, residuals, cotangents):
    hidden, table, targets, lse, kept = residuals
    tables, ids = _chunks(table, num_shards, num_chunks, hidden.dtype)
    g_nll, g_lse = cotangents
    precision = _HIGHEST if hidden.dtype == jnp.float32 else None

    def scan_chunk(dx, chunk):
        rows, row_ids, logits = chunk
        logits = _logits(hidden, rows, row_ids) if logits is None else logits
        probability = jnp.exp(logits - lse[..., None, None])
        hit = row_ids == targets[..., None, None]
        g = (g_nll + g_lse)[..., None, None] * probability - jnp.where(hit, g_nll[..., None, None], 0.0)
        g = g.astype(hidden.dtype)
        dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
        dx = dx + dot(g, rows, (((2, 3), (0, 1)), ((), ())))
        return dx, dot(g, hidden, (((0, 1), (0, 1)), ((), ())))

    dx = parallel.constrain(jnp.zeros(hidden.shape, jnp.float32), "batch", "length", "act_embed")
    dx, d_tables = lax.scan(scan_chunk, dx, (tables, ids, kept))
    V, D = table.shape
    d_table = d_tables.swapaxes(0, 1).reshape(num_shards, -1, D)[:, : V // num_shards].reshape(V, D)
    return dx.astype(hidden.dtype), d_table.astype(table.dtype), None


_cross_entropy.defvjp(_forward, _backward)
