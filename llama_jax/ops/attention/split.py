"""Decoding on NVIDIA GPUs: one query a row over the live slots of a KV cache, in Pallas for Triton.

The live slots of a row are split over several programs, because rows and key/value heads alone are too few to keep a
GPU's memory busy (flash decoding). Each part gives its result and its sum of exponentials, and a second kernel joins
the parts. Slots beyond the live length are not read, and an int8 cache is read as int8.

Letters: B batch, N query heads, K key/value heads, G = N / K, S slots, H head dim, P parts.
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
from llama_jax.ops.attention.call import Call, Target, refuses_mesh
from llama_jax.ops.pallas import interpreted, masked

_DTYPES = (jnp.bfloat16, jnp.float16)
_STEP = 32  # slots that are multiplied at once
_ROWS = 16  # smallest block of a product in Triton
_PROGRAMS = 264  # programs to aim for: two for each of the 132 processors of an H100
_LEAST = 2  # steps of a part
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
    """The kernels on the rows and heads of one device. `cache` is k and v, or values and scales of both."""
    B, N, H = q_BNH.shape
    K, S = cache[0].shape[1:3]
    G = N // K
    most = max(1, min(_PROGRAMS // (B * K), bound // (_LEAST * _STEP)))
    parts = 1 << (most.bit_length() - 1)  # a power of two, as the second kernel needs
    in_specs = [
        pl.BlockSpec((None, None, G, H), lambda p, k, b: (b, k, 0, 0)),
        pl.BlockSpec((1,), lambda p, k, b: (b,)),
    ]
    for array in cache:
        shape = (None, None, S, H)[: array.ndim]
        in_specs.append(pl.BlockSpec(shape, lambda p, k, b, n=array.ndim: (b, k, 0, 0)[:n]))
    out_BPKGH, largest_BPKG, total_BPKG = pl.pallas_call(
        functools.partial(_part_kernel, scale=H**-0.5, parts=parts, quantized=len(cache) == 4),
        grid=(parts, K, B),
        in_specs=in_specs,
        out_specs=[
            pl.BlockSpec((None, None, None, G, H), lambda p, k, b: (b, p, k, 0, 0)),
            pl.BlockSpec((None, None, None, G), lambda p, k, b: (b, p, k, 0)),
            pl.BlockSpec((None, None, None, G), lambda p, k, b: (b, p, k, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, parts, K, G, H), jnp.float32),
            jax.ShapeDtypeStruct((B, parts, K, G), jnp.float32),
            jax.ShapeDtypeStruct((B, parts, K, G), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpreted(),
        name="split_decode",
    )(q_BNH.reshape(B, K, G, H), lengths_B, *cache)
    per_head = pl.BlockSpec((None, parts, None), lambda n, b: (b, 0, n))
    return pl.pallas_call(
        _join_kernel,
        grid=(N, B),
        in_specs=[pl.BlockSpec((None, parts, None, H), lambda n, b: (b, 0, n, 0)), per_head, per_head],
        out_specs=pl.BlockSpec((None, None, H), lambda n, b: (b, n, 0)),
        out_shape=jax.ShapeDtypeStruct(q_BNH.shape, q_BNH.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=1 if parts <= 8 else 4, num_stages=1),
        interpret=interpreted(),
        name="split_decode_join",
    )(out_BPKGH.reshape(B, parts, N, H), largest_BPKG.reshape(B, parts, N), total_BPKG.reshape(B, parts, N))


def _join_kernel(out_ref: Any, largest_ref: Any, total_ref: Any, joined_ref: Any) -> None:
    """The result of one head from its parts."""
    largest_P = largest_ref[...]
    weights_P = jnp.exp2(largest_P - jnp.max(largest_P))
    total = jnp.sum(weights_P * total_ref[...])
    joined_ref[...] = (jnp.sum(weights_P[:, None] * out_ref[...], axis=0) / total).astype(joined_ref.dtype)


def _part_kernel(q_ref: Any, length_ref: Any, *refs: Any, scale: float, parts: int, quantized: bool) -> None:
    """One part of the live slots of one row and key/value head."""
    cache, (out_ref, largest_ref, total_ref) = refs[:-3], refs[-3:]
    (G, H), length = q_ref.shape, length_ref[0]
    # A product has at least 16 rows. Those beyond the heads of the group are zeros, and are not stored.
    rows = max(_ROWS, pl.next_power_of_2(G))
    every, ours = masked(rows, pl.program_id(0)), jnp.arange(rows) < G
    of_head = jnp.broadcast_to(ours[:, None], (rows, H))
    q = plgpu.load(q_ref.at[every, :], mask=of_head, other=0)
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

    start = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full(q.shape[:1], _HIDDEN, jnp.float32),
        jnp.zeros(q.shape[:1], jnp.float32),
    )
    out, largest, total = lax.fori_loop(low, high, body, start)
    plgpu.store(out_ref.at[every, :], out, mask=of_head)
    plgpu.store(largest_ref.at[every], largest, mask=ours)
    plgpu.store(total_ref.at[every], total, mask=ours)
