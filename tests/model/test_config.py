"""The values that the config computes, and those that it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from llama_jax import model
from llama_jax.cache import Window, init_cache, read, write
from llama_jax.config import SIZES, ModelConfig, RopeScaling, size
from llama_jax.errors import ConfigError, nearest
from llama_jax.ops import cpu
from llama_jax.params import abstract_params


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("llama3-8b", 8_030_261_248),
        ("llama3.1-8b", 8_030_261_248),
        ("llama3.1-70b", 70_553_706_496),
        ("llama3.3-70b", 70_553_706_496),
        ("llama3.1-405b", 405_853_388_800),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
    ],
)
def test_parameter_count_is_the_published_one(name, params):
    assert size(name).num_params == params


@pytest.mark.parametrize("name", ["tiny", "quickstart", "llama3.1-8b", "llama3.2-1b"])
@pytest.mark.parametrize("stacked", [True, False])
def test_parameter_count_is_that_of_the_tree(name, stacked):
    leaves = jax.tree.leaves(abstract_params(size(name), stacked=stacked))
    assert sum(leaf.size for leaf in leaves) == size(name).num_params


def test_flops_per_token_agree_with_xla(monkeypatch):
    """XLA counts our products exactly, and element-wise work (softmax, norms, rotations, silu) on top: here 0.5%."""
    monkeypatch.setattr(cpu, "ready", lambda: False)  # XLA does not count what native kernels compute
    config = dataclasses.replace(SIZES["tiny"], embed_dim=256, ffn_dim=1024, num_layers=2, vocab_size=2048, head_dim=32)
    B, T = 2, 64

    def logits(params, tokens, positions):
        hidden, _ = model.forward(config, params, tokens, positions, None)
        return model.unembed(config, params, hidden)

    params = abstract_params(config, stacked=False)
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    counted = jax.jit(logits).lower(params, ids, ids).cost_analysis()["flops"]
    ours = B * T * config.flops_per_token(T, training=False)
    assert 1.0 <= counted / ours < 1.01
    assert config.flops_per_token(T, training=True) == 3 * config.flops_per_token(T, training=False)


def test_cache_bytes_are_the_published_ones_and_those_of_the_cache():
    assert size("llama3.1-8b").cache_bytes_per_token(2) == 131_072
    tiny = size("tiny")
    cache = jax.eval_shape(lambda: init_cache(tiny, batch=3, capacity=20, dtype=jnp.bfloat16))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert held == 3 * 20 * tiny.cache_bytes_per_token(2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_cache_keeps_each_dtype_to_the_bit(dtype):
    tiny = size("tiny")
    leaf = init_cache(tiny, batch=2, capacity=20, dtype=dtype).k[0]
    new = jax.random.normal(jax.random.key(0), (2, 3, tiny.num_kv_heads, tiny.head_dim)).astype(dtype)
    at = Window(jnp.tile(jnp.arange(3), (2, 1)), jnp.tile(jnp.arange(3), (2, 1)), 3)
    kept = read(write(leaf, new, at), at, dtype)
    assert kept.dtype == dtype and jnp.array_equal(kept.swapaxes(1, 2), new)


@pytest.mark.parametrize("name", list(SIZES))
def test_config_survives_a_dict(name):
    assert ModelConfig.from_dict(SIZES[name].to_dict()) == SIZES[name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_kv_heads": 3}, ("num_kv_heads=3", "[1, 2, 4, 8]")),
        ({"head_dim": 15}, ("head_dim", "even", "15")),
        ({"num_layers": 0}, ("num_layers", "0")),
        ({"num_layers": True}, ("num_layers", "True")),
        ({"vocab_size": 512.0}, ("vocab_size", "512.0")),
        ({"norm_eps": 0.0}, ("norm_eps",)),
        ({"norm_eps": float("nan")}, ("norm_eps", "nan")),
        ({"rope_theta": float("inf")}, ("rope_theta", "inf")),
        ({"rope_theta": "500000"}, ("rope_theta", "'500000'")),
        ({"tied_embeddings": 1}, ("tied_embeddings", "1")),
        ({"rope_scaling": 8.0}, ("rope_scaling", "8.0")),
    ],
)
def test_impossible_value_is_refused_by_name(change, words):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(SIZES["tiny"], **change)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "change", [{"factor": 0.5}, {"high_freq_factor": 1.0}, {"low_freq_factor": -1.0}, {"original_max_seq_len": 0}]
)
def test_impossible_scaling_is_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(SIZES["tiny"].rope_scaling, **change)


def test_unknown_and_missing_keys_are_refused_with_the_nearest():
    values = SIZES["tiny"].to_dict()
    with pytest.raises(ConfigError, match="did you mean 'num_heads'"):
        ModelConfig.from_dict({**values, "num_head": 8})
    with pytest.raises(ConfigError, match="rope_scaling.factr.*did you mean 'factor'"):
        ModelConfig.from_dict({**values, "rope_scaling": {"factr": 8}})
    del values["ffn_dim"]
    with pytest.raises(ConfigError, match="lacks ffn_dim"):
        ModelConfig.from_dict(values)


def test_unknown_size_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'llama3.1-8b'"):
        size("llama3.1-8B")


def test_configs_are_frozen_and_hashable():
    assert len({hash(config) for config in SIZES.values()}) > 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        SIZES["tiny"].num_layers = 4
    assert isinstance(SIZES["tiny"].rope_scaling, RopeScaling)


@pytest.mark.parametrize(
    "change",
    [{"num_heads": 10**12 + 1}, {"num_layers": 10**6}, {"rope_theta": 10**400}, {"norm_eps": float("nan")}],
    ids=str,
)
def test_numbers_of_no_model_are_refused_at_once(change):
    with pytest.raises(ConfigError, match=next(iter(change))) as error:
        dataclasses.replace(SIZES["tiny"], **change)
    assert len(str(error.value)) < 200


def test_no_nearest_name_is_looked_for_among_very_many_or_long_ones():
    assert nearest("a" * 10_000, ["b" * 10_000]) == ""
    assert nearest("vocab_siez", [*(f"name{i}" for i in range(100_000)), "vocab_size"]) == ""
    assert nearest("vocab_siez", ["vocab_size"]) == "; did you mean 'vocab_size'?"
