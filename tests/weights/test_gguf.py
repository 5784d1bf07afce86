"""GGUF files: the weights, config and logits equal those of ggml's own code, and bad files are refused in one line.

Goldens are made by golden/make_gguf.py.
"""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden.make_gguf import CONFIG, LENGTH, MERGES, STRIDE, factors, kind_of, vocabulary
from golden.make_model import random_tokens, random_weights
from helpers.errors import refusal
from helpers.paths import GOLDEN_FOLDER
from helpers.sound import lazy
from llama_jax import model
from llama_jax.config import SIZES, RopeScaling
from llama_jax.errors import ConfigError
from llama_jax.text.chat_template import ChatTemplate
from llama_jax.weights import load, name_table
from llama_jax.weights.formats import gguf, gguf_blocks, gguf_file
from llama_jax.weights.tensor import of_array
from llama_jax.weights.validate import match_tensors

GOLDEN = np.load(GOLDEN_FOLDER / "gguf.npz")
TINY = GOLDEN_FOLDER / "gguf_tiny.gguf"
REFERENCE = 1e-4  # asked of llama.cpp; measured 2.4e-6


def logits(found, config):
    _, leaves = match_tensors(found.entries, config, format="gguf", source="test")
    params = load.load_leaves(leaves, config, layout=None, dtype=jnp.float32, quantize="none")
    tokens = jnp.asarray(random_tokens(config, rows=1, length=LENGTH))

    @jax.jit
    def run(params, tokens):
        hidden, _ = model.forward(config, params, tokens, jnp.arange(LENGTH)[None], None, dtype=None, remat="none")
        return model.unembed(config, params, hidden)[0]

    return np.asarray(run(params, tokens))


def leaves_of(config):
    """The weights of make_model.py as ours."""
    named = random_weights(config)
    return {weight.path: lazy(named[weight.name]) for weight in name_table.weights(config, "huggingface")}


def save(path, config, **changes):
    options = dict(dtype="float32", vocabulary=None, name="tiny", stop_tokens=(), bos_token=None)
    gguf.save_file(path, config, leaves_of(config), **options | changes)
    return gguf_file.open_file(path)


def altered(**metadata):
    """The golden model with other metadata; None takes a key away."""
    found = gguf_file.open_file(TINY)
    changed = found.metadata | {name.replace("__", "."): value for name, value in metadata.items()}
    return dataclasses.replace(found, metadata={k: v for k, v in changed.items() if v is not None})


def test_logits_are_those_of_llama_cpp():
    found = gguf_file.open_file(TINY)
    config = gguf.read_config(found)
    assert config == CONFIG
    expected = GOLDEN["tiny/logits"]
    assert np.abs(logits(found, config)[::STRIDE] - expected).max() < REFERENCE * np.abs(expected).max()


def test_weights_are_those_that_were_converted():
    found = gguf_file.open_file(TINY)
    _, leaves = match_tensors(found.entries, CONFIG, format="gguf", source="test")
    for weight, path in zip(name_table.weights(CONFIG, "gguf"), leaves, strict=True):
        kind, ours = kind_of(weight.name), leaves_of(CONFIG)[path].read()
        assert leaves[path].kind == kind
        expected = (
            ours.astype(gguf_file.PLAIN[kind])
            if kind in gguf_file.PLAIN
            else gguf_blocks.dequantize(kind, gguf_blocks.quantize(kind, ours))
        )
        np.testing.assert_array_equal(leaves[path].read(), expected)


@pytest.mark.parametrize("dtype", list(gguf.DTYPES))
@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, tied_embeddings=True, rope_scaling=None)])
def test_a_saved_model_is_the_model(tmp_path, config, dtype):
    found = save(tmp_path / "w.gguf", config, dtype=dtype)
    assert gguf.read_config(found) == config
    kinds = {weight.name: found.entries[weight.name].kind for weight in name_table.weights(config, "gguf")}
    kind = gguf.DTYPES[dtype][0]
    shared = "Q8_0" if dtype == "q4_0" else kind
    assert kinds["blk.1.ffn_down.weight"] == kind
    assert kinds["token_embd.weight"] == (shared if config.tied_embeddings else kind)
    assert kinds.get("output.weight", kind) == kind
    assert kinds["output_norm.weight"] == "F32"
    for path, leaf in match_tensors(found.entries, config, format="gguf", source="test")[1].items():
        ours = leaves_of(config)[path].read()
        if leaf.kind in gguf_file.PLAIN:
            np.testing.assert_array_equal(leaf.read(), ours.astype(leaf.dtype))
        else:  # blocks lie within rows, so that reordering rows does not change them
            np.testing.assert_array_equal(
                leaf.read(), gguf_blocks.dequantize(leaf.kind, gguf_blocks.quantize(leaf.kind, ours))
            )


def test_rows_that_are_no_multiple_of_32_stay_float16(tmp_path):
    config = SIZES["tiny"]
    found = save(tmp_path / "w.gguf", config, dtype="q4_0")
    assert gguf.read_config(found) == config
    assert found.entries["blk.0.attn_q.weight"].kind == "F16"
    assert found.entries["blk.0.ffn_down.weight"].kind == "Q4_0"


def test_saving_again_copies_blocks(tmp_path):
    first = save(tmp_path / "a.gguf", CONFIG, dtype="q8_0")
    _, leaves = match_tensors(first.entries, CONFIG, format="gguf", source="test")
    options = dict(dtype="q8_0", vocabulary=None, name="tiny", stop_tokens=(), bos_token=None)
    gguf.save_file(tmp_path / "b.gguf", CONFIG, leaves, **options)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("name", list(SIZES))
def test_every_config_survives(name, monkeypatch):
    written = {}
    monkeypatch.setattr(gguf_file, "save_file", lambda path, *given, **_: written.update(zip("mt", given, strict=True)))
    config = SIZES[name]
    shapes = {w.path: of_array(lambda: None, np.dtype(np.float32), w.shape) for w in name_table.weights(config, "gguf")}
    options = dict(dtype="bfloat16", vocabulary=None, name=name, stop_tokens=(), bos_token=None)
    gguf.save_file(Path("x"), config, shapes, **options)
    metadata = {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in written["m"].items()}
    assert metadata["llama.attention.layer_norm_rms_epsilon"] != config.norm_eps  # float32 is not exact
    metadata = {k: float(str(np.float32(v))) if isinstance(v, float) else v for k, v in metadata.items()}
    entries = {tensor: made for tensor, (made, _) in written["t"].items()}
    assert gguf.read_config(gguf_file.GGUF(Path("x"), 3, metadata, entries, 0)) == config


def test_what_may_be_left_out_has_llama_cpps_default():
    absent = ("attention__head_count_kv", "rope__dimension_count", "rope__freq_base", "vocab_size")
    found = altered(**{f"llama__{name}": None for name in absent})
    found = dataclasses.replace(found, entries={k: v for k, v in found.entries.items() if k != "rope_freqs.weight"})
    expected = dataclasses.replace(CONFIG, num_kv_heads=CONFIG.num_heads, rope_scaling=None, rope_theta=10_000.0)
    assert gguf.read_config(found) == expected


def test_equal_numbers_for_each_layer_are_one():
    assert gguf.read_config(altered(llama__attention__head_count_kv=np.int32([2, 2]))) == CONFIG


REFUSED = {
    "general__architecture": ["qwen2", None, 3],
    "llama__block_count": [None, 0, -1, 2.0, True, "2", 1 << 40, np.int32([2])],
    "llama__context_length": [None, 0, "x"],
    "llama__embedding_length": [None, 66, 0],
    "llama__feed_forward_length": [None, np.int32([96, 97]), ["a", "b"]],
    "llama__attention__head_count": [None, 0, 3, np.float32([4, 4])],
    "llama__attention__head_count_kv": [np.int32([2, 1]), np.int32([2]), 3, np.int32([])],
    "llama__attention__key_length": [15, 32, "16"],
    "llama__attention__value_length": [8],
    "llama__attention__layer_norm_rms_epsilon": [None, 0.0, math.nan, -1e-5, math.inf, "1e-5", True],
    "llama__rope__dimension_count": [8],
    "llama__rope__freq_base": [0.0, math.nan, -1.0],
    "llama__rope__scaling__type": ["yarn", "longrope", 1],
    "llama__rope__scaling__factor": [4.0, math.nan],
    "llama__rope__scale_linear": [2.0],
    "llama__expert_count": [8],
    "llama__attention__sliding_window": [8, np.int32([8, 0])],
    "llama__attention__scale": [0.1],
    "llama__logit_scale": [0.5],
    "llama__attention__causal": [False],
    "llama__final_logit_softcapping": [30.0],
    "llama__something_new": [1],
    "llama__a\nb": [1],
    "llama__vocab_size": [0],
    "llama__rope__scaling__attn_factor": [np.zeros(1000)],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_what_is_not_implemented_is_refused_by_name(name, value):
    with pytest.raises(ConfigError) as error:
        gguf.read_config(altered(**{name: value}))
    message = refusal(error)
    assert message.startswith(str(TINY)) and message.count(str(TINY)) == 1
    if name not in ("llama__attention__key_length", "llama__a\nb", "llama__attention__head_count"):
        assert name.replace("__", ".").split(".")[-1] in message or "num_kv_heads" in message or "multiple" in message


def test_harmless_keys_are_ignored():
    neutral = dict(rope__scaling__type="linear", rope__scaling__factor=1.0, expert_count=0, tensor_data_layout="Meta")
    assert gguf.read_config(altered(**{f"llama__{k}": v for k, v in neutral.items()})) == CONFIG


def test_settings_without_an_effect_are_accepted():
    neutral = {
        "attention.sliding_window": CONFIG.max_seq_len,  # reaches as far as the positions go
        "attention.sliding_window_pattern": np.zeros(2, np.bool_),
        "attention.scale": float(np.float32(CONFIG.head_dim**-0.5)),  # llama.cpp's own default
        "expert_group_count": 0,
        "nextn_predict_layers": 0,
        "rope.dimension_sections": np.zeros(4, np.int32),
        "some_flag": False,
        "some_list": [],
    }
    assert gguf.read_config(altered(**{f"llama__{k.replace('.', '__')}": v for k, v in neutral.items()})) == CONFIG


# Frequencies.

SCALINGS = [
    (theta, head_dim, RopeScaling(factor=f, low_freq_factor=low, high_freq_factor=high, original_max_seq_len=original))
    for theta in (10_000.0, 500_000.0)
    for head_dim in (16, 32, 64, 128)
    for f in (4.0, 8.0, 32.0)
    for low, high in ((1.0, 4.0), (1.0, 2.0), (2.0, 8.0), (1.0, 32.0), (4.0, 5.0))
    for original in (64, 256, 8192)
]


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_a_scaling_is_found_that_reproduces_the_factors(theta):
    for base, head_dim, scaling in SCALINGS:
        if base != theta:
            continue
        config = dataclasses.replace(CONFIG, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
        given = factors(config)
        found = gguf.rope_scaling_of(given, theta=theta, head_dim=head_dim, context=131_072)
        if found is None:  # none of so few frequencies is touched
            assert (given == 1).all()
            continue
        np.testing.assert_allclose(factors(dataclasses.replace(config, rope_scaling=found)), given, rtol=1e-5)
        if (scaling.low_freq_factor, scaling.high_freq_factor) == (1, 4) and (
            (given > 1) & (given < given.max())
        ).any():
            assert found == scaling


@pytest.mark.parametrize("original", [64, 8192])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_factors_are_the_converters(head_dim, original):
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=original)
    config = dataclasses.replace(CONFIG, head_dim=head_dim, rope_theta=500_000.0, rope_scaling=scaling)
    ours = gguf.rope_factors(scaling, theta=config.rope_theta, head_dim=head_dim)
    np.testing.assert_allclose(ours, factors(config), rtol=1e-6)


def test_factors_of_one_are_no_scaling():
    assert gguf.rope_scaling_of(np.ones(8), theta=10_000.0, head_dim=16, context=512) is None


@pytest.mark.parametrize("theta", [1.0, 1e-300, 1e308])
def test_no_base_does_worse_than_a_refusal(theta):
    plain = [1.0] * 3
    for given in ([*plain, 2, 3, 8, 8, 8], [*plain, 1, 3, 8, 8, 8], [*plain, 1, 8, 8, 8, 8], [2, 3, 4, 5, 6, 7, 8, 9]):
        try:
            found = gguf.rope_scaling_of(np.float32(given), theta=theta, head_dim=16, context=8192)
        except ConfigError as error:
            assert "rope_freqs.weight" in str(error)
        else:
            np.testing.assert_allclose(gguf.rope_factors(found, theta=theta, head_dim=16), given, rtol=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        [1, 1, 1, 8, 1, 8, 8, 8],
        [8, 4, 2, 1, 1, 1, 1, 1],
        [1, 1, 1, 2, 3, 4, 5, 8],
        [1, 1, 1, 1, 0.5, 8, 8, 8],
        [1, 1, 1, 1, math.nan, 8, 8, 8],
        [1, 1, 1, 1, math.inf, 8, 8, 8],
        [1, 1, 1, 8],
        [0] * 8,
        [-1] * 8,
    ],
)
def test_other_frequencies_are_refused(given):
    with pytest.raises(ConfigError, match="rope_freqs.weight") as error:
        gguf.rope_scaling_of(np.float32(given), theta=500_000.0, head_dim=16, context=8192)
    refusal(error)


# The vocabulary.


def test_the_vocabulary_is_what_was_written():
    tokens, types = vocabulary()
    file = gguf_file.open_file(TINY)
    found = gguf.vocabulary(file)
    assert found["tokens"] == tokens
    assert found["token_types"].tolist() == types
    assert found["merges"] == MERGES
    assert (found["model"], found["pre"], found["add_bos"]) == ("gpt2", "llama-bpe", True)
    assert gguf.chat_template(file).sources == {"default": "{{ messages }}"}
    assert (tokens[found["bos"]], tokens[found["eos"]]) == ("<|begin_of_text|>", "<|end_of_text|>")


def test_bos_and_stop_tokens_are_the_files():
    tokens, _ = vocabulary()
    found = gguf_file.open_file(TINY)
    assert gguf.bos_token(found) == tokens.index("<|begin_of_text|>")
    assert gguf.stop_tokens(found) == (tokens.index("<|end_of_text|>"), tokens.index("<|eot_id|>"))
    none = altered(
        tokenizer__ggml__bos_token_id=-1, tokenizer__ggml__eos_token_id=None, tokenizer__ggml__eot_token_id=7
    )
    assert gguf.bos_token(none) is None and gguf.stop_tokens(none) == (7,)


def test_a_saved_vocabulary_is_the_vocabulary(tmp_path):
    before = gguf.vocabulary(gguf_file.open_file(TINY))
    stops = tuple(before["tokens"].index(f"<|{name}|>") for name in ("end_of_text", "eom_id", "eot_id"))
    found = save(tmp_path / "w.gguf", CONFIG, vocabulary=before, stop_tokens=stops, bos_token=before["bos"])
    after = gguf.vocabulary(found)
    assert after["token_types"].tolist() == before["token_types"].tolist()
    assert {**after, "token_types": None} == {**before, "token_types": None}
    assert [found.metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eom", "eot")] == list(stops)
    assert set(gguf.stop_tokens(found)) == set(stops)


def test_the_end_that_a_template_writes_is_kept_among_many_stop_tokens(tmp_path):
    before = gguf.vocabulary(gguf_file.open_file(TINY))
    stops = (5, 6, 7, 8)
    template = ChatTemplate({"default": "{{ eos_token }}"}, {"eos_token": before["tokens"][8]})
    options = dict(vocabulary=before, stop_tokens=stops, bos_token=before["bos"], chat_template=template)
    found = save(tmp_path / "w.gguf", CONFIG, **options)
    assert found.metadata["tokenizer.ggml.eos_token_id"] == 8 and set(gguf.stop_tokens(found)) == {5, 6, 8}


def test_missing_ids_are_filled_with_unused_tokens(tmp_path):
    whole = gguf.vocabulary(gguf_file.open_file(TINY))
    short = {**whole, "tokens": whole["tokens"][:300], "token_types": [1] * 300}
    found = gguf.vocabulary(save(tmp_path / "w.gguf", CONFIG, vocabulary=short))
    assert found["tokens"][:300] == short["tokens"] and len(set(found["tokens"])) == CONFIG.vocab_size
    assert found["token_types"].tolist() == [1] * 300 + [5] * 20


def test_a_model_without_vocabulary_says_so(tmp_path):
    found = save(tmp_path / "w.gguf", CONFIG, stop_tokens=(5, 7), bos_token=1)
    assert gguf.vocabulary(found) is None
    assert (gguf.bos_token(found), gguf.stop_tokens(found)) == (1, (5, 7))
    assert gguf.vocabulary(altered(tokenizer__ggml__model=None)) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 3),
        ("tokens", None),
        ("tokens", "abc"),
        ("tokens", np.int32([1])),
        ("tokens", []),
        ("token_type", np.int32([1, 2])),
        ("token_type", np.zeros(320, np.float32)),
        ("merges", np.int32([1])),
        ("pre", 5),
        ("bos_token_id", "1"),
        ("bos_token_id", 1.0),
        ("add_bos_token", 1),
    ],
)
def test_an_unsound_vocabulary_is_refused(name, value):
    with pytest.raises(ValueError, match=f"tokenizer.ggml.{name}") as error:
        gguf.vocabulary(altered(**{f"tokenizer__ggml__{name}": value}))
    assert refusal(error).startswith(str(TINY))


def test_what_the_format_cannot_hold_is_refused(tmp_path):
    large = {**gguf.vocabulary(gguf_file.open_file(TINY)), "tokens": ["a"] * 321, "token_types": [1] * 321}
    cases = {"dtype": dict(dtype="q4"), "ids": dict(vocabulary=large)}
    for word, changes in cases.items():
        with pytest.raises(ConfigError, match=word) as error:
            save(tmp_path / "w.gguf", CONFIG, **changes)
        refusal(error)
