"""Layers of a decode step of one row on NVIDIA GPUs: the calls of layers.cu.

One launch computes as many layers as its arguments allow. Blocks wait for one another five times a layer. The copies of
weights into shared memory continue during these waits.

Letters: D embedding, N query heads, K key/value heads, S slots, H head dim, F ffn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.cache import KVCache, Leaf, QCache, Window, dtype_in_place
from llama_jax.config import ModelConfig
from llama_jax.ops.gpu import build
from llama_jax.ops.native import weights_of
from llama_jax.ops.quant import GROUP, QTensor

_DTYPES = (jnp.bfloat16, jnp.float16)
_UNIT = 128  # bytes of a row of a weight that a warp multiplies at once
_TILE = 16  # outputs, or slots, that a warp multiplies at once
_WARPS = 8
_STAGES = range(10, 2, -1)
_MAX_RATIO = 8
_MAX_ARGUMENTS = 512  # of 8 bytes: PTX allows 4 KiB
_OTHER_ARGUMENTS = 8  # x, rotations, position, slot, and three results


class Tiling(NamedTuple):
    """The division of the work of a launch: constants of layers.cu with these names.

    Attributes:
        warps: warps of a block.
        stages: units of a warp in shared memory, of which all but one are on their way.
        parts: parts of the slots of a key/value head.
        region: bytes of shared memory without the stages and the pointers.
    """

    warps: int
    stages: int
    parts: int
    region: int


def refuses(config: ModelConfig, layers: Sequence[Mapping[str, Any]], x: jax.Array, cache: KVCache) -> str:
    """The reason why the kernel does not run a step; "" if it does."""
    N, K, H, leaf = config.num_heads, config.num_kv_heads, config.head_dim, cache.k[0]
    if x.shape[:2] != (1, 1):
        return "it takes one token of one row"
    if x.dtype not in _DTYPES or dtype_in_place(leaf) not in (x.dtype, jnp.int8):
        stored = dtype_in_place(leaf)
        return f"it takes bfloat16 and float16, and the same or int8 in the cache, not {x.dtype} with {stored}"
    if K > build.chip().processors:
        return f"it takes at most as many key/value heads as the GPU has processors, not {K}"
    if H not in (64, 128) or N // K > _MAX_RATIO:
        return f"it takes heads of 64 or 128 values and at most {_MAX_RATIO} queries a key"
    if leaf.shape[1] != K or leaf.shape[2] % _TILE:
        return (
            f"it takes caches of {K} heads with a multiple of {_TILE} slots, not {leaf.shape[1]} with {leaf.shape[2]}"
        )
    weights = [w for layer in layers for w in weights_of(layer)]
    kinds = {(w.bits if isinstance(w, QTensor) else w.dtype) if _plain(w) else None for w in weights}
    if len(kinds) > 1 or not kinds <= {4, 8, x.dtype}:
        return "it takes weights of one kind"
    bits = _bits(weights[0])
    if any(width * bits % (8 * _UNIT) for width in (config.embed_dim, N * H, config.ffn_dim)):
        return f"it takes inputs that are a multiple of {8 * _UNIT // bits}"
    if tiling(config, bits, leaf.shape[2], build.chip(), _MAX_ARGUMENTS) is None:
        return "the GPU has too little shared memory"
    return ""


def _plain(weight: Any) -> bool:
    return isinstance(weight, QTensor | jax.Array)


def _bits(weight: jax.Array | QTensor) -> int:
    return weight.bits if isinstance(weight, QTensor) else 16


def kind_of(layers: Sequence[Mapping[str, Any]], cache: KVCache) -> str:
    """The kind of a step."""
    return kind(_bits(weights_of(layers[0])[0]), "int8" if isinstance(cache.k[0], QCache) else "compute")


def kind(bits: int, kv: str) -> str:
    """The kind of a step with a cache of one of KV_TYPES, as the check of the kernels names it."""
    return f"layers of {bits} bits, cache {kv}"


def tiling(config: ModelConfig, bits: int, bound: int, chip: build.Chip, pointers: int) -> Tiling | None:
    """The tiling for a GPU, or None if its shared memory is too small."""
    K, H, ratio = config.num_kv_heads, config.head_dim, config.num_heads // config.num_kv_heads
    inputs = max(config.embed_dim, config.ffn_dim, K * ratio * H)
    items = [(ratio + 2) * K * H, config.embed_dim, 2 * config.ffn_dim]
    tiles = 2 * max(math.ceil(n / (2 * _TILE) / chip.processors) for n in items)
    products = 2 * inputs + (4 * inputs // GROUP if bits == 4 else 0) + 4 * tiles * _WARPS * _TILE
    attention = 8 * (2 * H + 16) + 4 * _WARPS * (16 + ratio * H)
    parts = max(1, min(chip.processors // K, math.ceil(bound / _TILE / _WARPS / 2)))
    for stages in _STAGES:
        tried = Tiling(_WARPS, stages, parts, 16 * math.ceil(max(products, attention) / 16))
        if shared_bytes(bits, tried, pointers) + 1024 <= chip.shared:
            return tried
    return None


def shared_bytes(bits: int, tiling: Tiling, pointers: int) -> int:
    """Bytes of shared memory of a block, as layers.cu uses it."""
    stage = _TILE * (_UNIT + (0 if bits == 16 else 2 * _UNIT * 8 // bits // GROUP))
    return tiling.warps * (tiling.stages * stage + 4) + tiling.region + 8 * pointers


def decode(
    config: ModelConfig,
    layers: Sequence[Mapping[str, Any]],
    x_BTD: jax.Array,
    rotations: tuple[jax.Array, jax.Array],
    window: Window,
    cache: KVCache,
) -> tuple[jax.Array, KVCache]:
    """The hidden state after the layers, (1, 1, D), and the cache with the new keys and values.

    Products are accumulated in float32 and rounded to the dtype of x; the scale of a group multiplies the sum of its
    exact products. Scores and the softmax are computed in float32, and the weights of values are rounded to the dtype
    of x.

    Args:
        config: the model's shape.
        layers: the weights of each layer, as in params.py.
        x_BTD: hidden state before the layers, (1, 1, D).
        rotations: float32 cosines and sines (1, 1, R).
        window: position of the token, which attends to the slots up to it, where its key and value are stored, and how
            many slots are read.
        cache: keys and values of each layer.
    """
    x, keys, values = x_BTD, list(cache.k), list(cache.v)
    bits = _bits(weights_of(layers[0])[0])
    arguments = 2 + 7 * (1 if bits == 16 else 2) + 4 * (2 if isinstance(keys[0], QCache) else 1)  # of a layer
    launches = math.ceil(len(layers) / ((_MAX_ARGUMENTS - _OTHER_ARGUMENTS) // arguments))
    each = math.ceil(len(layers) / launches)
    given = [x, *rotations, window.positions_BT.astype(jnp.int32), window.slots_BT.astype(jnp.int32)]
    for first in range(0, len(layers), each):
        some = slice(first, first + each)
        given[0] = x
        x, keys[some], values[some] = _launch(config, bits, layers[some], given, window.bound, keys[some], values[some])
    return x, KVCache(tuple(keys), tuple(values))


def _launch(
    config: ModelConfig,
    bits: int,
    layers: Sequence[Mapping[str, Any]],
    given: Sequence[jax.Array],
    bound: int,
    keys: Sequence[Leaf],
    values: Sequence[Leaf],
) -> tuple[jax.Array, list[Leaf], list[Leaf]]:
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    x, chip, operands, stored = given[0], build.chip(), list(given), []
    in_place = {}
    for layer, leaves in zip(layers, zip(keys, values, strict=True), strict=True):
        norms = [layer[name]["scale"].astype(x.dtype) for name in ("attention_norm", "ffn_norm")]
        operands += [*norms, *jax.tree.leaves(weights_of(layer))]
        for array in jax.tree.leaves(leaves):
            stored.append(array)
            in_place[len(operands)] = len(stored)
            operands.append(array)
    count = len(operands) + len(stored) + 3
    chosen = tiling(config, bits, bound, chip, count)
    assert chosen is not None
    between = [
        jax.ShapeDtypeStruct(((N + 2 * K) * H + config.ffn_dim,), x.dtype),
        jax.ShapeDtypeStruct((N * chosen.parts * (H + 2),), jnp.float32),
    ]
    new, *rest = build.call(
        "layers",
        _constants(config, bits, keys[0], x.dtype, len(layers), bound, chosen, count),
        operands,
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, *stored)] + between,
        grid=(chip.processors,),  # one block for each, all at the same time: they wait for one another
        threads=32 * chosen.warps,
        shared=shared_bytes(bits, chosen, count),
        in_place=in_place,
    )
    each = len(stored) // len(layers)
    structure = jax.tree.structure((keys[0], values[0]))
    pairs = [jax.tree.unflatten(structure, rest[first : first + each]) for first in range(0, len(stored), each)]
    new_keys, new_values = zip(*pairs, strict=True)
    return new, list(new_keys), list(new_values)


def _constants(
    config: ModelConfig, bits: int, leaf: Leaf, dtype: Any, layers: int, bound: int, tiling: Tiling, count: int
) -> dict[str, str | int]:
    """The constants of layers.cu for a launch with `count` arguments."""
    return {
        "BITS": bits,
        "KV_BITS": 8 if isinstance(leaf, QCache) else 16,
        "HALF": int(dtype == jnp.float16),
        "LAYERS": layers,
        "EMBED": config.embed_dim,
        "FFN": config.ffn_dim,
        "HEADS": config.num_kv_heads,
        "RATIO": config.num_heads // config.num_kv_heads,
        "DIM": config.head_dim,
        "SLOTS": leaf.shape[2],
        "BOUND": bound,
        "GRID": build.chip().processors,
        **{name.upper(): value for name, value in tiling._asdict().items()},
        "EPS": build.float32(config.norm_eps),
        "SCALE": build.float32(math.log2(math.e) / math.sqrt(config.head_dim)),
        "COUNT": count,
        "POINTERS": ",".join(f"const void*p{i}" for i in range(count)),
        "POINTS": ",".join(f"p{i}" for i in range(count)),
    }
