"""The report of what quantization costs, compared with the same numbers in numpy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from helpers.quantized import CONFIG
from helpers.tokenizers import byte_tokenizer
from llama_jax.cli import convert
from llama_jax.cli import eval as command
from llama_jax.errors import ConfigError
from llama_jax.eval import calibration, quantization
from llama_jax.infer.llama import Llama
from llama_jax.ops import linear, quant
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
    assert [row["name"] for row in rows] == ["int8", "int4", str(gguf)]
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
    np.testing.assert_allclose(rows[2]["mean"], rows[1]["mean"], rtol=1e-3)  # the same numbers in another file
    fields = {key: value for key, value in rows[0].items() if key != "perplexity_change"}
    assert "same top" in quantization.table([quantization.Divergence(**fields)])


def test_what_cannot_be_measured_is_refused(model, tmp_path):
    text = tmp_path / "empty.txt"
    text.write_text("")
    for arguments, match in (
        (["--quantizations", "int5"], "int5"),
        (["--quantizations", ""], "nothing to measure"),
    ):
        with pytest.raises(ConfigError, match=match):
            command.main(["quantization", str(model), "--text", str(text), *arguments])
    with pytest.raises(ConfigError, match="no token to predict"):
        list(quantization.measure(str(model), []))


def test_calibration_is_the_mean_square_of_the_inputs_and_lowers_the_error_of_products(tmp_path, capsys):
    params = jax.tree.map(lambda a: a * 6, init_params(CONFIG, jax.random.key(1)))
    uneven = np.exp(2 * np.random.default_rng(0).standard_normal(CONFIG.embed_dim)).astype(np.float32)
    for name in ("attention_norm", "ffn_norm"):
        params["layers"][name]["scale"] = params["layers"][name]["scale"] * uneven
    llama = Llama(CONFIG, params, byte_tokenizer(), dtype="float32")
    means = calibration.importance(llama, TEXTS)
    ids = [i for text in TEXTS for i in [llama.tokenizer.bos_id, *text.encode()]]
    x = np.asarray(llama.params["embed"], np.float64)[ids]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps)
    scale = np.asarray(llama.params["layers"][0]["attention_norm"]["scale"], np.float64)
    np.testing.assert_allclose(means["layers", 0, "attention", "q"], ((x * scale) ** 2).mean(0), rtol=1e-4)
    assert len(means) == 7 * CONFIG.num_layers + 1 and not linear._observers
    folder = llama.save(tmp_path / "m", "hf")
    plain, weighted = quantization.measure(str(folder), TEXTS, quantizations=["int4"], calibration=TEXTS)
    assert weighted.name == "int4, calibrated" and weighted.nbytes == plain.nbytes
    for at in (("attention", "q"), ("ffn", "gate")):
        w, importance = llama.params["layers"][0][at[0]][at[1]], jnp.asarray(means["layers", 0, *at])
        errors = [
            (importance * (quant.dequantize(quant.fit(w, 4, m), jnp.float32) - w) ** 2).sum()
            for m in (importance, None)
        ]
        assert errors[0] < 0.8 * errors[1], at
    assert 0 < weighted.mean != plain.mean > 0  # the calibrated weights are others
    text = tmp_path / "texts.jsonl"
    text.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    command_line = [str(folder), str(tmp_path / "m.gguf"), "--to", "gguf", "--dtype", "q4_0", "--calibrate", str(text)]
    assert convert.main(command_line) == 0
    (saved,) = quantization.measure(
        str(folder), TEXTS, quantizations=[], others=[str(tmp_path / "m.gguf")], opened={"dtype": "float32"}
    )
    np.testing.assert_allclose(saved.mean, weighted.mean, rtol=1e-2)
    with pytest.raises(ConfigError, match="no token"):
        calibration.importance(llama, [])
    with pytest.raises(ConfigError, match="int4 or q4_0, not with bfloat16"):
        convert.main([str(folder), str(tmp_path / "b"), "--to", "hf", "--dtype", "bfloat16", "--calibrate", str(text)])
