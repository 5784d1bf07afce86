"""Run folders of LoRA as models: their base is found from anywhere, and both ways to merge write the same files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from helpers import sound
from helpers.conversion import convert, tensors
from helpers.errors import refusal
from helpers.runs import make_run as make_run_config
from llama_jax.checkpoint import Checkpoints
from llama_jax.errors import ConfigError
from llama_jax.run_keys import LoraConfig
from llama_jax.text import chat_template
from llama_jax.train.folder import RunFolder
from llama_jax.weights import export, lora_params
from llama_jax.weights.adapters import Adapter
from llama_jax.weights.formats import peft
from llama_jax.weights.open import open_source

LORA = LoraConfig(rank=4, alpha=8.0)
GENERATION = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 5,
    "eos_token_id": [265, 270],
    "pad_token_id": 268,
    "max_length": 99,
    "transformers_version": "4.45.0",
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def base(tmp_path):
    """A bfloat16 Hugging Face folder with generation settings and a chat template of its own."""
    folder = sound.make_sound(tmp_path / "models" / "base", "hf")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 265, "pad_token_id": 268}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"pad_token": "<|finetune_right_pad_id|>", "chat_template": TEMPLATE, "padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def make_run(folder, base, init_from):
    """A run folder with one checkpoint of random LoRA updates, as train.py leaves it, and its adapter."""
    shapes = jax.eval_shape(lambda: lora_params.initial(sound.CONFIG, LORA, jax.random.key(0)))
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda a: jnp.asarray(0.1 * rng.standard_normal(a.shape), jnp.float32), shapes)
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, params=trained, rest={"step": jnp.int32(1)}, meta={})
    checkpoints.close()
    config = {
        "model": sound.CONFIG.to_dict(),
        "lora": {"rank": LORA.rank, "alpha": LORA.alpha, "targets": list(LORA.targets)},
        "init_from": init_from,
        "frozen": open_source(base).identity(),
        "tokenizer_fingerprint": sound.tokenizer().fingerprint,
    }
    (folder / "config.json").write_text(json.dumps(config))
    sound.tokenizer().save(folder / "tokenizer.model")
    chat_template.write(chat_template.read_folder(base), folder)
    adapter = Adapter(sound.CONFIG, export.lazy_lora(lora_params.lora_by_path(LORA, trained)))
    peft.write_adapter(folder / "adapter", adapter, base_model=str(base))
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_relative_base_is_found_from_any_folder(tmp_path, base, monkeypatch):
    run = make_run(tmp_path / "runs" / "first", base, "models/base")
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path, tmp_path / "elsewhere", run):
        monkeypatch.chdir(folder)
        source = open_source(run)
        assert source.base.path.resolve() == base and source.dtype == source.base.dtype
    merged = {path: leaf.read(dtype=np.float32) for path, leaf in source.merged_leaves().items()}
    assert any(np.abs(leaf - tensors(base)[path].astype(np.float32)).max() > 0.01 for path, leaf in merged.items())
    base.rename(base.with_name("other"))
    with pytest.raises(ConfigError, match="holds LoRA updates of 'models/base', which cannot be opened") as error:
        open_source(run).load(None, None, None)
    refusal(error)
    open_source(run).tokenizer()  # all that needs no base still works
    assert open_source(run).metadata.bos_token is None
    other = sound.make_sound(tmp_path / "models" / "base", "meta")  # the same weights in another format
    assert open_source(run).base.path.resolve() == other


def test_a_base_that_was_moved_together_with_its_run_is_found(tmp_path, base):
    project = tmp_path / "project"
    (project / "models").mkdir(parents=True)
    moved = base.rename(project / "models" / "base")
    make_run(project / "runs" / "first", moved, str(moved))
    project = project.rename(tmp_path / "moved")
    assert open_source(project / "runs" / "first").base.path == project / "models" / "base"


@pytest.mark.parametrize("name", ["models/base", "owner/name", "smollm2", ""])
def test_a_runs_config_has_the_absolute_path_of_a_local_base(tmp_path, base, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    run = make_run_config(init_from=name, output=str(tmp_path / "out"))
    folder = RunFolder(run)
    folder.write_config(run, sound.tokenizer(), "id")
    folder.checkpoints.close()
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["init_from"] == (str(base) if name == "models/base" else name)


@pytest.mark.parametrize("format", ["hf", "gguf", "meta"])
def test_both_ways_to_merge_write_the_same_files(tmp_path, base, format):
    run = make_run(tmp_path / "runs" / "first", base, str(base))
    one = convert(run, tmp_path / "one", format)
    two = convert(base, tmp_path / "two", format, "--adapter", str(run / "adapter"))
    assert files_of(one) == files_of(two)
    if format == "hf":
        assert json.loads((one / "generation_config.json").read_text()) == GENERATION
        assert json.loads((one / "config.json").read_text())["pad_token_id"] == 268
        assert (one / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()
        assert all(array.dtype.name == "bfloat16" for array in tensors(one).values())


@pytest.mark.parametrize("format", ["hf", "gguf", "meta"])
def test_save_and_convert_write_the_same_files(tmp_path, base, format):
    llama = llama_jax.load(base, dtype="bfloat16")
    llama.save(tmp_path / "saved", format)
    convert(base, tmp_path / "converted", format)
    assert files_of(tmp_path / "saved") == files_of(tmp_path / "converted")
