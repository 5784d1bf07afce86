"""The check of the CUDA kernels before they are used: each must give the results of XLA, and is timed.

    python -m llama_jax.ops.gpu.check DEVICE RECORD.json    # writes the gains, and the reason of each failure

A kind of kernel is timed as it is used: the products of a layer of 8B, or a decode step over a cache, many times in one
program, so that the times are those of the GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
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

_ERROR = 0.01  # of the norm of the result, as bfloat16 gives
_LARGEST_ERROR = 0.02  # of an element, as a share of the largest element
_LAYER = (4096, 1024, 14336)  # values of a token, of its keys, and of the feed-forward layer
_HEADS = (32, 8, 128)  # query heads, key/value heads, and values of a head
_SLOTS = 2048
_REPEATS, _TURNS = 20, 4  # layers of a program, and calls of each program
_BITS, _ROWS = (16, 8, 4), (1, 8, 64)
# Products that a layer of 8B does not have: dtype, rows, inputs and outputs.
_ODD = (
    (jnp.bfloat16, 1, 576, (40, 16, 33)),
    (jnp.float16, 1, 1536, (48,)),
    (jnp.bfloat16, 3, 576, (40, 16, 33)),
    (jnp.float16, 2, 1536, (48,)),
    (jnp.float16, 20, 320, (16, 8)),
)
# Decode steps that 8B does not have: dtype, rows, query heads, key/value heads and values of a head.
_ODD_HEADS = ((jnp.bfloat16, 2, 6, 2, 64), (jnp.float16, 3, 16, 1, 32), (jnp.float16, 1, 3, 3, 96))
_EPS = 1e-5
_Kernels = Callable[..., Any]


def kinds() -> Iterator[tuple[str, Callable[[], float]]]:
    """Each kind of kernel, with the function that checks it and returns its gain."""
    for bits in _BITS:
        for rows in _ROWS:
            if bits < 16 or rows <= 8:
                yield products.kind(bits, rows), functools.partial(_gain_of_products, bits, rows)
    for kv in KV_TYPES:
        yield decode.kind(kv), functools.partial(_gain_of_decoding, kv)


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


def _gain_of_products(bits: int, rows: int) -> float:
    for dtype, count, width, outputs in _ODD:
        if products.kind(bits, count) != products.kind(bits, rows):
            continue
        x, plus = _draw(count, width, seed=0, dtype=dtype), _draw(count, outputs[0], seed=1, dtype=dtype)
        several = [_weight((out, width), bits, dtype, out) for out in outputs]
        name = f"products of {count} rows of {width} inputs"
        _compare(products.linears(x, several, dtype=dtype), _by_float32(x, several), name)
        product = products.linears(x, several[:1], dtype=dtype, up=x, plus=plus)
        _compare(product, (a + plus for a in _by_float32(jax.nn.silu(x) * x, several[:1])), f"{name} after SwiGLU")
    D, K, F = _LAYER
    shapes = {"qkv": [(D, D), (K, D), (K, D)], "o": [(D, D)], "ffn": [(F, D), (F, D)], "down": [(D, F)]}
    weights = {
        name: [_weight(shape, bits, jnp.bfloat16, i) for i, shape in enumerate(each)] for name, each in shapes.items()
    }
    norm = (1 + 0.1 * _draw(D, seed=1), _EPS)

    def layer(kernels: _Kernels, x: jax.Array, weights: Any) -> jax.Array:
        q, k, v = kernels(x, weights["qkv"], dtype=x.dtype, norm=norm)
        q = q.at[:, :K].add(k + v)
        (x,) = kernels(q, weights["o"], dtype=x.dtype, plus=x)
        gate, up = kernels(x, weights["ffn"], dtype=x.dtype, norm=norm)
        (x,) = kernels(gate, weights["down"], dtype=x.dtype, up=up, plus=x)
        return x

    x = _draw(rows, D, seed=2)
    ours, others = functools.partial(layer, products.linears), functools.partial(layer, _others)
    return _gain(ours, others, x, weights, f"products of {rows} rows with {bits} bits")


def _gain_of_decoding(kv: str) -> float:
    for dtype, rows, heads, keys, dim in _ODD_HEADS:
        ours, others, q, cache = _steps(kv, heads, keys, dim, rows, dtype)
        _compare(ours(q, cache), others(q, cache), f"decoding with {heads} heads of {dim} and a cache in {kv}")
    return _gain(*_steps(kv, *_HEADS), f"decoding with a cache in {kv}")


def _steps(
    kv: str, N: int, K: int, H: int, B: int = 1, dtype: Any = jnp.bfloat16
) -> tuple[Callable[..., Any], Callable[..., Any], jax.Array, Any]:
    """A decode step by our kernel and by others, its query, and a cache of which half the slots are live."""
    config = dataclasses.replace(SIZES["tiny"], num_layers=1, num_heads=N, num_kv_heads=K, head_dim=H)
    live = _SLOTS // 2 + 13 + jnp.arange(B, dtype=jnp.int32)[:, None]
    empty = caches.init_cache(config, batch=B, capacity=_SLOTS, dtype=dtype, kv=kv)
    every = caches.window(empty, jnp.broadcast_to(jnp.arange(_SLOTS), (B, _SLOTS)), None)
    cache = tuple(
        caches.write(leaf[0], _draw(B, _SLOTS, K, H, seed=i, dtype=dtype), every)
        for i, leaf in enumerate((empty.k, empty.v))
    )
    k, v = (_draw(B, 1, K, H, seed=i, dtype=dtype) for i in (3, 4))
    window = caches.window(empty, live, None)

    def step(attend: Callable[..., Any], q: jax.Array, cache: Any) -> Any:
        return attend(q, k, v, rope.rotations(config, live), live, window, cache)

    ours, others = functools.partial(step, decode.attend), functools.partial(step, attention.over_cache)
    return ours, others, _draw(B, 1, N, H, seed=5, dtype=dtype), cache


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
    """Raises RuntimeError if an array of the results is not near the one that is expected."""
    results, expected = (jax.tree.leaves(list(a) if isinstance(a, Iterator) else a) for a in (results, expected))
    for result, exact in zip(results, expected, strict=True):
        result, exact = result.astype(jnp.float32), exact.astype(jnp.float32)
        error = float(jnp.linalg.norm(result - exact) / jnp.linalg.norm(exact))
        largest = float(jnp.max(jnp.abs(result - exact)) / jnp.max(jnp.abs(exact)))
        if not (error <= _ERROR and largest <= _LARGEST_ERROR):
            raise RuntimeError(
                f"{name}: the kernel differs from XLA by {error:.1e} of the result, at most {largest:.1e}"
            )


def run(record: Path) -> None:
    """Checks each kind, and writes the gains and the reasons of failures.

    Raises:
        RuntimeError: the GPU has no memory left for the check, which the next start may have.
    """
    gains, failed = {}, {}
    for kind, check in kinds():
        try:
            gains[kind] = check()
        except RuntimeError as error:
            text = str(error).splitlines()[0][:300]
            if "RESOURCE_EXHAUSTED" in text or "OUT_OF_MEMORY" in text:
                raise
            failed[kind] = text
    write_json(record, {"gains": gains, "failed": failed})


def main(device: int, record: Path) -> None:
    """Checks the kernels on the device with this number."""
    jax.config.update("jax_default_device", jax.local_devices(backend="cuda")[device])
    jax.block_until_ready(jnp.zeros(8) + 1)  # without a GPU to use, this process fails and records nothing
    run(record)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
