"""Quantized models on disk: sizes, what is rounded to what, and folders of the compressed-tensors library."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from golden.make_model import random_tokens
from helpers.numbers import gap
from helpers.quantized import CONFIG
from llama_jax import config
from llama_jax.errors import ConfigError
from llama_jax.infer.llama import Llama
from llama_jax.ops import quant
from llama_jax.ops.quant import QTensor
from llama_jax.params import init_params
from llama_jax.weights import quantize
from llama_jax.weights.formats import compressed_tensors, safetensors
from llama_jax.weights.tensor import of_array

TIED = config.ModelConfig(**{**CONFIG.to_dict(), "rope_scaling": CONFIG.rope_scaling, "tied_embeddings": True})
TOKENIZER = 0.02  # GB of Llama 3's tokenizer.json with its settings


@pytest.mark.parametrize(
    "size, name, most", [("llama3.1-8b", "int4", 4.7), ("llama3.1-70b", "int4", 40), ("llama3.1-8b", "int8", 8.6)]
)
def test_large_models_fit(size, name, most):
    assert quantize.nbytes(config.size(size), name) / 1e9 + TOKENIZER <= most


@pytest.mark.parametrize("bits", [8, 4])
def test_the_best_scales_have_smaller_errors_than_the_largest_value_gives(bits):
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((64, 256)) * 10.0 ** rng.integers(-4, 2, (64, 1))).astype(np.float32)
    w[3, :32], w[4, 32:64], w[5, 7] = 0, 0.125, 40

    def errors(w, rounded, cost=1.0):
        return ((quant.dequantize(rounded, jnp.float32) - w) ** 2 * cost).reshape(64, -1, 32).sum(-1)

    nearest, fitted = errors(w, quant.quantize(w, bits)), errors(w, jax.jit(quant.fit, static_argnums=1)(w, bits))
    assert (fitted <= nearest * 1.02 + 1e-12).all()
    if bits == 4:
        assert fitted.sum() < 0.95 * nearest.sum()
        cost = rng.random(256).astype(np.float32) ** 4
        weighted = quant.fit(w, 4, jnp.asarray(cost))
        assert errors(w, weighted, cost).sum() < errors(w, quant.fit(w, 4), cost).sum()
        np.testing.assert_array_equal(quant.fit(w, 4, jnp.zeros(256)).values, quant.fit(w, 4).values)


@pytest.mark.parametrize("shape", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_saved_folder_is_the_model_that_is_quantized_while_it_is_read(tmp_path, name, shape):
    llama = Llama(shape, init_params(shape, jax.random.key(3)), dtype="float32")
    whole = llama.save(tmp_path / "whole", "hf")
    saved = llama_jax.load(llama.save(tmp_path / "saved", "hf", dtype=name), dtype="float32")
    read = llama_jax.load(whole, quantize=name, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, saved.params, read.params)
    matrices = [
        leaf for leaf in jax.tree.leaves(saved.params, is_leaf=lambda a: isinstance(a, QTensor)) if len(leaf.shape) == 2
    ]
    assert all(isinstance(leaf, QTensor) for leaf in matrices)
    assert saved.params["embed"].bits == (8 if name == "int8" or shape.tied_embeddings else 4)
    held = sum(a.nbytes for leaf in matrices for a in jax.tree.leaves(leaf))
    files = list((tmp_path / "saved").glob("*.safetensors"))
    assert held < sum(file.stat().st_size for file in files) < held + 40_000  # norms, and names of tensors
    again = llama_jax.load(saved.save(tmp_path / "again", "hf"), dtype="float32")  # its dtype follows from the weights
    jax.tree.map(np.testing.assert_array_equal, saved.params, again.params)
    plain = llama_jax.load(tmp_path / "saved", quantize="none", dtype="float32")
    tokens = random_tokens(shape, rows=2, length=20)
    assert gap(plain.logits(tokens), saved.logits(tokens)) < 1e-5
    file = llama.save(tmp_path / "m.gguf", "gguf", dtype={"int8": "q8_0", "int4": "q4_0"}[name])
    gguf = llama_jax.load(file, dtype="float32")
    assert gap(gguf.logits(tokens), saved.logits(tokens)) < 1e-5


def numbers_of(words, scales, bits):
    """The definition of the layout, a value at a time."""
    per = 32 // bits
    out, groups = scales.shape
    size = words.shape[1] * per
    w = np.zeros((out, size))
    for i in range(out):
        for j in range(size):
            code = int(np.uint32(words[i, j // per])) >> (bits * (j % per)) & (2**bits - 1)
            w[i, j] = (code - 2 ** (bits - 1)) * float(scales[i, j * groups // size])
    return w


@pytest.mark.parametrize("groups", [4, 1, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_words_are_read_by_their_definition(bits, groups):
    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, (6, 128 * bits // 32)).astype(np.int32)
    scales = (rng.random((6, groups)) * 0.01).astype(np.float16)
    arrays = {"a.weight_packed": words, "a.weight_scale": scales, "a.weight_shape": np.array([6, 128])}
    tensors = {name: of_array(lambda a=a: a, a.dtype, a.shape) for name, a in arrays.items()}
    tensor = compressed_tensors.unpacked(tensors, "here")["a.weight"]
    expected = numbers_of(words, scales, bits)
    np.testing.assert_allclose(tensor.read(), expected, rtol=1e-6)
    np.testing.assert_allclose(tensor.read((slice(2, 5), slice(40, 90))), expected[2:5, 40:90], rtol=1e-6)
    leaf = QTensor(tensor.quantized.values.read(), tensor.quantized.scales.read())
    np.testing.assert_allclose(quant.dequantize(leaf, jnp.float32), expected, rtol=1e-6)
    stored = dict(compressed_tensors.packed({"a.weight": tensor}))
    np.testing.assert_array_equal(stored["a.weight_packed"].read(), words)


def test_other_quantizations_and_damaged_parts_are_refused(tmp_path):
    llama = Llama(CONFIG, init_params(CONFIG, jax.random.key(3)), dtype="float32")
    llama.save(tmp_path / "m", "hf", dtype="int4")
    path = tmp_path / "m" / "config.json"
    good = json.loads(path.read_text())

    def refused(match, **changes):
        changed = json.loads(json.dumps(good))
        changed["quantization_config"]["config_groups"]["group_0"]["weights"] |= changes
        path.write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=match):
            llama_jax.load(tmp_path / "m")

    refused("num_bits=2; supported: 4, 8", num_bits=2)
    refused("symmetric=False", symmetric=False)
    refused("type='float'", type="float")
    path.write_text(json.dumps(good))
    file = tmp_path / "m" / "model.safetensors"
    tensors = safetensors.open_file(file)
    name = "model.layers.0.mlp.up_proj.weight_scale"
    arrays = {key: tensor.read() for key, tensor in tensors.items() if key != name}
    safetensors.save_file(file, {key: of_array(lambda a=a: a, a.dtype, a.shape) for key, a in arrays.items()})
    with pytest.raises((ConfigError, ValueError), match="up_proj.weight_packed has no .*up_proj.weight_scale"):
        llama_jax.load(tmp_path / "m")
