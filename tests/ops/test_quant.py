"""Quantized weights: products, look-ups and forward passes equal those of the dequantized values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from golden.make_model import random_tokens
from helpers import sound
from helpers.numbers import gap
from helpers.quantized import CONFIG, quantized_params, random_quantized
from llama_jax import parallel
from llama_jax.errors import ConfigError
from llama_jax.infer.llama import Llama
from llama_jax.ops import linear, quant
from llama_jax.ops.quant import QTensor
from llama_jax.params import init_params, stack, unstack
from llama_jax.weights.formats import gguf_blocks

ROUNDING = 1e-5
MESH = {"data": 2, "tensor": 4}


@pytest.mark.parametrize("bits", [8, 4])
def test_its_shape_and_numbers_are_those_it_stands_for(bits):
    w, numbers = random_quantized((6, 96), bits)
    assert (w.shape, w.bits) == ((6, 96), bits)
    np.testing.assert_array_equal(quant.dequantize(w, jnp.float32), numbers)
    assert sum(a.nbytes for a in jax.tree.leaves(w)) == 6 * 3 * (34 if bits == 8 else 18)


@pytest.mark.parametrize("out", [512, 100], ids=["in turn", "at once"])
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("bits", [8, 4])
def test_products_are_those_of_the_numbers(bits, rows, out):
    w, numbers = random_quantized((out, 64), bits)
    x = np.random.default_rng(1).standard_normal((2, rows, 64)).astype(np.float32)
    for product in (linear.linear, linear.linear_f32):
        result = jax.jit(product)(x, w)
        assert result.dtype == jnp.float32
        assert gap(result, x.astype(np.float64) @ numbers.T.astype(np.float64)) < ROUNDING
    half = jax.jit(linear.linear)(x.astype(jnp.bfloat16), w)
    assert half.dtype == jnp.bfloat16 and gap(half, x @ numbers.T) < 2e-2


@pytest.mark.parametrize("bits", [8, 4])
def test_products_with_the_layouts_of_tpus_are_those_of_the_numbers(bits, monkeypatch):
    monkeypatch.setattr(parallel, "device_platform", lambda: "tpu")
    w, numbers = random_quantized((48, 64), bits)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    for product in (linear.linear, linear.linear_f32):
        assert gap(jax.jit(product)(x, w), x.astype(np.float64) @ numbers.T.astype(np.float64)) < ROUNDING


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_flow_through_it_to_the_activations(bits):
    w, numbers = random_quantized((512, 64), bits)
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    gradient = jax.grad(lambda x: (linear.linear(x, w) ** 2).sum())(x)
    assert gap(gradient, 2 * (x @ numbers.T) @ numbers) < ROUNDING


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_looked_up_and_other_ids_are_nan(bits):
    w, numbers = random_quantized((50, 64), bits)
    ids = jnp.array([[3, 49], [0, 50]])
    rows = jax.jit(linear.embed, static_argnums=2)(w, ids, jnp.float32)
    np.testing.assert_array_equal(rows[:, 0], numbers[[3, 0]])
    np.testing.assert_array_equal(rows[0, 1], numbers[49])
    assert jnp.isnan(rows[1, 1]).all()


@pytest.mark.parametrize("sizes", [None, {"tensor": 4, "data": 2}], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_is_the_model_of_its_numbers_on_any_mesh(bits, sizes):
    quantized, dense = quantized_params(bits)
    mesh = None if sizes is None else parallel.make_mesh(sizes)
    a = Llama(CONFIG, quantized, mesh=mesh, dtype="float32")
    b = Llama(CONFIG, dense, dtype="float32")
    held = [leaf for leaf in jax.tree.leaves(a.params) if leaf.ndim == 2]
    assert {leaf.dtype.name for leaf in held} == {"int8" if bits == 8 else "uint8", "float16"}
    tokens = random_tokens(CONFIG, rows=2, length=9)
    assert gap(a.logits(tokens), b.logits(tokens)) < ROUNDING
    prompts = [row[:5].tolist() for row in tokens]
    options = {"temperature": 0.0, "max_new_tokens": 6}
    assert [r.tokens for r in a.generate(prompts, **options)] == [r.tokens for r in b.generate(prompts, **options)]


def test_quantized_weights_stack_and_unstack():
    quantized, _ = quantized_params(4)
    again = unstack(stack(quantized))
    jax.tree.map(np.testing.assert_array_equal, again, quantized)


@pytest.mark.parametrize("bits, kind", [(8, "Q8_0"), (4, "Q4_0")])
def test_weights_are_rounded_as_ggml_rounds_them(bits, kind):
    rng = np.random.default_rng(bits)
    w = (rng.standard_normal((64, 256)) * 10.0 ** rng.integers(-4, 2, (64, 1))).astype(np.float32)
    w[3, :32], w[4, 32:64] = 0, 0.125
    ours = jax.jit(quant.quantize, static_argnums=1)(w, bits)
    theirs = gguf_blocks.dequantize(kind, gguf_blocks.quantize(kind, w))
    np.testing.assert_array_equal(quant.dequantize(ours, jnp.float32), theirs)
    assert ours.bits == bits and ours.shape == w.shape


@pytest.mark.parametrize("sizes", [None, MESH], ids=str)
@pytest.mark.parametrize("name, bits", [("int8", 8), ("int4", 4)])
def test_a_model_quantized_while_it_is_read_is_the_rounded_model(tmp_path, name, bits, sizes):
    params = init_params(CONFIG, jax.random.key(3))
    sound.save_params(tmp_path / "whole", CONFIG, params)

    @jax.jit
    def rounded(leaf):
        return leaf if leaf.ndim < 2 else quant.dequantize(quant.fit(leaf, bits), jnp.float32)

    expected = Llama(CONFIG, jax.tree.map(rounded, unstack(params)), dtype="float32")
    llama = llama_jax.load(tmp_path / "whole", quantize=name, dtype="float32", mesh=sizes)
    up = llama.params["layers"][0]["ffn"]["up"]
    assert isinstance(up, QTensor) and isinstance(llama.params["embed"], QTensor) and up.bits == bits
    tokens = random_tokens(CONFIG, rows=2, length=9)
    assert gap(llama.logits(tokens), expected.logits(tokens)) < 2e-5
    with pytest.raises(ConfigError, match="quantize must be one of none, int8, int4, or be left out; got 'int5'"):
        llama_jax.load(tmp_path / "whole", quantize="int5")
