"""Causal attention of whole rows by the Pallas kernel that jax ships for TPUs ("splash", a sparse flash attention).

The scores of a block of queries and keys exist only in the chip's vector memory (Dao, arXiv:2307.08691). Memory grows
with the length rather than its square, and blocks above the diagonal are skipped. The kernel is tested against the
plain attention in `xla`.

Letters: B batch, T length, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from llama_jax import parallel
from llama_jax.cache import QCache
from llama_jax.ops.attention.call import Call, Target, refuses_mesh
from llama_jax.ops.pallas import interpreted

_LANES = 128  # lanes of a TPU's vector registers; the length must be a multiple
_HEAD_DIMS = (64, 128)


def refuses(call: Call, target: Target) -> str:
    """The reason why the kernel does not take a call on a target; "" if it does.

    The kernel uses a TPU's default precision, which would round float32 to bfloat16, while the plain attention uses the
    highest.
    """
    _, T, _, H = call.q_BTNH.shape
    if call.window is not None:
        return "it takes whole rows without a KV cache"
    if call.q_BTNH.dtype != jnp.bfloat16:
        return f"it takes bfloat16, not {call.q_BTNH.dtype}"
    if H not in _HEAD_DIMS:
        return f"it takes heads of 64 or 128, not {H}"
    tokens = T // target.length
    tokens //= 2 if target.length > 1 and T % (2 * target.length) == 0 else 1  # in chunks of parallel.length_order
    if tokens % _LANES:
        return f"it takes rows in multiples of {_LANES} tokens a device, not {tokens}"
    return refuses_mesh(call, target)


def attend(call: Call) -> jax.Array:
    """The attention of whole rows, (B, T, N, H) in the dtype of q.

    Each device runs the kernel on its own rows and heads. If the length axis is sharded, a device has the queries of
    its part of a row, and gathers the keys and values of the whole row. If the active layout is balanced, the parts are
    those of `parallel.length_order`, which give all devices equal work.

    The queries are multiplied by 1 / sqrt(H) and rounded to their own dtype. Each document must be contiguous. Padding
    (segment 0) attends to the padding before it.
    """
    q_BTNH, segments_BT = call.q_BTNH, call.segments_BT
    assert not isinstance(call.k, QCache) and not isinstance(call.v, QCache)  # `refuses` takes no cache
    B, T, _, H = q_BTNH.shape
    q_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    if segments_BT is None:
        segments_BT = jnp.zeros((B, T), jnp.int32)
    shards, layout = parallel.axis_size("length"), parallel.active()
    order: tuple[int, ...] = parallel.length_order(T) if layout is not None and layout.balanced else (0,)
    kernel = _kernel(T, q_BTNH.shape[2] // parallel.axis_size("heads"), order, shards=shards)
    whole = (kernel, jax.tree.map(lambda _: PartitionSpec(), kernel))
    if layout is not None and shards > 1:
        whole = (kernel, kernel.manual_sharding_spec(layout.sharding((None, "length"))))
    return parallel.on_each_part(
        functools.partial(_rows, order=order),
        (q_BTNH, ("batch", "length", "heads", None)),
        (call.k, ("batch", "kv_heads", "length", None)),
        (call.v, ("batch", "kv_heads", "length", None)),
        (segments_BT, ("batch", "length")),
        whole=whole,
    )


def _kernel(T: int, N: int, order: tuple[int, ...], *, shards: int) -> Any:
    """The kernel for rows of T tokens in chunks of `order`, whose queries are sharded over devices."""
    return splash.make_splash_mha(
        splash.MultiHeadMask([_Causal((T, T), order)] * N),
        block_sizes=_block_sizes(T, T // max(shards, len(order))),
        head_shards=1,
        q_seq_shards=shards,
        # remat="dots" and "attention" (ops/remat.py) keep its residuals, so that the kernel runs once.
        residual_checkpoint_name="attention",
        interpret=interpreted(),
    )


def _rows(
    q_BTNH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    segments_BT: jax.Array,
    kernel: Any,
    *,
    order: tuple[int, ...],
) -> jax.Array:
    """Runs the kernel on the rows, queries and heads of one device."""
    k_BKSH, v_BKSH = (
        parallel.reordered(parallel.all_gathered(a, "length", 2), order, axis=2, back=True) for a in (k_BKTH, v_BKTH)
    )
    segments_BS = parallel.reordered(parallel.all_gathered(segments_BT, "length", 1), order, back=True)
    # The kernel masks keys after the query's index and keys of other segments; the plain attention compares positions.
    # The masks are equal because the documents of a row are contiguous (data/packing.py), with a segment each and
    # increasing positions. Only padding, whose positions are all 0, attends to less here, and nothing attends to it.
    documents_BT = splash.SegmentIds(segments_BT, segments_BS)
    return jax.vmap(kernel)(q_BTNH.swapaxes(1, 2), k_BKSH, v_BKSH, documents_BT).swapaxes(1, 2)


class _Causal(splash.CausalMask):
    """The causal mask of rows whose chunks are reordered. Blocks off the diagonal are decided by their corners alone.

    To find the blocks to skip, jax evaluates every block of the mask. At T = 131,072 that took a CPU 50 s, for 17
    billion pairs compared three times.
    """

    def __init__(self, shape: tuple[int, int], order: tuple[int, ...] = (0,)):
        super().__init__(shape)
        self.q_sequence = self.q_sequence.reshape(len(order), -1)[np.asarray(order)].reshape(-1)

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        queries, keys = index
        rows = self.q_sequence[queries]  # a block is within a chunk, so that its rows follow one another
        if keys.stop <= rows[0] + 1:
            return np.ones((1, 1), bool)
        if rows[-1] < keys.start:
            return np.zeros((1, 1), bool)
        return super().__getitem__(index)


# Up to this length one backward kernel computes all three gradients. Its dq comes in T / block parts that are summed
# afterwards. For longer rows these parts take too much memory, and a second kernel computes dq.
_MAX_FUSED = 8192


def _block_sizes(T: int, chunk: int | None = None) -> splash.BlockSizes:
    """The block sizes of the kernel: queries (within a chunk of the row), keys, and keys that are multiplied at once.

    Larger blocks are fetched fewer times, but more of their entries are above the diagonal. The sizes are not measured
    on a TPU.
    """
    fused = T <= _MAX_FUSED
    block_q = _divisor(chunk or T, 512 if fused else 1024)
    block_kv, compute = _divisor(T, 1024), _divisor(T, 512)
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
