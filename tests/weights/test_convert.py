"""Models from any format to any other: the same bytes, logits and words; and one line where it cannot be."""

import dataclasses
import hashlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from helpers import sound
from helpers.conversion import convert, tensors
from helpers.errors import refusal
from helpers.paths import ROOT
from helpers.program import program
from llama_jax import parallel
from llama_jax.errors import ConfigError
from llama_jax.infer.llama import Llama
from llama_jax.sampling_params import SamplingParams
from llama_jax.weights import export
from llama_jax.weights.model_files import Metadata
from llama_jax.weights.open import open_source
from llama_jax.weights.tensor import of_array

TIED = dataclasses.replace(sound.CONFIG, tied_embeddings=True)
LONG = dataclasses.replace(sound.CONFIG, max_seq_len=131_072)
TOKENS = [[1, 300, 40, 7, 519]]


@pytest.fixture
def folder(tmp_path):
    metadata = Metadata(sound.tokenizer())
    return export.save(tmp_path / "hf", sound.CONFIG, sound.random_leaves(), metadata, format="hf", dtype="bfloat16")


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize("config", [sound.CONFIG, TIED], ids=["untied", "tied"])
def test_a_tour_of_all_formats_comes_back_byte_for_byte(tmp_path, config):
    tokenizer = sound.tokenizer()
    metadata = Metadata(tokenizer, tokenizer.bos_id, tokenizer.stop_tokens)
    first = export.save(tmp_path / "a", config, sound.random_leaves(config), metadata, format="hf", dtype="bfloat16")
    meta = convert(first, tmp_path / "b", "meta")
    gguf = convert(meta, tmp_path / "c.gguf", "gguf")
    last = convert(gguf, tmp_path / "d", "hf")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert sha256(first / name) == sha256(last / name), name
    for path in (first, meta, gguf, last):
        source = open_source(path)
        assert source.config == config and source.dtype == "bfloat16" and not source.quantized
        found = source.tokenizer()
        assert found.encode("the inn, then", bos=True) == tokenizer.encode("the inn, then", bos=True)
        assert (found.special_tokens, found.stop_tokens) == (tokenizer.special_tokens, tokenizer.stop_tokens)


@pytest.mark.parametrize("format", ["hf", "meta", "gguf"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_format_holds_every_dtype(tmp_path, format, dtype):
    path = tmp_path / ("m.gguf" if format == "gguf" else "m")
    leaves = sound.random_leaves()
    export.save(path, sound.CONFIG, leaves, Metadata(bos_token=5, stop_tokens=(3,)), format=format, dtype=dtype)
    found = tensors(path)
    for name, leaf in leaves.items():
        exact = "float32" if format == "gguf" and len(leaf.shape) == 1 else dtype  # llama.cpp wants norms so
        assert found[name].dtype == exact
        np.testing.assert_array_equal(found[name], leaf.read().astype(exact))
    if format != "meta":  # whose params.json has no room for them
        metadata = open_source(path).metadata
        assert (metadata.bos_token, metadata.stop_tokens) == (5, (3,))


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_quantized_files_stay_as_they_are_in_memory_and_out_again(tmp_path, dtype):
    metadata = Metadata(sound.tokenizer())
    path = export.save(tmp_path / "a.gguf", sound.CONFIG, sound.random_leaves(), metadata, format="gguf", dtype=dtype)
    assert export.written_dtype("gguf", {"q8_0": "int8", "q4_0": "INT4"}[dtype]) == dtype  # one quantization, two names
    held, dense = llama_jax.load(path, dtype="float32"), llama_jax.load(path, quantize="none", dtype="float32")
    arrays = {leaf.dtype.name for leaf in jax.tree.leaves(held.params)}
    shared = sound.CONFIG.tied_embeddings
    integers = {"int8"} if dtype == "q8_0" else {"uint8", "int8"} if shared else {"uint8"}
    assert arrays == {"float16", "float32"} | integers
    assert {leaf.dtype.name for leaf in jax.tree.leaves(dense.params)} == {"float32"}
    np.testing.assert_allclose(held.logits(TOKENS), dense.logits(TOKENS), atol=1e-5)
    again = held.save(tmp_path / "b.gguf", "gguf")  # in the type it has
    assert open_source(again).quantized
    for name, array in tensors(path).items():
        np.testing.assert_array_equal(tensors(again)[name], array)
    widened = held.save(tmp_path / "c", "hf", dtype="float32")
    assert json.loads((widened / "config.json").read_text())["torch_dtype"] == "float32"
    for name, array in tensors(path).items():
        np.testing.assert_array_equal(tensors(widened)[name], array)


@pytest.mark.parametrize("sizes", [{"tensor": 2, "data": 4}, {"tensor": 8}], ids=str)
@pytest.mark.parametrize("format", ["meta", "gguf"])
def test_a_model_on_a_mesh_is_loaded_and_saved_whole(tmp_path, sizes, format):
    config = dataclasses.replace(sound.CONFIG, num_heads=8, num_kv_heads=8, head_dim=4)
    leaves = sound.random_leaves(config)
    metadata = Metadata()
    path = tmp_path / ("m.gguf" if format == "gguf" else "m")
    export.save(path, config, leaves, metadata, format=format, dtype="q8_0" if format == "gguf" else "float32")
    one, many = llama_jax.load(path, dtype="float32"), llama_jax.load(path, dtype="float32", mesh=sizes)
    np.testing.assert_allclose(many.logits(TOKENS), one.logits(TOKENS), atol=1e-5)
    saved = tensors(many.save(tmp_path / "again", "hf"))
    for name, array in tensors(path).items():
        np.testing.assert_array_equal(saved[name], array)


def test_a_saved_model_speaks_as_before(tmp_path):
    leaves = sound.random_leaves()
    metadata = Metadata(sound.tokenizer())
    path = export.save(tmp_path / "a", LONG, leaves, metadata, format="hf", dtype="float32")
    before = llama_jax.load(path, dtype="float32").generate("the inn", temperature=0, max_new_tokens=12)
    llama = llama_jax.load(path, dtype="float32")
    for format, name in ((None, "b"), ("meta", "c"), (None, "d.gguf")):
        after = llama_jax.load(llama.save(tmp_path / name, format), dtype="float32")
        assert after.generate("the inn", temperature=0, max_new_tokens=12) == before
        assert after.config == llama.config


def test_sampling_settings_travel_with_the_model(tmp_path, caplog):
    llama = Llama(sound.CONFIG, open_source_params(tmp_path), sampling=SamplingParams(temperature=0.3, top_k=7))
    path = llama.save(tmp_path / "out", "hf")
    generation = json.loads((path / "generation_config.json").read_text())
    assert (generation["do_sample"], generation["temperature"], generation["top_k"]) == (True, 0.3, 7)
    again = llama_jax.load(path)
    assert again.sampling == llama.sampling
    drawn = [again.generate(TOKENS[0], max_new_tokens=8, seed=3, **s).tokens for s in ({}, {"temperature": 0.3})]
    assert drawn[0] == drawn[1] == llama.generate(TOKENS[0], max_new_tokens=8, seed=3).tokens
    (path / "generation_config.json").write_text('{"do_sample": false, "temperature": 9}')
    greedy = llama_jax.load(path)
    assert greedy.sampling.temperature == 0
    (path / "generation_config.json").write_text('{"do_sample": true, "temperature": -1}')
    assert llama_jax.load(path).sampling == SamplingParams()  # with a warning
    assert "generation_config.json: temperature must be" in caplog.text
    for text in ("{", "[]", '{"do_sample": true, "eos_token_id": "x"}', '{"a": ' + "[" * 5_000 + "}"):
        (path / "generation_config.json").write_text(text)
        caplog.clear()
        assert llama_jax.load(path).sampling == SamplingParams()
        (record,) = [record for record in caplog.records if "generation_config.json" in record.getMessage()]
        assert record.getMessage().startswith("warning: the model is used without its sampling defaults: ")


def open_source_params(tmp_path):
    metadata = Metadata()
    path = export.save(tmp_path / "in", sound.CONFIG, sound.random_leaves(), metadata, format="hf", dtype="float32")
    return open_source(path).load(None, None, "none")


def test_training_on_a_mesh_starts_from_every_format(tmp_path):
    layout = parallel.Layout(parallel.make_mesh({"fsdp": 4, "tensor": 2}), "train")
    leaves = sound.random_leaves()
    for format, name in (("hf", "a"), ("meta", "b"), ("gguf", "c.gguf")):
        metadata = Metadata()
        path = export.save(tmp_path / name, sound.CONFIG, leaves, metadata, format=format, dtype="float32")
        params = open_source(path).load(layout, np.dtype(np.float32), "none")
        q = params["layers"][1]["attention"]["q"]
        np.testing.assert_array_equal(q, leaves[("layers", 1, "attention", "q")].read())
        assert len({str(shard.index) for shard in q.addressable_shards}) == 8


# What goes along, and what cannot.


def test_norms_of_another_dtype_keep_it_unless_nothing_is_lost(tmp_path):
    leaves = {k: leaf.cast(np.dtype("bfloat16"), "") for k, leaf in sound.random_leaves().items()}
    exact, odd = (np.full(32, value, np.float32) for value in (1.5, 1 / 3))
    for path, array in ((("layers", 0, "ffn_norm", "scale"), exact), (("norm", "scale"), odd)):
        leaves[path] = of_array(lambda array=array: array, array.dtype, array.shape)
    metadata = Metadata()
    found = tensors(export.save(tmp_path / "a", sound.CONFIG, leaves, metadata, format="hf"))
    assert found[("layers", 0, "ffn_norm", "scale")].dtype == "bfloat16"
    np.testing.assert_array_equal(found[("norm", "scale")], odd)
    asked = tensors(export.save(tmp_path / "b", sound.CONFIG, leaves, metadata, format="meta", dtype="bfloat16"))
    assert {array.dtype.name for array in asked.values()} == {"bfloat16"}


@pytest.mark.parametrize("format", ["hf", "meta", "gguf"])
def test_numbers_that_float16_cannot_hold_are_refused_by_name(tmp_path, format):
    leaves = sound.random_leaves()
    large = np.full((520, 32), 1e6, np.float32)
    leaves[("embed",)] = of_array(lambda: large, large.dtype, large.shape)
    path = tmp_path / ("m.gguf" if format == "gguf" else "m")
    with pytest.raises(ValueError, match="(?i)embd?.*(float16|F16)"):
        export.save(path, sound.CONFIG, leaves, Metadata(), format=format, dtype="float16")
    with pytest.raises(ConfigError):
        open_source(path)


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def test_a_chat_template_of_its_own_is_saved_with_the_model_and_used(tmp_path, folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert "<|start_header_id|>" in config["chat_template"]
    config["chat_template"] = CHATML
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    hf = convert(folder, tmp_path / "copy", "hf")
    assert sha256(hf / "tokenizer_config.json") == sha256(folder / "tokenizer_config.json")
    gguf = convert(hf, tmp_path / "m.gguf", "gguf")
    assert open_source(gguf).metadata.chat_template.sources == {"default": CHATML}
    llama = llama_jax.load(gguf)
    ids = llama.encode_dialog([{"role": "user", "content": "hi"}])
    assert ids == llama.tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n")  # its names are no tokens here
    saved = llama.save(tmp_path / "saved", "hf")
    assert json.loads((saved / "tokenizer_config.json").read_text())["chat_template"] == CHATML


def test_what_a_format_cannot_hold_is_warned_of(tmp_path, folder, caplog):
    config = dataclasses.replace(sound.CONFIG, max_seq_len=600)
    metadata = Metadata(sound.tokenizer(), stop_tokens=(3, 4, 5, 6))
    export.save(tmp_path / "meta", config, sound.random_leaves(config), metadata, format="meta")
    assert "600 positions will be read back as 131072" in caplog.text
    path = export.save(tmp_path / "m.gguf", config, sound.random_leaves(config), metadata, format="gguf")
    assert "the last are left out" in caplog.text
    assert set(open_source(path).metadata.stop_tokens) == {3, 4, 5}


def test_a_tokenizer_that_is_not_understood_goes_along_but_is_not_used(tmp_path, folder, capsys, caplog):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00")
    llama = llama_jax.load(folder)
    assert llama.tokenizer is None and "SentencePiece" in caplog.text
    assert llama.generate(TOKENS[0], max_new_tokens=2).text == ""
    hf = convert(folder, tmp_path / "copy", "hf")
    assert sha256(hf / "tokenizer.model") == sha256(folder / "tokenizer.model")
    convert(folder, tmp_path / "m.gguf", "gguf")
    assert "written without a tokenizer" in capsys.readouterr().err
    convert(folder, tmp_path / "n.gguf", "gguf", "--quiet")  # no progress bars, but every warning
    assert "written without a tokenizer" in capsys.readouterr().err
    assert logging.getLogger("llama_jax").isEnabledFor(logging.WARNING)


def test_what_a_link_of_a_folder_leads_to_elsewhere_is_not_copied(tmp_path, folder):
    (tmp_path / "secret").write_text("secret")
    (folder / "merges.txt").symlink_to(tmp_path / "secret")
    (folder / "vocab.json").symlink_to(folder / "config.json")
    out = convert(folder, tmp_path / "out", "hf")
    assert not (out / "merges.txt").exists() and (out / "vocab.json").is_file()


def test_stop_tokens_outside_the_vocabulary_are_left_out(folder, caplog):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 32000]}')
    assert open_source(folder).metadata.stop_tokens == (7,) and "[7, 32000] only [7] are" in caplog.text


# Where a model is not.


def test_a_name_of_no_model_is_refused_with_the_names_that_are_allowed(tmp_path, folder):
    cases = {
        "missing": (tmp_path / "hg", "does not exist; did you mean 'hf'"),
        "a shard": (folder / "model.safetensors", "name its folder"),
        "above": (tmp_path, "a folder with models below it: bin, hf"),
    }
    cases["too long"] = ("a" * 5_000, "cannot be the path of a file: it has 5,000 bytes")
    (tmp_path / "none").mkdir()
    cases["empty"] = (tmp_path / "none", "none of these")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text("{}")
    (tmp_path / "bin" / "tf_model.h5").touch()
    cases["bin"] = (tmp_path / "bin", "tf_model.h5, without the config")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a.gguf").touch()
    (tmp_path / "two" / "b.gguf").touch()
    cases["two"] = (tmp_path / "two", "name one, such as")
    for path, words in cases.values():
        with pytest.raises(ConfigError, match=words) as error:
            open_source(path)
        refusal(error)


def test_a_gguf_is_known_by_its_first_bytes_and_alone_in_its_folder(tmp_path, folder):
    path = convert(folder, tmp_path / "only" / "m.gguf", "gguf")
    assert open_source(path.parent).config == sound.CONFIG
    path.rename(path.with_suffix(".bin"))
    assert open_source(path.with_suffix(".bin")).config == sound.CONFIG


def test_nothing_that_is_there_is_written_over(tmp_path, folder, capsys):
    before = sha256(folder / "model.safetensors")
    (tmp_path / "m.gguf").write_bytes(b"mine")
    for dest, format in ((folder, "hf"), (folder, "meta"), (tmp_path / "m.gguf", "gguf"), (tmp_path / "m.gguf", "hf")):
        status = program("convert", str(folder), str(dest), "--to", format)
        assert status == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert sha256(folder / "model.safetensors") == before and (tmp_path / "m.gguf").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give the format: --to hf, --to meta"),
        (["--to", "gguff"], "did you mean 'gguf'"),
        (["--to", "meta", "--dtype", "q8_0"], "'meta' is not written in 'q8_0'; allowed: float32, float16, bfloat16"),
        (["--to", "hf", "--shard_size", "5X"], "--shard_size: must be a size such as 500M"),
        (["--to", "hf", "--shard_size", "0"], "--shard_size: must be a size such as 500M"),
        (["--to", "hf", "--shard_size", "9" * 5000], "--shard_size: must be a size such as 500M or 5G, got '999"),
        (["--to", "hf", "--adapter", ""], "--adapter: must be the name of a file"),
        (["--too", "hf"], "unknown argument '--too'; did you mean '--to'?"),
    ],
)
def test_a_mistyped_command_is_one_line_and_makes_nothing(tmp_path, folder, capsys, options, words):
    status = program("convert", str(folder), str(tmp_path / "out"), *options)
    assert status == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_shard_size_bounds_the_files(tmp_path, folder):
    out = convert(folder, tmp_path / "out", "hf", "--shard_size", "40K")
    sizes = [p.stat().st_size for p in out.glob("model-*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 44_000
    assert tensors(out).keys() == tensors(folder).keys()


def test_a_full_disk_is_told_before_and_leaves_no_model(tmp_path, folder, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    source = open_source(folder)
    metadata, before = Metadata(), set(tmp_path.iterdir())
    for name, format in (("out", "hf"), ("a/b/out", "meta"), ("a/out.gguf", "gguf")):
        with pytest.raises(ConfigError, match=r"needs up to 67\.\d MB, but the disk has 1 kB free: make room"):
            export.save(tmp_path / name, source.config, source.leaves, metadata, format=format, dtype="bfloat16")
    assert set(tmp_path.iterdir()) == before


def test_the_disk_of_an_existing_folder_is_its_own(tmp_path, folder, monkeypatch):
    """An empty folder may be the mount of another disk than that of its parent."""
    import shutil

    (tmp_path / "mount").mkdir()
    free = {tmp_path / "mount": 1000}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, free.get(path, 10**9)))
    source = open_source(folder)
    for name in ("mount", "mount/out", "mount/a.gguf"):
        format = "gguf" if name.endswith(".gguf") else "hf"
        with pytest.raises(ConfigError, match=r"the disk has 1 kB free: make room"):
            export.save(tmp_path / name, source.config, source.leaves, Metadata(), format=format)
    assert list((tmp_path / "mount").iterdir()) == []


def test_a_dtype_to_write_may_be_one_of_numpy_or_jax():
    for dtype in (jnp.bfloat16, jnp.dtype("bfloat16"), "bf16"):
        assert export.written_dtype("hf", dtype) == "bfloat16"
    assert export.written_dtype("meta", np.float16) == "float16" and export.written_dtype("gguf", np.int8) == "q8_0"
    for dtype, words in ((np.int64, "not written in 'int64'"), (object(), "not written in '<object object at")):
        with pytest.raises(ConfigError, match=words):
            export.written_dtype("hf", dtype)


def test_inspect_prints_what_a_model_is(folder, capsys):
    assert program("inspect", str(folder)) == 0
    out = capsys.readouterr().out
    for words in ("Hugging Face folder", "51,872", "vocab_size       520", "attention.q", "2 x ", "520 ids"):
        assert words in out, out


def test_inspect_refuses_a_broken_model_in_one_line(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    done = subprocess.run(
        [sys.executable, "-m", "llama_jax", "inspect", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cut off" in done.stderr and not done.stdout
