"""Flash attention on NVIDIA GPUs by our Triton kernels: rows of documents, whole rows, and prompts over a KV cache.

Each query attends to one range of keys: those of its document up to itself, or the slots up to its position.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax import parallel
from llama_jax.cache import QCache, read
from llama_jax.ops.attention.call import Call, Target, refuses_mesh
from llama_jax.ops.attention.flash_kernels import Blocks, attention
from llama_jax.ops.pallas import interpreted

_DTYPES = (jnp.bfloat16, jnp.float16)
_WORKSTATIONS = (86, 87, 89, 120, 121)  # RTX 30, Jetson, RTX 40 and L4, RTX 50
_MAX_HEAD = 128  # larger heads need more registers than a block of queries has


def refuses(call: Call, target: Target) -> str:
    """The reason why the kernels do not take a call on a target; "" if they do."""
    _, T, _, H = call.q_BTNH.shape
    if target.capability < 80:
        return "Triton takes GPUs of compute capability 8.0 and above"
    if call.q_BTNH.dtype not in _DTYPES:
        return f"it takes bfloat16 and float16, not {call.q_BTNH.dtype}, which tensor cores would round"
    if H > _MAX_HEAD:
        return f"it takes heads of at most {_MAX_HEAD}, not {H}"
    if call.window is None and T % target.length:
        return f"rows of {T} tokens do not divide over {target.length} devices"
    return refuses_mesh(call, target)


def attend(call: Call) -> jax.Array:
    """The attention of a call, (B, T, N, H) in the dtype of q. The softmax is computed in float32.

    Each device runs the kernels on its own rows and heads. If the length axis is sharded, a device has the queries of
    its part of a row, and gathers the keys and values of the whole row.

    The documents of a row are contiguous, each with a segment of its own. Padding (segment 0) attends to the padding
    before it.
    """
    order: tuple[int, ...] = (0,)
    if call.window is not None:
        k, v = (read(leaf, call.window, call.q_BTNH.dtype) for leaf in (call.k, call.v))
        first, last = jnp.zeros_like(call.positions_BT), call.positions_BT
        gathered, slots = False, None
    else:
        assert not isinstance(call.k, QCache) and not isinstance(call.v, QCache)
        k, v = call.k, call.v
        layout = parallel.active()
        T = call.q_BTNH.shape[1]
        if layout is not None and layout.balanced:
            order = parallel.length_order(T)
        first, last = document_ranges(call.q_BTNH.shape[0], T, call.segments_BT, order)
        gathered, slots = parallel.axis_size("length") > 1, "length"
    return parallel.on_each_part(
        functools.partial(_own_part, order=order, gathered=gathered, blocks=_blocks(parallel.compute_capability())),
        (call.q_BTNH, ("batch", "length", "heads", None)),
        (k, ("batch", "kv_heads", slots, None)),
        (v, ("batch", "kv_heads", slots, None)),
        (first, ("batch", "length")),
        (last, ("batch", "length")),
    )


def document_ranges(
    B: int, T: int, segments_BT: jax.Array | None, order: tuple[int, ...] = (0,)
) -> tuple[jax.Array, jax.Array]:
    """The indices of the first and the last key of each query of whole rows: (B, T) each, int32.

    Args:
        B: number of rows.
        T: length of a row.
        segments_BT: document numbers, in the order of the queries; None for one document a row.
        order: order of the chunks of the row that the queries are in (`parallel.length_order`). Indices count in the
            order of the row itself.
    """
    index_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    first_BT = jnp.zeros((B, T), jnp.int32)
    if segments_BT is not None:
        segments_BT = parallel.reordered(segments_BT, order, back=True)
        starts_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], [(0, 0), (1, 0)])
        first_BT = lax.cummax(jnp.where(starts_BT, index_BT, 0), axis=1)
    return parallel.reordered(first_BT, order), parallel.reordered(index_BT, order)


def _own_part(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    first_BT: jax.Array,
    last_BT: jax.Array,
    *,
    order: tuple[int, ...],
    gathered: bool,
    blocks: Blocks,
) -> jax.Array:
    """Runs the kernels on the rows, queries and heads of one device."""
    if gathered:
        k_BKSH, v_BKSH = (parallel.all_gathered(a, "length", 2) for a in (k_BKSH, v_BKSH))
    k_BKSH, v_BKSH = (parallel.reordered(a, order, axis=2, back=True) for a in (k_BKSH, v_BKSH))
    return attention(q_BTNH, k_BKSH, v_BKSH, first_BT, last_BT, blocks)


def _blocks(capability: int) -> Blocks:
    """The tiling for a compute capability. Workstation GPUs have 99 KiB of shared memory a block, others over 160."""
    small = capability in _WORKSTATIONS
    return Blocks(keys=32 if small else 64, backward=32 if small else 64, interpret=interpreted())
