"""The CPU kernel for all layers of a decode step beside those of single operations, which test_cpu.py compares."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.native import needs_cpu_kernels
from helpers.numbers import gap
from llama_jax import cache as caches
from llama_jax import model
from llama_jax.config import SIZES
from llama_jax.ops import cpu, lora, quant
from llama_jax.ops.cpu import layers
from llama_jax.params import init_params, unstack

pytestmark = needs_cpu_kernels

CONFIG = dataclasses.replace(SIZES["tiny"], embed_dim=96, num_layers=3, num_heads=6, num_kv_heads=2, ffn_dim=160)
KINDS = ("float32", "bfloat16", 8, 4)


def kind_of(params, kind):
    """Parameters with weights of one kind; `mixed` has other ones in each product of a layer."""
    kinds = {"o": 8, "down": 4, "gate": "bfloat16", "up": "bfloat16"} if kind == "mixed" else {}

    def one(path, w):
        name = path[-1].key
        chosen = kinds.get(name, 8 if kind == "mixed" else kind)
        if w.ndim != 2 or name == "embed":
            return w.astype(jnp.bfloat16 if kind == "mixed" else w.dtype)
        return quant.quantize(w, chosen) if isinstance(chosen, int) else w.astype(chosen)

    return jax.tree_util.tree_map_with_path(one, unstack(params))


def step(params, rows, dtype, kv, monkeypatch, whole):
    """Hidden states of two decode steps after a prompt of 5 tokens, and the cache, with or without the kernel."""
    monkeypatch.setattr(cpu, "takes_layers", layers.takes if whole else lambda *_: False)
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, CONFIG.vocab_size, (rows, 7)))
    cache = caches.init_cache(CONFIG, batch=rows, capacity=20, dtype=dtype, kv=kv)
    run = jax.jit(functools.partial(model.forward, CONFIG, dtype=dtype))
    _, cache = run(params, ids[:, :5], jnp.arange(5)[None], None, cache)
    out = []
    for i, live in ((5, jnp.ones((rows, 1), jnp.int32)), (6, (jnp.arange(rows) % 3 != 1).astype(jnp.int32)[:, None])):
        # Rows have positions of their own; in the second step some are padding.
        positions = jnp.maximum(jnp.full((rows, 1), i) - jnp.arange(rows)[:, None] % 2, 0)
        hidden, cache = run(params, ids[:, i : i + 1], positions, live, cache)
        out.append(hidden)
    return out, cache


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("kv", ["compute", "int8"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, "float32") for kind in KINDS] + [(kind, "bfloat16") for kind in (*KINDS[1:], "mixed")],
)
def test_all_layers_in_one_call_are_those_of_single_operations(kind, dtype, kv, rows, monkeypatch):
    params = kind_of(init_params(CONFIG, jax.random.key(1)), kind)
    dtype = jnp.dtype(dtype)
    x = jnp.zeros((rows, 1, CONFIG.embed_dim), dtype)
    empty = caches.init_cache(CONFIG, batch=rows, capacity=20, dtype=dtype, kv=kv)
    assert layers.takes(CONFIG, params["layers"], x, empty)
    expected = step(params, rows, dtype, kv, monkeypatch, whole=False)
    result = step(params, rows, dtype, kv, monkeypatch, whole=True)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def same_bytes(a, b):
    """Asserts that two trees are the same, NaN included."""
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("kv", ["compute", "int8"])
@pytest.mark.parametrize("value", ["zero", "tiny", "huge", "nan", "inf"])
def test_keys_and_values_that_are_not_usual_are_stored_as_by_xla(value, kv, monkeypatch):
    params = kind_of(init_params(CONFIG, jax.random.key(1)), "float32")
    by = {"zero": 0.0, "tiny": 1e-9, "huge": 1e30, "nan": np.nan, "inf": np.inf}[value]
    for name in "kv":
        first = params["layers"][0]["attention"][name]
        params["layers"][0]["attention"][name] = first.at[: CONFIG.head_dim].multiply(by)  # of one of two heads
    both = [step(params, 3, jnp.dtype("float32"), kv, monkeypatch, whole) for whole in (False, True)]
    same_bytes(*both)


@pytest.mark.parametrize("kv", ["compute", "int8"])
def test_positions_and_slots_outside_of_the_cache_do_not_reach_other_memory(kv, monkeypatch):
    params = kind_of(init_params(CONFIG, jax.random.key(1)), "bfloat16")
    cache = caches.init_cache(CONFIG, batch=4, capacity=20, dtype=jnp.bfloat16, kv=kv)
    cache = jax.tree.map(lambda a: jax.random.randint(jax.random.key(2), a.shape, 1, 100).astype(a.dtype), cache)
    # The last slot; one beyond; before the first; a position beyond the cache with a slot in it.
    window = caches.Window(jnp.array([[19], [20], [-1], [90]]), jnp.array([[19], [20], [-1], [5]]), 20)
    x = jax.random.normal(jax.random.key(3), (4, 1, CONFIG.embed_dim), jnp.bfloat16)
    rotations = (jnp.ones((4, 1, CONFIG.head_dim // 2)), jnp.zeros((4, 1, CONFIG.head_dim // 2)))
    pos = model.Positions(window.positions_BT, None, window, *rotations)
    results = []
    for takes in (lambda *_: False, layers.takes):
        monkeypatch.setattr(cpu, "takes_layers", takes)
        results.append(jax.jit(functools.partial(model._unroll_cached, CONFIG))(params["layers"], x, pos, cache))
    same_bytes(*results)


def test_scales_of_norms_in_float16_are_read_as_such(monkeypatch):
    params = kind_of(init_params(CONFIG, jax.random.key(1)), 8)
    halves = jax.tree_util.tree_map_with_path(
        lambda path, a: a.astype(jnp.float16) if path[-1] == jax.tree_util.DictKey("scale") else a, params
    )
    both = [step(p, 2, jnp.dtype("float32"), "compute", monkeypatch, True)[0] for p in (params, halves)]
    for a, b in zip(*both, strict=True):
        assert gap(b, a) < 1e-6  # scales of 1 are exact in float16
    same_bytes(both[1], step(halves, 2, jnp.dtype("float32"), "compute", monkeypatch, False)[0])


def test_other_steps_take_other_kernels():
    params = kind_of(init_params(CONFIG, jax.random.key(1)), "bfloat16")["layers"]

    def takes(weights=params, config=CONFIG, rows=2, length=1, dtype=jnp.bfloat16, capacity=20):
        x = jnp.zeros((rows, length, CONFIG.embed_dim), dtype)
        cache = caches.init_cache(config, batch=rows, capacity=capacity, dtype=dtype)
        return cpu.takes_layers(config, weights, x, cache)

    assert takes()
    assert not takes(rows=17)
    assert not takes(length=2)
    assert not takes(dtype=jnp.float16)
    assert not takes(config=dataclasses.replace(CONFIG, head_dim=24))
    q = params[1]["attention"]["q"]
    for other in (q.astype(jnp.float16), quant.quantize(q, 8), lora.LoraTensor(q, q[:, :4].T, q[:, :4], 1.0)):
        attention = params[1]["attention"] | {"q": other}
        assert not takes([params[0], params[1] | {"attention": attention}, params[2]])
