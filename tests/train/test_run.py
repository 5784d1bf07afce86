"""A whole run: the shape that follows the model, epochs, the loss before training, early stopping, and its result."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from helpers import sound
from helpers.errors import refusal
from helpers.runs import dialog_run, metrics_of, parse, text_run, write_config
from helpers.tokenizers import byte_tokenizer
from llama_jax import manifest, model, parallel, phases
from llama_jax.checkpoint import SaveError
from llama_jax.config import SIZES
from llama_jax.data.loader import evaluation_batches
from llama_jax.errors import ConfigError
from llama_jax.params import init_params
from llama_jax.run_config import RunConfig, default_dict
from llama_jax.train import setup
from llama_jax.train.folder import Trend
from llama_jax.train.loop import Loop
from llama_jax.train.program import Program
from llama_jax.train.run import train

GENERATION = {"do_sample": True, "temperature": 0.3, "note": "kept"}
SMALL = dataclasses.replace(SIZES["tiny"], num_layers=1, ffn_dim=64, max_seq_len=256)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Hugging Face folder of another shape than `tiny`, with a tokenizer of one id a byte."""
    folder = tmp_path_factory.mktemp("base")
    params = jax.jit(init_params, static_argnums=0)(SMALL, jax.random.key(7))
    sound.save_params(folder, SMALL, params)
    byte_tokenizer().save(folder / "tokenizer.model")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def unnamed(run: RunConfig, **shape) -> RunConfig:
    """The run with its section model as in a config file that names no size."""
    values = run.to_dict() | {"model": default_dict()["model"] | shape}
    return RunConfig.from_dict(values)


# ---- the shape -------------------------------------------------------------------------------------------------


def test_the_shape_of_a_run_is_that_of_the_model_it_starts_from(tmp_path, base):
    run = unnamed(dialog_run(tmp_path, "run", init_from=str(base), train__steps=2))
    result = train(run)
    assert result.run.model == SMALL
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"] == SMALL.to_dict()
    llama = result.model(dtype="float32")
    assert llama.config == SMALL and llama.sampling.temperature == 0.3
    assert json.loads((llama.save(tmp_path / "out", "hf") / "generation_config.json").read_text()) == GENERATION
    # The same config resumes, and needs the model no more.
    longer = dataclasses.replace(run, init_from="nowhere/at-all", train=dataclasses.replace(run.train, steps=3))
    assert train(longer).step == 3


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"num_layers": 3}, "model.num_layers=1 there, 3 here. Leave the keys of the section model out: its shape"),
        ({"name": "tiny"}, "model.ffn_dim=64 there, 96 here; model.num_layers=1 there, 3 here"),
        ({"rope_scaling": {"factor": 4.0}}, "model.rope_scaling.factor=8.0 there, 4.0 here"),
    ],
)
def test_keys_that_contradict_the_model_are_refused_before_data_are_read(tmp_path, base, shape, words):
    run = unnamed(dialog_run(tmp_path, "run", init_from=str(base)), **shape)
    with pytest.raises(ConfigError) as caught:
        train(run)
    assert "is another model" in str(caught.value) and "\n" not in str(caught.value)
    assert words in str(caught.value)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_a_key_that_agrees_with_the_model_is_accepted_and_positions_may_differ(base):
    values = default_dict() | {"output": "x", "init_from": str(base)}
    values["data"] |= {"train": ("a.txt",), "sequence_length": 300}
    values["model"] |= {"num_layers": 1, "max_seq_len": 512}
    assert RunConfig.from_dict(values).with_shape(SMALL).model == dataclasses.replace(SMALL, max_seq_len=512)
    values["model"]["max_seq_len"] = None
    with pytest.raises(ConfigError, match="data.sequence_length=300 is more than model.max_seq_len=256"):
        RunConfig.from_dict(values).with_shape(SMALL)


def test_a_model_on_the_hub_is_compared_before_its_weights_are_downloaded(tmp_path, monkeypatch):
    def download(name):
        raise AssertionError(f"{name} was downloaded")

    monkeypatch.setattr(setup, "open_source", download)
    monkeypatch.setattr(setup.hub_models, "read_shape", lambda name: SIZES["llama3.2-1b"])
    run = unnamed(dialog_run(tmp_path, "run", init_from="meta-llama/Llama-3.2-1B"), name="llama3.1-8b")
    with pytest.raises(ConfigError, match="model.num_layers=16 there, 32 here"):
        train(run)


def test_a_run_without_a_shape_and_without_a_model_names_both_ways():
    values = default_dict() | {"output": "x"}
    values["data"] |= {"train": ("a.txt",)}
    with pytest.raises(ConfigError, match=r"--config.model=llama3.2-1b.*init_from.*llama3.1-8b"):
        RunConfig.from_dict(values)


def test_the_flag_model_names_a_size_and_other_flags_change_it(tmp_path):
    path = write_config(tmp_path)
    assert parse(f"--config={path}", "--config.model=llama3.2-1b")[0].model == SIZES["llama3.2-1b"]
    run, _ = parse(f"--config={path}", "--config.model=llama3.2-1b", "--config.model.num_layers=2")
    assert run.model == dataclasses.replace(SIZES["llama3.2-1b"], num_layers=2)
    with pytest.raises(ConfigError) as caught:
        parse(f"--config={path}", "--config.model=llama3.2-1B")
    assert "did you mean 'llama3.2-1b'?" in refusal(caught)


# ---- epochs and steps ------------------------------------------------------------------------------------------


def test_epochs_become_steps_and_one_two_and_three_are_printed(tmp_path, capsys):
    values = text_run(tmp_path, optimizer__warmup_steps=0).to_dict()
    values["train"] |= {"steps": 0, "epochs": 1.5}
    result = train(RunConfig.from_dict(values))
    out = capsys.readouterr().out
    rows = int(out.split(" rows")[0].rpartition(" ")[2].replace(",", ""))
    assert result.finished and result.step == math.ceil(1.5 * rows / 8)
    one, two, three = (f"{math.ceil(n * rows / 8):,}" for n in (1, 2, 3))
    assert f"one, two and three epochs are {one}, {two} and {three} steps" in out
    assert f"finished at step {result.step} of {result.step}" in out


def test_epochs_train_to_the_same_numbers_as_their_steps(tmp_path):
    by_steps = text_run(tmp_path, output=str(tmp_path / "steps"), optimizer__warmup_steps=1)
    values = by_steps.to_dict() | {"output": str(tmp_path / "epochs")}
    values["train"] |= {"steps": 0, "epochs": 1.0}
    steps = train(RunConfig.from_dict(values)).step
    train(dataclasses.replace(by_steps, train=dataclasses.replace(by_steps.train, steps=steps)))
    assert metrics_of(tmp_path / "epochs") == metrics_of(tmp_path / "steps")


def test_a_flag_for_epochs_takes_the_place_of_the_steps_of_a_recipe(tmp_path):
    path = write_config(tmp_path)
    both = ("--config.train.epochs=2", "--config.train.steps=5")
    assert parse(f"--config={path}", both[0])[0].train.steps_for(rows=20, batch_size=8) == 5
    assert parse(f"--config={path}", both[1])[0].train.steps_for(rows=20, batch_size=8) == 5
    with pytest.raises(ConfigError, match="are both set"):
        parse(f"--config={path}", *both)


def test_epochs_that_end_before_the_warmup_name_the_value_to_set(tmp_path):
    values = text_run(tmp_path).to_dict()
    values["train"] |= {"steps": 0, "epochs": 0.1}
    values["optimizer"] |= {"warmup_steps": 100}
    with pytest.raises(ConfigError, match=r"the \d+ steps of train.epochs=0.1.*set optimizer.warmup_steps=\d+"):
        train(RunConfig.from_dict(values))


# ---- evaluation ------------------------------------------------------------------------------------------------


def with_validation(tmp_path, name: str, **changes) -> RunConfig:
    text = tmp_path / "held_out.txt"
    text.write_text("A lazy dog sleeps under the brown fox. " * 30)
    given = {"output": str(tmp_path / name), "data__validation": (str(text),), "log__eval_every": 4}
    return text_run(tmp_path, **(given | changes))


def test_the_loss_before_the_first_step_is_that_of_the_first_weights(tmp_path, capsys):
    run = with_validation(tmp_path, "run")
    result = train(run)
    assert list(result.validation_losses) == [0, 4, 8] and list(result.losses) == list(range(1, 9))
    assert metrics_of(tmp_path / "run")[0]["step"] == 0
    assert f"step 0  validation loss {result.validation_losses[0]:.4f}" in capsys.readouterr().out
    program = Program.make(run, parallel.make_mesh({}, jax.devices()[:1]))
    rows = setup.load_data(program, tmp_path / "run", resuming=True).validation
    params = jax.jit(lambda: init_params(run.model, jax.random.split(jax.random.key(0))[1]))()
    total = count = 0.0
    for batch in evaluation_batches(rows, batch_size=8, max_batches=20):
        hidden, _ = model.forward(run.model, params, batch["tokens"], batch["positions"], batch["segments"])
        logprobs = jax.nn.log_softmax(model.unembed(run.model, params, hidden))
        nll = -np.take_along_axis(np.asarray(logprobs), batch["targets"][..., None], axis=-1)[..., 0]
        total, count = total + float((nll * batch["weights"]).sum()), count + float(batch["weights"].sum())
    assert abs(result.validation_losses[0] - total / count) < 1e-4


def test_evaluation_changes_no_number_of_training(tmp_path):
    plain = train(with_validation(tmp_path, "plain", log__eval_every=0))
    assert plain.validation_losses == {}
    assert train(with_validation(tmp_path, "evaluated", log__eval_every=1)).losses == plain.losses


def test_a_resumed_run_is_not_evaluated_before_training_again(tmp_path):
    train(with_validation(tmp_path, "parts", train__steps=4))
    train(with_validation(tmp_path, "parts"))
    whole = train(with_validation(tmp_path, "whole", optimizer__schedule="cosine"))
    lines = metrics_of(tmp_path / "parts")
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 4, 8]
    assert list(whole.validation_losses) == [0, 4, 8]


def test_a_trend_counts_the_evaluations_without_a_lower_loss():
    trend = Trend()
    for loss, higher in ((3.0, 0), (2.0, 0), (2.0, 1), (float("nan"), 2), (1.9, 0), (2.5, 1)):
        trend = trend.after(loss)
        assert trend.higher == higher
    assert trend.lowest == 1.9


def test_a_run_ends_early_when_the_validation_loss_stops_falling(tmp_path, capsys):
    """With a learning rate of 0 no evaluation after the first is lower."""
    settings = {"optimizer__learning_rate": 0.0, "log__eval_every": 2, "train__patience": 2, "train__steps": 20}
    run = with_validation(tmp_path, "run", **settings)
    result = train(run)
    assert result.finished and result.step == 4 and list(result.validation_losses) == [0, 2, 4]
    assert "finished at step 4 of 20" in capsys.readouterr().out
    assert train(run).step == 4  # and stays so
    assert "it ended early by train.patience; raise it to continue" in capsys.readouterr().out
    more = dataclasses.replace(run, train=dataclasses.replace(run.train, patience=3))
    assert train(more).step == 6  # the evaluations before the restart count


# ---- the result ------------------------------------------------------------------------------------------------


def test_the_result_has_the_model_and_every_loss(tmp_path):
    result = train(text_run(tmp_path))
    lines = metrics_of(tmp_path / "run")
    assert result.losses == {line["step"]: line["loss"] for line in lines}
    llama = result.model(dtype="float32")
    ids = [llama.tokenizer.bos_id, *llama.tokenizer.encode((tmp_path / "text.txt").read_text())[:31]]
    logprobs = jax.nn.log_softmax(llama.logits([ids])[0])
    nll = -float(np.mean([logprobs[i, token] for i, token in enumerate(ids[1:])]))
    assert result.losses[1] - result.losses[8] > 0.4 and abs(nll - result.losses[8]) < 0.3


def test_train_samples_from_python_without_a_sampler(tmp_path, capsys):
    train(text_run(tmp_path, log__sample_every=4, log__sample_prompts=("The quick",), log__sample_tokens=2))
    out = capsys.readouterr().out
    assert "step 4  sample: The quick|" in out and "step 8  sample: The quick|" in out


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({}, ["--prompt", "The"]),
        ({"log__sample_prompts": ("Once",)}, ["--prompt", "Once"]),
        ({"log__sample_as": "chat", "log__sample_prompts": ("Why?",)}, ["--ask", "Why?"]),
    ],
)
def test_the_command_that_samples_from_a_run_on_text(tmp_path, changes, flags):
    result = train(text_run(tmp_path, train__steps=1, optimizer__warmup_steps=0, **changes))
    assert result.command() == ["python", "infer.py", "--model", str(tmp_path / "run"), *flags]


def test_the_command_that_samples_from_a_run_on_dialogs(tmp_path, base):
    result = train(unnamed(dialog_run(tmp_path, "run", init_from=str(base), train__steps=2)))
    assert result.command()[-1] == "--chat"


def test_long_phases_are_announced(tmp_path, base, capsys):
    run = unnamed(dialog_run(tmp_path, "run", init_from=str(base), train__steps=2))
    train(run)
    out = capsys.readouterr().out
    assert f"loading {base}" in out and "compiling the training step" in out
    assert out.index("loading") < out.index("compiling") < out.index("step 1/2")


def test_a_phase_is_announced_with_its_last_time(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    now, lines = [0.0], []
    monkeypatch.setattr(phases.time, "monotonic", lambda: now[0])
    for seconds in (90.0, 1.0, 5.0, 5.0):
        with phases.phase("compiling", lines.append, of="a model"):
            now[0] += seconds
    assert lines == ["compiling", "compiling (took 1:30 last time)", "compiling", "compiling (took 0:05 last time)"]
    with pytest.raises(KeyError), phases.phase("compiling", lines.append, of="a model"):
        raise KeyError  # what failed is not remembered
    with phases.phase("compiling", lines.append, of="another model"):
        pass
    assert lines[4:] == ["compiling (took 0:05 last time)", "compiling"]
    (tmp_path / "phases.json").write_text("{")
    monkeypatch.setattr(phases, "write_json", lambda *args: (_ for _ in ()).throw(OSError("read-only")))
    with phases.phase("compiling", lines.append, of="a model"):
        pass
    assert lines[6:] == ["compiling"]


def test_an_adapter_of_an_earlier_step_is_written_again(tmp_path, base):
    """A kill after the last checkpoint leaves the adapter of an earlier step, or none."""
    run = unnamed(dialog_run(tmp_path, "run", init_from=str(base), train__steps=2, lora__rank=4))
    train(run)
    adapter = tmp_path / "run" / "adapter"
    whole = {path.name: path.read_bytes() for path in adapter.iterdir()}
    for change in ("files of another step", "damaged weights", "no manifest"):
        if change == "files of another step":  # a kill while the files of an earlier step are replaced
            manifest.write(adapter, step=1, loss=None)
        elif change == "damaged weights":
            (adapter / "adapter_model.safetensors").write_bytes(b"old")
        else:
            (adapter / manifest.FILE).unlink()
        train(run)
        assert {path.name: path.read_bytes() for path in adapter.iterdir()} == whole, change
    assert manifest.read(adapter).step == 2


def test_the_adapter_is_that_of_each_checkpoint_while_the_run_goes_on(tmp_path, base):
    """Readers in between find an adapter of the step that its manifest names."""
    run = unnamed(dialog_run(tmp_path, "run", init_from=str(base), train__steps=4, lora__rank=4, checkpoint__every=2))
    found = {}

    def read(step, metrics):
        if (tmp_path / "run" / "adapter").is_dir():
            found[step] = manifest.check_present(tmp_path / "run" / "adapter").step
            return False
        return step > 3

    train(run, on_metrics=read)
    assert found == {3: 2, 4: 2}
    assert manifest.check_present(tmp_path / "run" / "adapter").step == 4


def test_an_adapter_that_cannot_be_written_costs_no_step(tmp_path, base, monkeypatch, capsys):
    """The checkpoints have the same weights, and the next start writes the adapter."""
    run = unnamed(dialog_run(tmp_path, "run", init_from=str(base), train__steps=2, lora__rank=4, checkpoint__every=1))
    write = manifest.write

    def full(folder, **of):
        if folder.name == "adapter.new":
            raise OSError(28, "No space left on device", str(folder))
        write(folder, **of)

    monkeypatch.setattr(manifest, "write", full)
    with pytest.raises(SaveError, match="the adapter of step 2 could not be written .*: No space left on device"):
        train(run)
    assert capsys.readouterr().out.count("warning: the adapter of step ") == 2
    monkeypatch.undo()
    train(run)
    assert "step 2 of 2 is already done" in capsys.readouterr().out
    assert manifest.check_present(tmp_path / "run" / "adapter").step == 2


def test_a_step_is_dispatched_before_the_metrics_of_the_one_before_are_fetched(tmp_path, monkeypatch):
    """The host waits for the device only in device_get, which the transfer guard leaves as the one way."""
    events = []
    plain_get, plain_step = jax.device_get, Loop._do_step

    def get(tree):
        if isinstance(tree, dict) and "skipped" in tree:
            events.append("fetch")
        else:
            events.append("other fetch")
        return plain_get(tree)

    def do_step(self, batch):
        report = plain_step(self, batch)
        events.append("dispatch")
        return report

    monkeypatch.setattr(jax, "device_get", get)
    monkeypatch.setattr(Loop, "_do_step", do_step)
    train(text_run(tmp_path, train__steps=6, checkpoint__every=100, log__eval_every=0))
    assert events == [
        "dispatch",
        *["dispatch", "fetch"] * 5,
        "fetch",
        "other fetch",
    ]  # the last: are all weights finite
