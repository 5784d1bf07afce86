"""The training loop: steps, their reports, and between them evaluation, samples and checkpoints.

The device never waits for the host. The metrics of a step are fetched while the next step computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import parallel
from llama_jax.checkpoint import SaveError
from llama_jax.data.loader import evaluation_batches
from llama_jax.errors import ConfigError, one_line
from llama_jax.parallel import processes
from llama_jax.params import Params
from llama_jax.phases import phase
from llama_jax.run_config import RunConfig
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train import setup, trackers, trainable
from llama_jax.train.folder import RunFolder, Trend, rest_of
from llama_jax.train.metrics import MetricLog, Progress
from llama_jax.train.objectives import Batch, own_name
from llama_jax.train.profile import Profile
from llama_jax.train.program import Program
from llama_jax.train.state import TrainState
from llama_jax.train.stop import Interrupted, StopSignal

# (config, params, tokenizer, mesh) -> one text for each of log.sample_prompts.
Sampler = Callable[[RunConfig, Params, Tokenizer, jax.sharding.Mesh], list[str]]


# (step, its metrics by name) -> True to stop the run after this step.
OnMetrics = Callable[[int, dict[str, float]], bool | None]


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Functions of the caller that a run calls.

    Attributes:
        sampler: Makes the texts of log.sample_every; None makes none.
        on_metrics: Called in the first process with every line of metrics.jsonl: the metrics of a step, or the
            validation loss. If it returns True, the run stops cleanly, as at Ctrl-C.
    """

    sampler: Sampler | None = None
    on_metrics: OnMetrics | None = None


class TrainingError(RuntimeError):
    """Raised if a run cannot continue. The message has the reason and the remedy."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The metrics of one step, as arrays that the device may still be computing.

    Attributes:
        step: The number of the step, from 1.
        metrics: Scalars by name, and with several processes the flag `stop`.
    """

    step: int
    metrics: dict[str, jax.Array]


class Loop:
    """The training loop of one run, from the step of `state` to the last step or to a request to stop.

    Args:
        program: The compiled steps.
        state: The state to start from.
        frozen: The frozen model of LoRA or DPO.
        data: The tokenizer, the batches (the first is that of the state's next step), and the validation rows.
        folder: The run folder, whose checkpoints are ready to be saved to.
        trend: The validation losses so far.
        stop: The signals that end the run early.
        hooks: Functions of the caller.
    """

    def __init__(
        self,
        program: Program,
        state: TrainState,
        frozen: setup.Frozen,
        data: setup.Data,
        folder: RunFolder,
        trend: Trend,
        stop: StopSignal,
        hooks: Hooks,
    ):
        self.program, self.run, self.state, self.frozen, self.data = program, program.run, state, frozen, data
        self.folder, self.checkpoints, self.trend = folder, folder.checkpoints, trend
        self.stop, self.hooks = stop, hooks
        self.first = self.step = self.saved = int(state.step)
        self.all_finite = jax.jit(_all_finite)
        self.train_step = processes.compiled_together(program.train_step, "train step")
        self.eval_step = processes.compiled_together(program.eval_step, "evaluation step")
        self.any_stop = _any_process(program.layout) if jax.process_count() > 1 else None
        self.stop_seen = False
        self.main = jax.process_index() == 0
        self.progress = self._new_progress()
        self.profile = Profile(self.run.log.profile, folder.path / "profile")
        self.log: MetricLog | None = None
        if self.main:
            started = trackers.start(self.run, folder.path, from_step=self.first)
            self.log = MetricLog(folder.path, from_step=self.first, trackers=started)

    def train(self) -> TrainState:
        """Do the steps, and save the last one; returns the last state."""
        try:
            with jax.transfer_guard("disallow"):
                if self.first == 0:
                    self._evaluate()
                self._do_steps()
                if self.step != self.saved:
                    self._save(None)
        except Exception as error:
            # A pending save is of an earlier step, and sound. Several processes can wait for it only if all are here.
            if isinstance(error, TrainingError) or jax.process_count() == 1:
                with contextlib.suppress(SaveError):
                    self.checkpoints.close()
            raise
        self.profile.close()
        self.checkpoints.close()
        self.stop.end_work()
        self.data.loader.close()
        if self.log is not None:
            self.log.close()
        return self.state

    def is_end(self) -> bool:
        """True if the run is complete after the last step that was done."""
        return self.trend.is_end(self.run, self.step, self.program.steps)

    def _do_steps(self) -> None:
        """Do the steps, and evaluate, sample and save between them. A step is reported while the next one runs."""
        batches = to_devices(self.data.loader, self.program)
        pending: Report | None = None
        while not self.is_end() and not self._stopping():
            report = self._do_step(next(batches))
            self.checkpoints.check()
            self._report(pending)
            pending = report
            if self._is_pause():
                self._report(pending)
                pending = None
                loss = self._evaluate() if self._due(self.run.log.eval_every) else None
                if self._due(self.run.log.sample_every):
                    self._sample()
                if self._due(self.run.checkpoint.every):
                    self._save(loss)
                self.progress.pause()
        if self.stop.requested:
            self.stop.acknowledge()
        self._report(pending)

    def _do_step(self, batch: Batch) -> Report:
        """Dispatch one optimizer step."""
        self.profile.before(self.step + 1, self.state)
        with self._phase("compiling the training step", self.step == self.first):
            self.state, metrics = self.train_step(self.state, self.frozen.params, batch)
        self.stop.begin_work()
        if self.any_stop is not None:
            metrics["stop"] = self.any_stop(self.stop.requested)
        self.step += 1
        self.profile.after(self.step, self.state)
        return Report(self.step, metrics)

    def _phase(self, title: str, long: bool) -> contextlib.AbstractContextManager[None]:
        """Announces a phase of the first process if it is long."""
        if not (long and self.main):
            return contextlib.nullcontext()
        return phase(title, self.progress.say, of=f"{self.run.shape.num_params} {self.program.batch['tokens'].shape}")

    def _due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self.program.steps)

    def _is_pause(self) -> bool:
        log = self.run.log
        return any(self._due(every) for every in (self.run.checkpoint.every, log.eval_every, log.sample_every))

    def _stopping(self) -> bool:
        # All processes must leave after the same step, whichever of them received the signal: each sends its flag with
        # the metrics of a step. (jax's own preemption notice would need the SIGTERM handler that StopSignal has.)
        return self.stop.requested if self.any_stop is None else self.stop_seen

    def _asked_to_stop(self) -> bool:
        """True if any process was asked to stop. Every process must call it between steps; it waits for all."""
        if self.any_stop is None:
            return self.stop.requested
        return bool(jax.device_get(self.any_stop(self.stop.requested)))

    def _report(self, report: Report | None) -> None:
        """Wait for the metrics of a step, and log and print them."""
        if report is None:
            return
        step = report.step
        values = {name: float(value) for name, value in jax.device_get(report.metrics).items()}
        self.stop_seen = bool(values.pop("stop", 0.0))
        if values["skipped"] >= self.run.train.max_skipped:
            raise TrainingError(
                f"step {step}: the loss or the gradient was not finite {int(values['skipped'])} times in a row. Those "
                "steps changed nothing, and the saved checkpoints are good. Look at the data around this step, or "
                "lower optimizer.learning_rate, and start again: the run continues from its last checkpoint, if it has "
                "one"
            )
        if self.log is None:
            return
        speed: dict[str, float] = {}
        if self.profile.covers(step):
            self.progress.pause()
        else:
            speed = self.progress.speed(step)
        self._log(step, {**values, **speed})
        self.progress.show(step, values=values, speed=speed)
        if values["skipped"]:
            self.progress.say(f"step {step}: loss or gradient not finite, step skipped")

    def _log(self, step: int, values: dict[str, float]) -> None:
        """Write metrics to the log and give them to the caller, in the first process."""
        assert self.log is not None
        self.log.write(step, values)
        if self.hooks.on_metrics is not None and self.hooks.on_metrics(step, dict(values)):
            self.stop.requested = True

    def _evaluate(self) -> float | None:
        """The validation loss of the state, logged and printed; None without an evaluation, or when asked to stop."""
        if self.data.validation is None or not self.run.log.eval_every:
            return None
        batches = evaluation_batches(
            self.data.validation,
            batch_size=self.run.data.batch_size,
            max_batches=self.run.log.eval_batches,
            rows_of_host=self.program.rows_of_host,
        )
        evaluate = functools.partial(self.eval_step, self.state.best, self.frozen.params)
        sums = []
        with self._phase("evaluating the model before the first step", self.step == self.first == 0):
            for batch in to_devices(batches, self.program):
                if self._asked_to_stop():
                    return None
                sums.append(evaluate(batch))
            sums = jax.device_get(sums)
        total = {name: float(sum(part[name] for part in sums)) for name in sums[0]}
        count = max(total.pop("count"), 1.0)
        means = {name: value / count for name, value in total.items()}
        if self.log is not None:
            self._log(self.step, {f"validation_{name}": mean for name, mean in means.items()})
            more = f"perplexity {np.exp(min(means['loss'], 50)):.2f}"
            if "accuracy" in means:
                more = f"accuracy {means['accuracy']:.1%}  margin {means['margin']:.3f}"
            self.progress.say(f"step {self.step}  validation loss {means['loss']:.4f}  {more}")
        self.trend = self.trend.after(means["loss"])
        return means["loss"]

    def _sample(self) -> None:
        """Print a sample for each of log.sample_prompts."""
        if self.hooks.sampler is None:
            return
        with jax.transfer_guard("allow"):
            params = trainable.policy(self.run, self.state.best, parallel.on_device(self.frozen.params))
            run = dataclasses.replace(self.run, model=trainable.policy_config(self.run))
            try:
                with self.stop.interruptible():
                    texts = self.hooks.sampler(run, params, self.data.tokenizer, self.program.layout.mesh)
            except Interrupted:
                return
        if self.log is not None:
            samples = dict(zip(self.run.log.sample_prompts, texts, strict=True))
            self.log.write_texts(self.step, samples)
            for prompt, text in samples.items():
                self.progress.say(f"step {self.step}  sample: {prompt}" + f"|{text}".replace("\n", "\n    "))

    def _save(self, loss: float | None) -> None:
        """Start saving a checkpoint of this step; `loss` is its validation loss, if that was computed."""
        if not jax.device_get(self.all_finite(self.state.params)):
            raise TrainingError(
                f"step {self.step}: weights are not finite, so this step is not saved; earlier checkpoints are good. "
                "Lower optimizer.learning_rate and start again: the run continues from its last checkpoint, if it has "
                "one"
            )
        meta = {
            "data": self.data.loader.state(),
            "config": self.run.to_dict(),
            "frozen": self.frozen.identity,
            "trend": dataclasses.asdict(self.trend),
            "objective": own_name(self.program.loss),
            "files": self.folder.files,
        }
        with jax.transfer_guard("allow"):
            self.checkpoints.save(self.step, params=self.state.best, rest=rest_of(self.state), meta=meta, loss=loss)
            if self.run.lora.rank:
                self._write_adapter()
        self.saved = self.step

    def _write_adapter(self) -> None:
        """Write LoRA's adapter. A failure ends no run, since the checkpoint has the same weights."""
        try:
            self.folder.write_adapter(self.run, self.state.best, self.step)
        except (OSError, ConfigError) as error:  # the second if an earlier, partial folder cannot be removed
            self.progress.say(f"warning: the adapter of step {self.step} is not written: {one_line(error)}")

    def _new_progress(self) -> Progress:
        run = self.run
        tokens = run.data.batch_size * run.data.sequence_length
        forward = run.shape.flops_per_token(run.data.sequence_length, training=False)
        flops = tokens * forward * trainable.forward_equivalents(run)
        return Progress(
            start=self.first,
            steps=self.program.steps,
            every=run.log.every,
            tokens_per_step=tokens,
            flops_per_step=flops,
        )


def to_devices(batches: Iterator[dict[str, np.ndarray]], program: Program) -> Iterator[Batch]:
    """Global arrays of host batches: each device gets its rows and columns, and no host holds whole arrays."""
    shape = program.batch["tokens"].shape
    sharding = program.batch_sharding
    local_row = {row: i for i, row in enumerate(program.rows_of_host)}

    def shard(local: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        rows = [local_row[row] for row in range(*index[0].indices(shape[0]))]
        return local[rows][:, index[1]]

    for batch in batches:
        with jax.transfer_guard_host_to_device("allow"):  # the only transfer of a batch
            arrays: Batch = {
                name: jax.make_array_from_callback(shape, sharding, functools.partial(shard, local))
                for name, local in batch.items()
            }
        yield arrays


def _all_finite(params: Params) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))


def _any_process(layout: parallel.Layout) -> Callable[[bool], jax.Array]:
    """An asynchronous all-reduce (logical or) of a flag of each process. Every process must call it."""
    spread = parallel.spread(layout.mesh)
    reduce = jax.jit(jnp.any, out_shardings=parallel.replicated(layout.mesh))

    def any_process(flag: bool) -> jax.Array:
        with jax.transfer_guard_host_to_device("allow"):
            return reduce(jax.make_array_from_callback((layout.mesh.size,), spread, lambda _: np.array([flag])))

    return any_process
