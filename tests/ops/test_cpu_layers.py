"""The CPU kernel for all layers of a decode step beside those of single operations, which test_cpu.py compares."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.native import needs_cpu_kernels
from llama_jax import cache as caches
from llama_jax import model
from llama_jax.config import SIZES
from llama_jax.ops import cpu, quant
from llama_jax.ops.cpu import layers
from llama_jax.params import init_params, unstack

pytestmark = needs_cpu_kernels

CONFIG = dataclasses.replace(SIZES["tiny"], embed_dim=96, num_layers=3, num_heads=6, num_kv_heads=2, ffn_dim=160)
KINDS = ("float32", "bfloat16", 8, 4)


def kind_of(params, kind):
    """Parameters with weights of one kind; `mixed` has other ones in each product of a layer."""
    config = CONFIG
    kinds = {"o": 8, "down": 4, "gate": "bfloat16", "up": "bfloat16"} if kind == "mixed" else {}

    def one(path, w):
        name = path[-1].key
        chosen = kinds.get(name, 8 if kind == "mixed" else kind)
        if w.ndim != 2 or name == "embed":
            return w.astype(jnp.bfloat16 if kind == "mixed" else w.dtype)
        return quant.quantize(w, chosen) if isinstance(chosen, int) else w.astype(chosen)

    return config, jax.tree_util.tree_map_with_path(one, unstack(params))


def step(config, params, rows, dtype, kv, monkeypatch, whole):
    """Hidden states of two decode steps after a prompt of 5 tokens, and the cache, with or without the kernel."""
    monkeypatch.setattr(cpu, "takes_layers", layers.takes if whole else lambda *_: False)
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, config.vocab_size, (rows, 7)))
    cache = caches.init_cache(config, batch=rows, capacity=20, dtype=dtype, kv=kv)
    run = jax.jit(functools.partial(model.forward, config, dtype=dtype))
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
    ("kind", "dtype"), [(k, d) for k in KINDS for d in ("float32", "bfloat16")] + [("mixed", "bfloat16")]
)
def test_all_layers_in_one_call_are_those_of_single_operations(kind, dtype, kv, rows, monkeypatch):
    if kind == "float32" and dtype == "bfloat16":
        pytest.skip("the kernels do not multiply float32 weights with bfloat16")
    config, params = kind_of(init_params(CONFIG, jax.random.key(1)), kind)
    dtype = jnp.dtype(dtype)
    x = jnp.zeros((rows, 1, config.embed_dim), dtype)
    empty = caches.init_cache(config, batch=rows, capacity=20, dtype=dtype, kv=kv)
    assert layers.takes(config, params["layers"], x, empty)
    expected = step(config, params, rows, dtype, kv, monkeypatch, whole=False)
    result = step(config, params, rows, dtype, kv, monkeypatch, whole=True)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
