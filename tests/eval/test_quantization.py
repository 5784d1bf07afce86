"""The report of what quantization costs, compared with the same numbers in numpy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from helpers.quantized import CONFIG
from helpers.tokenizers import byte_tokenizer
from llama_jax import model as model_of
from llama_jax.cli import convert
from llama_jax.cli import eval as command
from llama_jax.errors import ConfigError
from llama_jax.eval import calibration, quantization
from llama_jax.infer.llama import Llama
from llama_jax.ops import gptq, linear, quant
from llama_jax.params import init_params

TEXTS = ["the cat sat on the mat and the dog sat on the log", "a cat and a dog", "on and on and on the dog sat" * 6]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a random model whose predictions differ from token to token, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "m"
    params = jax.tree.map(lambda a: a * 6, init_params(CONFIG, jax.random.key(1)))
    Llama(CONFIG, params, byte_tokenizer(), dtype="float32").save(folder, "hf")
    return folder


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_the_report_is_that_of_the_definitions(model, tmp_path, capsys):
    text = tmp_path / "texts.jsonl"
    text.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    gguf = llama_jax.load(model).save(tmp_path / "m.gguf", "gguf", dtype="q4_0")
    arguments = ["quantization", str(model), "--text", str(text), "--context", "16", "--others", str(gguf)]
    assert command.main([*arguments, "--json", "--dtype", "float32"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == ["int8", "int4", "kv_int8", str(gguf)]
    reference = llama_jax.load(model, dtype="float32")
    for row, name in zip(rows[:2], ("int8", "int4"), strict=True):
        llama = llama_jax.load(model, quantize=name, dtype="float32")
        divergences, agree, nats = [], [], []
        for sample in TEXTS:
            ids = llama.tokenizer.encode(sample, bos=True)
            for start in range(0, len(ids) - 1, 16):
                window = ids[start : start + 17]
                p, q = (log_softmax(m.logits([window[:-1]])[0]) for m in (reference, llama))
                divergences += (np.exp(p) * (p - q)).sum(-1).tolist()
                agree += (p.argmax(-1) == q.argmax(-1)).tolist()
                nats += (-q[np.arange(len(q)), window[1:]]).tolist()
        assert row["tokens"] == len(nats)
        np.testing.assert_allclose(row["mean"], np.mean(divergences), rtol=1e-3)
        np.testing.assert_allclose(row["percentile_99"], np.quantile(divergences, 0.99), rtol=1e-3)
        assert row["agreement"] == pytest.approx(np.mean(agree))
        np.testing.assert_allclose(row["perplexity"], np.exp(np.mean(nats)), rtol=1e-4)
        assert row["nbytes"] == sum(a.nbytes for a in jax.tree.leaves(llama.params)) < row["reference_nbytes"] / 3
    assert 0 < rows[0]["mean"] < rows[1]["mean"] / 20
    np.testing.assert_allclose(rows[3]["mean"], rows[1]["mean"], rtol=1e-3)  # the same numbers in another file
    assert 0 < rows[2]["mean"] < rows[1]["mean"] / 20 and rows[2]["nbytes"] == rows[2]["reference_nbytes"]
    fields = {key: value for key, value in rows[0].items() if key != "perplexity_change"}
    assert "same top" in quantization.table([quantization.Divergence(**fields)])


def test_a_cache_of_8_bits_gives_the_predictions_of_generation_with_it(model):
    llama, plain = (llama_jax.load(model, dtype="float32", kv=kv) for kv in ("int8", "compute"))
    ids = llama.tokenizer.encode(TEXTS[0], bos=True)
    p = log_softmax(quantization._logits(llama, np.array([ids]))[0])
    assert np.abs(p - log_softmax(plain.logits([ids])[0])).max() > 1e-3
    for length in (3, len(ids)):
        result = llama.generate([ids[:length]], max_new_tokens=1, top_logprobs=5, temperature=0)[0]
        for token, logprob in result.top_logprobs[0]:
            np.testing.assert_allclose(p[length - 1, token], logprob, atol=1e-4)


def test_what_cannot_be_measured_is_refused(model, tmp_path):
    text = tmp_path / "empty.txt"
    text.write_text("")
    for arguments, match in (
        (["--quantizations", "int5"], "int5"),
        (["--quantizations", ""], "nothing to measure"),
        (["--kv", "int8"], "--quantizations kv_int8 measures it"),
    ):
        with pytest.raises(ConfigError, match=match):
            command.main(["quantization", str(model), "--text", str(text), *arguments])
    with pytest.raises(ConfigError, match="no token to predict"):
        list(quantization.measure(str(model), []))
    with pytest.raises(ConfigError, match="kv='int8' would round the reference's cache"):
        list(quantization.measure(str(model), TEXTS, opened={"kv": "int8"}))


def by_definition(w, moments, scales):
    """GPTQ as its paper derives it: after each column, H^-1 of the columns that remain, by Gaussian elimination."""
    order = np.argsort(-np.diagonal(moments), kind="stable")
    damped = moments + 0.01 * np.diagonal(moments).mean() * np.eye(len(moments))
    w, inverse = w[:, order].astype(np.float64), np.linalg.inv(damped[np.ix_(order, order)])
    integers = np.zeros_like(w)
    for i, column in enumerate(order):
        scale = scales[:, column // 32].astype(np.float64)
        integers[:, i] = np.clip(np.round(w[:, i] / scale), -8, 7)
        error = (w[:, i] - integers[:, i] * scale) / inverse[i, i]
        w[:, i:] -= error[:, None] * inverse[i, i:]
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    result = np.zeros_like(integers)
    result[:, order] = integers
    return result


@pytest.mark.parametrize("size", [96, 256])  # blocks of 32 and of 128 columns
def test_gptq_is_its_definition_and_lowers_the_error_of_products(size):
    rng = np.random.default_rng(0)
    uneven = np.exp(rng.standard_normal(size))
    x = (rng.standard_normal((500, size // 4)) @ rng.standard_normal((size // 4, size)) + 0.3) * uneven
    moments = (x.T @ x / len(x)).astype(np.float32)
    w = rng.standard_normal((40, size)).astype(np.float32)
    fitted = gptq.fit(jnp.asarray(w), jnp.asarray(moments))
    integers = np.concatenate([np.asarray(p) for p in quant.planes(fitted)], axis=-1).reshape(w.shape)
    expected = by_definition(w, moments.astype(np.float64), np.asarray(fitted.scales))
    assert (integers != expected).mean() < 0.003  # ties of float32 against float64
    plain = quant.fit(jnp.asarray(w), 4, jnp.asarray(np.diagonal(moments)))
    errors = [((x @ (np.asarray(quant.dequantize(q, jnp.float32)) - w).T) ** 2).sum() for q in (fitted, plain)]
    assert errors[0] < 0.6 * errors[1]


def test_gptq_takes_inputs_that_never_occur_and_few_samples():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    x[:, 5:40] = 0
    w = rng.standard_normal((8, 64)).astype(np.float32)
    for moments in (x.T @ x, np.zeros((64, 64), np.float32)):
        fitted = gptq.fit(jnp.asarray(w), jnp.asarray(moments))
        error = np.asarray(quant.dequantize(fitted, jnp.float32)) - w
        assert np.abs(error).max() < 1 and np.isfinite(error).all()
    assert (quant.dequantize(gptq.fit(jnp.zeros((2, 64)), jnp.asarray(x.T @ x)), jnp.float32) == 0).all()


def test_calibrated_weights_are_those_of_gptq_on_the_inputs_of_rounded_layers(tmp_path, capsys):
    params = jax.tree.map(lambda a: a * 6, init_params(CONFIG, jax.random.key(1)))
    llama = Llama(CONFIG, params, byte_tokenizer(), dtype="float32")
    result = calibration.quantized(llama, TEXTS[2:], progress=False)
    assert not linear._observers
    ids = [i for text in TEXTS[2:] for i in [llama.tokenizer.bos_id, *text.encode()]]
    x = np.asarray(llama.params["embed"], np.float64)[ids]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps)
    first = llama.params["layers"][0]
    x = x * np.asarray(first["attention_norm"]["scale"], np.float64)
    expected = gptq.fit(first["attention"]["q"], jnp.asarray(x.T @ x / len(x), jnp.float32))
    got = result["layers"][0]["attention"]["q"]
    assert (np.asarray(got.values) != np.asarray(expected.values)).mean() < 0.01
    # The last layer's inputs come from layers that are rounded already.
    before = {**llama.params, "layers": (*result["layers"][:-1], llama.params["layers"][-1])}
    seen = []
    with linear.observed(lambda x, w: seen.append((x, w))):
        for text in TEXTS[2:]:
            tokens = jnp.asarray([[llama.tokenizer.bos_id, *text.encode()]])
            model_of.forward(CONFIG, before, tokens, jnp.arange(tokens.shape[1])[None], None, dtype=jnp.float32)
    down = llama.params["layers"][-1]["ffn"]["down"]
    rows = np.concatenate([np.asarray(x[0], np.float64) for x, w in seen if w is down])
    expected = gptq.fit(down, jnp.asarray(rows.T @ rows / len(rows), jnp.float32))
    assert (np.asarray(result["layers"][-1]["ffn"]["down"].values) != np.asarray(expected.values)).mean() < 0.02


def test_calibration_lowers_the_divergence_and_is_written_by_convert(model, tmp_path):
    plain, calibrated = quantization.measure(str(model), TEXTS[2:], quantizations=["int4"], calibration=TEXTS[2:])
    assert calibrated.name == "int4, calibrated" and calibrated.nbytes == plain.nbytes
    assert 0 < calibrated.mean < 0.8 * plain.mean
    text = tmp_path / "texts.jsonl"
    text.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS[2:]))
    for name, form in (("m.gguf", ["gguf", "--dtype", "q4_0"]), ("folder", ["hf", "--dtype", "int4"])):
        arguments = [str(model), str(tmp_path / name), "--to", *form, "--calibrate", str(text)]
        assert convert.main(arguments) == 0
        (saved,) = quantization.measure(
            str(model), TEXTS[2:], quantizations=[], others=[str(tmp_path / name)], opened={"dtype": "float32"}
        )
        np.testing.assert_allclose(saved.mean, calibrated.mean, rtol=2e-2)
    with pytest.raises(ConfigError, match="no token"):
        calibration.quantized(llama_jax.load(model), [])
    with pytest.raises(ConfigError, match="plain weights on one device"):
        calibration.quantized(llama_jax.load(model, quantize="int4"), TEXTS)
    with pytest.raises(ConfigError, match="int4 or q4_0, not with bfloat16"):
        convert.main([str(model), str(tmp_path / "b"), "--to", "hf", "--dtype", "bfloat16", "--calibrate", str(text)])
