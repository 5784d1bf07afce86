"""Cross-entropy from hidden states, a piece of the vocabulary at a time, so that the full logits never exist.

Letters: B batch, T length, D embedding, V vocab; C pieces of n rows of the vocabulary on each of P devices.
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
    """-log softmax(hidden table^T)[target] and log sum exp of the logits, each (B, T) float32.

    The vocabulary is walked in pieces with a running maximum and sum (Milakov and Gimelshein, arXiv:1805.02867); the
    backward pass computes each piece again. Where one piece holds the whole vocabulary its logits are kept instead.

    Args:
        hidden_BTD: hidden states after the final norm.
        table_VD: the unembedding, in any float type; products are taken in the type of hidden, summed in float32.
        targets_BT: the ids to predict.
        vocab_chunk: rows of the vocabulary per piece and device; 0 for all at once.
    """
    V = table_VD.shape[0]
    parts = parallel.axis_size("vocab")
    parts = parts if V % parts == 0 else 1
    pieces = 1 if vocab_chunk == 0 else -(-(V // parts) // vocab_chunk)
    return _cross_entropy(hidden_BTD, table_VD, targets_BT, parts, pieces)


def _pieces(table_VD: jax.Array, parts: int, pieces: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """The vocabulary as (C, P, n, D) and the ids of its rows (C, P, n), -1 where a row is padding.

    Every device's share is cut, rather than the whole, so that no piece has to travel.
    """
    V, D = table_VD.shape
    share = V // parts
    n = -(-share // pieces)
    table = jnp.pad(table_VD.astype(dtype).reshape(parts, share, D), ((0, 0), (0, pieces * n - share), (0, 0)))
    column = jnp.arange(pieces * n)
    ids = jnp.where(column < share, jnp.arange(parts)[:, None] * share + column, -1)
    split = lambda a: a.reshape(parts, pieces, n, *a.shape[2:]).swapaxes(0, 1)  # noqa: E731
    return split(table), split(ids)


def _logits(hidden: jax.Array, table: jax.Array, ids: jax.Array) -> jax.Array:
    """(B, T, P, n) float32, -inf at padding."""
    precision = _HIGHEST if hidden.dtype == jnp.float32 else None
    logits = lax.dot_general(
        hidden, table, (((2,), (2,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    logits = parallel.constrain(logits, "batch", "length", "vocab", None)
    return jnp.where(ids >= 0, logits, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _cross_entropy(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, parts: int, pieces: int
) -> tuple[jax.Array, jax.Array]:
    return _forward(hidden, table, targets, parts, pieces)[0]


def _forward(hidden, table, targets, parts, pieces):
    tables, ids = _pieces(table, parts, pieces, hidden.dtype)

    def walk(carry, piece):
        peak, total, score = carry
        logits = _logits(hidden, *piece)
        new_peak = jnp.maximum(peak, logits.max(axis=(2, 3)))
        total = total * jnp.exp(peak - new_peak) + jnp.exp(logits - new_peak[..., None, None]).sum(axis=(2, 3))
        hit = piece[1] == targets[..., None, None]
        score = score + jnp.where(hit, logits, 0.0).sum(axis=(2, 3))
        return (new_peak, total, score), logits if pieces == 1 else None

    low = jnp.full(targets.shape, jnp.finfo(jnp.float32).min)
    zero = jnp.zeros(targets.shape, jnp.float32)
    (peak, total, score), kept = lax.scan(walk, (low, zero, zero), (tables, ids))
    lse = peak + jnp.log(total)
    return (lse - score, lse), (hidden, table, targets, lse, kept)


def _backward(parts, pieces, residuals, cotangents):
    hidden, table, targets, lse, kept = residuals
    tables, ids = _pieces(table, parts, pieces, hidden.dtype)
    g_nll, g_lse = cotangents
    precision = _HIGHEST if hidden.dtype == jnp.float32 else None

    def walk(dx, piece):
        rows, row_ids, logits = piece
        logits = _logits(hidden, rows, row_ids) if logits is None else logits
        probability = jnp.exp(logits - lse[..., None, None])
        hit = row_ids == targets[..., None, None]
        g = (g_nll + g_lse)[..., None, None] * probability - jnp.where(hit, g_nll[..., None, None], 0.0)
        g = g.astype(hidden.dtype)
        dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
        dx = dx + dot(g, rows, (((2, 3), (0, 1)), ((), ())))
        return dx, dot(g, hidden, (((0, 1), (0, 1)), ((), ())))

    dx = parallel.constrain(jnp.zeros(hidden.shape, jnp.float32), "batch", "length", "act_embed")
    dx, d_tables = lax.scan(walk, dx, (tables, ids, kept))
    V, D = table.shape
    d_table = d_tables.swapaxes(0, 1).reshape(parts, -1, D)[:, : V // parts].reshape(V, D)
    return dx.astype(hidden.dtype), d_table.astype(table.dtype), None


_cross_entropy.defvjp(_forward, _backward)
