"""Checkpoints: the same logits from every kind of folder, and one-line refusals of every broken one."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from golden.make_model import CASES, random_tokens, random_weights
from helpers.errors import refusal
from helpers.folders import make_folder, new_config, old_config
from llama_jax import model, parallel
from llama_jax.config import SIZES
from llama_jax.errors import ConfigError
from llama_jax.params import abstract_params, init_params, logical_axes, stack, unstack
from llama_jax.text import Tokenizer
from llama_jax.weights import export, name_table
from llama_jax.weights.formats import huggingface, torch_file
from llama_jax.weights.load import load_leaves
from llama_jax.weights.model_files import Metadata
from llama_jax.weights.open import open_source
from llama_jax.weights.source import UnknownTokenizer, checked_tokenizer
from llama_jax.weights.tensor import of_array
from llama_jax.weights.validate import match_tensors

TINY = SIZES["tiny"]
TIED = CASES["tied"][0]


def load(folder, *, layout=None, dtype=None):
    source = open_source(folder)
    return source.config, source.load(layout, dtype, "none")


def same(params, config, tensors, *, dtype=None):
    for weight in name_table.weights(config, "huggingface"):
        ours, theirs = np.asarray(name_table.get(params, weight.path)), tensors[weight.name]
        np.testing.assert_array_equal(ours, theirs if dtype is None else theirs.astype(dtype))


# The table of names.


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("format", list(name_table.FORMATS))
def test_table_is_the_tree_of_the_model(name, format):
    config = SIZES[name]
    tree = abstract_params(config, stacked=False)
    rows = name_table.weights(config, format)
    assert len({row.name for row in rows}) == len(rows) == len(jax.tree.leaves(tree))
    for row in rows:
        assert name_table.get(tree, row.path).shape == row.shape
    built = name_table.build(config, ((row.path, name_table.get(tree, row.path)) for row in rows))
    assert jax.tree.structure(built) == jax.tree.structure(tree)


def test_rotary_pairs_go_to_halves_and_back():
    H = 8
    assert name_table.halves_order(H).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]  # Meta's (2i, 2i + 1) are our (i, i + H/2)
    assert name_table.halves_order(H)[name_table.pairs_order(H)].tolist() == list(range(H))
    q = next(row for row in name_table.weights(TINY, "meta") if row.path[-1] == "q")
    theirs = np.arange(q.shape[0] * q.shape[1], dtype=np.float32).reshape(q.shape)
    ours = q.from_disk(of_array(lambda: theirs, theirs.dtype, theirs.shape))
    pairs = theirs.reshape(8, 8, 2, 48)
    expected = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(q.shape)
    np.testing.assert_array_equal(ours.read(), expected)
    for part in (slice(3, 77), slice(64, 128), slice(127, 128)):
        np.testing.assert_array_equal(ours.read((part, slice(2, 9))), expected[part, 2:9])
    np.testing.assert_array_equal(q.to_disk(ours).read(), theirs)


def test_only_q_and_k_of_meta_and_gguf_are_permuted():
    for format in ("meta", "gguf"):
        assert {row.path[-1] for row in name_table.weights(TINY, format) if row.pairs} == {"q", "k"}
    assert not any(row.pairs for row in name_table.weights(TINY, "huggingface"))
    with pytest.raises(ConfigError, match="did you mean 'meta'"):
        name_table.weights(TINY, "mete")


# Loading.


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_folder_loads_to_the_bit(tmp_path, config, shards):
    tensors = random_weights(config)
    assert huggingface.read_config(make_folder(tmp_path, config, tensors, shards=shards)) == config
    same(load(tmp_path)[1], config, tensors)


def test_loaded_folder_gives_the_logits_of_its_numbers(tmp_path):
    tensors = random_weights(TINY)
    config, params = load(make_folder(tmp_path, TINY, tensors, shards=2))
    tokens = jnp.asarray(random_tokens(TINY, rows=2, length=8))
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))
    rows = name_table.weights(TINY, "huggingface")
    direct = name_table.build(TINY, ((row.path, jnp.asarray(tensors[row.name])) for row in rows))
    run = jax.jit(lambda p: model.forward(config, p, tokens, positions, None)[0])
    np.testing.assert_array_equal(run(params), run(direct))


@pytest.mark.parametrize("mixed", [False, True])
def test_types_are_the_files_own_or_cast_one_by_one(tmp_path, mixed):
    tensors = random_weights(TINY)
    half = {k: v if mixed and v.ndim == 1 else v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
    make_folder(tmp_path, TINY, half)
    _, own = load(tmp_path)
    same(own, TINY, half)
    assert own["layers"][0]["attention"]["q"].dtype == jnp.bfloat16
    assert own["norm"]["scale"].dtype == (jnp.float32 if mixed else jnp.bfloat16)
    _, wide = load(tmp_path, dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype(jnp.float32)}
    same(wide, TINY, half, dtype=np.float32)


@pytest.mark.parametrize("rules", ["train", "infer"])
@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 4}, {"data": 4, "tensor": 2}, {"fsdp": 8}], ids=str)
def test_tensors_are_read_into_the_shards_of_the_layout(tmp_path, sizes, rules):
    layout = parallel.Layout(parallel.make_mesh(sizes), rules)
    tensors = random_weights(TINY)
    config, params = load(make_folder(tmp_path, TINY, tensors), layout=layout, dtype=jnp.bfloat16)
    same(params, config, tensors, dtype=ml_dtypes.bfloat16)
    expected = parallel.shardings(layout, logical_axes(config, stacked=False), params)
    for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.mark.parametrize("format", ["meta", "gguf", "flax"])
def test_every_layout_of_numbers_loads_into_shards(format):
    tensors = random_weights(TINY)
    entries = {}
    for ours, row in zip(name_table.weights(TINY, "huggingface"), name_table.weights(TINY, format), strict=True):
        array = tensors[ours.name]
        if row.pairs:
            array = array.reshape(-1, 2, row.pairs // 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        array = array.T if row.transposed else array
        entries[row.name] = of_array(lambda array=array: array, array.dtype, array.shape)
    _, leaves = match_tensors(entries, TINY, format=format, source="here")
    for where in (None, parallel.Layout(parallel.make_mesh({"fsdp": 2, "tensor": 4}), "train")):
        same(load_leaves(leaves, TINY, layout=where, dtype=None, quantize=None), TINY, tensors)


def test_loaded_weights_do_not_follow_the_file(tmp_path):
    tensors = random_weights(TINY)
    _, params = load(make_folder(tmp_path, TINY, tensors))
    path = tmp_path / "model.safetensors"
    with open(path, "r+b") as file:
        file.seek(-(100_000), 2)
        file.write(b"\xff" * 100_000)
    same(params, TINY, tensors)


def test_known_buffers_and_an_equal_unembedding_are_passed_over(tmp_path):
    tensors = random_weights(TIED)
    embed = tensors["model.embed_tokens.weight"]
    extra = {"lm_head.weight": embed, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    _, params = load(make_folder(tmp_path, TIED, {**tensors, **extra}))
    same(params, TIED, tensors)
    assert "unembed" not in params


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_in_torchs_files_are_the_same_model(tmp_path, shards):
    tensors = random_weights(TINY)
    folder = make_folder(tmp_path, TINY, tensors)
    config, params = load(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    names = [f"pytorch_model-{i:05}-of-{shards:05}.bin" for i in range(1, shards + 1)]
    weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        held = {name: tensors[name] for name in tensors if weight_map[name] == file}
        torch_file.save_file(folder / file, {n: of_array(lambda a=a: a, a.dtype, a.shape) for n, a in held.items()})
    if shards == 1:
        (folder / names[0]).rename(folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    again, found = load(folder)
    assert again == config
    same(found, config, tensors)
    assert open_source(folder).description == "Hugging Face folder (torch)"
    (folder / names[-1]).unlink(missing_ok=True)
    if shards == 2:
        with pytest.raises(ValueError, match="pytorch_model-00002-of-00002.bin: missing"):
            load(folder)


def test_a_tied_embedding_may_have_either_name(tmp_path):
    """As safetensors' save_model writes tied weights: under the first of their names."""
    tensors = random_weights(TIED)
    renamed = {k: v for k, v in tensors.items() if k != "model.embed_tokens.weight"}
    renamed["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    config, params = load(make_folder(tmp_path, TIED, renamed))
    assert config == TIED
    same(params, TIED, tensors)


def test_an_unembedding_that_differs_from_the_tied_embedding_is_used(tmp_path, caplog):
    """As in transformers 5, the file's weights have precedence over the config's tie."""
    tensors = random_weights(TIED)
    head = tensors["model.embed_tokens.weight"] + 1
    folder = make_folder(tmp_path, TIED, {**tensors, "lm_head.weight": head})
    config, params = load(folder)
    assert config == dataclasses.replace(TIED, tied_embeddings=False)
    np.testing.assert_array_equal(params["unembed"], head)
    same(params, config, {**tensors, "lm_head.weight": head})
    (record,) = caplog.records
    assert "lm_head.weight differs from model.embed_tokens.weight although the config ties them" in record.message
    make_folder(tmp_path, TIED, {**tensors, "lm_head.weight": head[:-1]})
    with pytest.raises(ValueError, match="lm_head.weight has shape"):
        load(folder)


def _without(tensors, name):
    return {k: v for k, v in tensors.items() if k != name}


_Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: _without(t, _Q), ("missing 1", _Q)),
        (lambda t: {**_without(t, _Q), _Q[:-7] + "_weight": t[_Q]}, ("missing", _Q, "did you mean")),
        (lambda t: _without(t, "lm_head.weight"), ("missing", "lm_head.weight", "tied")),
        (lambda t: {**t, "model.layers.3.mlp.up_proj.weight": t[_Q]}, ("do not belong to this config", "layers.3")),
        (lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": t[_Q][0]}, ("do not belong", "q_proj.bias")),
        (lambda t: {**t, _Q: t[_Q].T}, (_Q, "(48, 128)", "(128, 48)")),
        (lambda t: {**t, _Q: t[_Q].astype(np.int8)}, (_Q, "int8")),
        (lambda t: {**t, _Q: t[_Q].astype(np.float64)}, (_Q, "float64")),
    ],
)
def test_wrong_tensors_are_refused_by_name(tmp_path, spoil, words):
    make_folder(tmp_path, TINY, spoil(random_weights(TINY)))
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    text = refusal(error)
    assert all(word in text for word in words), text


# config.json and its neighbours.


@pytest.mark.parametrize("name", ["tiny", "llama3.1-8b", "llama3.1-405b", "llama3.2-1b", "llama3-8b"])
@pytest.mark.parametrize("style", [old_config, new_config, huggingface.export_config])
def test_config_is_read_in_every_spelling(tmp_path, name, style):
    (tmp_path / "config.json").write_text(json.dumps(style(SIZES[name])))
    assert huggingface.read_config(tmp_path) == SIZES[name]


def test_the_oldest_configs_have_the_theta_of_their_time(tmp_path):
    values = {**old_config(TINY), "rope_scaling": None, "rope_theta": None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert huggingface.read_config(tmp_path) == dataclasses.replace(TINY, rope_theta=10_000.0, rope_scaling=None)
    (tmp_path / "config.json").write_text(json.dumps({**values, "vocab_size": 128_256}))
    with pytest.raises(ConfigError, match="rope_theta must be a number"):
        huggingface.read_config(tmp_path)


def test_absent_head_dim_and_kv_heads_follow_from_the_rest(tmp_path):
    values = old_config(TINY)
    del values["head_dim"], values["num_key_value_heads"], values["tie_word_embeddings"]
    values["rope_scaling"]["type"] = values["rope_scaling"].pop("rope_type")
    values |= {"pretraining_tp": 4, "rope_theta": 500000}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert huggingface.read_config(tmp_path) == dataclasses.replace(TINY, head_dim=6, num_kv_heads=8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mistral"}, ("model_type", "mistral", '"llama"')),
        ({"model_type": None}, ("model_type",)),
        ({"attention_bias": True}, ("attention_bias", "true")),
        ({"mlp_bias": True}, ("mlp_bias",)),
        ({"hidden_act": "gelu"}, ("hidden_act", "gelu", "silu")),
        ({"quantization_config": {"bits": 4}}, ("quantization_config",)),
        ({"sliding_window": 40}, ("sliding_window", "40")),
        ({"sliding_window": 40, "use_sliding_window": True}, ("sliding_window", "use_sliding_window=false")),
        ({"sliding_window": 40, "layer_types": ["sliding_attention"]}, ("sliding_window", "40")),
        ({"sliding_window": "40"}, ("sliding_window", '"40"')),
        ({"layer_types": ["chunked_attention"]}, ("layer_types", "chunked_attention", "full_attention")),
        ({"final_logit_softcapping": 30.0}, ("final_logit_softcapping", "30")),
        ({"rope_interleaved": True}, ("rope_interleaved", "true", "false")),
        ({"num_local_experts": 8}, ("num_local_experts", "8")),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, ("quantization_config",)),
        ({"rope_scaling": {"type": "yarn", "factor": 1.0, "attention_factor": 2.0}}, ("attention_factor",)),
        ({"rope_theta": None}, ("rope_theta", "500000")),
        ({"rope_theta": "1e4"}, ("rope_theta", "'1e4'")),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ("rope_type", "linear", "llama3")),
        ({"rope_scaling": {"rope_type": "llama3", "type": "yarn"}}, ("rope_type", "yarn")),
        ({"rope_scaling": {"factor": 8.0}}, ("factor", "default")),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ("lacks", "low_freq_factor")),
        ({"rope_scaling": [8.0]}, ("rope_scaling", "[8.0]")),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, ("contradict",)),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
        ({"hidden_size": None}, ("lacks", "hidden_size")),
        ({"rms_norm_eps": None}, ("lacks", "rms_norm_eps")),
        ({"hidden_size": 50, "head_dim": None}, ("50", "8", "head_dim")),
        ({"num_attention_heads": "8"}, ("num_heads", "'8'")),
        ({"num_key_value_heads": 3}, ("num_kv_heads=3",)),
        ({"tie_word_embeddings": "yes"}, ("tied_embeddings", "yes")),
    ],
)
def test_config_that_is_not_understood_is_refused(tmp_path, change, words):
    (tmp_path / "config.json").write_text(json.dumps({**old_config(TINY), **change}))
    with pytest.raises(ConfigError) as error:
        huggingface.read_config(tmp_path)
    text = refusal(error)
    assert all(word in text for word in (*words, "config.json")), text


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 32, "use_sliding_window": False, "max_window_layers": 2},
        {"sliding_window": 131_072},
        {"sliding_window": 0},
        {"sliding_window": 32, "layer_types": ["full_attention", "full_attention"]},
        {"layer_types": ["full_attention", "full_attention"]},
        {"attention_bias": False, "mlp_bias": False, "qkv_bias": None, "attention_dropout": 0.1, "pretraining_tp": 1},
        {"pretraining_tp": 2, "use_cache": False, "initializer_range": 0.5, "unsloth_version": "2025.1"},
        {"hidden_act": "swish"},
        {"rope_interleaved": False, "is_llama_config": True, "partial_rotary_factor": 1},
        {"embedding_multiplier": 1.0, "residual_multiplier": 1, "final_logit_softcapping": None, "num_experts": 0},
        {"quantization_config": {}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}},
    ],
    ids=str,
)
def test_settings_without_an_effect_are_accepted(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps({**old_config(TINY), **change}))
    assert huggingface.read_config(tmp_path) == TINY


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "yarn"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_a_scaling_by_one_is_none(tmp_path, kind, key):
    values = {**old_config(TINY), "rope_scaling": {key: kind, "factor": 1.0}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert huggingface.read_config(tmp_path) == dataclasses.replace(TINY, rope_scaling=None)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [128001, 128008, 128009]}, {"eos_token_id": 128001}, (128001, 128008, 128009)),
        ({"eos_token_id": 5}, {"eos_token_id": 7}, (5,)),
        ({"temperature": 0.6}, {"eos_token_id": [7, 7]}, (7,)),
        (None, {"eos_token_id": 7}, (7,)),
        (None, {}, ()),
    ],
)
def test_stop_tokens_come_from_the_generation_config_first(tmp_path, generation, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert huggingface.read_metadata(tmp_path).stop_tokens == expected


def test_stop_tokens_that_are_no_ids_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ConfigError, match="eos_token_id"):
        huggingface.read_metadata(tmp_path)


# Saving, and the two layouts.


METADATA = Metadata(bos_token=2, stop_tokens=(3, 4))


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 50_000])
@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_saved_folder_loads_again_to_the_bit(tmp_path, config, shard_bytes, stacked):
    tensors = random_weights(config)
    _, params = load(make_folder(tmp_path / "a", config, tensors))
    leaves = export.leaves_of(config, stack(params) if stacked else params)
    out = tmp_path / "b"
    options = {"format": "hf", "dtype": "bfloat16", "shard_bytes": shard_bytes}
    assert export.save(out, config, leaves, METADATA, **options) == out
    again, loaded = load(out)
    assert again == config and huggingface.read_metadata(out).stop_tokens == (3, 4)
    same(loaded, config, tensors, dtype=ml_dtypes.bfloat16)
    assert (len(list(out.glob("*.safetensors"))) > 1) == (shard_bytes == 50_000)
    assert not list(out.glob("*.part"))
    with pytest.raises(ConfigError, match="already"):
        export.save(out, config, leaves, METADATA, **options)


def test_saving_refuses_other_types_and_other_weights(tmp_path):
    params = init_params(TINY, jax.random.key(0))
    leaves = export.leaves_of(TINY, params)
    with pytest.raises(ConfigError, match="int8"):
        export.save(tmp_path / "out", TINY, leaves, METADATA, format="hf", dtype="int8")
    with pytest.raises(ConfigError, match="'q8_0'; allowed: float32"):
        export.save(tmp_path / "out", TINY, leaves, METADATA, format="meta", dtype="q8_0")
    with pytest.raises(ConfigError, match="did you mean 'gguf'"):
        export.save(tmp_path / "out", TINY, leaves, METADATA, format="ggup", dtype="float32")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="unknown weight.*unembed"):
        export.leaves_of(TIED, params)


def test_stack_and_unstack_are_inverse_and_keep_shardings():
    layout = parallel.Layout(parallel.make_mesh({"fsdp": 2, "tensor": 4}), "train")
    stacked = init_params(TINY, jax.random.key(0))
    want = {
        s: parallel.shardings(layout, logical_axes(TINY, stacked=s), abstract_params(TINY, stacked=s))
        for s in (True, False)
    }
    placed = jax.device_put(stacked, want[True])
    apart = unstack(placed)
    for tree, s in ((apart, False), (stack(apart), True)):
        assert jax.tree.structure(tree) == jax.tree.structure(want[s])
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(want[s]), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    jax.tree.map(np.testing.assert_array_equal, stack(apart), stacked)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(unstack)(stacked), apart)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(stack)(apart), stacked)
    assert unstack(apart) is apart and stack(stacked) is stacked


@pytest.mark.parametrize("fault", ["damaged", "missing permission", "of a larger model", "of another model"])
def test_whatever_is_wrong_with_a_tokenizer_costs_the_tokenizer_alone(fault, tmp_path):
    path = tmp_path / "tokenizer.model"
    Tokenizer.from_ranks({bytes([i]): i for i in range(256)}).save(path)

    def read() -> Tokenizer:
        if fault == "missing permission":
            raise PermissionError(13, "Permission denied", str(path))
        if fault == "damaged":
            path.write_bytes(path.read_bytes()[:900])
        return Tokenizer(path)

    config = dataclasses.replace(TINY, vocab_size=200 if fault == "of a larger model" else 512)
    with pytest.raises(UnknownTokenizer) as error:
        checked_tokenizer(read, path, config, fingerprint="0" if fault == "of another model" else None)
    assert "\n" not in str(error.value)
    if fault == "of a larger model":  # the ids of control tokens alone may be without rows
        assert checked_tokenizer(read, path, dataclasses.replace(TINY, vocab_size=300)).rows == 300
