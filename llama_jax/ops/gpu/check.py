"""The check of the CUDA kernels before they are used: each must give the results of XLA, and is timed.

    python -m llama_jax.ops.gpu.check DEVICE KIND RESULT.json    # writes the gain, or the reason of a failure

A kind of kernel is timed as it is used: with layers of 8B, many times in one program, so that the times are those of
the GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import cache as caches
from llama_jax.choices import KV_TYPES
from llama_jax.config import SIZES, ModelConfig
from llama_jax.files import write_json
from llama_jax.ops import attention, linear, quant, rope
from llama_jax.ops.gpu import layers, products

_ERROR = 0.01  # of the norm of the result, as bfloat16 gives
_LARGEST_ERROR = 0.02  # of an element, as a share of the largest element
_MODEL = "llama3.1-8b"
_LAYERS, _SLOTS = 4, 2048
_REPEATS, _TURNS = 10, 4  # passes of a program, and calls of each program
_ROWS = 8
# Products that a layer of 8B does not have: dtype, rows, inputs and outputs.
_ODD = ((jnp.bfloat16, 3, 576, (40, 16, 33)), (jnp.float16, 2, 1536, (48,)))
# Layers that 8B does not have: dtype, embedding, ffn, query heads, key/value heads and values of a head.
_ODD_LAYERS = {
    "compute": (jnp.bfloat16, 1536, 2560, 24, 8, 64),
    "int8": (jnp.float16, 512, 3072, 8, 1, 128),
}
_Kernels = Callable[..., Any]


def kinds() -> dict[str, Callable[[], float]]:
    """The function that checks a kind of kernel and returns its gain, for each kind."""
    checks: dict[str, Callable[[], float]] = {
        products.kind(bits): functools.partial(_gain_of_products, bits) for bits in (8, 4)
    }
    for bits, kv in itertools.product((16, 8, 4), KV_TYPES):
        checks[layers.kind(bits, kv)] = functools.partial(_gain_of_layers, bits, kv)
    return checks


def _draw(*shape: int, seed: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _weight(shape: tuple[int, int], bits: int, dtype: Any, seed: int) -> Any:
    weight = shape[1] ** -0.5 * jax.random.normal(jax.random.key(seed), shape, dtype)
    return weight if bits == 16 else quant.quantize(weight, bits)


def _others(x: jax.Array, weights: Any, *, dtype: Any, **around: Any) -> list[jax.Array]:
    """The products by the kernels that ours replace."""
    return linear.linears(x, [(w, None) for w in weights], **around)


def _by_float32(x: jax.Array, weights: Any) -> Iterator[jax.Array]:
    """The products in float32."""
    for w in weights:
        whole = quant.dequantize(w, jnp.float32) if isinstance(w, quant.QTensor) else w.astype(jnp.float32)
        yield jnp.dot(x.astype(jnp.float32), whole.T, precision="highest")


def _gain_of_products(bits: int) -> float:
    for dtype, count, width, outputs in _ODD:
        x, plus = _draw(count, width, seed=0, dtype=dtype), _draw(count, outputs[0], seed=1, dtype=dtype)
        several = [_weight((out, width), bits, dtype, out) for out in outputs]
        name = f"products of {count} rows of {width} inputs"
        _compare(products.linears(x, several, dtype=dtype), _by_float32(x, several), name)
        product = products.linears(x, several[:1], dtype=dtype, up=x, plus=plus)
        _compare(product, (a + plus for a in _by_float32(jax.nn.silu(x) * x, several[:1])), f"{name} after SwiGLU")
    config = _config(SIZES[_MODEL], 1)

    def mixed(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return q.at[:, : k.shape[1]].add(k + v)  # in the place of attention

    ours, others = (functools.partial(_layer, config, kernels, mixed) for kernels in (products.linears, _others))
    x = _draw(_ROWS, config.embed_dim, seed=2)
    return _gain(ours, others, x, _random_layer(config, bits, x.dtype, 0), f"products with {bits} bits")


def _config(config: ModelConfig, count: int) -> ModelConfig:
    return dataclasses.replace(config, num_layers=count, max_seq_len=_SLOTS)


def _random_layer(config: ModelConfig, bits: int, dtype: Any, seed: int) -> dict[str, Any]:
    """Random weights of a layer, as in params.py."""
    D, F = config.embed_dim, config.ffn_dim
    Q, K = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention_shapes = {"q": (Q, D), "k": (K, D), "v": (K, D), "o": (D, Q)}
    ffn_shapes = {"gate": (F, D), "up": (F, D), "down": (D, F)}
    modules = [
        {name: _weight(shape, bits, dtype, seed + i) for i, (name, shape) in enumerate(shapes.items())}
        for shapes in (attention_shapes, ffn_shapes)
    ]
    norms = [{"scale": 1 + 0.1 * _draw(D, seed=seed + i, dtype=dtype)} for i in range(2)]
    return dict(zip(("attention", "ffn", "attention_norm", "ffn_norm"), modules + norms, strict=True))


def _layer(config: ModelConfig, kernels: _Kernels, attend: Callable[..., jax.Array], x: jax.Array, layer: Any) -> Any:
    """A layer with the products of `kernels`, for x (R, D)."""
    projections, ffn = layer["attention"], layer["ffn"]
    norms = [(layer[name]["scale"], config.norm_eps) for name in ("attention_norm", "ffn_norm")]
    qkv = kernels(x, [projections[name] for name in "qkv"], dtype=x.dtype, norm=norms[0])
    (x,) = kernels(attend(*qkv), [projections["o"]], dtype=x.dtype, plus=x)
    gate, up = kernels(x, [ffn["gate"], ffn["up"]], dtype=x.dtype, norm=norms[1])
    return kernels(gate, [ffn["down"]], dtype=x.dtype, up=up, plus=x)[0]


def _gain_of_layers(bits: int, kv: str) -> float:
    name = f"layers with {bits} bits and a cache in {kv}"
    dtype, D, F, N, K, H = _ODD_LAYERS[kv]
    odd = dataclasses.replace(SIZES["tiny"], embed_dim=D, ffn_dim=F, num_heads=N, num_kv_heads=K, head_dim=H)
    ours, others, x, held = _steps(_config(odd, 2), bits, kv, dtype, _SLOTS - 1)
    _compare(jax.jit(ours)(x, held), jax.jit(others)(x, held), f"{name}, {N} heads of {H}")
    return _gain(*_steps(_config(SIZES[_MODEL], _LAYERS), bits, kv, jnp.bfloat16, _SLOTS // 2 + 13), name)


def _steps(
    config: ModelConfig, bits: int, kv: str, dtype: Any, at: int, bound: int | None = None
) -> tuple[Callable[..., Any], Callable[..., Any], Any, Any]:
    """The layers of a decode step at a position by our kernel and by others, x, and weights with a cache."""
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    position = jnp.array([[at]], jnp.int32)
    empty = caches.init_cache(config, batch=1, capacity=_SLOTS, dtype=dtype, kv=kv)
    every = caches.window(empty, jnp.arange(_SLOTS)[None], None)

    def full(leaves: Sequence[caches.Leaf], seed: int) -> tuple[caches.Leaf, ...]:
        drawn = [_draw(1, _SLOTS, K, H, seed=seed + i, dtype=dtype) for i in range(len(leaves))]
        return tuple(caches.write(leaf, new, every) for leaf, new in zip(leaves, drawn, strict=True))

    cache = caches.KVCache(full(empty.k, 20), full(empty.v, 30))
    weights = [_random_layer(config, bits, dtype, 40 + 10 * i) for i in range(config.num_layers)]
    window, rotations = caches.window(empty, position, None, bound=bound), rope.rotations(config, position)
    x = _draw(1, config.embed_dim, seed=5, dtype=dtype)
    if reason := layers.refuses(config, weights, x[None], cache):
        raise RuntimeError(reason)

    def ours(x: jax.Array, held: Any) -> Any:
        x, cache = layers.decode(config, held[0], x[None], rotations, window, held[1])
        return x[0], (held[0], cache)

    def others(x: jax.Array, held: Any) -> Any:
        weights, cache = held
        keys, values = list(cache.k), list(cache.v)
        for i, layer in enumerate(weights):

            def attend(q: jax.Array, k: jax.Array, v: jax.Array, i: int = i) -> jax.Array:
                q, k = (rope.rotate(a.reshape(1, 1, -1, H), *rotations) for a in (q, k))
                keys[i] = caches.write(keys[i], k, window)
                values[i] = caches.write(values[i], v.reshape(1, 1, K, H), window)
                call = attention.Call(q, keys[i], values[i], position, None, window)
                return attention.attention(call).reshape(1, N * H)

            x = _layer(config, _others, attend, x, layer)
        return x, (weights, caches.KVCache(tuple(keys), tuple(values)))

    return ours, others, x, (weights, cache)


def _gain(ours: Callable[..., Any], others: Callable[..., Any], x: jax.Array, held: Any, name: str) -> float:
    """The time of the others over ours, the least of calls in turn.

    A function takes x and what is held, and returns the next x, or the next of both.

    Raises:
        RuntimeError: their results differ.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def many(function: Callable[..., Any], x: jax.Array, held: Any) -> Any:
        def body(_: Any, carry: Any) -> Any:
            found = function(*carry)
            return found if isinstance(found, tuple) else (found, carry[1])

        return jax.lax.fori_loop(0, _REPEATS, body, (x, held))[0]

    _compare(jax.jit(ours)(x, held), jax.jit(others)(x, held), name)
    times: dict[Any, list[float]] = {ours: [], others: []}
    for turn in range(1 + _TURNS):
        for function, seconds in times.items():
            start = time.perf_counter()
            jax.block_until_ready(many(function, x, held))
            seconds.append(time.perf_counter() - start) if turn else None  # the first call compiles
    return round(min(times[others]) / min(times[ours]), 2)


def _compare(results: Any, expected: Any, name: str) -> None:
    """Raises RuntimeError if an array of the results is not near the one that is expected.

    For layers, only x and the cache are compared.
    """
    if isinstance(results, tuple):
        (x, (_, cache)), (x_expected, (_, cache_expected)) = results, expected
        results, expected = (x, cache), (x_expected, cache_expected)
    results, expected = (jax.tree.leaves(list(a) if isinstance(a, Iterator) else a) for a in (results, expected))
    for result, exact in zip(results, expected, strict=True):
        result, exact = result.astype(jnp.float32), exact.astype(jnp.float32)
        error = float(jnp.linalg.norm(result - exact) / jnp.linalg.norm(exact))
        largest = float(jnp.max(jnp.abs(result - exact)) / jnp.max(jnp.abs(exact)))
        if not (error <= _ERROR and largest <= _LARGEST_ERROR):
            raise RuntimeError(
                f"{name}: the kernel differs from XLA by {error:.1e} of the result, at most {largest:.1e}"
            )


def run(kind: str, result: Path) -> None:
    """Checks a kind, and writes the gain or the reason of a failure.

    Raises:
        RuntimeError: the GPU has no memory left for the check, which the next start may have.
    """
    try:
        found: dict[str, float | str] = {"gain": kinds()[kind]()}
    except Exception as error:  # whatever it is, it would be the same at the next start
        text = (str(error).splitlines() or [repr(error)])[0][:300]
        if "RESOURCE_EXHAUSTED" in text or "OUT_OF_MEMORY" in text:
            raise
        found = {"failed": text}
    write_json(result, found)


def main(device: int, kind: str, result: Path) -> None:
    """Checks a kind on the device with this number."""
    jax.config.update("jax_default_device", jax.local_devices(backend="cuda")[device])
    jax.block_until_ready(jnp.zeros(8) + 1)  # without a GPU to use, this process fails and records nothing
    run(kind, result)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
