"""Each part of the model equals transformers' module of that part, so that a break in the logits is located.

Goldens are made by golden/make_parts.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden.make_model import random_weights
from golden.make_parts import CASES, FILE, IGNORED, POSITIONS, SEGMENTS, T, heads, hidden, targets
from helpers.numbers import gap
from llama_jax import model
from llama_jax.ops import norm, rope
from llama_jax.ops.attention import Call, attention
from llama_jax.ops.loss import cross_entropy
from llama_jax.weights import name_table

GOLDEN = np.load(FILE)
REFERENCE = 1e-5  # float32 on both sides, in other orders of summation; measured below 2e-6
CONFIGS = pytest.mark.parametrize(("case", "config"), CASES.items(), ids=CASES)


def params_of(config):
    """The weights of make_parts.py as ours, unrolled."""
    named = random_weights(config)
    rows = name_table.weights(config, "huggingface")
    return name_table.build(config, ((row.path, jnp.asarray(named[row.name])) for row in rows))


def block_of(config):
    """The decoder block of a model with one layer, with its weights."""
    return model.Block(config, params_of(config)["layers"][0])


def positions_of(config):
    positions = jnp.asarray(POSITIONS)
    return model.Positions(positions, None, None, *rope.rotations(config, positions))


@CONFIGS
def test_rms_norm_is_that_of_transformers(case, config):
    scale = params_of(config)["layers"][0]["attention_norm"]["scale"]
    out = norm.rms_norm(jnp.asarray(hidden(config)), scale, eps=config.norm_eps)
    assert gap(out, GOLDEN[f"{case}/norm"]) < REFERENCE


@CONFIGS
def test_rotated_queries_and_keys_are_those_of_transformers(case, config):
    q, k, _ = heads(config)
    angles = rope.rotations(config, jnp.asarray(POSITIONS))
    for name, array in (("rope_q", q), ("rope_k", k)):
        out = rope.rotate(jnp.asarray(array), *angles)
        assert gap(out, GOLDEN[f"{case}/{name}"]) < REFERENCE
        other = next(c for c in CASES if c != case)
        assert gap(out, GOLDEN[f"{other}/{name}"]) > 0.1  # the scaling of Llama 3.1 matters at these positions


@pytest.mark.parametrize(("name", "segments"), [("attention", None), ("attention_packed", SEGMENTS)])
@CONFIGS
def test_attention_is_that_of_transformers(case, config, name, segments):
    q, k, v = (jnp.asarray(array) for array in heads(config))
    order = jnp.broadcast_to(jnp.arange(T), (2, T))
    segments = None if segments is None else jnp.asarray(segments)
    out = attention(Call(q, k.swapaxes(1, 2), v.swapaxes(1, 2), order, segments))
    assert gap(out, GOLDEN[f"{case}/{name}"]) < REFERENCE


@CONFIGS
def test_attention_with_its_projections_is_that_of_transformers(case, config):
    x = jnp.asarray(hidden(config))
    out, _ = block_of(config).attention(x, positions_of(config), None)
    assert gap(out - x, GOLDEN[f"{case}/attention_module"]) < REFERENCE


@CONFIGS
def test_the_feed_forward_network_is_that_of_transformers(case, config):
    x = jnp.asarray(hidden(config))
    out = block_of(config).ffn(x)
    assert gap(out - x, GOLDEN[f"{case}/feed_forward"]) < REFERENCE


@CONFIGS
def test_a_decoder_block_is_that_of_transformers(case, config):
    out, _ = block_of(config)(jnp.asarray(hidden(config)), positions_of(config), None)
    assert gap(out, GOLDEN[f"{case}/block"]) < REFERENCE


@pytest.mark.parametrize("vocab_chunk", [0, 100])
@CONFIGS
def test_the_loss_and_its_gradient_are_those_of_transformers(case, config, vocab_chunk):
    labels = targets(config)
    counted = jnp.asarray(labels != IGNORED)
    ids = jnp.asarray(np.maximum(labels, 0))

    @jax.value_and_grad
    def loss(x):
        nll, _ = cross_entropy(x, params_of(config)["unembed"], ids, vocab_chunk=vocab_chunk)
        return (nll * counted).sum() / counted.sum()

    value, gradient = loss(jnp.asarray(hidden(config)))
    assert gap(value, GOLDEN[f"{case}/loss"]) < REFERENCE
    assert gap(gradient, GOLDEN[f"{case}/loss_gradient"]) < REFERENCE
