"""The check of a new library before it is used: every kernel must give the results of XLA. Many rows are timed too."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import cache as caches
from llama_jax import parallel
from llama_jax.config import SIZES, ModelConfig
from llama_jax.ops import quant
from llama_jax.ops.cpu import calls, layers
from llama_jax.ops.quant import QTensor

_FLOAT = 1e-5  # of the largest result
_BFLOAT16 = 2e-2  # where results, and numbers on the way to them, are rounded to bfloat16


def against_xla() -> None:
    """Runs every kind of kernel once. Raises RuntimeError if a result differs from XLA's."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    for kind in ("float32", "bfloat16", 8, 4):
        for dtype in (jnp.float32, jnp.bfloat16):
            exact = isinstance(kind, str) or dtype == jnp.float32
            for rows in (1, 3, 8, 40, 520):
                plain = normal(50, 608)
                w = quant.quantize(plain, kind) if isinstance(kind, int) else plain.astype(kind)
                x = normal(rows, 608).astype(dtype)
                result = jax.jit(lambda x, w: calls.linears(x, [w], dtype=jnp.float32)[0])(x, w)
                # Where the processor multiplies bfloat16, many rows round dequantized weights to it.
                roundings = [jnp.float32] if exact or rows < 40 else [jnp.float32, dtype]
                expected = [_product(x, w, to) for to in roundings]
                _compare(result, expected, f"linear, {rows} rows, {kind}, {dtype.__name__}")
    _check_training(normal)
    _check_attention(normal)
    _check_rotation(normal)
    _check_layers(normal)
    table, ids = normal(9, 40).astype(jnp.bfloat16), jnp.array([[8, 0], [3, 3]])
    if not jnp.array_equal(jax.jit(calls.rows)(table, ids), table[ids]):
        raise RuntimeError("rows: the kernel differs from XLA")


def _product(x: jax.Array, w: jax.Array | QTensor, to: jnp.dtype) -> jax.Array:
    """x w^T in float32, with a quantized weight dequantized to dtype `to`."""
    numbers = (quant.dequantize(w, to) if isinstance(w, QTensor) else w).astype(jnp.float32)
    return jnp.dot(x.astype(jnp.float32), numbers.T, precision="highest")


def _check_training(normal: Callable[..., jax.Array]) -> None:
    """Products for gradients, and the softmax over a part of the vocabulary."""
    for dtype in (jnp.float32, jnp.bfloat16):
        a, b, table = (normal(*shape).astype(dtype) for shape in ((520, 70), (520, 40), (600, 70)))
        table *= 0.1
        plain = [each.astype(jnp.float32) for each in (a, b, table)]
        dot = functools.partial(jnp.dot, precision="highest")
        for transposed, x, y, expected in (
            (True, a, b, dot(plain[0].T, plain[1])),
            (False, b.T, a, dot(plain[1].T, plain[0])),
        ):
            result = jax.jit(functools.partial(calls.product, dtype=jnp.float32, transposed=transposed))(x, y)
            _compare(result, [expected], f"product, {dtype.__name__}, transposed: {transposed}")
        scores, targets = dot(plain[0], plain[2].T), jnp.arange(520)
        top, total, score, _ = jax.jit(calls.loss)(a, table, targets, jnp.int32(600))
        lse = jax.nn.logsumexp(scores, axis=1)
        _compare(top + jnp.log(total) - score, [lse - scores[targets, targets]], f"loss, {dtype.__name__}")
        result = jax.jit(calls.loss_gradient)(a, table, targets, jnp.int32(600), lse, lse, lse)
        expected = lse[:, None] * (jax.nn.softmax(scores) - jax.nn.one_hot(targets, 600))
        bound = _FLOAT if dtype == jnp.float32 else _BFLOAT16
        _compare(result.astype(jnp.float32), [expected], f"loss_gradient, {dtype.__name__}", bound)


def gain_of_many_rows() -> float:
    """The speed of the kernel for many rows, as a multiple of that of XLA, in the dtype that sampling has here.

    Of runs in turn, the fastest of each count, so that other work on the machine matters little.
    """
    dtype = jnp.bfloat16 if parallel.has_bfloat16(jax.local_devices()[0]) else jnp.float32
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((512, 1024)), dtype)
    w = jnp.asarray(rng.standard_normal((2048, 1024)), dtype)
    kernel = jax.jit(lambda x, w: calls.linears(x, [w], dtype=dtype)[0])
    xla = jax.jit(lambda x, w: jnp.dot(x, w.T, preferred_element_type=jnp.float32).astype(dtype))
    seconds: dict[Callable[..., jax.Array], list[float]] = {kernel: [], xla: []}
    for _ in range(8):
        for product, times in seconds.items():
            start = time.perf_counter()
            jax.block_until_ready(product(x, w))
            times.append(time.perf_counter() - start)
    return min(seconds[xla]) / min(seconds[kernel])


def _check_attention(normal: Callable[..., jax.Array]) -> None:
    q, k, v = normal(2, 6, 64), normal(2, 2, 40, 64), normal(2, 2, 40, 64)
    lengths = jnp.array([40, 7], jnp.int32)
    for dtype in (jnp.float32, jnp.bfloat16):
        keys, values = k.astype(dtype), v.astype(dtype)
        result = jax.jit(calls.attend)(q, keys, values, lengths)
        scores = jnp.einsum("bkgh,bksh->bkgs", q.reshape(2, 2, 3, 64), keys.astype(jnp.float32), precision="highest")
        live = jnp.arange(40) < lengths[:, None, None, None]
        weights = jax.nn.softmax(jnp.where(live, scores / 8, -jnp.inf), axis=-1)
        expected = jnp.einsum("bkgs,bksh->bkgh", weights, values.astype(jnp.float32), precision="highest")
        _compare(result, [expected.reshape(2, 6, 64)], f"attention, {dtype.__name__}")
        many = jnp.broadcast_to(q[:, None], (2, 5, 6, 64))
        zeros = jnp.zeros((2, 5), jnp.int32)
        result = jax.jit(calls.attend_many)(many, keys, values, zeros, lengths[:, None] + zeros)
        expected = jnp.broadcast_to(expected.reshape(2, 1, 6, 64), result.shape)
        _compare(result, [expected], f"attention of many queries, {dtype.__name__}")
    _check_gradient(normal)


def _check_gradient(normal: Callable[..., jax.Array]) -> None:
    """Compares the gradients of q, k and v for a row of two documents of 37 and 83 tokens."""
    keys = jnp.arange(120)
    low, high = jnp.where(keys < 37, 0, 37)[None], keys[None] + 1
    live = (keys >= low[0, :, None]) & (keys < high[0, :, None])

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("btkgh,bksh->bkgts", q.reshape(1, 120, 2, 3, 40), k, precision="highest") * 40**-0.5
        weights = jax.nn.softmax(jnp.where(live, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bkgts,bksh->btkgh", weights, v, precision="highest").reshape(q.shape)

    @jax.jit
    def both(
        q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        out, lse = calls.attend_many_forward(q, k, v, low, high)
        _, back = jax.vjp(plain, *(a.astype(jnp.float32) for a in (q, k, v)))
        return calls.attend_many_backward(q, k, v, low, high, out, lse, g), back(g.astype(jnp.float32))

    q, k, v, g = (normal(1, *shape, 40) for shape in ((120, 6), (2, 120), (2, 120), (120, 6)))
    for dtype, bound in ((jnp.float32, _FLOAT), (jnp.bfloat16, _BFLOAT16)):
        for a, b, name in zip(*both(*(a.astype(dtype) for a in (q, k, v, g))), "qkv", strict=True):
            _compare(a, [b], f"gradient of {name}, {dtype.__name__}", bound)


def _check_rotation(normal: Callable[..., jax.Array]) -> None:
    angles = normal(2, 5, 20)
    for dtype, bound in ((jnp.float32, _FLOAT), (jnp.bfloat16, _BFLOAT16)):
        x = normal(2, 5, 3, 40).astype(dtype)
        result = jax.jit(calls.rotate)(x, jnp.cos(angles), jnp.sin(angles)).astype(jnp.float32)
        pairs = x[..., :20].astype(jnp.float32) + 1j * x[..., 20:].astype(jnp.float32)
        turned = pairs * jnp.exp(1j * angles)[:, :, None]
        _compare(result, [jnp.concatenate([turned.real, turned.imag], -1)], f"rotate, {dtype.__name__}", bound)


def _check_layers(normal: Callable[..., jax.Array]) -> None:
    """Compares two layers in one call with the kernels of single operations."""
    config = dataclasses.replace(SIZES["tiny"], embed_dim=64, ffn_dim=96, num_heads=4, num_kv_heads=2, head_dim=16)
    shapes = {
        "attention": {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64)},
        "ffn": {"gate": (96, 64), "up": (96, 64), "down": (64, 96)},
    }

    def layer(kind: str | int) -> dict[str, Any]:
        def weight(out: int, size: int) -> jax.Array | QTensor:
            w = normal(out, size) * size**-0.5
            return quant.quantize(w, kind) if isinstance(kind, int) else w.astype(kind)

        norms = {f"{name}_norm": {"scale": normal(64)} for name in shapes}
        return norms | {name: {key: weight(*shape) for key, shape in those.items()} for name, those in shapes.items()}

    angles, slots = normal(3, 1, 8), jnp.array([[5], [0], [40]])  # the last is padding
    window = caches.Window(jnp.minimum(slots, 7), slots, 16)
    for kind, dtype, kv in (
        ("float32", jnp.float32, "compute"),
        ("bfloat16", jnp.bfloat16, "int8"),
        (8, jnp.bfloat16, "compute"),
    ):
        empty = caches.init_cache(config, batch=3, capacity=16, dtype=dtype, kv=kv)
        cache = caches.KVCache(empty.k[:2], empty.v[:2])
        given = [layer(kind), layer(kind)], normal(3, 1, 64).astype(dtype), (jnp.cos(angles), jnp.sin(angles))
        floats = [_with_floats(decode, config, window)(*given, cache) for decode in (layers.decode, _one_by_one)]
        for a, b in zip(*map(jax.tree.leaves, floats), strict=True):
            _compare(a, [b], f"layers, {kind}, cache {kv}", _FLOAT if dtype == jnp.float32 else _BFLOAT16)


def _with_floats(
    decode: Callable[..., tuple[jax.Array, caches.KVCache]], config: ModelConfig, window: caches.Window
) -> Callable[..., list[jax.Array]]:
    """A step whose hidden state, keys and values are float32."""

    def run(weights: Any, x_BTD: jax.Array, rotations: Any, cache: caches.KVCache) -> list[jax.Array]:
        y_BTD, cache = decode(config, weights, x_BTD, rotations, window, cache)
        read = [caches.read(leaf, window, x_BTD.dtype) for leaf in (*cache.k, *cache.v)]
        return [a.astype(jnp.float32) for a in (y_BTD, *read)]

    return jax.jit(run)


def _one_by_one(
    config: ModelConfig,
    weights: Sequence[Mapping[str, Any]],
    x_BTD: jax.Array,
    rotations: tuple[jax.Array, jax.Array],
    window: caches.Window,
    cache: caches.KVCache,
) -> tuple[jax.Array, caches.KVCache]:
    """The result of `layers.decode` by the kernels of single operations."""
    lengths_B = jnp.where(window.slots_BT < cache.capacity, window.positions_BT + 1, 0)[:, 0]
    stored, x = [], x_BTD[:, 0]
    linears = functools.partial(calls.linears, dtype=x.dtype)
    for layer, pair in zip(weights, zip(cache.k, cache.v, strict=True), strict=True):
        attention, ffn = layer["attention"], layer["ffn"]
        norms = [(layer[name]["scale"], config.norm_eps) for name in ("attention_norm", "ffn_norm")]
        products = linears(x, [attention[name] for name in "qkv"], norm=norms[0])
        q, k, v = (a.reshape(len(x), 1, -1, config.head_dim) for a in products)
        q, k = calls.rotate(q, *rotations), calls.rotate(k, *rotations)
        stored.append((caches.write(pair[0], k, window), caches.write(pair[1], v, window)))
        k, v, *scales = sorted(jax.tree.leaves(stored[-1]), key=lambda a: -a.ndim)  # a stable order
        out = calls.attend(q[:, 0], k, v, lengths_B, tuple(scales) or None)
        (x,) = linears(out.reshape(len(x), -1), [attention["o"]], plus=x)
        gate, up = linears(x, [ffn["gate"], ffn["up"]], norm=norms[1])
        (x,) = linears(gate, [ffn["down"]], up=up, plus=x)
    keys, values = zip(*stored, strict=True)
    return x[:, None], caches.KVCache(keys, values)


def _compare(result: jax.Array, expected: list[jax.Array], name: str, bound: float = _FLOAT) -> None:
    """Raises RuntimeError if a result is near none of those that it may be."""
    gap = min(float(jnp.abs(result - each).max() / jnp.abs(each).max()) for each in expected)
    if not gap <= bound:
        raise RuntimeError(f"{name}: the kernel differs from XLA by {gap:.1e} of the largest result")
