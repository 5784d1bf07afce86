"""The choice of an attention backend: who runs a call on which devices, and the reasons of the others."""

import dataclasses
import functools
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.attention import draw, packed, plain
from helpers.numbers import gap
from llama_jax import cache, model, ops, parallel
from llama_jax.config import SIZES
from llama_jax.infer import inputs
from llama_jax.ops.attention import BACKENDS, Call, Target, attention, choose
from llama_jax.params import init_params, unstack

H100, T4, TPU = Target("cuda", 90), Target("cuda", 75), Target("tpu")


def whole(T=256, H=128, dtype=jnp.bfloat16, documents=True, N=8, K=2):
    """An abstract call for whole rows."""
    array = jax.ShapeDtypeStruct
    q, k, tokens = array((2, T, N, H), dtype), array((2, K, T, H), dtype), array((2, T), jnp.int32)
    return Call(q, k, k, tokens, tokens if documents else None)


def cached(T=1, kv="compute", dtype=jnp.bfloat16, capacity=256, H=128):
    """An abstract call of a pass with a KV cache."""
    config = dataclasses.replace(SIZES["tiny"], num_layers=1, num_heads=8, num_kv_heads=2, head_dim=H)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "device_platform", lambda: "cuda")  # where a cache is not stored as bits
        store = jax.eval_shape(
            functools.partial(cache.init_cache, config, batch=2, capacity=capacity, dtype=dtype, kv=kv)
        )
    positions = jax.ShapeDtypeStruct((2, T), jnp.int32)
    window = cache.Window(positions, positions, capacity)
    return Call(jax.ShapeDtypeStruct((2, T, 8, H), dtype), store.k[0], store.v[0], positions, None, window)


CHOICES = [
    (whole(), H100, "flash", {"cudnn": "documents"}),
    (whole(documents=False), H100, "cudnn", {}),
    (whole(documents=False), H100._replace(length=2), "flash", {"cudnn": "several devices"}),
    (whole(T=100, H=64, dtype=jnp.float16), H100._replace(heads=2), "flash", {}),
    (whole(), H100._replace(heads=4), "xla", {"flash": "do not divide over 4 devices"}),
    (whole(dtype=jnp.float32), H100, "xla", {"flash": "float32"}),
    (whole(H=256), H100, "xla", {"flash": "at most 128"}),
    (whole(H=256, documents=False), H100, "cudnn", {}),
    (whole(dtype=jnp.float16), T4, "xla", {"flash": "capability 8.0", "cudnn": "documents"}),
    (cached(), H100, "split", {}),
    (cached(kv="int8"), H100, "split", {}),
    (cached(T=64, kv="int8"), H100, "flash", {"split": "one query a row"}),
    (cached(), H100._replace(slots=2), "xla", {"split": "shared by 2 devices", "flash": "shared by 2 devices"}),
    (cached(capacity=100), H100, "flash", {"split": "multiples of 32"}),
    (whole(), TPU, "splash", {}),
    (whole(T=100), TPU, "xla", {"splash": "multiples of 128"}),
    (whole(T=512), TPU._replace(length=4), "xla", {"splash": "not 64"}),
    (whole(dtype=jnp.float32), TPU, "xla", {"splash": "float32"}),
    (cached(), TPU, "ragged", {"splash": "without a KV cache"}),
    (cached(T=64, kv="int8"), TPU._replace(heads=2), "ragged", {}),
    (cached(H=64), TPU, "xla", {"ragged": "heads of 128"}),
    (cached(dtype=jnp.float32), TPU, "xla", {"ragged": "float32"}),
    (cached(), TPU._replace(slots=4), "xla", {"ragged": "shared by 4 devices"}),
    (whole(), Target("rocm"), "xla", {}),
    (whole(dtype=jnp.float16), Target("cpu"), "xla", {"native": "not float16"}),
]


@pytest.mark.parametrize(("call", "target", "name", "reasons"), CHOICES, ids=lambda x: getattr(x, "kind", None))
def test_the_first_backend_that_takes_a_call_runs_it_and_the_better_ones_say_why_not(call, target, name, reasons):
    backend, found = choose(call, target)
    assert backend.name == name
    for other, words in reasons.items():
        assert words in found[other]
    better = BACKENDS[: BACKENDS.index(backend)]
    assert list(found) == [one.name for one in better if one.platform == target.platform]
    assert all(found.values())


def test_plain_attention_on_an_accelerator_is_said_once_with_the_reasons(monkeypatch, caplog):
    monkeypatch.setattr(parallel, "device_platform", lambda: "tpu")
    ops.attention._log_once.cache_clear()
    segments, positions = packed([[20, 10]], 30)
    q, k, v = draw(1, 1, 30, 4, 64), draw(2, 1, 2, 30, 64), draw(3, 1, 2, 30, 64)
    with caplog.at_level(logging.INFO, "llama_jax"):
        for _ in range(2):
            out = attention(Call(q, k, v, positions, segments))
    assert jnp.array_equal(out, plain(q, k, v, segments, positions))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "rows of documents on tpu: xla; not splash, because it takes bfloat16, not float32" in record.message


def gpu(capability):
    """A device that is described, not attached."""
    return SimpleNamespace(platform="gpu", device_kind="Tesla T4", compute_capability=capability)


@pytest.mark.parametrize(
    ("capability", "training", "sampling"), [("7.5", "float32", "float16"), ("9.0",) + 2 * ("bfloat16",)]
)
def test_a_gpu_without_bfloat16_samples_in_float16_and_trains_in_float32(
    capability, training, sampling, monkeypatch, caplog
):
    mesh = SimpleNamespace(devices=np.asarray([gpu(capability)]))
    assert parallel.compute_dtype("auto", mesh) == training
    assert ("Tesla T4 has no bfloat16" in caplog.text) == (training == "float32")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu(capability)])
    for stored, quantized in ((jnp.bfloat16, False), (np.float16, False), (np.float32, True)):
        assert inputs.default_dtype(np.dtype(stored), quantized=quantized) == sampling
    assert inputs.default_dtype(np.dtype(np.float32), quantized=False) == np.float32


@pytest.mark.parametrize(
    ("features", "processes", "training"),
    [
        ("avx2", 1, "float32"),
        ("avx512_bf16", 1, "bfloat16"),
        ("amx_bf16", 1, "bfloat16"),
        ("avx512_bf16", 2, "float32"),
    ],
)
def test_a_single_process_on_a_cpu_with_bfloat16_trains_in_it(features, processes, training, monkeypatch):
    monkeypatch.setattr("llama_jax.parallel.platform.cpu_features", lambda: frozenset([features]))
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    assert parallel.compute_dtype("auto") == training
    assert parallel.compute_dtype("bfloat16") == "bfloat16"


def test_in_float16_logits_are_near_those_in_float32():
    config = dataclasses.replace(SIZES["tiny"], num_layers=2)
    params = init_params(config, jax.random.key(0))
    tokens = jnp.arange(12)[None] % config.vocab_size

    def logits(dtype):
        cast = jax.tree.map(lambda a: a.astype(dtype), params)
        cached = cache.init_cache(config, batch=1, capacity=16, dtype=dtype)
        order = jnp.arange(12)[None]

        @jax.jit
        def run(params, cached):
            hidden, _ = model.forward(config, params, tokens, order, None, cached, dtype=dtype)
            return model.unembed(config, params, hidden)

        return run(unstack(cast), cached)

    assert gap(logits(jnp.float16), logits(jnp.float32)) < 2e-2  # the cache of a CPU holds 8 bits of bfloat16
