"""Training from Python: records, a loss, callbacks and trackers of the caller's own, and the examples."""

import ast
import dataclasses
import importlib.util
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from helpers.errors import refusal
from helpers.paths import ROOT
from helpers.runs import metrics_of, text_run
from llama_jax.data import own_records
from llama_jax.errors import ConfigError
from llama_jax.run_config import RunConfig
from llama_jax.train.objectives import objective, token_losses
from llama_jax.train.run import train

pytestmark = pytest.mark.usefixtures("one_device")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TEXT = "The quick brown fox jumps over the lazy dog. " * 40


# ---- records ---------------------------------------------------------------------------------------------------


def test_records_train_as_the_same_text_in_a_file(tmp_path):
    by_file = train(text_run(tmp_path, output=str(tmp_path / "file"), train__steps=3))
    keys = text_run(tmp_path, output=str(tmp_path / "records"), train__steps=3).to_dict()
    del keys["data"]["train"]
    by_records = train(keys, records=iter([{"text": TEXT}]))
    assert by_records.losses == by_file.losses
    assert train(by_records.run).step == 3  # the file of the records resumes the run


def test_records_of_numpy_and_of_mappings_are_written_as_json(tmp_path):
    record = {"text": "a", "label": np.float32(0.5), "more": types.MappingProxyType({"ids": np.arange(2)})}
    path = own_records.save([record, "b"], tmp_path, name="records")
    assert path.read_text() == '{"text": "a", "label": 0.5, "more": {"ids": [0, 1]}}\n{"text": "b"}\n'
    before = path.stat().st_mtime_ns
    assert own_records.save(iter([record, "b"]), tmp_path, name="records") == path
    assert path.stat().st_mtime_ns == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ("a text", "records must be an iterable of records such as"),
        ({"text": "x"}, "records must be an iterable"),
        (5, "records must be an iterable"),
        ([], "records is empty"),
        (["a", 5], "records: record 1 must be a dict"),
        ([{"text": {1, 2}}], "records: record 0 cannot be written as JSON"),
    ],
)
def test_records_that_are_none_are_refused(tmp_path, records, words):
    with pytest.raises(ConfigError) as caught:
        train(text_run(tmp_path), records=records)
    assert words in refusal(caught)
    assert list((tmp_path / "cache" / "records").glob("*")) == []


# ---- arguments -------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named(tmp_path):
    run = text_run(tmp_path)
    with pytest.raises(TypeError, match="has no argument 'recods'; did you mean 'records'"):
        train(run, recods=[])
    with pytest.raises(ConfigError, match="run must be a RunConfig, or a dict of its keys, got 'runs/x'"):
        train("runs/x")
    with pytest.raises(ConfigError, match="resume must be True or False, got 'no'"):
        train(text_run(tmp_path), resume="no")
    with pytest.raises(ConfigError, match="loss must be a function, got 'sft'"):
        train(run, loss="sft")


# ---- the loss --------------------------------------------------------------------------------------------------


def halved(run, policy, reference, batch, *, dtype):
    nll_BT, _ = token_losses(run, policy, batch, dtype)
    loss = 0.5 * jnp.sum(batch["weights"] * nll_BT)
    return loss, {"count": jnp.sum(batch["weights"]), "loss": loss, "own": 2 * loss}


def test_a_loss_of_the_caller_trains_and_a_resumed_run_must_have_it(tmp_path):
    """Half the loss has half the gradient, of which Adam makes the same steps; clipping is off."""
    settings = {"optimizer__clip_norm": 0.0, "optimizer__eps": 1e-12, "train__steps": 3}
    whole = train(text_run(tmp_path, output=str(tmp_path / "whole"), **settings))
    run = text_run(tmp_path, **settings)
    half = train(run, loss=halved)
    assert np.allclose(list(half.losses.values()), [loss / 2 for loss in whole.losses.values()], rtol=1e-4)
    line = metrics_of(tmp_path / "run")[0]
    assert line["own"] == pytest.approx(2 * line["loss"])
    with pytest.raises(ConfigError) as caught:
        train(run)
    assert "was trained with another loss: it was" in refusal(caught) and "halved" in refusal(caught)
    assert train(run, loss=halved).step == 3


# ---- callbacks, trackers and the profiler ----------------------------------------------------------------------


def events(folder) -> list:
    """The events in the files of a folder: records of a length, a checksum, a message and a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def sampler(run, params, tokenizer, mesh):
    return ["jumps\nhigh"]


class Wandb(types.ModuleType):
    """A stand-in for the package wandb, which records the calls."""

    def __init__(self):
        super().__init__("wandb")
        self.calls, self.__spec__ = [], importlib.util.spec_from_loader("wandb", None)

    def init(self, **options):
        self.calls.append(("init", options))
        own = self.calls
        return types.SimpleNamespace(
            id=options["id"] or "abc",
            log=lambda values, step: own.append(("log", step, values)),
            finish=lambda: own.append(("finish",)),
        )

    def Table(self, **options):  # noqa: N802
        return options


def test_trackers_get_metrics_samples_and_keys_and_a_callback_stops_the_run(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    settings = {"log__sample_every": 2, "log__sample_prompts": ("The fox",), "log__profile": (2, 3)}
    run = text_run(tmp_path, log__to=("tensorboard", "wandb"), train__steps=5, **settings)
    seen = {}
    result = train(run, sampler=sampler, on_metrics=lambda step, values: seen.update({step: values}) or step == 3)
    assert not result.finished and 3 <= result.step <= 4
    expected = result.losses
    assert {step: values["loss"] for step, values in seen.items()} == expected
    assert not any("tokens_per_second" in seen[step] for step in (2, 3))  # the host waits for a step that is traced

    logged = {
        step: values for _, step, values in (call for call in wandb.calls if call[0] == "log") if "loss" in values
    }
    assert {step: values["loss"] for step, values in logged.items()} == expected
    assert wandb.calls[0][1]["config"] == run.to_dict() and wandb.calls[-1] == ("finish",)
    table = {"columns": ["prompt", "text"], "data": [["The fox", "jumps\nhigh"]]}
    assert ("log", 2, {"samples": table}) in wandb.calls
    train(dataclasses.replace(run, log=dataclasses.replace(run.log, profile=())), sampler=sampler)
    ids = [call[1]["id"] for call in wandb.calls if call[0] == "init"]
    assert ids == [None, "abc"]  # the resumed run continues the same one

    values = [
        (event.step, value) for event in events(tmp_path / "run" / "tensorboard") for value in event.summary.value
    ]
    losses = {step: value.simple_value for step, value in values if value.tag == "loss" and step <= result.step}
    assert losses == pytest.approx(expected, rel=1e-6)
    texts = {value.tag: value.tensor.string_val[0].decode() for _, value in values if value.tensor.string_val}
    assert texts["sample/The fox/text_summary"] == "    jumps\n    high"
    assert '"learning_rate": 0.001' in texts["config/text_summary"]
    (start,) = (v.metadata.plugin_data.content for _, v in values if v.tag == "_hparams_/session_start_info")
    assert b"optimizer.learning_rate" in start

    traces = {path.name.partition(".")[2] for path in (tmp_path / "run" / "profile").rglob("*.*") if path.is_file()}
    assert {"xplane.pb", "json.gz"} <= traces  # of xprof, and of Perfetto


def test_wandb_that_is_not_installed_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package wandb, which is not installed: pip install wandb"):
        train(text_run(tmp_path, log__to=("wandb",)))
    assert not (tmp_path / "run").exists()


# ---- resuming with another batch -------------------------------------------------------------------------------


def test_a_run_resumes_with_other_parts_of_its_batch_and_other_batches(tmp_path):
    settings = {"optimizer__schedule": "constant"}
    whole = train(text_run(tmp_path, output=str(tmp_path / "whole"), train__steps=4, **settings))
    train(text_run(tmp_path, train__steps=2, **settings))
    moved = tmp_path / "moved.txt"
    moved.write_text((tmp_path / "text.txt").read_text())
    settings |= {"data__train": (str(moved),)}  # the same data at another path
    parts = train(text_run(tmp_path, train__steps=4, train__accumulate=2, **settings))
    assert list(parts.losses.values()) == pytest.approx(list(whole.losses.values()), rel=1e-5)
    train(text_run(tmp_path, train__steps=5, data__batch_size=4, **settings))
    tokens = {line["step"]: line["tokens"] for line in metrics_of(tmp_path / "run")}
    assert list(tokens) == [1, 2, 3, 4, 5] and tokens[5] < 0.7 * tokens[4]
    moved.write_text("Another text. " * 100)
    with pytest.raises(ValueError, match="the text, tokenizer, weights or loss of data.train are not what they were"):
        train(text_run(tmp_path, train__steps=6, data__batch_size=4, **settings))


def test_epochs_are_the_same_rows_after_a_change_of_the_batch():
    train = RunConfig.from_dict(
        {
            "output": "x",
            "model": "tiny",
            "data": {"train": "a"},
            "train": {"epochs": 2},
            "optimizer": {"warmup_steps": 0},
        }
    ).train
    assert train.steps_for(rows=40, batch_size=8) == 10
    assert train.steps_for(rows=40, batch_size=8, step=5, position=40) == 10
    assert train.steps_for(rows=40, batch_size=4, step=5, position=40) == 15


# ---- examples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_learns_and_its_own_part_has_thirty_lines(path, tmp_path, monkeypatch):
    source = path.read_text()
    parts = [node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert sum(node.end_lineno - node.lineno + 1 for node in parts) <= 30
    body = source.split('"""\n\n', 1)[1]
    assert f"# examples/{path.name}\n{body}" in (ROOT / "docs" / "guides" / "train-from-python.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = module.main()
    losses = result[0] if isinstance(result, tuple) else list(result.losses.values())
    assert losses[-1] < 0.8 * losses[0]
    model = result[1] if isinstance(result, tuple) else result.model()
    assert len(model.generate("The", max_new_tokens=4).tokens) <= 4


def test_the_objective_of_a_run_is_the_default_loss():
    assert train.__wrapped__.__kwdefaults__["loss"] is objective
