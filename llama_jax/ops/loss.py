"""Cross-entropy from hidden states, one chunk of the vocabulary at a time, so that the full logits never exist.

Letters: B batch, T length, D embedding, V vocab; C chunks of n vocabulary rows on each of P devices.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax import parallel
from llama_jax.ops import cpu
from llama_jax.ops.linear import linear
from llama_jax.ops.lora import LoraTensor

_HIGHEST = lax.Precision.HIGHEST

Arrays = tuple[jax.Array, ...]  # one for each product that is summed to logits


def cross_entropy(
    hidden_BTD: jax.Array, table_VD: jax.Array | LoraTensor, targets_BT: jax.Array, *, vocab_chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of each target, and log-sum-exp of the logits; both float32 (B, T).

    The logits are hidden table^T. The vocabulary is scanned in chunks with a running maximum and sum (Milakov and
    Gimelshein, arXiv:1805.02867), and the backward pass computes each chunk's logits again. If one chunk holds the
    whole vocabulary, its logits are kept for the backward pass instead.

    Args:
        hidden_BTD: hidden states after the final norm.
        table_VD: the unembedding, of any float dtype. Products have operands in the dtype of the hidden states and
            accumulate in float32. For a LoraTensor the logits are the sum of two products, and no merged table exists.
        targets_BT: token ids to predict.
        vocab_chunk: vocabulary rows a chunk on each device; 0 takes the whole vocabulary at once.
    """
    V = table_VD.shape[0]
    num_shards = parallel.axis_size("vocab")
    num_shards = num_shards if V % num_shards == 0 else 1
    num_chunks = 1 if vocab_chunk == 0 else -(-(V // num_shards) // vocab_chunk)
    if not isinstance(table_VD, LoraTensor):
        native = _native(hidden_BTD, num_shards)
        return _cross_entropy((hidden_BTD,), (table_VD,), targets_BT, num_shards, num_chunks, native)
    lora = table_VD
    low_rank_BTR = lora.scaled(linear(lora.dropped(hidden_BTD), lora.a))
    return _cross_entropy((hidden_BTD, low_rank_BTR), (lora.base, lora.b), targets_BT, num_shards, num_chunks, False)


def _chunks(table_VD: jax.Array, num_shards: int, num_chunks: int, dtype: jnp.dtype) -> jax.Array:
    """The table in chunks (C, P, n, D). Each device cuts its own shard, so that no chunk is communicated.

    On a CPU they have the dtype of the table, and `_gathered` casts them: XLA would widen bfloat16 chunks to float32
    before it cuts them.
    """
    V, D = table_VD.shape
    shard = V // num_shards
    n = -(-shard // num_chunks)
    table = table_VD if parallel.device_platform() == "cpu" else table_VD.astype(dtype)
    table = jnp.pad(table.reshape(num_shards, shard, D), ((0, 0), (0, num_chunks * n - shard), (0, 0)))
    return table.reshape(num_shards, num_chunks, n, D).swapaxes(0, 1)


def _chunk_ids(V: int, num_shards: int, num_chunks: int) -> jax.Array:
    """The ids of the rows of `_chunks`, (C, P, n), which are -1 for padding."""
    shard = V // num_shards
    column = jnp.arange(num_chunks * -(-shard // num_chunks))
    ids = jnp.where(column < shard, jnp.arange(num_shards)[:, None] * shard + column, -1)
    return ids.reshape(num_shards, num_chunks, -1).swapaxes(0, 1)


def _gathered(tables: Arrays, dtype: jnp.dtype) -> Arrays:
    """The chunks of one step (P, n, D) in `dtype`, all-gathered over the mesh axes of `embed`."""
    return tuple(parallel.constrain(table.astype(dtype), "vocab", None, None) for table in tables)


def _logits(hiddens: Arrays, tables: Arrays, ids: jax.Array) -> jax.Array:
    """The logits of one chunk, float32 (B, T, P, n); -inf for padding."""
    precision = _HIGHEST if hiddens[0].dtype == jnp.float32 else None
    dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    products = [dot(hidden, table, (((2,), (2,)), ((), ()))) for hidden, table in zip(hiddens, tables, strict=True)]
    logits = parallel.constrain(sum(products[1:], products[0]), "batch", "length", "vocab", None)
    return jnp.where(ids >= 0, logits, -jnp.inf)


def _native(x: jax.Array, num_shards: int) -> bool:
    """True if the kernels for CPUs compute it: their logits are in memory for a few rows at a time only."""
    known = x.dtype in (jnp.float32, jnp.bfloat16) and num_shards == 1
    return known and cpu.multiplies(x.size // x.shape[-1])


def _flat(
    hiddens: Arrays, tables: Arrays, ids: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The arguments of `cpu.loss` for a chunk of the vocabulary with these ids (1, n)."""
    x, table = (a.reshape(-1, a.shape[-1]) for a in (hiddens[0], tables[0]))
    return x, table, targets.ravel() - ids[0, 0], (ids >= 0).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _cross_entropy(
    hiddens: Arrays, tables: Arrays, targets: jax.Array, num_shards: int, num_chunks: int, native: bool
) -> tuple[jax.Array, jax.Array]:
    return _forward(hiddens, tables, targets, num_shards, num_chunks, native)[0]


def _forward(
    hiddens: Arrays, tables: Arrays, targets: jax.Array, num_shards: int, num_chunks: int, native: bool
) -> Any:
    """The forward pass: ((nll, lse), residuals for `_backward`)."""
    chunks = tuple(_chunks(table, num_shards, num_chunks, hiddens[0].dtype) for table in tables)

    def scan_chunk(carry: Any, chunk: Any) -> Any:
        peak, total, score = carry
        rows, ids = chunk
        rows = _gathered(rows, hiddens[0].dtype)
        if native:
            # Products of float32 are slower than memory, those of bfloat16 are computed again.
            keep = num_chunks == 1 and hiddens[0].dtype == jnp.float32
            *sums, logits = cpu.loss(*_flat(hiddens, rows, ids, targets), keep=keep)
            top, part, hit = (a.reshape(targets.shape) for a in sums)
            new_peak = jnp.maximum(peak, top)
            total = total * jnp.exp(peak - new_peak) + part * jnp.exp(top - new_peak)
            return (new_peak, total, score + hit), logits
        logits = _logits(hiddens, rows, ids)
        new_peak = jnp.maximum(peak, logits.max(axis=(2, 3)))
        total = total * jnp.exp(peak - new_peak) + jnp.exp(logits - new_peak[..., None, None]).sum(axis=(2, 3))
        hit = ids == targets[..., None, None]
        score = score + jnp.where(hit, logits, 0.0).sum(axis=(2, 3))
        return (new_peak, total, score), logits if num_chunks == 1 else None

    low = jnp.full(targets.shape, jnp.finfo(jnp.float32).min)
    zero = jnp.zeros(targets.shape, jnp.float32)
    ids = _chunk_ids(tables[0].shape[0], num_shards, num_chunks)
    (peak, total, score), kept = lax.scan(scan_chunk, (low, zero, zero), (chunks, ids))
    lse = peak + jnp.log(total)
    return (lse - score, lse), (hiddens, tables, targets, lse, kept)


def _backward(
    num_shards: int, num_chunks: int, native: bool, residuals: Any, cotangents: tuple[jax.Array, jax.Array]
) -> Any:
    """The gradients of hiddens and tables, and None for targets."""
    hiddens, tables, targets, lse, kept = residuals
    dtype, V = hiddens[0].dtype, tables[0].shape[0]
    chunks = tuple(_chunks(table, num_shards, num_chunks, dtype) for table in tables)
    g_nll, g_lse = cotangents
    precision = _HIGHEST if dtype == jnp.float32 else None
    dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def scan_chunk(dxs: Arrays, chunk: Any) -> tuple[Arrays, Arrays]:
        rows, row_ids, logits = chunk
        rows = _gathered(rows, dtype)
        if native:
            x, part, at, live = _flat(hiddens, rows, row_ids, targets)
            softmax, hit = (g_nll + g_lse).ravel(), g_nll.ravel()
            g = cpu.loss_gradient(x, part, at, live, lse.ravel(), softmax, hit, scores_TV=logits)
            dx = cpu.product(g, part, jnp.float32).reshape(hiddens[0].shape)
            return (dxs[0] + dx,), (cpu.product(g, x, jnp.float32, transposed=True)[None],)
        logits = _logits(hiddens, rows, row_ids) if logits is None else logits
        softmax = jnp.exp(logits - lse[..., None, None])
        hit = jnp.where(row_ids == targets[..., None, None], g_nll[..., None, None], 0.0)
        g = ((g_nll + g_lse)[..., None, None] * softmax - hit).astype(dtype)
        dxs = tuple(dx + dot(g, part, (((2, 3), (0, 1)), ((), ()))) for dx, part in zip(dxs, rows, strict=True))
        return dxs, tuple(
            table_gradient(g, hidden, name) for hidden, name in zip(hiddens, ("embed", *names[1:]), strict=True)
        )

    def table_gradient(g: jax.Array, hidden: jax.Array, name: str | None) -> jax.Array:
        flat, axes = g.reshape(*g.shape[:2], -1), ("vocab", name)
        if parallel.ring_takes(flat, hidden, axes):
            return parallel.ring_gradient(flat, hidden, axes).reshape(*g.shape[2:], -1)
        return parallel.constrain(dot(g, hidden, (((0, 1), (0, 1)), ((), ()))), "vocab", None, name)

    names = ("act_embed",) + (None,) * (len(hiddens) - 1)  # no device splits the rank of LoRA
    dxs = tuple(
        parallel.constrain(jnp.zeros(hidden.shape, jnp.float32), "batch", "length", name)
        for hidden, name in zip(hiddens, names, strict=True)
    )
    dxs, d_chunks = lax.scan(scan_chunk, dxs, (chunks, _chunk_ids(V, num_shards, num_chunks), kept))

    def d_table(d_chunk: jax.Array, table: jax.Array) -> jax.Array:
        shards = d_chunk.swapaxes(0, 1).reshape(num_shards, -1, table.shape[1])[:, : V // num_shards]
        return shards.reshape(table.shape).astype(table.dtype)

    d_hiddens = tuple(dx.astype(hidden.dtype) for dx, hidden in zip(dxs, hiddens, strict=True))
    return d_hiddens, tuple(map(d_table, d_chunks, tables)), None


_cross_entropy.defvjp(_forward, _backward)
