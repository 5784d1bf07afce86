"""Decoding on NVIDIA GPUs: one query a row over the live slots of a KV cache, in Pallas for Triton.

The live slots of a row are split over several programs, because rows and key/value heads alone are too few to keep a
GPU's memory busy (flash decoding). Each part gives its result and its sum of exponentials, and XLA joins the parts.
Slots beyond the live length are not read, and an int8 cache is read as int8.

Letters: B batch, N query heads, K key/value heads, G = N / K padded to 16, S slots, H head dim, P parts.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llama_jax import parallel
from llama_jax.ops.attention.call import Call, Target, interpreted, refuses_mesh

_DTYPES = (jnp.bfloat16, jnp.float16)
_STEP = 64  # slots that are multiplied at once
_ROWS = 16  # smallest block of a product in Triton
_PROGRAMS = 264  # programs to aim for: two for each of the 132 processors of an H100
_HIDDEN = -1e30


def refuses(call: Call, target: Target) -> str:
    """The reason why the kernel does not take a call on a target; "" if it does."""
    _, T, _, H = call.q_BTNH.shape
    if call.window is None or T != 1:
        return "it takes one query a row and a KV cache"
    if target.capability < 80:
        return "Triton takes GPUs of compute capability 8.0 and above"
    if call.q_BTNH.dtype not in _DTYPES or call.cache_dtype not in (*_DTYPES, jnp.int8):
        return f"it takes bfloat16 and float16, and those or int8 in the cache, not {call.q_BTNH.dtype}"
    if H not in (16, 32, 64, 128, 256) or call.k.shape[2] % _STEP:
        return f"it takes heads of powers of two and slots in multiples of {_STEP}, not {H} and {call.k.shape[2]}"
    return refuses_mesh(call, target)


def attend(call: Call) -> jax.Array:
    """The attention of a decode step, (B, 1, N, H) in the dtype of q. The softmax is computed in float32.

    Each device runs the kernel on its own rows and heads.
    """
    assert call.window is not None
    # A row that has ended may have a position beyond a bound, and beyond a cache that has shrunk since.
    lengths_B = jnp.minimum(call.positions_BT[:, 0] + 1, call.window.bound)
    arrays = [(call.q_BTNH[:, 0], ("batch", "heads", None)), (lengths_B, ("batch",))]
    arrays += call.cache_parts
    return parallel.on_each_part(functools.partial(_own_part, bound=call.window.bound), *arrays)[:, None]


def _own_part(q_BNH: jax.Array, lengths_B: jax.Array, *cache: jax.Array, bound: int) -> jax.Array:
    """The kernel on the rows and heads of one device. `cache` is k and v, or values and scales of both."""
    B, N, H = q_BNH.shape
    K, S = cache[0].shape[1:3]
    group = N // K
    G = max(_ROWS, pl.next_power_of_2(group))
    parts = max(1, min(pl.cdiv(_PROGRAMS, B * K), pl.cdiv(bound, 2 * _STEP)))
    q_BKGH = jnp.pad(q_BNH.reshape(B, K, group, H), [(0, 0), (0, 0), (0, G - group), (0, 0)])
    in_specs = [
        pl.BlockSpec((None, None, G, H), lambda p, k, b: (b, k, 0, 0)),
        pl.BlockSpec((1,), lambda p, k, b: (b,)),
    ]
    for array in cache:
        shape = (None, None, S, H)[: array.ndim]
        in_specs.append(pl.BlockSpec(shape, lambda p, k, b, n=array.ndim: (b, k, 0, 0)[:n]))
    out_BKPGH, largest_BKPG, total_BKPG = pl.pallas_call(
        functools.partial(_kernel, scale=H**-0.5, parts=parts, quantized=len(cache) == 4),
        grid=(parts, K, B),
        in_specs=in_specs,
        out_specs=[
            pl.BlockSpec((None, None, None, G, H), lambda p, k, b: (b, k, p, 0, 0)),
            pl.BlockSpec((None, None, None, G), lambda p, k, b: (b, k, p, 0)),
            pl.BlockSpec((None, None, None, G), lambda p, k, b: (b, k, p, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, K, parts, G, H), jnp.float32),
            jax.ShapeDtypeStruct((B, K, parts, G), jnp.float32),
            jax.ShapeDtypeStruct((B, K, parts, G), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpreted(),
        name="split_decode",
    )(q_BKGH, lengths_B, *cache)
    weights_BKPG = jnp.exp2(largest_BKPG - jnp.max(largest_BKPG, axis=2, keepdims=True))
    total_BKG = jnp.sum(weights_BKPG * total_BKPG, axis=2)
    out_BKGH = jnp.sum(weights_BKPG[..., None] * out_BKPGH, axis=2) / total_BKG[..., None]
    return out_BKGH[:, :, :group].reshape(B, N, H).astype(q_BNH.dtype)


def _kernel(q_ref: Any, length_ref: Any, *refs: Any, scale: float, parts: int, quantized: bool) -> None:
    """One part of the live slots of one row and key/value head."""
    cache, (out_ref, largest_ref, total_ref) = refs[:-3], refs[-3:]
    q, length = q_ref[...], length_ref[0]
    blocks = lax.div(length + (_STEP - 1), jnp.int32(_STEP))
    each = lax.div(blocks + (parts - 1), jnp.int32(parts))
    low = jnp.minimum(pl.program_id(0) * each, blocks)
    high = jnp.minimum(low + each, blocks)

    def load(which: int, rows: Any) -> tuple[jax.Array, jax.Array | None]:
        if not quantized:
            return cache[which][rows, :], None
        values, scales = cache[2 * which], cache[2 * which + 1]
        return values[rows, :].astype(q.dtype), scales[rows].astype(jnp.float32)[None, :]

    def body(j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        out, largest, total = carry
        rows = pl.ds(j * _STEP, _STEP)
        k, k_scales = load(0, rows)
        scores = plgpu.dot(q, k.T) * (scale * math.log2(math.e))
        scores = scores if k_scales is None else scores * k_scales
        live = (j * _STEP + jnp.arange(_STEP, dtype=jnp.int32)) < length
        scores = jnp.where(live[None, :], scores, _HIDDEN)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=1))
        correction = jnp.exp2(largest - new_largest)
        weights = jnp.exp2(scores - new_largest[:, None])
        v, v_scales = load(1, rows)
        scaled = weights if v_scales is None else weights * v_scales
        out = out * correction[:, None] + plgpu.dot(scaled.astype(q.dtype), v)
        return out, new_largest, total * correction + jnp.sum(weights, axis=1)

    rows, H = q.shape
    start = (
        jnp.zeros((rows, H), jnp.float32),
        jnp.full((rows,), _HIDDEN, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    out, largest, total = lax.fori_loop(low, high, body, start)
    out_ref[...], largest_ref[...], total_ref[...] = out, largest, total
