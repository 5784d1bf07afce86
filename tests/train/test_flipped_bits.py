"""One flipped bit anywhere in a run or in the token cache is noticed, or changes nothing that the model says."""

import json

import pytest

from helpers import bits, sound
from llama_jax import manifest
from llama_jax.errors import ConfigError
from llama_jax.train.run import train
from llama_jax.weights.open import open_source


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = sound.make_sound(tmp_path_factory.mktemp("base"), "hf")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": bits.TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def drill(tmp_path_factory, base):
    return bits.make(tmp_path_factory.mktemp("lora"), base, lora=True)


def test_no_flipped_bit_changes_a_result_in_silence(drill):
    """Each reader is a load, a conversion or another step; `python -m helpers.bits` is the long form."""
    files = {path.name for path in bits.files_of(drill.folder)}
    assert {"config.json", "tokenizer.model", "tokenizer_config.json", "adapter_config.json", "meta.json"} <= files
    assert bits.silent_changes(drill, bits.sampled(drill, 12, seed=0)) == []


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False])
def test_no_flipped_bit_of_many_changes_a_result_in_silence(tmp_path, base, lora):
    drill = bits.make(tmp_path, base, lora=lora)
    assert bits.silent_changes(drill, bits.sampled(drill, 150, seed=1)) == []


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("config.json", '"norm_eps": 1e-05', '"norm_eps": 3e-05'),
        ("config.json", '"rope_theta": 500000.0', '"rope_theta": 500001.0'),
        ("config.json", '"alpha": 16.0', '"alpha": 26.0'),
        ("tokenizer_config.json", "content", "bontent"),
        ("tokenizer.model", "dGg= 256", "dGk= 256"),
        ("generation_config.json", '"bos_token_id": 264', '"bos_token_id": 265'),
    ],
)
def test_a_changed_file_is_named_by_readers_and_written_again_by_training(drill, name, old, new):
    run = drill.folder / "run"
    whole = (run / name).read_text()
    assert old in whole
    (run / name).write_text(whole.replace(old, new, 1))
    try:
        with pytest.raises(ConfigError, match=f"{name} was changed after it was written.*repeat the command") as caught:
            open_source(run)
        assert "\n" not in str(caught.value)
        train(bits.with_steps(drill.run, 2))
        if name != "config.json":
            assert (run / name).read_text() == whole
        open_source(run)
    finally:
        (run / name).write_text(whole)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json"])
def test_a_finished_run_writes_a_missing_file_of_its_adapter_again(drill, name):
    path = drill.folder / "run" / "adapter" / name
    whole = path.read_bytes()
    path.unlink()
    train(bits.with_steps(drill.run, 2))
    assert path.read_bytes() == whole


def test_runs_and_adapters_without_hashes_are_used(drill):
    """Those of earlier versions, and adapters whose owner deleted the manifest after a change."""
    run = drill.folder / "run"
    paths = run / "config.json", run / "adapter" / manifest.FILE
    before = [path.read_text() for path in paths]
    values = {k: v for k, v in json.loads(before[0]).items() if k not in (manifest.SEAL, "files")}
    paths[0].write_text(json.dumps(values))
    paths[1].unlink()
    try:
        for name in ("sample", "adapter"):
            value, said = bits.outcome(drill.readers[name], drill.folder)
            assert value is not None and not said
    finally:
        for path, text in zip(paths, before, strict=True):
            path.write_text(text)
