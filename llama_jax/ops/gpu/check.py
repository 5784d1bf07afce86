"""The check of the CUDA kernels before they are used: each must give the results of XLA, and is timed.

python -m llama_jax.ops.gpu.check RECORD.json    # writes the gains, or what failed
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import cache as caches
from llama_jax.choices import KV_TYPES
from llama_jax.config import SIZES
from llama_jax.files import write_json
from llama_jax.ops import attention, linear, quant, rope
from llama_jax.ops.gpu import decode, products
from llama_jax.ops.quant import QTensor

_ERROR = 0.01  # of the norm of the result, as bfloat16 gives
_SHAPE = (4096, 4096)
_COPIES = 6  # of a weight, so that the cache of a GPU does not hold them
_BITS, _ROWS = (16, 8, 4), (1, 8, 64)
_HEADS = (32, 8, 128)  # query heads, key/value heads, and values of a head
_SLOTS = 2048
_CALLS, _TURNS = 10, 8  # of a timing


def gains() -> dict[str, float]:
    """The gain of each kind of kernel. Raises RuntimeError if a result differs from XLA's."""
    found = {}
    for bits in _BITS:
        weights = [_draw(bits, seed) for seed in range(_COPIES)]
        for rows in _ROWS:
            if products.refuses(jnp.zeros((rows, _SHAPE[1]), jnp.bfloat16), weights[:1]):
                continue
            found[products.kind(weights[0], rows)] = _gain_of_products(weights, rows)
    for kv in KV_TYPES:
        found[decode.kind(kv)] = _gain_of_decoding(kv)
    return found


@functools.partial(jax.jit, static_argnums=0)
def _draw(bits: int, seed: int) -> jax.Array | QTensor:
    weight = 0.02 * jax.random.normal(jax.random.key(seed), _SHAPE, jnp.bfloat16)
    return weight if bits == 16 else quant.quantize(weight, bits)


def _gain_of_products(weights: Sequence[jax.Array | QTensor], rows: int) -> float:
    x = jax.random.normal(jax.random.key(rows), (rows, _SHAPE[1]), jnp.bfloat16)
    scale = 1 + 0.1 * jax.random.normal(jax.random.key(1), (_SHAPE[1],), jnp.bfloat16)
    norm = (scale, 1e-5)

    def ours(x: jax.Array, weights: Any) -> list[jax.Array]:
        return [products.linears(x, [w], dtype=x.dtype, norm=norm, plus=x)[0] for w in weights]

    def others(x: jax.Array, weights: Any) -> list[jax.Array]:
        return [linear.linears(x, [(w, None)], norm=norm, plus=x)[0] for w in weights]

    return _gain(ours, others, (x, weights), f"products of {rows} rows")


def _gain_of_decoding(kv: str) -> float:
    N, K, H = _HEADS
    config = dataclasses.replace(SIZES["tiny"], num_layers=1, num_heads=N, num_kv_heads=K, head_dim=H)
    live = jnp.array([[_SLOTS // 2 + 13]], jnp.int32)
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def draw(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    empty = caches.init_cache(config, batch=1, capacity=_SLOTS, dtype=jnp.bfloat16, kv=kv)
    every = caches.window(empty, jnp.arange(_SLOTS)[None], None)
    cache = tuple(caches.write(leaf[0], draw(1, _SLOTS, K, H), every) for leaf in (empty.k, empty.v))
    q, k, v = draw(1, 1, N, H), draw(1, 1, K, H), draw(1, 1, K, H)
    rotations = rope.rotations(config, live)
    window = caches.window(empty, live, None)

    def ours(q: jax.Array, cache: Any) -> list[jax.Array]:
        out, new = decode.attend(q, k, v, rotations, live, window, cache)
        return [out, *_floats(new)]

    def others(q: jax.Array, cache: Any) -> list[jax.Array]:
        out, new = attention.over_cache(q, k, v, rotations, live, window, cache)
        return [out, *_floats(new)]

    return _gain(ours, others, (q, cache), f"decoding with a cache in {kv}")


def _floats(cache: Any) -> list[jax.Array]:
    """The new slot of keys and values. Of a cache in 8 bits, the scales."""
    return [(leaf.scales_BKS if isinstance(leaf, caches.QCache) else leaf)[:, :, _SLOTS // 2 + 13] for leaf in cache]


def _gain(ours: Callable[..., Any], others: Callable[..., Any], arguments: Any, name: str) -> float:
    """The time of the others over ours, the least of runs in turn. Raises RuntimeError if results differ."""
    run, other = jax.jit(ours), jax.jit(others)
    for result, expected in zip(run(*arguments), other(*arguments), strict=True):
        result, expected = result.astype(jnp.float32), expected.astype(jnp.float32)
        error = float(jnp.linalg.norm(result - expected) / jnp.linalg.norm(expected))
        if not error <= _ERROR:
            raise RuntimeError(f"{name}: the kernel differs from XLA by {error:.1e} of the result")
    times: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(_TURNS):
        for number, function in enumerate((run, other)):
            start = time.perf_counter()
            jax.block_until_ready([function(*arguments) for _ in range(_CALLS)])
            times[number].append(time.perf_counter() - start)
    return round(min(times[1]) / min(times[0]), 2)


def main(record: Path) -> None:
    """Runs the check and writes its result."""
    try:
        result: dict[str, Any] = {"gains": gains()}
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):  # the next start may have more memory
            raise
        result = {"failed": f"the check of the GPU kernels failed: {str(error).splitlines()[0][:300]}"}
    write_json(record, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
