"""The calls of the CPU kernels, once they are registered (see kernels.cc). JAX differentiates none of them.

Letters: B rows, T queries or tokens, V rows of a table, D inputs, O outputs, N query heads, K key/value heads, S cache
slots, H head dim, R rotary pairs (H / 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.ops.quant import QTensor

DTYPES = (jnp.float32, jnp.bfloat16)  # of activations
FEW_ROWS = 16  # most rows that are multiplied with weights as they are read: FEW in inputs.h
HEAD = 16  # with one query a row, heads are a multiple of this
_NOTHING, _NORM, _SWIGLU = 0, 1, 2


def takes_weight(dtype: jnp.dtype, weight: jax.Array | QTensor) -> bool:
    """True if the kernels multiply inputs of this dtype with a weight (out, in)."""
    of_dtype = (
        isinstance(weight, QTensor) or weight.dtype == dtype or (dtype == jnp.float32 and weight.dtype == jnp.bfloat16)
    )
    return dtype in DTYPES and of_dtype and len(weight.shape) == 2


def linears(
    x: jax.Array,
    weights: Sequence[jax.Array | QTensor],
    *,
    dtype: jnp.dtype,
    norm: tuple[jax.Array, float] | None = None,
    up: jax.Array | None = None,
    plus: jax.Array | None = None,
) -> list[jax.Array]:
    """The products f(x) w^T of one or several weights, each (B, O) in `dtype`, accumulated in float32.

    Products are exact: inputs are not rounded to 8 bits, as llama.cpp rounds them. It would not be faster
    (docs/measurements/cpu-kernels.md#inputs-in-8-bits).

    Args:
        x: activations (B, D), float32 or bfloat16.
        weights: one to four weights (O, D), all of one kind: float32, bfloat16, or quantized.
        dtype: dtype of the results, float32 or bfloat16.
        norm: scale (D,) and eps of an RMSNorm of x.
        up: f(x) is silu(x) * up, with `up` (B, D) in the dtype of x. It excludes `norm`.
        plus: (B, O) in `dtype`, to add to the rounded product of a single weight.
    """
    arguments, before, eps = [x], _NOTHING, 0.0
    if norm is not None:
        scale, eps = norm
        arguments, before = [x, norm_scale(scale)], _NORM
    elif up is not None:
        arguments, before = [x, up], _SWIGLU
    for w in weights:
        arguments += [w.values, w.scales] if isinstance(w, QTensor) else [w]
    if plus is not None:
        arguments.append(plus)
    shapes = [jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), dtype) for w in weights]
    call = jax.ffi.ffi_call("llama_linear", shapes, vmap_method="sequential")
    return list(call(*arguments, before=np.int32(before), eps=np.float32(eps)))


def norm_scale(scale: jax.Array) -> jax.Array:
    """The scale of a norm in float32, or in bfloat16 if it is stored so, as the kernels read it."""
    return scale if scale.dtype == jnp.bfloat16 else scale.astype(jnp.float32)


def product(a: jax.Array, b: jax.Array, dtype: jnp.dtype, *, transposed: bool = False) -> jax.Array:
    """The matrix product a b, or a^T b if `transposed`, in `dtype`, accumulated in float32.

    Args:
        a: (M, K), or (K, M) if it is transposed; float32 or bfloat16.
        b: (K, N) in the dtype of a.
        dtype: float32 or bfloat16.
        transposed: whether a is transposed.
    """
    result = jax.ShapeDtypeStruct((a.shape[int(transposed)], b.shape[1]), dtype)
    return jax.ffi.ffi_call("llama_product", result, vmap_method="sequential")(a, b, transposed=np.int32(transposed))


def loss(
    x_TD: jax.Array, table_VD: jax.Array, targets_T: jax.Array, live: jax.Array, *, keep: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """The softmax of the scores x table^T over the rows of a table, which may be a part of the vocabulary.

    Args:
        x_TD: hidden states, float32 or bfloat16.
        table_VD: rows of the unembedding in the dtype of x.
        targets_T: int32 rows of the table. A target outside of it belongs to another part.
        live: int32 number of rows of the table; the others are padding.
        keep: whether the scores are returned.

    Returns:
        float32 (T,) each: the largest score, the sum of exp(score - largest), and the score of the target or 0; then
        the scores (T, V), or None if they are not kept.
    """
    results = [jax.ShapeDtypeStruct(targets_T.shape, jnp.float32)] * 3
    if keep:
        results.append(jax.ShapeDtypeStruct((x_TD.shape[0], table_VD.shape[0]), jnp.float32))
    call = jax.ffi.ffi_call("llama_loss", results, vmap_method="sequential")
    top, total, score, *scores = call(x_TD, table_VD, targets_T.astype(jnp.int32), live.astype(jnp.int32))
    return top, total, score, scores[0] if keep else None


def loss_gradient(
    x_TD: jax.Array,
    table_VD: jax.Array,
    targets_T: jax.Array,
    live: jax.Array,
    lse_T: jax.Array,
    all_T: jax.Array,
    hit_T: jax.Array,
    scores_TV: jax.Array | None = None,
) -> jax.Array:
    """The gradient of the scores of `loss`: all * exp(score - lse), minus `hit` at the target; (T, V) as x.

    Args:
        x_TD: as in `loss`.
        table_VD: as in `loss`.
        targets_T: as in `loss`.
        live: as in `loss`.
        lse_T: log-sum-exp over the whole vocabulary, float32.
        all_T: factor of the softmax, float32.
        hit_T: factor of the target, float32.
        scores_TV: the scores, if `loss` kept them: the gradient takes their place in memory, in float32. Otherwise they
            are computed again.
    """
    factors = targets_T.astype(jnp.int32), live.astype(jnp.int32), lse_T, all_T, hit_T
    if scores_TV is not None:
        result = jax.ShapeDtypeStruct(scores_TV.shape, scores_TV.dtype)
        in_place = jax.ffi.ffi_call(
            "llama_kept_gradient", result, vmap_method="sequential", input_output_aliases={0: 0}
        )
        return in_place(scores_TV, *factors)
    result = jax.ShapeDtypeStruct((x_TD.shape[0], table_VD.shape[0]), x_TD.dtype)
    return jax.ffi.ffi_call("llama_loss_gradient", result, vmap_method="sequential")(x_TD, table_VD, *factors)


def rows(table_VD: jax.Array, ids: jax.Array) -> jax.Array:
    """The rows of a bfloat16 table for ids (...), as (..., D). Ids outside 0..V-1 give NaN."""
    result = jax.ShapeDtypeStruct((*ids.shape, table_VD.shape[1]), table_VD.dtype)
    return jax.ffi.ffi_call("llama_rows", result, vmap_method="sequential")(table_VD, ids.astype(jnp.int32))


def rotate(x_BTNH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Each pair (i, i + H/2) of x turned by the angle of these float32 cosines and sines, computed in float32.

    Args:
        x_BTNH: queries or keys, float32 or bfloat16, which is the dtype of the result.
        cos_BTR: cosines; one row serves all rows of x.
        sin_BTR: sines.
    """
    B, T, _, H = x_BTNH.shape
    angles = (jnp.broadcast_to(a, (B, T, H // 2)).astype(jnp.float32) for a in (cos_BTR, sin_BTR))
    result = jax.ShapeDtypeStruct(x_BTNH.shape, x_BTNH.dtype)
    return jax.ffi.ffi_call("llama_rotate", result, vmap_method="sequential")(x_BTNH, *angles)


def attend(
    q_BNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    lengths_B: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the first lengths_B keys of each row: (B, N, H) in the dtype of q.

    Only these keys are read. A row of length 0 gives zeros. Computed in float32.

    Args:
        q_BNH: rotated queries, float32 or bfloat16.
        k_BKSH: rotated keys, float32, bfloat16 (or its bits as uint16) or int8.
        v_BKSH: values in the dtype of the keys.
        lengths_B: int32 number of live keys.
        scales: float16 (or its bits as uint16) scales (B, K, S) of int8 keys and of int8 values.
    """
    call = jax.ffi.ffi_call("llama_attention", jax.ShapeDtypeStruct(q_BNH.shape, q_BNH.dtype), vmap_method="sequential")
    return call(q_BNH, k_BKSH, v_BKSH, lengths_B.astype(jnp.int32), *(scales or ()))


def attend_many(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    low_BT: jax.Array,
    high_BT: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the keys low_BT to high_BT - 1 of each query: (B, T, N, H) in the dtype of q.

    Blocks of keys without a query are not read. A query without keys gives zeros. Scores and the softmax are computed
    in float32; for bfloat16 queries the weights of the values are rounded to bfloat16, if the processor multiplies it.

    Args:
        q_BTNH: rotated queries, float32 or bfloat16.
        k_BKSH: rotated keys, float32, bfloat16 (or its bits as uint16) or int8.
        v_BKSH: values in the dtype of the keys.
        low_BT: int32 first key of each query.
        high_BT: int32 number after the last key of each query.
        scales: float16 (or its bits as uint16) scales (B, K, S) of int8 keys and of int8 values.
    """
    results = [jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype)]
    call = jax.ffi.ffi_call("llama_attention_many", results, vmap_method="sequential")
    return call(q_BTNH, k_BKSH, v_BKSH, low_BT.astype(jnp.int32), high_BT.astype(jnp.int32), *(scales or ()))[0]


def attend_many_forward(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, low_BT: jax.Array, high_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The result of `attend_many`, and the log-sum-exp of each query's scores: (B, T, N) float32, -inf without keys."""
    results = [jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype), jax.ShapeDtypeStruct(q_BTNH.shape[:3], jnp.float32)]
    call = jax.ffi.ffi_call("llama_attention_many", results, vmap_method="sequential")
    out_BTNH, lse_BTN = call(q_BTNH, k_BKSH, v_BKSH, low_BT.astype(jnp.int32), high_BT.astype(jnp.int32))
    return out_BTNH, lse_BTN


def attend_many_backward(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    low_BT: jax.Array,
    high_BT: jax.Array,
    out_BTNH: jax.Array,
    lse_BTN: jax.Array,
    g_BTNH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v of `attend_many`, in the dtype of q. Weights are computed again from the scores.

    Sums are in float32. For bfloat16 queries the weights and the gradients of scores are rounded to bfloat16, if the
    processor multiplies it.

    Args:
        q_BTNH: rotated queries, float32 or bfloat16.
        k_BKSH: rotated keys, float32 or bfloat16.
        v_BKSH: values in the dtype of the keys.
        low_BT: int32 first key of each query.
        high_BT: int32 number after the last key of each query.
        out_BTNH: first result of `attend_many_forward`.
        lse_BTN: its second result.
        g_BTNH: gradient of out_BTNH, in the dtype of q.
    """
    results = [jax.ShapeDtypeStruct(a.shape, q_BTNH.dtype) for a in (q_BTNH, k_BKSH, v_BKSH)]
    call = jax.ffi.ffi_call("llama_attention_gradient", results, vmap_method="sequential")
    low_BT, high_BT = low_BT.astype(jnp.int32), high_BT.astype(jnp.int32)
    d_q, d_k, d_v = call(q_BTNH, k_BKSH, v_BKSH, low_BT, high_BT, out_BTNH, lse_BTN, g_BTNH)
    return d_q, d_k, d_v
