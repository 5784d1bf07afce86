"""The records that describe one call of attention and the devices that run it. Backends decide and compute by them.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax import parallel
from llama_jax.cache import Leaf, QCache, Window, dtype_in_place


class Call(NamedTuple):
    """One call of attention: softmax(q k^T / sqrt(H)) v, where a query attends to its document's keys up to its
    position.

    The arrays may be abstract (jax.ShapeDtypeStruct) if a backend is only chosen and nothing is computed.

    Attributes:
        q_BTNH: rotated queries.
        k: rotated keys (B, K, S, H): an array, or a leaf of a KV cache.
        v: values, in the form of the keys.
        positions_BT: position of each query within its document.
        segments_BT: document number of each query of a packed row; None if every row is one document.
        window: the window of a pass with a KV cache. None for whole rows, where query i and key i are the same token.
    """

    q_BTNH: jax.Array
    k: Leaf
    v: Leaf
    positions_BT: jax.Array
    segments_BT: jax.Array | None = None
    window: Window | None = None

    @property
    def kind(self) -> str:
        """The name of this use of attention: whole rows, prefill or decoding."""
        if self.window is None:
            return "whole rows" if self.segments_BT is None else "rows of documents"
        return "decoding" if self.q_BTNH.shape[1] == 1 else "prefill"

    @property
    def cache_dtype(self) -> jnp.dtype | None:
        """The dtype of the stored keys; None if a kernel cannot read them where they are."""
        return dtype_in_place(self.k)

    @property
    def cache_parts(self) -> list[tuple[jax.Array, tuple[str | None, ...]]]:
        """The arrays of the keys and then of the values, with their logical axes for kernels that need whole rows."""
        leaves = ((a.values_BKSH, a.scales_BKS) if isinstance(a, QCache) else (a,) for a in (self.k, self.v))
        axes = ("batch", "kv_heads", None, None)
        return [(part, axes[: part.ndim]) for parts in leaves for part in parts]


class Target(NamedTuple):
    """The devices of a call.

    Attributes:
        platform: "cpu", "cuda", "rocm" or "tpu".
        capability: compute capability of NVIDIA GPUs times ten (90 for an H100); 0 on other platforms.
        length: number of devices that share the length of a row.
        heads: number of devices that share the query heads.
        slots: number of devices that share the slots of a KV cache.
    """

    platform: str
    capability: int = 0
    length: int = 1
    heads: int = 1
    slots: int = 1


def active_target() -> Target:
    """The devices of the active layout, or the default device without a layout."""
    return Target(
        parallel.device_platform(),
        parallel.compute_capability(),
        parallel.axis_size("length"),
        parallel.axis_size("heads"),
        parallel.axis_size("slots"),
    )


def refuses_mesh(call: Call, target: Target) -> str:
    """The reason why a call cannot be split as the devices of the target are; "" if it can."""
    N, K = call.q_BTNH.shape[2], call.k.shape[1]
    if call.window is not None and target.slots > 1:
        return f"the slots of the KV cache are shared by {target.slots} devices"
    if N % target.heads or K % target.heads:
        return f"{N} query and {K} key/value heads do not divide over {target.heads} devices"
    return ""
