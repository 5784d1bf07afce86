"""A whole training run: from a RunConfig to a run folder with checkpoints, metrics and a picture of the loss.

from llama_jax.run_config import RunConfig
from llama_jax.train.run import train

result = train(RunConfig.from_dict({"output": "runs/mine", "model": "tiny", "data": {"train": "text/*.txt"}}))
print(result.losses[result.step], result.model().generate("The").text)
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from llama_jax import parallel, remote_files
from llama_jax.data import own_records
from llama_jax.data.own_records import Record
from llama_jax.errors import ConfigError, brief, checked_keywords
from llama_jax.files import expanded
from llama_jax.parallel import processes
from llama_jax.progress import duration
from llama_jax.run_config import RunConfig
from llama_jax.run_keys import DataConfig, LoraConfig
from llama_jax.storage import is_url, work_folder
from llama_jax.train import setup, trackers, trainable
from llama_jax.train.folder import Newest, RunFolder, Trend, locked
from llama_jax.train.loop import Hooks, Loop, OnMetrics, Sampler, TrainingError
from llama_jax.train.metrics import read_metrics, say
from llama_jax.train.objectives import Objective, objective
from llama_jax.train.program import Program
from llama_jax.train.state import TrainState
from llama_jax.train.stop import StopSignal

if TYPE_CHECKING:
    from llama_jax.infer.llama import Llama

__all__ = ["Result", "TrainingError", "train"]


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of a training run.

    Attributes:
        step: The last step that was done.
        finished: True if the run is complete; False if it was asked to stop and can be resumed.
        folder: The run folder.
        dialogs: True if the run learned answers: from dialogs, completions or preference pairs.
        run: The run, with the shape of its model.
        stopped_by: The number of the signal that stopped this process, or None.
    """

    step: int
    finished: bool
    folder: Path
    dialogs: bool
    run: RunConfig
    stopped_by: int | None = None

    @property
    def losses(self) -> dict[int, float]:
        """The training loss by step, from metrics.jsonl. It covers the whole run, including earlier starts."""
        return self._metric("loss")

    @property
    def validation_losses(self) -> dict[int, float]:
        """The validation loss by step, from metrics.jsonl. Step 0 is the model before training."""
        return self._metric("validation_loss")

    def model(self, **options: Any) -> Llama:
        """The trained model, ready to sample: `llama_jax.load(folder, **options)`."""
        from llama_jax.infer.load import load

        return load(self.folder, **options)

    def command(self) -> list[str]:
        """The command that samples from the model: a question or a chat after dialogs, else a text to continue."""
        log = self.run.log
        first = (*log.sample_prompts, "The")[0]
        if log.sample_as == "chat":
            flags = ["--ask", first]
        else:
            flags = ["--chat"] if self.dialogs else ["--prompt", first]
        model = self.run.output if is_url(self.run.output) else str(self.folder)
        return ["python", "infer.py", "--model", model, *flags]

    def _metric(self, name: str) -> dict[int, float]:
        lines = read_metrics(self.folder / "metrics.jsonl")
        return {line["step"]: line[name] for line in lines if line.get(name) is not None}


@checked_keywords
def train(
    run: RunConfig | Mapping[str, Any],
    *,
    records: Iterable[Record] | None = None,
    validation_records: Iterable[Record] | None = None,
    loss: Objective = objective,
    on_metrics: OnMetrics | None = None,
    sampler: Sampler | None = None,
    resume: bool = True,
    stop: StopSignal | None = None,
) -> Result:
    """Train a model, from the newest checkpoint of the run folder if there is one.

    It does the work of `train.py`, and prints the same lines. It returns after the last step, or after the step in
    which SIGINT, SIGTERM or SIGHUP arrived or `on_metrics` returned True; call it again to continue.

    Args:
        run: The run, or a dict of its keys as `RunConfig.from_dict` takes it.
        records: Training data in the place of data.train: an iterable of records (docs/reference/records.md), each a
            dict, or a string for a text. They are read once and kept as a file in data.cache_dir, which becomes
            data.train.
        validation_records: Validation data in the place of data.validation, in the same form.
        loss: A loss function in the place of that of train.objective. A resumed run must have a loss of the same name.
        on_metrics: Called in the first process with the step and the metrics of every line of metrics.jsonl. If it
            returns True, the run stops after the running step.
        sampler: Makes the texts of log.sample_every; None samples from the model as `llama_jax.load` would.
        resume: False refuses a folder that already has a checkpoint.
        stop: An active StopSignal, for a process that only trains. None watches signals during this call.

    Raises:
        ConfigError: the mesh, the model, the data, the tokenizer or the folder does not fit the run, or an argument is
            wrong.
        TrainingError: the loss or the weights are not finite.
        SaveError: a checkpoint could not be written; raised at the first step after the failure.
        TypeError: there is no such argument.
    """
    started = time.monotonic()
    run = _run(run, records, validation_records)
    for name, function in (("loss", loss), ("on_metrics", on_metrics), ("sampler", sampler)):
        if function is not None and not callable(function):
            raise ConfigError(f"{name} must be a function, got {brief(function)}")
    if not isinstance(resume, bool) or not isinstance(stop, StopSignal | None):
        name, value = ("stop", stop) if isinstance(resume, bool) else ("resume", resume)
        raise ConfigError(f"{name} must be {'a StopSignal' if name == 'stop' else 'True or False'}, got {brief(value)}")
    trackers.check(run)
    with contextlib.nullcontext(stop) if stop else StopSignal() as stop:
        stop.grace = run.checkpoint.grace_seconds
        mesh = parallel.make_mesh(dataclasses.asdict(run.mesh))
        setup.check_paths(run)
        in_parts = remote_files.reading_in_parts(run.distributed.download == "part")
        with locked(work_folder(run.output, processes.number())), in_parts:
            folder = RunFolder(run)
            newest = folder.newest(resume=resume)
            if newest is None:
                run = setup.shaped(run, mesh)
            else:
                run = folder.check_resume(run, newest, loss)
            program = Program.make(run, mesh, loss=loss)
            data = setup.load_data(program, folder.path, resuming=newest is not None and folder.files_intact(newest))
            if newest is not None:
                folder.check_files(newest)
            processes.meet("data are ready")
            step, position = (0, 0) if newest is None else (newest.step, newest.position)
            program = program.with_steps(run.steps_for(data.rows, step=step, position=position))
            if newest is not None and newest.trend.is_end(run, newest.step, program.steps):
                state, finished = _done_already(program, folder, newest, data), True
            else:
                loop = _begin(program, folder, newest, data, stop, Hooks(_sampler(run, sampler), on_metrics))
                state, finished = loop.train(), loop.is_end()
                _say_end(program, folder, loop, time.monotonic() - started)
            folder.write_results(program, state)
    return Result(int(state.step), finished, folder.path, data.dialogs, run, stop.number)


def _run(
    run: RunConfig | Mapping[str, Any],
    records: Iterable[Record] | None,
    validation_records: Iterable[Record] | None,
) -> RunConfig:
    """The run as a RunConfig, whose data are the given records if there are any."""
    if not isinstance(run, (RunConfig, Mapping)):
        raise ConfigError(f"run must be a RunConfig, or a dict of its keys, got {brief(run)}")
    values = run.to_dict() if isinstance(run, RunConfig) else dict(run)
    data = values.get("data") or {}
    for key, given in (("train", records), ("validation", validation_records)):
        if given is not None and isinstance(data, Mapping):
            folder = expanded(data.get("cache_dir") or DataConfig().cache_dir) / "records"
            name = "records" if key == "train" else "validation_records"
            data = {**data, key: (str(own_records.save(given, folder, name=name)),)}
    if isinstance(run, RunConfig) and data == values["data"]:
        return run
    return RunConfig.from_dict({**values, "data": data})


def _done_already(program: Program, folder: RunFolder, newest: Newest, data: setup.Data) -> TrainState:
    """Restores the last state of a run that has no steps left, and prints the reason why it has none."""
    more = "raise train.steps to continue" if program.run.train.steps else "raise train.epochs to continue"
    if newest.step < program.steps:
        more = "it ended early by train.patience; raise it to continue"
    say(f"step {newest.step} of {program.steps} is already done; {more}")
    folder.write_config(program.run, data.tokenizer, newest.frozen)
    state = folder.restore(program, newest.step, data.loader)
    folder.checkpoints.close()
    data.loader.close()
    return state


def _begin(
    program: Program,
    folder: RunFolder,
    newest: Newest | None,
    data: setup.Data,
    stop: StopSignal,
    hooks: Hooks,
) -> Loop:
    """Makes the loop at its first step, with new weights or with the state of the newest checkpoint."""
    if newest is None:
        _say_model(program)
        frozen, state, trend = setup.frozen(program), setup.first_state(program), Trend()
    else:
        say(f"resuming {folder.path} from step {newest.step}")
        state, trend = folder.restore(program, newest.step, data.loader), newest.trend
        frozen = setup.frozen(program)
        folder.check_frozen(program.run, newest, frozen)
    folder.read_base(program.run)
    folder.write_config(program.run, data.tokenizer, frozen.identity)
    folder.checkpoints.go_on_from(None if newest is None else newest.step)
    return Loop(program, state, frozen, data, folder, trend, stop, hooks)


def _sampler(run: RunConfig, sampler: Sampler | None) -> Sampler | None:
    """The sampler of a run, or None if it does not sample."""
    if not run.log.sample_every:
        return None
    if jax.process_count() > 1:
        say("log.sample_every is ignored: sampling during training needs a single process")
        return None
    if sampler is None:
        from llama_jax.train.samples import TrainingSampler  # a run that does not sample imports no inference

        sampler = TrainingSampler()
    return sampler


def _say_model(program: Program) -> None:
    """Print the size of the model, its devices, and the number of weights that LoRA trains."""
    run = program.run
    shape = program.layout.mesh.shape
    where = " x ".join(f"{axis}={n}" for axis, n in shape.items() if n > 1) or "1"
    products = np.dtype(program.dtype).name
    say(
        f"model: {run.shape.num_params:,} weights, {products} products, on {where} {jax.devices()[0].device_kind} "
        "device(s)"
    )
    if run.lora.rank:
        trained = sum(leaf.size for leaf in jax.tree.leaves(program.state.params))
        base = trainable.frozen_dtype(run, program.dtype).name
        base = base if trainable.frozen_quantize(run) == "none" else run.lora.base
        say(f"LoRA: {trained:,} weights are trained ({trained / run.shape.num_params:.2%}), the base is in {base}")
    elif run.lora != LoraConfig():
        say("lora.rank is 0: all weights are trained, and lora.alpha has no effect")


def _say_end(program: Program, folder: RunFolder, loop: Loop, seconds: float) -> None:
    """Print the last step of the run, and the checkpoint with the lowest validation loss."""
    step = loop.step
    word = "finished" if loop.is_end() else "stopped"
    why = (
        f", since {loop.trend.higher} evaluations had no lower loss"
        if word == "finished" and step < program.steps
        else ""
    )
    say(f"{word} at step {step} of {program.steps} after {duration(seconds)}{why}")
    best = folder.checkpoints.best() if program.run.checkpoint.keep_best else step
    if best != step:
        say(f"lowest validation loss: step {best}; as a model it is {folder.checkpoints.folder / str(best)}")
