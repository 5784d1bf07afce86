"""A whole training run: from a RunConfig to a run folder with checkpoints, metrics and a picture of the loss.

The step never waits for the host: its numbers are fetched one step late, while the next one computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import model, parallel
from llama_jax.checkpoint import Checkpoints
from llama_jax.data.loader import Loader, evaluation_batches
from llama_jax.data.packing import Rows
from llama_jax.errors import ConfigError
from llama_jax.files import write_json
from llama_jax.run_config import RunConfig, differences
from llama_jax.run_keys import LoraConfig
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train import setup, trainable
from llama_jax.train.metrics import MetricLog, Progress, draw_loss, duration
from llama_jax.train.objectives import Batch
from llama_jax.train.program import Program
from llama_jax.train.state import TrainState
from llama_jax.train.stop import StopSignal
from llama_jax.weights import export, lora_params
from llama_jax.weights.adapters import Adapter, LazyRows
from llama_jax.weights.formats import peft
from llama_jax.weights.run_folder import CONFIG_FILE

# (config, params, tokenizer, mesh) -> one text for each of log.sample_prompts. The loop does not import inference.
Sampler = Callable[[RunConfig, model.Params, Tokenizer, jax.sharding.Mesh], list[str]]

# Keys that may differ between a run and its resumption; any other difference would make it another run.
_MAY_CHANGE = (
    "init_from",  # what of it is still needed is held against what it was
    "optimizer.",
    "train.steps",
    "train.max_skipped",
    "log.",
    "checkpoint.",
    "mesh.",
    "distributed.",
    "output",
    "data.cache",
)


_MAY_NOT = ("optimizer.name", "optimizer.moments", "optimizer.ema_decay")  # what the state is made of


class TrainingError(RuntimeError):
    """A run that cannot go on. The message says why, and what to change."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: the last step done.
        finished: whether that is the last of the run; otherwise it was asked to stop, and can be resumed.
        folder: the run folder.
    """

    step: int
    finished: bool
    folder: Path


def train(run: RunConfig, *, sampler: Sampler | None = None, resume: bool = True) -> Result:
    """Train as `run` says, from its newest checkpoint if its folder has one.

    Args:
        run: the run.
        sampler: makes the texts of log.sample_every; None makes none.
        resume: False refuses a folder that already has a checkpoint.

    Raises:
        ConfigError: a mesh, a tokenizer or a folder that does not fit the run.
        TrainingError: too many non-finite steps in a row.
        SaveError: a checkpoint could not be written; raised at the step after it is known.
    """
    started = time.monotonic()
    with StopSignal(grace=run.checkpoint.grace_seconds) as stop, contextlib.ExitStack() as held:
        program = Program.make(run, parallel.make_mesh(dataclasses.asdict(run.mesh)))
        setup.check_paths(run)
        folder = Path(run.output).expanduser()
        if jax.process_index() == 0:
            held.enter_context(_alone(folder))
        say = print if jax.process_index() == 0 else _silent
        checkpoints = Checkpoints(folder, keep=run.checkpoint.keep, keep_best=run.checkpoint.keep_best)
        latest = checkpoints.latest()
        before = None if latest is None else checkpoints.meta(latest)
        if before is not None:
            _check_resume(run, folder, before["config"], latest, resume, say)
        tokenizer = setup.tokenizer(run, folder, resuming=latest is not None, say=say)
        train_rows, validation_rows = setup.rows(run, tokenizer, say)
        loader = Loader(
            train_rows,
            batch_size=run.data.batch_size,
            seed=run.data.seed,
            shuffle=run.data.shuffle,
            rows_of_host=program.rows_of_host,
        )
        if latest is None:
            _describe(program, say)
            frozen = setup.frozen(program)
            state = setup.first_state(program)
        else:
            state = _restore(program, checkpoints, latest, loader)
            say(f"resuming {folder} from step {latest}")
            if latest >= run.train.steps:
                say(f"step {latest} of {run.train.steps} is already done; raise train.steps to go on")
                checkpoints.close()
                loader.close()
                if run.lora.rank and not (folder / "adapter").exists():  # a kill may have come after the last save
                    base = setup.frozen(program).params if run.lora.trained_tokens else {}
                    _write_adapter(program, base, state.best, folder)
                if jax.process_index() == 0:
                    draw_loss(folder, run.train.objective)
                return Result(latest, True, folder)
            frozen = setup.frozen(program)
            if before.get("frozen") != frozen.identity:
                raise ConfigError(
                    f"init_from={run.init_from!r} is not the model that {folder} was begun with, and its checkpoints "
                    "mean nothing beside another: name the one that it was, or set another output to start anew"
                )
        if jax.process_index() == 0:
            description = {**run.to_dict(), "tokenizer_fingerprint": tokenizer.fingerprint, "frozen": frozen.identity}
            write_json(folder / CONFIG_FILE, description)
        if sampler is not None and run.log.sample_every and jax.process_count() > 1:
            say("log.sample_every is left out: sampling while training takes one process")
            sampler = None
        checkpoints.go_on_from(latest)
        loop = _Loop(program, frozen, tokenizer, checkpoints, loader, validation_rows, sampler, stop)
        try:
            step, best = loop.go(state, latest or 0)
        except TrainingError:
            checkpoints.close()  # what is still being saved is an earlier step, and sound
            raise
        if run.lora.rank:
            _write_adapter(program, frozen.params, best, folder)
        if jax.process_index() == 0:
            draw_loss(folder, run.train.objective)
        word = "finished" if step == run.train.steps else "stopped"
        say(f"{word} at step {step} of {run.train.steps} after {duration(time.monotonic() - started)}")
        lowest = checkpoints.best() if run.checkpoint.keep_best else step
        if lowest != step:
            say(f"lowest validation loss: step {lowest}; as a model it is {checkpoints.folder / str(lowest)}")
    return Result(step, step == run.train.steps, folder)


class _Loop:
    """The loop itself, with what it needs at hand."""

    def __init__(
        self,
        program: Program,
        frozen: setup.Frozen,
        tokenizer: Tokenizer,
        checkpoints: Checkpoints,
        loader: Loader,
        validation: Rows | None,
        sampler: Sampler | None,
        stop: StopSignal,
    ):
        self.program, self.run, self.frozen, self.tokenizer, self.stop = program, program.run, frozen, tokenizer, stop
        self.checkpoints, self.loader, self.validation, self.sampler = checkpoints, loader, validation, sampler
        self.all_finite = jax.jit(_all_finite)
        self.any_stop = _any_process(program.layout) if jax.process_count() > 1 else None
        self.stop_seen = False
        self.main = jax.process_index() == 0

    def go(self, state: TrainState, first: int) -> tuple[int, trainable.Trained]:
        """From step `first` to the end, or to where a stop is asked for; returns the last one, and what it has made."""
        run = self.run
        tokens = run.data.batch_size * run.data.sequence_length
        forward = run.model.flops_per_token(run.data.sequence_length, training=False)
        flops = tokens * forward * trainable.forwards(run)
        progress = Progress(
            start=first, steps=run.train.steps, every=run.log.every, tokens_per_step=tokens, flops_per_step=flops
        )
        folder = self.checkpoints.folder.parent
        log = MetricLog(folder, from_step=first, tensorboard=run.log.tensorboard) if self.main else None
        batches = _to_devices(self.loader, self.program)
        late: Callable[[], None] = _silent
        step, saved = first, first
        with jax.transfer_guard("disallow"):
            while step < run.train.steps and not self._stopping():
                state, metrics = self.program.train_step(state, self.frozen.params, next(batches))
                if self.any_stop is not None:
                    metrics["stop"] = self.any_stop(self.stop.requested)
                step += 1
                self.checkpoints.check()
                late()  # the numbers of the step before, while this one computes
                late = functools.partial(self._report, step, metrics, log, progress)
                pause = self._due(run.checkpoint.every, step) or self._due(run.log.eval_every, step)
                if pause or self._due(run.log.sample_every, step):
                    late()
                    late = _silent
                    loss = self._evaluate(state, step, log, progress)
                    self._sample(state, step, progress)
                    if self._due(run.checkpoint.every, step):
                        self._save(state, step, loss)
                        saved = step
                    progress.pause()
            if self.stop.requested:
                self.stop.acknowledge()
            late()
            if step != saved:
                self._save(state, step, None)
            self.checkpoints.close()
        self.loader.close()
        if log is not None:
            log.close()
        return step, state.best

    def _due(self, every: int, step: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.run.train.steps)

    def _stopping(self) -> bool:
        # All processes must leave after the same step, whichever of them was told to: the word goes round with the
        # numbers of a step. (jax's own preemption notice would need the SIGTERM handler that StopSignal has.)
        return self.stop.requested if self.any_stop is None else self.stop_seen

    def _report(self, step: int, metrics: dict[str, jax.Array], log: MetricLog | None, progress: Progress) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.stop_seen = bool(values.pop("stop", 0.0))
        if values["skipped"] >= self.run.train.max_skipped:
            raise TrainingError(
                f"step {step}: the loss or the gradient was not finite {int(values['skipped'])} times in a row. Those "
                "steps changed nothing, and what is saved is sound. Look at the data around this step, or lower "
                "optimizer.learning_rate, and start again: the run goes on from its last checkpoint, if it has one"
            )
        if log is None:
            return
        speed = progress.speed(step)
        log.write(step, {**values, **speed})
        progress.show(step, values=values, speed=speed)
        if values["skipped"]:
            progress.say(f"step {step}: loss or gradient not finite, step left out")

    def _evaluate(self, state: TrainState, step: int, log: MetricLog | None, progress: Progress) -> float | None:
        if self.validation is None or not self._due(self.run.log.eval_every, step):
            return None
        batches = evaluation_batches(
            self.validation,
            batch_size=self.run.data.batch_size,
            max_batches=self.run.log.eval_batches,
            rows_of_host=self.program.rows_of_host,
        )
        evaluate = functools.partial(self.program.eval_step, state.best, self.frozen.params)
        sums = jax.device_get([evaluate(batch) for batch in _to_devices(batches, self.program)])
        total = {name: float(sum(part[name] for part in sums)) for name in sums[0]}
        count = max(total.pop("count"), 1.0)
        means = {name: value / count for name, value in total.items()}
        if log is not None:
            log.write(step, {f"validation_{name}": mean for name, mean in means.items()})
            more = f"perplexity {np.exp(min(means['loss'], 50)):.2f}"
            if "accuracy" in means:
                more = f"accuracy {means['accuracy']:.1%}  margin {means['margin']:.3f}"
            progress.say(f"step {step}  validation loss {means['loss']:.4f}  {more}")
        return means["loss"]

    def _sample(self, state: TrainState, step: int, progress: Progress) -> None:
        if self.sampler is None or self.stop.requested or not self._due(self.run.log.sample_every, step):
            return
        with jax.transfer_guard("allow"):
            params = trainable.policy(self.run, state.best, self.frozen.params)
            run = dataclasses.replace(self.run, model=trainable.policy_config(self.run))
            texts = self.sampler(run, params, self.tokenizer, self.program.layout.mesh)
        if self.main:
            for prompt, text in zip(self.run.log.sample_prompts, texts, strict=True):
                progress.say(f"step {step}  sample: {prompt}" + f"|{text}".replace("\n", "\n    "))

    def _save(self, state: TrainState, step: int, loss: float | None) -> None:
        if not jax.device_get(self.all_finite(state.params)):
            raise TrainingError(
                f"step {step}: weights are not finite, so this step is not saved, and what is saved is sound. Lower "
                "optimizer.learning_rate and start again: the run goes on from its last checkpoint, if it has one"
            )
        meta = {
            "data": {**self.loader.state(), "step": step},
            "config": self.run.to_dict(),
            "frozen": self.frozen.identity,
        }
        with jax.transfer_guard("allow"):
            self.checkpoints.save(step, params=state.best, rest=_rest(state), meta=meta, loss=loss)


def _silent(*_: object) -> None:
    pass


def _all_finite(params: model.Params) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))


def _any_process(layout: parallel.Layout) -> Callable[[bool], jax.Array]:
    """A function of what this process says to whether any of them says so; all call it, and none waits for it."""
    spread = parallel.spread(layout.mesh)
    reduce = jax.jit(jnp.any, out_shardings=parallel.replicated(layout.mesh))

    def any_process(flag: bool) -> jax.Array:
        with jax.transfer_guard_host_to_device("allow"):
            return reduce(jax.make_array_from_callback((layout.mesh.size,), spread, lambda _: np.array([flag])))

    return any_process


def _to_devices(batches: Iterator[dict[str, np.ndarray]], program: Program) -> Iterator[Batch]:
    """Global arrays of host batches: each device gets its rows and columns, and no host holds them all."""
    shape = program.batch["tokens"].shape
    sharding = program.batch_sharding
    place = {row: i for i, row in enumerate(program.rows_of_host)}

    def shard(local: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        rows = [place[row] for row in range(*index[0].indices(shape[0]))]
        return local[rows][:, index[1]]

    for batch in batches:
        with jax.transfer_guard_host_to_device("allow"):  # the one place where a batch goes over
            arrays = {
                name: jax.make_array_from_callback(shape, sharding, functools.partial(shard, local))
                for name, local in batch.items()
            }
        yield arrays


def _describe(program: Program, say: Callable[..., None]) -> None:
    run = program.run
    kind, shape = jax.devices()[0].device_kind, program.layout.mesh.shape
    where = " x ".join(f"{axis}={n}" for axis, n in shape.items() if n > 1) or "1"
    products = np.dtype(program.dtype).name
    say(f"model: {run.model.num_params:,} weights, {products} products, on {where} {kind} device(s)")
    if run.lora.rank:
        trained = sum(leaf.size for leaf in jax.tree.leaves(program.state.params))
        base = trainable.frozen_dtype(run, program.dtype).name
        base = base if trainable.frozen_quantize(run) == "none" else run.lora.base
        say(f"LoRA: {trained:,} weights are trained ({trained / run.model.num_params:.2%}), beside a base in {base}")
    elif run.lora != LoraConfig():
        say("lora.rank is 0: all weights are trained, and lora.alpha is not read")


def _write_adapter(program: Program, base: model.Params, best: trainable.Trained, folder: Path) -> None:
    """Write what LoRA trained on a base as peft reads it. Other files in the folder stay."""
    run = program.run
    fresh, place = folder / "adapter.new", folder / "adapter"
    rows = lora_params.token_rows(run.lora, best, base)
    adapter = Adapter(
        trainable.policy_config(run),
        lora=export.lazy_lora(lora_params.lora_by_path(run.lora, best)),
        rows={path: LazyRows(ids, export.lazy_array(array)) for path, (ids, array) in rows.items()},
    )
    if jax.process_index() == 0:
        shutil.rmtree(fresh, ignore_errors=True)
    peft.write_adapter(fresh, adapter, base_model=run.init_from, dropout=run.lora.dropout)
    if jax.process_index() == 0:
        place.mkdir(exist_ok=True)
        for file in fresh.iterdir():
            os.replace(file, place / file.name)
        fresh.rmdir()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a run folder against a second run in it, for as long as this one lasts; a killed process lets go.

    Raises:
        ConfigError: another process trains in it.
    """
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process trains in {folder}: wait for it, stop it, or set another output"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


def _check_resume(
    run: RunConfig, folder: Path, before: dict[str, Any], step: int, resume: bool, say: Callable[..., None]
) -> None:
    """Refuse to go on from a checkpoint of `step` that another run made."""
    if not resume:
        raise ConfigError(f"{folder} has a checkpoint of step {step}: resume it, or set another output")
    changed = differences(RunConfig.from_dict(before).to_dict(), run.to_dict())  # keys it lacks had their defaults
    refused = {key: values for key, values in changed.items() if not key.startswith(_MAY_CHANGE) or key in _MAY_NOT}
    if refused:
        lines = "; ".join(f"{key} was {old!r}, is now {new!r}" for key, (old, new) in refused.items())
        raise ConfigError(
            f"{folder} was trained with other settings: {lines}. Set them back to resume it, or set another "
            "output to start anew"
        )
    for key, (old, new) in changed.items():
        say(f"{key} was {old!r}, is now {new!r}")


def _rest(state: TrainState) -> dict[str, Any]:
    """What a checkpoint keeps beside `state.best`; where that is the average, the weights themselves too."""
    rest = {name: getattr(state, name) for name in ("opt_state", "key", "skipped", "step")}
    return rest if state.ema is None else {**rest, "params": state.params}


def _restore(program: Program, checkpoints: Checkpoints, step: int, loader: Loader) -> TrainState:
    """The state of a checkpoint on this run's mesh, and the loader moved to its batch."""
    abstract = program.state
    best, rest, meta = checkpoints.restore(step, params=abstract.best, rest=_rest(abstract))
    loader.restore(meta["data"])
    if abstract.ema is None:
        return TrainState(params=best, ema=None, **rest)
    return TrainState(ema=best, **rest)
