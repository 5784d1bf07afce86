"""The sections of `accelerator.py`: functions of a size that yield one record after the other.

A record has a name, seconds where something was timed, and the operations or bytes that its share is of.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

Item = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Size:
    """The sizes of all measurements; the defaults are for an accelerator."""

    matrix: int = 8192  # rows and columns of the matrices that give the peak
    copied: int = 2 << 30  # bytes of the array that gives the bandwidth
    exact: int = 1024  # tokens of a row that is compared with float32
    length: int = 8192  # tokens of a training row and of a prompt
    chunk: int = 2048  # tokens of a prompt that are prefilled at once
    live: int = 1024  # live slots of a row in decoding
    steps: int = 64  # decode steps of one timing
    layers: tuple[int, ...] = (16, 12, 8, 4)  # trained layers of 8B's shape: the first that fits
    decoder_layers: int = 32
    batches: tuple[int, ...] = (1, 8, 64)
    repeats: int = 5
    shape: dict[str, int] = dataclasses.field(default_factory=dict)  # changes to the shape of 8B


SMALL = Size(
    matrix=256,
    copied=1 << 20,
    exact=128,
    length=128,
    chunk=64,
    live=64,
    steps=4,
    layers=(1,),
    decoder_layers=1,
    batches=(1, 2),
    repeats=1,
    shape={"vocab_size": 512, "embed_dim": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128, "ffn_dim": 256},
)


def model_shape(size: Size, layers: int) -> Any:
    """The shape of Llama 3.1 8B with so many layers."""
    from llama_jax.config import size as published

    return dataclasses.replace(published("llama3.1-8b"), num_layers=layers, **size.shape)


def seconds(run: Callable[[], Any], repeats: int, calls: int = 1) -> float:
    """The least time of a call that returns jax arrays, after one call that compiles.

    With several `calls` at once, the device computes one while the next is prepared, as in a loop of a program.
    """
    import jax

    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([run() for _ in range(calls)])
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def peaks(size: Size) -> Iterator[Item]:
    """The rate of bfloat16 matrix products, and of reading and writing memory."""
    import jax
    import jax.numpy as jnp

    n = size.matrix
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)  # zeros would need less power, and run faster
    product = jax.jit(lambda a, b: (a @ b).astype(jnp.bfloat16))
    yield {"name": "matmul", "seconds": seconds(lambda: product(a, a), size.repeats, calls=10), "flops": 2 * n**3}
    array = jax.random.normal(jax.random.key(1), (size.copied // 4,), jnp.float32)
    copy, total = jax.jit(lambda x: x + 1), jax.jit(jnp.sum)
    yield {"name": "copy", "seconds": seconds(lambda: copy(array), size.repeats, calls=10), "bytes": 2 * size.copied}
    yield {"name": "read", "seconds": seconds(lambda: total(array), size.repeats, calls=10), "bytes": size.copied}


def backends(call: Any) -> list[Any]:
    """The backends that take a call here. On a CPU, where nothing else runs them, also the kernels that interpret."""
    from llama_jax.ops.attention import BACKENDS, Target, active_target

    here = active_target()
    found = [b for b in BACKENDS if b.platform in ("", here.platform) and not b.refuses(call, here)]
    if here.platform == "cpu":
        others = [Target("cuda", 90), Target("tpu")]
        found += [b for b in BACKENDS for t in others if b.platform == t.platform and not b.refuses(call, t)]
        found = [b for b in found if b.name != "cudnn"]
    return found


def packed(T: int) -> Any:
    """Segments and positions of one row of T tokens with five documents of different lengths."""
    import numpy as np

    ends = [T // 16, T // 4 + 3, T // 2 - 1, 7 * T // 8 + 1, T]
    segments, positions = np.zeros((2, 1, T), np.int32)
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False), start=1):
        segments[0, start:end], positions[0, start:end] = number, np.arange(end - start)
    return segments, positions


def attention_calls(size: Size, T: int) -> Iterator[tuple[str, Any]]:
    """Calls of each kind with 8B's heads: whole rows of T tokens, and passes over a cache with T live slots."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from llama_jax import cache
    from llama_jax.choices import KV_TYPES
    from llama_jax.ops.attention import Call

    shape = model_shape(size, 1)
    N, K, H = shape.num_heads, shape.num_kv_heads, shape.head_dim
    keys = iter(jax.random.split(jax.random.key(0), 32))

    def draw(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    segments, positions = packed(T)
    order = np.arange(T, dtype=np.int32)[None]
    yield "documents", Call(draw(1, T, N, H), draw(1, K, T, H), draw(1, K, T, H), positions, segments)
    yield "one document", Call(draw(1, T, N, H), draw(1, K, T, H), draw(1, K, T, H), order)
    for kv in KV_TYPES:
        store = cache.init_cache(shape, batch=8, capacity=T, dtype=jnp.bfloat16, kv=kv)
        if jax.default_backend() == "cpu":  # which stores the bits of 16-bit floats, and kernels of other chips do not
            floats = jnp.float16 if kv == "int8" else jnp.bfloat16
            store = jax.tree.map(lambda a, to=floats: a.astype(to) if a.dtype == jnp.uint16 else a, store)
        every = cache.window(store, jnp.broadcast_to(order, (8, T)), None)
        k, v = (cache.write(leaf[0], draw(8, T, K, H), every) for leaf in (store.k, store.v))
        for name, tokens in (("decode", 1), ("prefill", min(256, T // 2))):
            at = jnp.broadcast_to(jnp.arange(T - tokens, T, dtype=jnp.int32), (8, tokens))
            window = cache.window(store, at, None)
            yield f"{name}, cache {kv}", Call(draw(8, tokens, N, H), k, v, at, None, window)


def attention(size: Size) -> Iterator[Item]:
    """Each backend: its largest error next to plain attention in float32, and its time, forward and backward."""
    import jax
    import jax.numpy as jnp

    from llama_jax.ops.attention import xla

    def gap(a: Any, b: Any) -> float:
        a, b = (x.astype(jnp.float32) for x in (a, b))
        return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))

    def both(attend: Any) -> Any:
        @jax.jit
        def run(call: Any, d_out: jax.Array) -> tuple[jax.Array, ...]:
            out, back = jax.vjp(lambda *qkv: attend(call._replace(q_BTNH=qkv[0], k=qkv[1], v=qkv[2])), *call[:3])
            return (out, *back(d_out.astype(out.dtype)))

        return run

    def in_float32(call: Any) -> Any:
        as_float = [
            jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, a) for a in call[:3]
        ]
        return call._replace(q_BTNH=as_float[0], k=as_float[1], v=as_float[2])

    for (name, small), (_, large) in zip(
        attention_calls(size, size.exact), attention_calls(size, size.length), strict=True
    ):
        rows = small.window is None
        _, T, N, H = large.q_BTNH.shape
        pairs = T * T / 2 if rows else T * large.k.shape[2]
        d_out = jax.random.normal(jax.random.key(1), small.q_BTNH.shape)
        exact = both(xla.attend)(in_float32(small), d_out) if rows else [jax.jit(xla.attend)(in_float32(small))]
        for backend in backends(large):
            ours = both(backend.attend)(small, d_out) if rows else [jax.jit(backend.attend)(small)]
            item = {"name": name, "backend": backend.name, "flops": 4 * large.q_BTNH.shape[0] * N * H * pairs}
            item["errors"] = [gap(a, b) for a, b in zip(ours, exact, strict=True)]
            forward = jax.jit(backend.attend)
            item["seconds"] = seconds(functools.partial(forward, large), size.repeats, calls=10)
            if rows:
                run, d_large = both(backend.attend), large.q_BTNH
                item["seconds_with_backward"] = seconds(functools.partial(run, large, d_large), size.repeats, calls=4)
            else:
                item["bytes"] = sum(a.nbytes for a in jax.tree.leaves((large.k, large.v)))
            yield item


def training(size: Size, lora: bool, products: str = "compute") -> Iterator[Item]:
    """Training steps of one row, all weights (as many layers as fit) or LoRA over a bfloat16 base (all layers)."""
    import jax

    for remat in ("attention", "dots", "full") if products == "compute" else ("dots",):
        for layers in (size.decoder_layers,) if lora else size.layers:
            item = {"name": "LoRA" if lora else "all weights", "layers": layers, "remat": remat, "products": products}
            try:
                yield item | train_steps(size, training_run(size, layers, remat, lora, products))
                break
            except jax.errors.JaxRuntimeError as error:  # out of memory: fewer layers
                yield item | {"error": str(error)[:200]}


def training_run(size: Size, layers: int, remat: str, lora: bool, products: str) -> Any:
    """The run of a training measurement. With LoRA, `init_from` gives a shape alone: the weights are random."""
    from llama_jax.run_config import RunConfig, default_dict

    shape = model_shape(size, layers)
    values = default_dict("tiny")
    values["output"] = "unused"
    values["init_from"] = "random" if lora else ""
    values["model"] = {key: value for key, value in shape.to_dict().items() if key in values["model"]}
    values["data"] |= {"train": ("unused",), "batch_size": 1, "sequence_length": size.length}
    values["train"] |= {"compute_dtype": "bfloat16", "remat": remat, "products": products}
    values["lora"] |= {"rank": 16 if lora else 0}
    run = RunConfig.from_dict(values)
    return run.with_shape(shape) if lora else run


def train_steps(size: Size, run: Any) -> Item:
    """The time of a training step with the batch of `packed` documents."""
    import jax
    import numpy as np

    from llama_jax import parallel
    from llama_jax.plan import projection
    from llama_jax.train import setup
    from llama_jax.train.program import Program

    program = Program.make(run, parallel.make_mesh({}, jax.local_devices()[:1]))
    segments, positions = packed(size.length)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, run.shape.vocab_size, (1, size.length + 1)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions, "segments": segments}
    batch["weights"] = np.ones((1, size.length), np.float32)
    state = setup.first_state(program)
    frozen = None if program.frozen is None else random_base(program.frozen)
    times, loss = [], 0.0
    for _ in range(2 + size.repeats):
        start = time.perf_counter()
        state, metrics = program.train_step(state, frozen, batch)
        loss = float(metrics["loss"])
        times.append(time.perf_counter() - start)
    flops = projection.flops(run).model
    return {"seconds": min(times[2:]), "compile_seconds": times[0], "flops": flops, "tokens": size.length, "loss": loss}


def random_base(like: Any) -> Any:
    """Random frozen weights in the layout and the dtypes of `like`, one array at a time."""
    import jax

    def draw(leaf: Any) -> jax.Array:
        make = functools.partial(jax.random.normal, shape=leaf.shape, dtype=leaf.dtype)
        return jax.jit(lambda key: 0.02 * make(key), out_shardings=leaf.sharding)(jax.random.key(0))

    return jax.tree.map(draw, like)


def random_weights(shape: Any, bits: int) -> Any:
    """Random weights in bfloat16, the matrices in 8 or 4 bits if `bits` says so, as `quantize` of `llama_jax.load`."""
    import jax
    import jax.numpy as jnp

    from llama_jax.ops import quant
    from llama_jax.params import abstract_params

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def draw(shape: tuple[int, ...], rounded: bool, seed: jax.Array) -> Any:
        weight = 0.02 * jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
        return quant.quantize(weight.astype(jnp.float32), bits) if rounded else weight

    leaves, tree = jax.tree.flatten(abstract_params(shape, stacked=False, dtype=jnp.bfloat16))
    drawn = [draw(leaf.shape, bool(bits) and len(leaf.shape) == 2, jnp.int32(i)) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, drawn)


def products(size: Size) -> Iterator[Item]:
    """Products of few rows with the weights of a layer, several copies in turn so that none is in a cache.

    Each has its time, that of XLA, and its error next to float32, relative to the norm of the result.
    """
    import jax
    import jax.numpy as jnp

    from llama_jax.ops import linear, quant

    shape = model_shape(size, 1)
    D, F, heads = shape.embed_dim, shape.ffn_dim, shape.num_heads * shape.head_dim
    pairs = shape.num_kv_heads * shape.head_dim
    shapes = {
        "q, k, v": [(heads, D), (pairs, D), (pairs, D)],
        "o": [(D, heads)],
        "gate, up": 2 * [(F, D)],
        "down": [(D, F)],
    }

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def draw(shape: tuple[int, ...], bits: int, seed: jax.Array) -> Any:
        weight = 0.02 * jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
        return quant.quantize(weight.astype(jnp.float32), bits) if bits < 16 else weight

    def by_xla(x: jax.Array, w: Any) -> jax.Array:
        whole = quant.dequantize(w, x.dtype) if isinstance(w, quant.QTensor) else w
        return jax.lax.dot_general(x, whole, (((1,), (1,)), ((), ())), "highest", preferred_element_type=x.dtype)

    for (name, each), bits in itertools.product(shapes.items(), (16, 8, 4)):
        total = sum(math.prod(one) for one in each) * bits // 8
        copies = max(1, min(32, size.copied // 8 // total))
        weights = [[draw(one, bits, jnp.int32(7 * i + j)) for j, one in enumerate(each)] for i in range(copies)]
        for rows in size.batches:
            x = jax.random.normal(jax.random.key(rows), (rows, each[0][1]), jnp.bfloat16)
            ours = jax.jit(lambda x, all_: [linear.linears(x, [(w, None) for w in ws]) for ws in all_])
            plain = jax.jit(lambda x, all_: [[by_xla(x, w) for w in ws] for ws in all_])
            exact = by_xla(x.astype(jnp.float32), _in_float32(weights[0][0]))
            gap = ours(x, weights)[0][0].astype(jnp.float32) - exact
            item = {
                "name": f"{name}, {bits} bits, {rows} rows",
                "error": float(jnp.linalg.norm(gap) / jnp.linalg.norm(exact)),
            }
            item["seconds"] = seconds(functools.partial(ours, x, weights), size.repeats, calls=10) / copies
            item["seconds_of_xla"] = seconds(functools.partial(plain, x, weights), size.repeats, calls=10) / copies
            yield item | {"bytes": sum(a.nbytes for a in jax.tree.leaves(weights[0]))}


def _in_float32(weight: Any) -> Any:
    """A weight of any kind as a float32 array."""
    import jax.numpy as jnp

    from llama_jax.ops import quant

    return quant.dequantize(weight, jnp.float32) if isinstance(weight, quant.QTensor) else weight.astype(jnp.float32)


def decode_loop(size: Size, shape: Any) -> Callable[..., Any]:
    """A program of `steps` greedy decode steps: (params, cache, tokens (B, 1)) -> (tokens, cache), in place."""
    import jax
    import jax.numpy as jnp

    from llama_jax import model

    @functools.partial(jax.jit, donate_argnums=1)
    def run(params: Any, cache: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        def step(i: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            tokens, cache = carry
            positions = jnp.broadcast_to(size.live + i, tokens.shape)
            hidden, cache = model.forward(shape, params, tokens, positions, None, cache, dtype=jnp.bfloat16)
            return jnp.argmax(model.unembed(shape, params, hidden), axis=-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, size.steps, step, (tokens, cache))

    return run


def decoding(size: Size) -> Iterator[Item]:
    """Steps of greedy decoding with `live` live slots a row: bfloat16, int8 and int4 weights at each batch size."""
    import jax
    import jax.numpy as jnp

    from llama_jax import cache as caches

    shape = model_shape(size, size.decoder_layers)
    run = decode_loop(size, shape)
    for bits in (0, 8, 4):
        params = random_weights(shape, bits)
        weights = sum(a.nbytes for a in jax.tree.leaves({**params, "embed": None}))
        for rows in size.batches:
            cache = caches.init_cache(shape, batch=rows, capacity=2 * size.live, dtype=jnp.bfloat16)
            tokens = jnp.ones((rows, 1), jnp.int32)
            times = []
            for _ in range(1 + size.repeats):
                start = time.perf_counter()
                tokens, cache = jax.block_until_ready(run(params, cache, tokens))
                times.append((time.perf_counter() - start) / size.steps)
            live = rows * (size.live + size.steps // 2) * shape.cache_bytes_per_token(2)
            item = {"name": f"{f'int{bits}' if bits else 'bfloat16'}, {rows} rows", "seconds": min(times[1:])}
            yield item | {"bytes": weights + live, "rows": rows, "bits": bits or 16}


def prefill(size: Size) -> Iterator[Item]:
    """A prompt of `length` tokens into the cache, in chunks."""
    import jax
    import jax.numpy as jnp

    from llama_jax import cache as caches
    from llama_jax import model

    shape = model_shape(size, size.decoder_layers)
    params = random_weights(shape, 0)

    @functools.partial(jax.jit, donate_argnums=1, static_argnames="bound")
    def run(params: Any, cache: Any, start: jax.Array, *, bound: int) -> Any:
        positions = start + jnp.arange(size.chunk, dtype=jnp.int32)[None]
        return model.forward(shape, params, positions % 100, positions, None, cache, bound=bound)[1]

    def whole() -> Any:
        cache = caches.init_cache(shape, batch=1, capacity=size.length, dtype=jnp.bfloat16)
        for start in range(0, size.length, size.chunk):
            cache = run(params, cache, jnp.int32(start), bound=start + size.chunk)
        return cache

    layers = 2 * (shape.matmul_params - shape.vocab_size * shape.embed_dim) * size.length
    scores = 2 * shape.num_layers * shape.num_heads * shape.head_dim * size.length**2
    took = seconds(whole, size.repeats)
    yield {"name": "prefill", "tokens": size.length, "seconds": took, "flops": layers + scores}


def peers(size: Size) -> Iterator[Item]:
    """The same by torch and transformers: matrix product, attention without documents, and decoding in bfloat16."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        yield {"name": "peers", "skipped": f"not installed: {', '.join(missing)}"}
        return
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def timed(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(2 + size.repeats):
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[2:])

    a = torch.ones((size.matrix, size.matrix), dtype=torch.bfloat16, device=device)
    yield {"name": "torch matmul", "seconds": timed(lambda: a @ a), "flops": 2 * size.matrix**3}
    shape = model_shape(size, size.decoder_layers)
    q = torch.randn((1, shape.num_heads, size.length, shape.head_dim), dtype=torch.bfloat16, device=device)
    k = torch.randn_like(q).requires_grad_()
    q.requires_grad_()
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, k, is_causal=True)
    pairs = size.length**2 / 2
    item = {"name": "torch attention", "flops": 4 * shape.num_heads * shape.head_dim * pairs, "seconds": timed(attend)}
    yield item | {"seconds_with_backward": timed(lambda: attend().sum().backward())}
    yield from transformers_decoding(size, shape, device)


def transformers_decoding(size: Size, shape: Any, device: str) -> Iterator[Item]:
    """Greedy decoding by transformers after a prompt of `live` tokens."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.embed_dim,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).eval()

    def took(ids: Any, new: int) -> float:
        start = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for rows in size.batches:
        ids = torch.ones((rows, size.live), dtype=torch.long, device=device)
        took(ids, 2)
        step = (took(ids, 2 + size.steps) - took(ids, 2)) / size.steps
        yield {"name": f"transformers, bfloat16, {rows} rows", "seconds": step, "rows": rows}


SECTIONS: dict[str, Callable[[Size], Iterator[Item]]] = {
    "peaks": peaks,
    "attention": attention,
    "decoding": decoding,
    "all weights": functools.partial(training, lora=False),
    "LoRA": functools.partial(training, lora=True),
    "all weights in fp8": functools.partial(training, lora=False, products="fp8"),
    "prefill": prefill,
    "peers": peers,
    "products": products,
}
