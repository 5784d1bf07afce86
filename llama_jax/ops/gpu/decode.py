"""Attention of a decode step on NVIDIA GPUs, from products to products: the calls of decode.cu.

One launch rotates the query and the new key, stores the new key and value in the cache, and attends to the live slots.
These are five launches otherwise.

Letters: B rows, N query heads, K key/value heads, S slots, H head dim, R rotary pairs.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from llama_jax.cache import Leaf, QCache, Window, dtype_in_place
from llama_jax.ops.gpu import build

_DTYPES = (jnp.bfloat16, jnp.float16)
_TILE = 16  # slots that a warp multiplies at once
_WARPS = 4
_BLOCKS = 3  # of a processor, to aim for
_MAX_GROUP, _MAX_DIM = 16, 128


def refuses(q_BTNH: jax.Array, k_BTKH: jax.Array, leaf: Leaf) -> str:
    """The reason why the kernel does not take a pass over a cache; "" if it does."""
    (_, T, N, H), (K, S) = q_BTNH.shape, leaf.shape[1:3]
    if T != 1:
        return "it takes one query a row"
    if q_BTNH.dtype not in _DTYPES or dtype_in_place(leaf) not in (q_BTNH.dtype, jnp.int8):
        return f"it takes bfloat16 and float16, and the same or int8 in the cache, not {q_BTNH.dtype}"
    if H % 32 or H > _MAX_DIM or S % _TILE or k_BTKH.shape[2] != K or N % K or N // K > _MAX_GROUP:
        return f"it takes heads of 32 to {_MAX_DIM} values and at most {_MAX_GROUP} queries a key"
    return ""


def kind(kv: str) -> str:
    """The kind of a decode step with a cache of one of KV_TYPES, as the check of the kernels names it."""
    return f"decoding, cache {kv}"


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    rotations: tuple[jax.Array, jax.Array],
    positions_BT: jax.Array,
    window: Window,
    cache: tuple[Leaf, Leaf],
) -> tuple[jax.Array, tuple[Leaf, Leaf]]:
    """The attention (B, 1, N, H) in the dtype of q, and the cache with the new keys and values.

    Scores and the softmax are computed in float32, and the weights of values are rounded to the dtype of q.

    Args:
        q_BTNH: queries (B, 1, N, H) before their rotation.
        k_BTKH: new keys (B, 1, K, H) before their rotation.
        v_BTKH: new values.
        rotations: float32 cosines and sines (B, 1, R).
        positions_BT: position of each query, which attends to the slots up to it.
        window: where the new keys and values are stored, and how many slots are read.
        cache: keys and values.
    """
    (B, _, N, H), (K, S) = q_BTNH.shape, cache[0].shape[1:3]
    tiles = math.ceil(window.bound / _TILE)
    # The parts' shares of a head must fit into the shared memory of their results.
    parts = max(1, min(_WARPS * H, _BLOCKS * build.chip().processors // (B * K), tiles // _WARPS))
    leaves = [jax.tree.leaves(leaf) for leaf in cache]
    stored = [array for arrays in leaves for array in arrays]
    vectors = [positions_BT[:, 0].astype(jnp.int32), window.slots_BT[:, 0].astype(jnp.int32)]
    operands = [q_BTNH, k_BTKH, v_BTKH, *rotations, *vectors, *stored]
    results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q_BTNH, *stored)]
    results += [jax.ShapeDtypeStruct((B, K, parts, N // K, n), jnp.float32) for n in (H, 2)]
    constants: dict[str, str | int] = {
        "KV_BITS": 8 if isinstance(cache[0], QCache) else 16,
        "HALF": int(q_BTNH.dtype == jnp.float16),
        "ROWS": B,
        "HEADS": K,
        "GROUP": N // K,
        "DIM": H,
        "SLOTS": S,
        "BOUND": window.bound,
        "PARTS": parts,
        "WARPS": _WARPS,
        "SCALE": build.float32(math.log2(math.e) / math.sqrt(H)),
    }
    row = 2 * H + 16  # bytes of a row in shared memory
    out, *rest = build.call(
        "decode",
        constants,
        operands,
        results,
        grid=(parts, K, B),
        threads=32 * _WARPS,
        shared=16 * row + _WARPS * (_TILE * row + 16 * 2 * 4 + N // K * H * 4) + 16,
        in_place={7 + i: 1 + i for i in range(len(stored))},
    )
    new = jax.tree.unflatten(jax.tree.structure(cache), rest[: len(stored)])
    return out, new
