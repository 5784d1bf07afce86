"""Causal attention of whole rows by the Pallas kernel that jax ships for TPUs ("splash", a sparse flash attention).

The scores of a block of queries and keys live in the chip's vector memory and nowhere else (Dao, arXiv:2307.08691), so
that memory grows with the length and not with its square, and blocks above the diagonal are passed over. What runs
everywhere, and what this is tested against, is the plain attention in `xla`.

Letters: B batch, T length, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from llama_jax import parallel

_LANES = 128  # of a TPU's vector registers: lengths are multiples of it
_HEAD_DIMS = (64, 128)


def takes(q_BTNH: jax.Array, k_BKTH: jax.Array) -> bool:
    """Whether the kernel takes arrays of these shapes and types, under the active layout.

    The length must be a multiple of 128, the head dim 64 or 128, and tensor parallelism must divide the heads of both
    kinds. The type must be bfloat16: the kernel asks for no more than a TPU's default precision, by which float32 would
    be rounded to bfloat16, where the plain attention asks for the highest.
    """
    _, T, N, H = q_BTNH.shape
    parts = parallel.axis_size("heads")
    whole = T % _LANES == 0 and N % parts == 0 and k_BKTH.shape[1] % parts == 0
    return whole and H in _HEAD_DIMS and q_BTNH.dtype == jnp.bfloat16


def attention(
    q_BTNH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    *,
    segments_BT: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v, where a query sees the keys of its segment up to itself.

    Each device runs the kernel on its own rows and heads; the length must be whole on each.

    Args:
        q_BTNH: queries, already rotated. 1 / sqrt(H) is multiplied into them in their own type.
        k_BKTH: keys, already rotated.
        v_BKTH: values.
        segments_BT: document numbers of a packed row, or None. Documents must stand one after the other.
        interpret: run the kernel as plain XLA operations, on any platform, slowly.

    Returns:
        (B, T, N, H) in the type of q; the softmax is float32. Padding (segment 0) sees the padding before it.
    """
    B, T, _, H = q_BTNH.shape
    q_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    if segments_BT is None:
        segments_BT = jnp.zeros((B, T), jnp.int32)
    return parallel.on_each_part(
        functools.partial(_rows, interpret=interpret),
        (q_BTNH, ("batch", "length", "heads", None)),
        (k_BKTH, ("batch", "kv_heads", "length", None)),
        (v_BKTH, ("batch", "kv_heads", "length", None)),
        (segments_BT, ("batch", "length")),
    )


def _rows(
    q_BTNH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, segments_BT: jax.Array, *, interpret: bool
) -> jax.Array:
    """The kernel on what one device holds."""
    _, T, N, _ = q_BTNH.shape
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([_Causal((T, T))] * N),
        block_sizes=_block_sizes(T),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="product",  # so that remat="dots" (model.py) keeps it, and runs the kernel once
        interpret=interpret,
    )
    # The kernel's mask is "not after the query's place, and in its segment"; the plain one compares positions. They are
    # the same: a row's documents stand one after the other (data/packing.py), each with a segment of its own and with
    # positions that count up. Only padding, whose positions are all 0, sees less here; and nothing sees padding.
    documents_BT = splash.SegmentIds(segments_BT, segments_BT)
    return jax.vmap(kernel)(q_BTNH.swapaxes(1, 2), k_BKTH, v_BKTH, documents_BT).swapaxes(1, 2)


class _Causal(splash.CausalMask):
    """The causal mask, whose blocks off the diagonal are told by their corners.

    To find what may be skipped the kernel's maker asks for every block: at T = 131,072 it took 50 s to compare 17
    billion pairs three times.
    """

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        queries, keys = index
        if keys.stop <= queries.start + 1:
            return np.ones((1, 1), bool)
        if queries.stop <= keys.start:
            return np.zeros((1, 1), bool)
        return super().__getitem__(index)


# Up to this length one backward kernel makes all three gradients; its dq comes in T / block parts that are summed
# afterwards, and beyond it they would take more memory than a second kernel costs time.
_MAX_FUSED = 8192


def _block_sizes(T: int) -> splash.BlockSizes:
    """Queries and keys that the kernel holds at a time, and how many of these keys it multiplies at once.

    Larger blocks are fetched fewer times, and more of what they hold lies above the diagonal. Not measured on a TPU.
    """
    fused = T <= _MAX_FUSED
    block_q, block_kv, compute = (_divisor(T, most) for most in (512 if fused else 1024, 1024, 512))
    return splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else block_q,
        block_kv_dq=None if fused else block_kv,
        use_fused_bwd_kernel=fused,
    )


def _divisor(T: int, most: int) -> int:
    """The largest of 128, 256, 512, ... up to `most` that divides T."""
    return next(size for size in (most, most // 2, most // 4, most // 8) if T % size == 0)
