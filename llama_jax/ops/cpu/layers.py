"""All layers of a decode step in one call of the CPU kernels (layers.h).

With a call for each operation, XLA takes several microseconds between two of them, and each wakes the threads up anew
(docs/measurements/cpu-kernels.md#whole-layers). Within one call they stay awake.

Letters: B rows, D embedding, N query heads, K key/value heads, S cache slots, H head dim, R rotary pairs (H / 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.cache import KVCache, Window, dtype_in_place
from llama_jax.config import ModelConfig
from llama_jax.ops.cpu import calls
from llama_jax.ops.native import weights_of
from llama_jax.ops.quant import QTensor


def takes(config: ModelConfig, layers: Sequence[Mapping[str, Any]], x: jax.Array, cache: KVCache) -> bool:
    """True if one call computes a step: one token of 1 to 16 rows, with weights that the kernels multiply.

    Args:
        config: the model's shape.
        layers: the weights of each layer, as in params.py.
        x: hidden state before the layers (B, T, D).
        cache: keys and values of each layer.
    """
    stored = jnp.uint16 if x.dtype == jnp.bfloat16 else x.dtype
    return (
        x.shape[1] == 1
        and 0 < x.shape[0] <= calls.FEW_ROWS
        and config.head_dim % calls.HEAD == 0
        and cache.k[0].shape[1] == config.num_kv_heads
        and dtype_in_place(cache.k[0]) in (stored, jnp.int8)
        and all(_alike(weights, x.dtype) for layer in layers for weights in _products(layer))
    )


def _products(layer: Mapping[str, Any]) -> list[list[Any]]:
    """The weights of each product of a layer, of which some have the same inputs."""
    q, k, v, o, gate, up, down = weights_of(layer)
    return [[q, k, v], [o], [gate, up], [down]]


def _alike(weights: Sequence[Any], dtype: jnp.dtype) -> bool:
    """True if weights are of one kind, which the kernels multiply with inputs of this dtype."""
    if not all(isinstance(w, QTensor | jax.Array) and calls.takes_weight(dtype, w) for w in weights):
        return False
    return len({w.bits if isinstance(w, QTensor) else w.dtype for w in weights}) == 1


def decode(
    config: ModelConfig,
    layers: Sequence[Mapping[str, Any]],
    x_BTD: jax.Array,
    rotations: tuple[jax.Array, jax.Array],
    window: Window,
    cache: KVCache,
) -> tuple[jax.Array, KVCache]:
    """The hidden state after the layers, (B, 1, D), and the cache with the new keys and values, in place.

    The results are those of `linears`, `rotate` and `attend` one after the other, to the bit.

    Args:
        config: the model's shape.
        layers: the weights of each layer, as in params.py.
        x_BTD: hidden state before the layers, (B, 1, D).
        rotations: float32 cosines and sines (B, 1, R).
        window: position of each token, which attends to the slots up to it, and where its key and value are stored.
        cache: keys and values of each layer.
    """
    slots_B = window.slots_BT[:, 0].astype(jnp.int32)
    # Padding has a slot beyond the cache, and no keys.
    lengths_B = jnp.where(slots_B < cache.capacity, window.positions_BT[:, 0].astype(jnp.int32) + 1, 0)
    operands = [x_BTD[:, 0], *(a[:, 0] for a in rotations), lengths_B, slots_B]
    in_place: dict[int, int] = {}
    for layer, stored in zip(layers, zip(cache.k, cache.v, strict=True), strict=True):
        q, k, v, o, *ffn = weights_of(layer)
        first, second = (calls.norm_scale(layer[name]["scale"]) for name in ("attention_norm", "ffn_norm"))
        operands += jax.tree.leaves([first, q, k, v, o, second, *ffn])
        for array in jax.tree.leaves(stored):
            in_place[len(operands)] = 1 + len(in_place)
            operands.append(array)
    results = [operands[0], *(operands[i] for i in in_place)]
    call = jax.ffi.ffi_call(
        "llama_layers",
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in results],
        vmap_method="sequential",
        input_output_aliases=in_place,
    )
    x_BD, *written = call(*operands, layers=np.int32(len(layers)), eps=np.float32(config.norm_eps))
    pairs = jax.tree.unflatten(jax.tree.structure(list(zip(cache.k, cache.v, strict=True))), written)
    keys, values = zip(*pairs, strict=True)
    return x_BD[:, None], KVCache(keys, values)
