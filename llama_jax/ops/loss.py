"""Cross-entropy from hidden states, a piece of the vocabulary at a time, so that the full logits never exist.

Letters: B batch, T length, D embedding, V vocab; C pieces of n rows of the vocabulary on each of P devices.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax import parallel
from llama_jax.ops.linear import linear
from llama_jax.ops.lora import LoraTensor

_HIGHEST = lax.Precision.HIGHEST

Arrays = tuple[jax.Array, ...]


def cross_entropy(
    hidden_BTD: jax.Array, table_VD: jax.Array | LoraTensor, targets_BT: jax.Array, *, vocab_chunk: int
) -> tuple[jax.Array, jax.Array]:
    """-log softmax(hidden table^T)[target] and log sum exp of the logits, each (B, T) float32.

    The vocabulary is walked in pieces with a running maximum and sum (Milakov and Gimelshein, arXiv:1805.02867); the
    backward pass computes each piece again. Where one piece holds the whole vocabulary its logits are kept instead.

    Args:
        hidden_BTD: hidden states after the final norm.
        table_VD: the unembedding, in any float type; products are taken in the type of hidden, summed in float32. Under
            LoRA the logits are the sum of two products, hidden with the base and LoRA's activations with b.
        targets_BT: the ids to predict.
        vocab_chunk: rows of the vocabulary per piece and device; 0 for all at once.
    """
    V = table_VD.shape[0]
    parts = parallel.axis_size("vocab")
    parts = parts if V % parts == 0 else 1
    pieces = 1 if vocab_chunk == 0 else -(-(V // parts) // vocab_chunk)
    if not isinstance(table_VD, LoraTensor):
        return _cross_entropy((hidden_BTD,), (table_VD,), targets_BT, parts, pieces)
    lora = table_VD
    activations_BTR = lora.scaled(linear(lora.dropped(hidden_BTD), lora.a))
    return _cross_entropy((hidden_BTD, activations_BTR), (lora.base, lora.b), targets_BT, parts, pieces)


def _pieces(table_VD: jax.Array, parts: int, pieces: int, dtype: jnp.dtype) -> jax.Array:
    """The vocabulary as (C, P, n, D). Every device's share is cut, rather than the whole, so that no piece travels."""
    V, D = table_VD.shape
    share = V // parts
    n = -(-share // pieces)
    table = jnp.pad(table_VD.astype(dtype).reshape(parts, share, D), ((0, 0), (0, pieces * n - share), (0, 0)))
    return table.reshape(parts, pieces, n, D).swapaxes(0, 1)


def _ids(V: int, parts: int, pieces: int) -> jax.Array:
    """The ids of the rows of `_pieces`, (C, P, n), -1 where a row is padding."""
    share = V // parts
    column = jnp.arange(pieces * -(-share // pieces))
    ids = jnp.where(column < share, jnp.arange(parts)[:, None] * share + column, -1)
    return ids.reshape(parts, pieces, -1).swapaxes(0, 1)


def _logits(hiddens: Arrays, tables: Arrays, ids: jax.Array) -> jax.Array:
    """The sum of all products, (B, T, P, n) float32, -inf at padding."""
    precision = _HIGHEST if hiddens[0].dtype == jnp.float32 else None
    dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    products = [dot(hidden, table, (((2,), (2,)), ((), ()))) for hidden, table in zip(hiddens, tables, strict=True)]
    logits = parallel.constrain(sum(products[1:], products[0]), "batch", "length", "vocab", None)
    return jnp.where(ids >= 0, logits, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _cross_entropy(
    hiddens: Arrays, tables: Arrays, targets: jax.Array, parts: int, pieces: int
) -> tuple[jax.Array, jax.Array]:
    return _forward(hiddens, tables, targets, parts, pieces)[0]


def _forward(hiddens, tables, targets, parts, pieces):
    cut = tuple(_pieces(table, parts, pieces, hiddens[0].dtype) for table in tables)

    def walk(carry, piece):
        peak, total, score = carry
        rows, ids = piece
        logits = _logits(hiddens, rows, ids)
        new_peak = jnp.maximum(peak, logits.max(axis=(2, 3)))
        total = total * jnp.exp(peak - new_peak) + jnp.exp(logits - new_peak[..., None, None]).sum(axis=(2, 3))
        hit = ids == targets[..., None, None]
        score = score + jnp.where(hit, logits, 0.0).sum(axis=(2, 3))
        return (new_peak, total, score), logits if pieces == 1 else None

    low = jnp.full(targets.shape, jnp.finfo(jnp.float32).min)
    zero = jnp.zeros(targets.shape, jnp.float32)
    ids = _ids(tables[0].shape[0], parts, pieces)
    (peak, total, score), kept = lax.scan(walk, (low, zero, zero), (cut, ids))
    lse = peak + jnp.log(total)
    return (lse - score, lse), (hiddens, tables, targets, lse, kept)


def _backward(parts, pieces, residuals, cotangents):
    hiddens, tables, targets, lse, kept = residuals
    dtype, V = hiddens[0].dtype, tables[0].shape[0]
    cut = tuple(_pieces(table, parts, pieces, dtype) for table in tables)
    g_nll, g_lse = cotangents
    precision = _HIGHEST if dtype == jnp.float32 else None

    def walk(dxs, piece):
        rows, row_ids, logits = piece
        logits = _logits(hiddens, rows, row_ids) if logits is None else logits
        probability = jnp.exp(logits - lse[..., None, None])
        hit = row_ids == targets[..., None, None]
        g = (g_nll + g_lse)[..., None, None] * probability - jnp.where(hit, g_nll[..., None, None], 0.0)
        g = g.astype(dtype)
        dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
        dxs = tuple(dx + dot(g, part, (((2, 3), (0, 1)), ((), ()))) for dx, part in zip(dxs, rows, strict=True))
        return dxs, tuple(dot(g, hidden, (((0, 1), (0, 1)), ((), ()))) for hidden in hiddens)

    zeros = (jnp.zeros(hidden.shape, jnp.float32) for hidden in hiddens)
    names = ("act_embed",) + (None,) * (len(hiddens) - 1)  # LoRA's activations (B, T, rank) are not split by rank
    dxs = tuple(parallel.constrain(z, "batch", "length", name) for z, name in zip(zeros, names, strict=True))
    dxs, d_cut = lax.scan(walk, dxs, (cut, _ids(V, parts, pieces), kept))

    def whole(d_pieces: jax.Array, table: jax.Array) -> jax.Array:
        d_table = d_pieces.swapaxes(0, 1).reshape(parts, -1, table.shape[1])[:, : V // parts]
        return d_table.reshape(table.shape).astype(table.dtype)

    d_hiddens = tuple(dx.astype(hidden.dtype) for dx, hidden in zip(dxs, hiddens, strict=True))
    return d_hiddens, tuple(map(whole, d_cut, tables)), None


_cross_entropy.defvjp(_forward, _backward)
