"""Attention over the live slots of a KV cache on TPUs, in Pallas: decode steps and chunks of prompts.

The grid visits blocks of slots up to the bound of the pass. Blocks beyond the last position of a row name the block
before them, which is in the chip's vector memory already, so that only live blocks are fetched. All key/value heads of
a block come in one transfer. An int8 cache is read as int8.

Letters: B batch, T queries a row, N query heads, K key/value heads, G = N / K, R = T G rows of a product, S slots,
H head dim, I blocks of queries.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llama_jax import parallel
from llama_jax.ops import quant
from llama_jax.ops.attention.call import Call, Target, refuses_mesh
from llama_jax.ops.pallas import interpreted

_LANES = 128
_HEAD = 128  # XLA would copy a cache of smaller heads to give its slots lanes of their own
_QUERIES = 128  # queries of a block
_MAX_STEP = 512  # slots of a block
_HIDDEN = -1e30


def refuses(call: Call, target: Target) -> str:
    """The reason why the kernel does not take a call on a target; "" if it does."""
    H = call.q_BTNH.shape[3]
    if call.window is None:
        return "it takes a KV cache"
    if call.q_BTNH.dtype != jnp.bfloat16 or call.cache_dtype not in (jnp.bfloat16, jnp.int8):
        return f"it takes bfloat16, and that or int8 in the cache, not {call.q_BTNH.dtype}"
    if H != _HEAD:
        return f"it takes heads of {_HEAD}, not {H}"
    if call.window.bound % _LANES or call.k.shape[2] % _LANES:
        return f"it takes slots in multiples of {_LANES}, not {call.window.bound} of {call.k.shape[2]}"
    return refuses_mesh(call, target)


def attend(call: Call) -> jax.Array:
    """The attention of new tokens, (B, T, N, H) in the dtype of q. The softmax is computed in float32.

    Each device runs the kernel on its own rows and heads.
    """
    assert call.window is not None
    arrays = [(call.q_BTNH, ("batch", "length", "heads", None)), (call.positions_BT, ("batch", "length"))]
    arrays += call.cache_parts
    return parallel.on_each_part(functools.partial(_own_part, bound=call.window.bound), *arrays)


def _own_part(q_BTNH: jax.Array, positions_BT: jax.Array, *cache: jax.Array, bound: int) -> jax.Array:
    """The kernel on the rows and heads of one device. `cache` is k and v, or values and scales of both."""
    B, T, N, H = q_BTNH.shape
    K = cache[0].shape[1]
    G = N // K
    queries = min(T, _QUERIES)
    more = -T % queries
    q = jnp.pad(q_BTNH, [(0, 0), (0, more), (0, 0), (0, 0)])
    positions = jnp.pad(positions_BT, [(0, 0), (0, more)], mode="edge")
    q_BKRH = q.reshape(B, T + more, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, (T + more) * G, H)
    positions_BR1 = jnp.repeat(positions, G, axis=1)[..., None]
    step = next(size for size in (_MAX_STEP, _MAX_STEP // 2, _LANES) if bound % size == 0)
    largest_BI = positions.reshape(B, -1, queries).max(axis=2)
    last_BI = jnp.clip(largest_BI, 0, bound - 1) // step
    out_BKRH = _visit(last_BI, q_BKRH, positions_BR1, *cache, bound=bound, step=step)
    out = out_BKRH.reshape(B, K, T + more, G, H).transpose(0, 2, 1, 3, 4).reshape(B, T + more, N, H)
    return out[:, :T]


def _visit(
    last_BI: jax.Array, q_BKRH: jax.Array, positions_BR1: jax.Array, *cache: jax.Array, bound: int, step: int
) -> jax.Array:
    """Runs the kernel: each block of queries visits blocks of `step` slots up to its last one. Returns (B, K, R, H)."""
    B, K, R, H = q_BKRH.shape
    blocks = last_BI.shape[1]
    rows = R // blocks

    def slots(b: Any, i: Any, j: Any, last: Any) -> tuple[Any, ...]:
        return b, 0, jnp.minimum(j, last[b, i]), 0

    per_query = pl.BlockSpec((None, K, rows, H), lambda b, i, j, last: (b, 0, i, 0))
    in_specs = [per_query, pl.BlockSpec((None, rows, 1), lambda b, i, j, last: (b, i, 0))]
    for array in cache:
        shape, n = (None, K, step, H)[: array.ndim], array.ndim
        in_specs.append(pl.BlockSpec(shape, lambda *at, n=n: slots(*at)[:n]))
    # Kernels of TPUs load no float16, so that scales come as their bits.
    arrays = [lax.bitcast_convert_type(a, jnp.int16) if a.dtype == jnp.float16 else a for a in cache]
    if not interpreted():  # XLA would copy a small cache to the chip's memory and back for every write
        arrays = [pltpu.with_memory_space_constraint(a, pltpu.HBM) if a.ndim == 4 else a for a in arrays]
    width = sum(a.dtype.itemsize * (H if a.ndim == 4 else 1) for a in cache)
    return pl.pallas_call(
        functools.partial(_kernel, scale=H**-0.5, step=step, quantized=len(cache) == 4),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, blocks, bound // step),
            in_specs=in_specs,
            out_specs=per_query,
            scratch_shapes=[
                pltpu.VMEM((K, rows, H), jnp.float32),
                pltpu.VMEM((K, rows, _LANES), jnp.float32),
                pltpu.VMEM((K, rows, _LANES), jnp.float32),
                pltpu.VMEM((K, step), jnp.float32),
                pltpu.VMEM((K, step), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_BKRH.shape, q_BKRH.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * q_BKRH.size * bound,
            transcendentals=B * K * R * bound,
            bytes_accessed=B * bound * K * width + 2 * q_BKRH.size * q_BKRH.dtype.itemsize,
        ),
        interpret=interpreted(),
        name="ragged_attention",
    )(last_BI, q_BKRH, positions_BR1, *arrays)


def _kernel(
    last_ref: Any, q_ref: Any, positions_ref: Any, *refs: Any, scale: float, step: int, quantized: bool
) -> None:
    """One block of queries and one block of slots of a row, for all heads."""
    cache, (out_ref, sum_ref, largest_ref, total_ref, k_scales_ref, v_scales_ref) = refs[:-6], refs[-6:]
    j, last = pl.program_id(2), last_ref[pl.program_id(0), pl.program_id(1)]

    @pl.when(j == 0)
    def _start() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)
        largest_ref[...] = jnp.full_like(largest_ref, _HIDDEN)
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(j <= last)
    def _add() -> None:
        rows = q_ref.shape[1]
        key_positions = j * step + lax.broadcasted_iota(jnp.int32, (rows, step), 1)
        seen = key_positions <= positions_ref[...]
        if quantized:
            k_scales_ref[...], v_scales_ref[...] = (quant.float16_of_bits(cache[i][...]) for i in (1, 3))

        def add(head: Any, _: None) -> None:
            q = q_ref[head]
            k, v = (cache[i][head].astype(q.dtype) for i in ((0, 2) if quantized else (0, 1)))
            scores = lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) * scale
            if quantized:
                scores *= k_scales_ref[pl.ds(head, 1)]
            scores = jnp.where(seen, scores, _HIDDEN)
            largest = largest_ref[head, :, :1]
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=1, keepdims=True))
            correction = jnp.exp(largest - new_largest)
            weights = jnp.exp(scores - new_largest)
            total = total_ref[head, :, :1] * correction + jnp.sum(weights, axis=1, keepdims=True)
            if quantized:
                weights *= v_scales_ref[pl.ds(head, 1)]
            product = lax.dot_general(
                weights.astype(q.dtype), v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
            sum_ref[head] = sum_ref[head] * correction + product
            largest_ref[head] = jnp.broadcast_to(new_largest, (rows, _LANES))
            total_ref[head] = jnp.broadcast_to(total, (rows, _LANES))

        lax.fori_loop(0, q_ref.shape[0], add, None)

    @pl.when(j == pl.num_programs(2) - 1)
    def _end() -> None:
        for head in range(q_ref.shape[0]):
            out_ref[head] = (sum_ref[head] / total_ref[head, :, :1]).astype(out_ref.dtype)
