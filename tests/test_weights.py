"""Checkpoints: the same logits from every kind of folder, and one-line refusals of every broken one."""

import dataclasses
import json
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden.make_model import CASES, random_tokens, random_weights

from llama_jax import model, parallel
from llama_jax.config import SIZES, ConfigError
from llama_jax.weights import huggingface, safetensors, transform
from llama_jax.weights import layout as table

TINY = SIZES["tiny"]
TIED = CASES["tied"][0]
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64", "int8": "I8"}


def encode(tensors):
    """A safetensors file, written here by the format's description and not by the code under test."""
    header, data = {}, b""
    for name, array in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": _CODES[str(array.dtype)], "shape": array.shape, "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def old_config(config):
    scaling = config.rope_scaling
    values = {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tied_embeddings,
        "pretraining_tp": 1,
    }
    if scaling is not None:
        values["rope_scaling"] = {
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
            "rope_type": "llama3",
        }
    return values


def new_config(config):
    values = old_config(config)
    rope = values.pop("rope_scaling") or {"rope_type": "default"}
    return {**values, "rope_parameters": {**rope, "rope_theta": values.pop("rope_theta")}}


def make_folder(folder, config, tensors, *, shards=1):
    """A checkpoint folder; more than one shard makes an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(old_config(config)))
    names = list(tensors)
    if shards == 1:
        (folder / "model.safetensors").write_bytes(encode(tensors))
        return folder
    places = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for shard in set(places.values()):
        held = {name: tensors[name] for name in names if places[name] == shard}
        (folder / shard).write_bytes(encode(held))
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load(folder, *, layout=None, dtype=None):
    config = huggingface.read_config(folder)
    return config, huggingface.load_params(folder, config, layout=layout, dtype=dtype)


def same(params, config, tensors, *, dtype=None):
    for weight in table.weights(config, "huggingface"):
        ours, theirs = np.asarray(table.get(params, weight.path)), tensors[weight.name]
        np.testing.assert_array_equal(ours, theirs if dtype is None else theirs.astype(dtype))


def refusal(error):
    """The message, which must be one line of a readable length."""
    text = str(error.value)
    assert "\n" not in text and 10 < len(text) < 600
    return text


# The table of names.


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("format", list(table.FORMATS))
def test_table_is_the_tree_of_the_model(name, format):
    config = SIZES[name]
    tree = model.abstract_params(config, stacked=False)
    rows = table.weights(config, format)
    assert len({row.name for row in rows}) == len(rows) == len(jax.tree.leaves(tree))
    for row in rows:
        assert table.get(tree, row.path).shape == row.shape
    built = table.build(config, ((row.path, table.get(tree, row.path)) for row in rows))
    assert jax.tree.structure(built) == jax.tree.structure(tree)


def test_rotary_pairs_go_to_halves_and_back():
    heads, H, D = 3, 8, 5
    halves = np.arange(heads * H * D).reshape(heads * H, D)
    pairs = table.to_pairs(halves, H)
    np.testing.assert_array_equal(pairs[:4], halves[[0, 4, 1, 5]])  # Meta's (2i, 2i + 1) are our (i, i + H/2)
    np.testing.assert_array_equal(pairs[H : H + 2], halves[[H, H + 4]])
    np.testing.assert_array_equal(table.to_halves(pairs, H), halves)
    q = next(row for row in table.weights(TINY, "meta") if row.path[-1] == "q")
    halves = np.arange(q.shape[0])
    for part in (None, slice(3, 77), slice(64, 128)):
        np.testing.assert_array_equal(table.to_pairs(halves, 16)[q.rows(part)], halves[part if part else slice(None)])


def test_only_q_and_k_of_meta_are_permuted():
    assert {row.path[-1] for row in table.weights(TINY, "meta") if row.pairs} == {"q", "k"}
    assert not any(row.pairs for row in table.weights(TINY, "huggingface"))
    with pytest.raises(ConfigError, match="did you mean 'meta'"):
        table.weights(TINY, "mete")


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
    rows = table.weights(TINY, "huggingface")
    direct = table.build(TINY, ((row.path, jnp.asarray(tensors[row.name])) for row in rows))
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
    expected = parallel.shardings(layout, model.logical_axes(config, stacked=False), params)
    for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_meta_names_load_into_shards_with_their_pairs_halved():
    tensors = random_weights(TINY)
    entries = {}
    both = zip(table.weights(TINY, "huggingface"), table.weights(TINY, "meta"), strict=True)
    for ours, meta in both:
        array = tensors[ours.name]
        array = table.to_pairs(array, TINY.head_dim) if meta.pairs else array
        entries[meta.name] = safetensors.TensorEntry(array.dtype, array.shape, lambda array=array: array)
    layout = parallel.Layout(parallel.make_mesh({"fsdp": 2, "tensor": 4}), "train")
    for where in (None, layout):
        params = huggingface.load_entries(entries, TINY, format="meta", source="here", layout=where, dtype=None)
        same(params, TINY, tensors)


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
    make_folder(tmp_path, TIED, {**tensors, "lm_head.weight": embed + 1})
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load(tmp_path)


def _without(tensors, name):
    return {k: v for k, v in tensors.items() if k != name}


_Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: _without(t, _Q), ("missing 1", _Q)),
        (lambda t: {**_without(t, _Q), _Q[:-7] + "_weight": t[_Q]}, ("missing", _Q, "did you mean")),
        (lambda t: _without(t, "lm_head.weight"), ("missing", "lm_head.weight", "tied")),
        (lambda t: {**t, "model.layers.3.mlp.up_proj.weight": t[_Q]}, ("no place", "layers.3")),
        (lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": t[_Q][0]}, ("no place", "q_proj.bias")),
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
        ({"sliding_window": 4096}, ("sliding_window", "4096")),
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
    assert huggingface.stop_tokens(tmp_path) == expected


def test_stop_tokens_that_are_no_ids_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ConfigError, match="eos_token_id"):
        huggingface.stop_tokens(tmp_path)


def test_tokenizer_is_found_beside_the_weights_or_in_original(tmp_path):
    assert huggingface.tokenizer_path(tmp_path) is None
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").touch()
    assert huggingface.tokenizer_path(tmp_path) == tmp_path / "original" / "tokenizer.model"
    (tmp_path / "tokenizer.model").touch()
    assert huggingface.tokenizer_path(tmp_path) == tmp_path / "tokenizer.model"


# Saving, and the two layouts.


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 50_000])
@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_saved_folder_loads_again_to_the_bit(tmp_path, config, shard_bytes, stacked):
    tensors = random_weights(config)
    _, params = load(make_folder(tmp_path / "a", config, tensors))
    params = transform.stack(params) if stacked else params
    out = tmp_path / "b"
    options = {"stop_tokens": (3, 4), "bos_token": 2, "max_shard_bytes": shard_bytes}
    huggingface.save_folder(out, config, params, dtype=jnp.bfloat16, **options)
    again, loaded = load(out)
    assert again == config and huggingface.stop_tokens(out) == (3, 4)
    same(loaded, config, tensors, dtype=ml_dtypes.bfloat16)
    assert (len(list(out.glob("*.safetensors"))) > 1) == (shard_bytes == 50_000)
    assert not list(out.glob("*.part"))
    with pytest.raises(ValueError, match="already"):
        huggingface.save_folder(out, config, params, dtype=jnp.bfloat16)


def test_saving_refuses_other_types_and_other_weights(tmp_path):
    params = model.abstract_params(TINY, stacked=False)
    with pytest.raises(ConfigError, match="int8"):
        huggingface.save_folder(tmp_path, TINY, params, dtype=jnp.int8)
    with pytest.raises(ConfigError, match="unknown weight.*unembed"):
        huggingface.save_folder(tmp_path, TIED, params, dtype=jnp.float32)


def test_stack_and_unstack_are_inverse_and_keep_shardings():
    layout = parallel.Layout(parallel.make_mesh({"fsdp": 2, "tensor": 4}), "train")
    stacked = model.init_params(TINY, jax.random.key(0))
    want = {
        s: parallel.shardings(layout, model.logical_axes(TINY, stacked=s), model.abstract_params(TINY, stacked=s))
        for s in (True, False)
    }
    placed = jax.device_put(stacked, want[True])
    apart = transform.unstack(placed)
    for tree, s in ((apart, False), (transform.stack(apart), True)):
        assert jax.tree.structure(tree) == jax.tree.structure(want[s])
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(want[s]), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    jax.tree.map(np.testing.assert_array_equal, transform.stack(apart), stacked)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(transform.unstack)(stacked), apart)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(transform.stack)(apart), stacked)
    assert transform.unstack(apart) is apart and transform.stack(stacked) is stacked


# The file format.


@pytest.mark.parametrize("dtype", list(safetensors.DTYPES))
def test_every_type_is_read_as_it_was_written(tmp_path, dtype):
    array = np.random.RandomState(0).randint(0, 2, (3, 5, 2)).astype(safetensors.DTYPES[dtype])
    tensors = {"b": array, "empty": array[:0], "scalar": array[0, 0, 0]}
    safetensors.save_file(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    entries = safetensors.open_folder(tmp_path)
    assert list(entries) == list(tensors)
    for name, entry in entries.items():
        assert (entry.dtype, entry.shape) == (tensors[name].dtype, tensors[name].shape)
        np.testing.assert_array_equal(entry.read(), tensors[name])
    np.testing.assert_array_equal(entries["b"].read((slice(1, 3), slice(None), slice(1))), array[1:3, :, :1])


def test_unaligned_tensors_are_read(tmp_path):
    tensors = {"a": np.ones(3, np.int8), "b": np.arange(5, dtype=np.float32), "c": np.ones(2, ml_dtypes.bfloat16)}
    (tmp_path / "model.safetensors").write_bytes(encode(tensors))
    for name, entry in safetensors.open_folder(tmp_path).items():
        np.testing.assert_array_equal(entry.read(), tensors[name])


def test_a_failed_save_leaves_nothing_under_the_name(tmp_path):
    path = tmp_path / "x.safetensors"
    entry = safetensors.TensorEntry(np.dtype(np.float32), (3,), lambda: np.ones(4, np.float32))
    with pytest.raises(ValueError, match="announced"):
        safetensors.save_file(path, {"a": np.ones(2), "b": entry})
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="complex64"):
        safetensors.save_file(path, {"a": np.ones(2, np.complex64)})


def crafted(header, data=b"\0" * 16, *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(**change):
    return crafted({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **change}})


_SOUND = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "empty file": (b"", "too short"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "too short"),
    "header longer than the file": (crafted({}, length=1 << 20), "claims 1,048,576"),
    "header of 2^63 bytes": (crafted({}, length=1 << 63), "claims"),
    "header of all ones": (b"\xff" * 64, "claims"),
    "no JSON": (crafted(b"{'a'"), "not sound JSON"),
    "no UTF-8": (crafted(b'{"\xff": 1}'), "not sound JSON"),
    "empty header": (crafted(b""), "not sound JSON"),
    "a list": (crafted([]), "must be a JSON object"),
    "deep nesting": (crafted(b"[" * 200_000), "nested too deeply"),
    "a number of 10,000 digits": (crafted(b'{"a": ' + b"9" * 10_000 + b"}"), "not sound JSON"),
    "duplicate names": (crafted(b'{"a": {}, "a": {}}'), "twice"),
    "duplicate keys": (crafted(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "twice"),
    "metadata of numbers": (crafted({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    "tensor is a string": (crafted({"a": "F32"}), "described by"),
    "no shape": (crafted({"a": {"dtype": "F32", "data_offsets": [0, 16]}}), "described by"),
    "unknown key": (one(strides=[1]), "described by"),
    "unknown dtype": (one(dtype="F4"), "'F4'"),
    "float8": (one(dtype="F8_E4M3"), "'F8_E4M3'"),
    "dtype is a list": (one(dtype=["F32"]), "dtype"),
    "negative dimension": (one(shape=[-2, -2]), "shape"),
    "fractional dimension": (one(shape=[2.0, 2]), "shape"),
    "true as a dimension": (one(shape=[True, 4]), "shape"),
    "shape of 10^30": (one(shape=[10**30]), "shape"),
    "shape that overflows to 16 bytes": (one(shape=[(1 << 62) - 1, 1 << 61, 4]), "beyond any memory"),
    "overflow beside a zero": (one(shape=[1 << 61, 1 << 61, 0], data_offsets=[0, 0]), "beyond any memory"),
    "rank 100": (one(shape=[1] * 100), "at most 32"),
    "size unlike the shape": (one(shape=[2, 3]), "needs 24 bytes"),
    "odd number of bytes": (one(data_offsets=[0, 15]), "give it 15"),
    "offsets reversed": (one(data_offsets=[16, 0]), "data_offsets"),
    "negative offset": (one(data_offsets=[-16, 0]), "data_offsets"),
    "beyond the end": (one(data_offsets=[16, 32]), "within the file's 16 bytes"),
    "three offsets": (one(data_offsets=[0, 8, 16]), "data_offsets"),
    "offsets are strings": (one(data_offsets=["0", "16"]), "data_offsets"),
    "cut off": (one()[:-1], "cut off"),
    "overlap": (crafted({"a": _SOUND, "b": {**_SOUND, "data_offsets": [4, 12]}}, b"\0" * 12), "overlaps"),
    "same bytes twice": (crafted({"a": _SOUND, "b": _SOUND}, b"\0" * 8), "overlaps"),
    "gap": (crafted({"a": _SOUND, "b": {**_SOUND, "data_offsets": [12, 20]}}, b"\0" * 20), "gap"),
    "bytes that nothing claims": (crafted({"a": _SOUND}, b"\0" * 12), "unclaimed"),
}


@pytest.mark.parametrize("case", list(HOSTILE))
def test_hostile_file_is_refused_in_one_line_without_allocating(tmp_path, case):
    data, words = HOSTILE[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=words) as error:
        safetensors.open_folder(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()
    assert "model.safetensors" in refusal(error)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/a.safetensors",
        "..\\a.safetensors",
        "a.bin",
        "C:a.safetensors",
        7,
        "",
    ],
)
def test_index_may_only_name_files_of_its_own_folder(tmp_path, shard):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match="bare name"):
        safetensors.open_folder(tmp_path)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "not sound JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": "model-1.safetensors", "a": "model-2.safetensors"}}', "twice"),
        ('{"weight_map": {"a": "model-2.safetensors"}}', "model-2.safetensors: missing"),
        ('{"weight_map": {"b": "model-1.safetensors"}}', "no tensor 'b'"),
    ],
)
def test_broken_index_is_refused(tmp_path, index, words):
    (tmp_path / "model-1.safetensors").write_bytes(encode({"a": np.ones(2, np.float32)}))
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=words) as error:
        safetensors.open_folder(tmp_path)
    refusal(error)


def test_folder_without_one_clear_set_of_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        safetensors.open_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="no safetensors file"):
        safetensors.open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="pytorch_model.bin, which is another format"):
        safetensors.open_folder(tmp_path)
    sound = encode({"a": np.ones(2, np.float32)})
    (tmp_path / "consolidated.safetensors").write_bytes(sound)
    assert list(safetensors.open_folder(tmp_path)) == ["a"]
    (tmp_path / "more.safetensors").write_bytes(sound)
    with pytest.raises(ValueError, match="index"):
        safetensors.open_folder(tmp_path)
