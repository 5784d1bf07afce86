"""Runs whose output is in a store: the copy is that of a run folder, at every instant, and any machine continues it."""

import json

import fsspec
import numpy as np
import pytest

from helpers.errors import refusal
from helpers.runs import metrics_of, text_run
from llama_jax import load, manifest, storage, stored_run
from llama_jax.checkpoint import SaveError
from llama_jax.errors import ConfigError
from llama_jax.train.run import train

pytestmark = pytest.mark.usefixtures("one_device")
URL = "memory://runs/mine"
SETTINGS = {"output": URL, "checkpoint__every": 2, "checkpoint__keep": 1, "optimizer__schedule": "constant"}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that moves to another machine, which shares the store in memory and nothing else."""

    def move(name):
        monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / name))

    move("one")
    yield move
    fs = fsspec.filesystem("memory")
    if fs.exists("/runs"):
        fs.rm("/runs", recursive=True)


def stored():
    return storage.Store(URL).files()


def test_another_machine_continues_a_run_in_a_store_to_the_bit(tmp_path, machine):
    whole = train(text_run(tmp_path, **SETTINGS | {"output": str(tmp_path / "whole")}))
    first = train(text_run(tmp_path, **SETTINGS, train__steps=4))
    assert {name.split("/")[1] for name in stored() if name.startswith("checkpoints/")} == {"4"}
    assert {"config.json", "metrics.jsonl", "loss.png", "tokenizer.model"} <= stored().keys()
    machine("two")
    run = text_run(tmp_path, **SETTINGS)
    second = train(run)
    assert second.folder != first.folder and second.losses == whole.losses
    assert {name.split("/")[1] for name in stored() if name.startswith("checkpoints/")} == {"8"}
    lines = storage.Store(URL).read("metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == list(whole.losses.values())
    assert second.command()[3] == URL
    machine("three")
    ids = [[second.model().tokenizer.bos_id, 1, 2]]
    assert np.array_equal(load(URL, dtype="float32").logits(ids), load(tmp_path / "whole", dtype="float32").logits(ids))


def test_the_manifest_of_a_step_is_copied_last_and_deleted_first(tmp_path, machine, monkeypatch):
    order = []
    for name in ("put", "delete"):
        plain = getattr(storage.Store, name)
        spy = lambda *args, name=name, plain=plain: order.append((name, args[-1])) or plain(*args)  # noqa: E731
        monkeypatch.setattr(storage.Store, name, spy)
    train(text_run(tmp_path, **SETTINGS, train__steps=4))
    for step in (2, 4):
        commit = f"checkpoints/{step}/{manifest.FILE}"
        mine = [(name, path) for name, path in order if f"/{step}/" in path]
        copied, deleted = ([path for name, path in mine if name == verb] for verb in ("put", "delete"))
        assert not copied or copied[-1] == commit
        assert not deleted or deleted[0] == commit
    assert ("put", commit) in order


def test_a_step_without_a_manifest_does_not_exist(tmp_path, machine):
    train(text_run(tmp_path, **SETTINGS | {"checkpoint__keep": 5}, train__steps=4))
    storage.Store(URL).delete(f"checkpoints/4/{manifest.FILE}")  # a process that was killed while it copied step 4
    machine("two")
    result = train(text_run(tmp_path, **SETTINGS, train__steps=6))
    assert [line["step"] for line in metrics_of(result.folder) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_store_that_fails_loses_nothing_and_the_next_start_copies_it(tmp_path, machine, monkeypatch, capsys):
    run = text_run(tmp_path, **SETTINGS, train__steps=4)
    with monkeypatch.context() as patch:

        def refuse(*args, **keywords):
            raise OSError("quota exceeded")

        patch.setattr(type(fsspec.filesystem("memory")), "put_file", refuse)
        with pytest.raises(SaveError) as caught:
            train(run)
    assert "cannot be written to or read (OSError: 'quota exceeded')" in refusal(caught)
    assert "The run is complete in" in refusal(caught)
    assert "warning: memory://runs/mine cannot be written to" in capsys.readouterr().err
    assert not [name for name in stored() if name.startswith("checkpoints/")]
    assert train(run).step == 4 and "step 4 of 4 is already done" in capsys.readouterr().out
    assert f"checkpoints/4/{manifest.FILE}" in stored()


def test_a_run_that_was_deleted_in_the_store_starts_anew(tmp_path, machine):
    run = text_run(tmp_path, **SETTINGS, train__steps=2)
    train(run)
    fsspec.filesystem("memory").rm("/runs/mine", recursive=True)
    assert list(train(run).losses) == [1, 2]
    assert f"checkpoints/2/{manifest.FILE}" in stored()


def test_remains_of_an_interrupted_copy_are_no_part_of_a_step(tmp_path, machine):
    """Two copies of a step have files of different names; the manifest is that of the second one."""
    train(text_run(tmp_path, **SETTINGS, train__steps=2))
    storage.Store(URL).write("checkpoints/2/params/d/0123456789abcdef", b"of the first copy")
    machine("two")
    result = train(text_run(tmp_path, **SETTINGS, train__steps=4))
    assert list(result.losses) == [1, 2, 3, 4]
    storage.Store(URL).write("checkpoints/4/params/d/0123456789abcdef", b"of the first copy")
    machine("three")
    model = load(URL)
    assert np.isfinite(model.logits([[1, 2]])).all()
    files = [path.relative_to(tmp_path / "three") for path in (tmp_path / "three").rglob("*")]
    assert any("params" in path.parts for path in files) and not any("rest" in path.parts for path in files)


def test_a_damaged_step_in_a_store_is_named_with_what_to_do(tmp_path, machine):
    train(text_run(tmp_path, **SETTINGS | {"checkpoint__keep": 2}, train__steps=4))
    store = storage.Store(URL)
    name = next(name for name in store.files() if name.startswith("checkpoints/4/rest/d/"))
    data = bytearray(store.read(name))
    data[len(data) // 2] ^= 4
    store.write(name, bytes(data))
    machine("two")
    with pytest.raises(ConfigError) as caught:
        train(text_run(tmp_path, **SETTINGS))
    assert "checkpoints/4 is damaged: rest/d/" in refusal(caught) and "was changed after" in refusal(caught)
    assert refusal(caught).endswith(f"Delete {URL}/checkpoints/4/manifest.json to continue from an older step")
    store.delete(f"checkpoints/4/{manifest.FILE}")
    assert train(text_run(tmp_path, **SETTINGS)).step == 8


def test_another_machine_deletes_no_step_that_is_to_be_kept(tmp_path, machine, monkeypatch):
    settings = SETTINGS | {"checkpoint__keep": 1, "checkpoint__keep_best": 1, "log__eval_every": 2}
    settings |= {"data__validation": (str(tmp_path / "text.txt"),), "optimizer__learning_rate": 1e-3}
    train(text_run(tmp_path, **settings, train__steps=4))
    commit = f"checkpoints/4/{manifest.FILE}"
    store = storage.Store(URL)
    best = manifest.Manifest(4, 1e-9, manifest.parse(store.read(commit)).files)  # no later loss is lower
    store.write(commit, manifest.dumps(best))
    machine("two")
    train(text_run(tmp_path, **settings))
    assert stored_run.steps(stored()) == {4, 8}


def test_a_store_that_cuts_a_file_short_gets_no_manifest(tmp_path, machine, monkeypatch):
    """A step with a manifest is complete, whatever the store did with its files."""
    plain = storage.Store.put

    def put(self, path, name):
        plain(self, path, name)
        if "/params/" in name:
            self.write(name, path.read_bytes()[:-1])

    monkeypatch.setattr(storage.Store, "put", put)
    with pytest.raises(SaveError, match="bytes of params/.* of step 2 after .* bytes were copied"):
        train(text_run(tmp_path, **SETTINGS, train__steps=2))
    assert not stored_run.steps(stored())
    monkeypatch.undo()
