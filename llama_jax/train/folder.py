"""The folder of a training run: its lock, the checks of a resumed run, config.json, and the results."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llama_jax import manifest
from llama_jax.checkpoint import Checkpoints, SaveError
from llama_jax.data.loader import Loader, position_of
from llama_jax.errors import ConfigError, one_line
from llama_jax.files import write_json
from llama_jax.parallel import processes
from llama_jax.run_config import RunConfig, differences
from llama_jax.run_shape import PartialShape
from llama_jax.storage import is_url, work_folder
from llama_jax.text import chat_template
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train import trainable
from llama_jax.train.metrics import draw_loss, say
from llama_jax.train.mirror import Mirror, PartMirror
from llama_jax.train.objectives import Objective, own_name
from llama_jax.train.program import Program
from llama_jax.train.setup import Frozen
from llama_jax.train.state import TrainState
from llama_jax.weights import export, lora_params, name_table
from llama_jax.weights.adapters import Adapter
from llama_jax.weights.formats import peft
from llama_jax.weights.formats.huggingface import GENERATION_FILE, TOKENIZER_FILES
from llama_jax.weights.locate import absolute
from llama_jax.weights.model_files import Metadata, tokenizer_in
from llama_jax.weights.open import open_source
from llama_jax.weights.run_folder import CONFIG_FILE

# Keys that may change when a run is resumed. A change of any other key is an error.
_MAY_CHANGE = (
    "init_from",  # a frozen model is compared by its identity instead
    "optimizer.",
    "train.steps",
    "train.epochs",
    "train.patience",
    "train.max_skipped",
    "train.accumulate",
    "train.remat",
    "data.batch_size",  # the position in the data counts rows
    "data.train",  # the loader compares the contents
    "log.",
    "checkpoint.",
    "mesh.",
    "lora.offload",
    "distributed.",
    "output",
    "data.cache",
)
# Exceptions: keys that decide which arrays the state has.
_MAY_NOT = ("optimizer.name", "optimizer.moments", "optimizer.ema_decay")
_OLD_STEP = ".step"  # held the step of an adapter in earlier versions


@dataclasses.dataclass(frozen=True)
class Trend:
    """The course of the validation loss, for train.patience.

    Attributes:
        lowest: The lowest validation loss so far, or None before the first evaluation.
        higher: The number of evaluations since then, none of which was lower.
    """

    lowest: float | None = None
    higher: int = 0

    def after(self, loss: float) -> Trend:
        """The trend after one more evaluation."""
        if self.lowest is None or loss < self.lowest:
            return Trend(loss, 0)
        return Trend(self.lowest, self.higher + 1)

    def is_end(self, run: RunConfig, step: int, steps: int) -> bool:
        """True if the run is complete at `step` of `steps`, or ends early by train.patience."""
        return step >= steps or 0 < run.train.patience <= self.higher


@dataclasses.dataclass(frozen=True)
class Newest:
    """The newest intact checkpoint of a run folder, without its arrays.

    Attributes:
        step: The step that it was saved at.
        config: The nested dict of the run that saved it.
        frozen: The identity of the frozen model, or None.
        trend: The course of the validation loss up to then.
        position: The number of training rows that its steps took.
        objective: The name of the caller's own loss function, or None.
        files: SHA-256 of each file of tokenizer, chat template and sampling defaults; empty for checkpoints of earlier
            versions.
    """

    step: int
    config: dict[str, Any]
    frozen: str | None
    trend: Trend
    position: int
    objective: str | None
    files: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Base:
    """The parts of LoRA's base that an adapter takes.

    Attributes:
        metadata: The metadata of the base.
        rows: The rows of the trained tokens by path (`lora_params.base_rows`).
    """

    metadata: Metadata
    rows: Mapping[name_table.Path, np.ndarray]


class RunFolder:
    """The folder of a run, open for training. With several processes, every process must make every call.

    Attributes:
        path: The folder.
        checkpoints: Its checkpoints.
        files: SHA-256 of each file of tokenizer, chat template and sampling defaults, once config.json is written.
    """

    def __init__(self, run: RunConfig):
        self.path = work_folder(run.output, processes.number())
        several = jax.process_count() > 1
        self.mirror: Mirror | None = None
        if is_url(run.output):
            self.mirror = (PartMirror if several else Mirror)(run.output, self.path, run.checkpoint)
            self.mirror.fetch()
        self.files: dict[str, str] = {}
        self._base: Base | None = None
        self.checkpoints = Checkpoints(
            self.path,
            keep=run.checkpoint.keep,
            keep_best=run.checkpoint.keep_best,
            on_commit=None if self.mirror is None else self.mirror.push_soon,
            own_disks=self.mirror is not None and several,
        )

    def newest(self, *, resume: bool) -> Newest | None:
        """The newest intact checkpoint, or None in a new folder. ConfigError if there is one and `resume` is False."""
        step = self.checkpoints.latest()
        if step is None:
            return None
        if not resume:
            raise ConfigError(f"{self.path} has a checkpoint of step {step}: resume it, or set another output")
        meta = self.checkpoints.meta(step)
        return Newest(
            step,
            meta["config"],
            meta.get("frozen"),
            Trend(**meta.get("trend", {})),
            position_of(meta["data"]),
            meta.get("objective"),
            meta.get("files", {}),
        )

    def check_resume(self, run: RunConfig, newest: Newest, objective: Objective) -> RunConfig:
        """Check that `run` continues the run that saved the checkpoint, and print the keys that have changed.

        Returns: The run with the shape in the checkpoint, so that the model of init_from need not exist any more.

        Raises:
            ConfigError: a key differs that would make it another run.
        """
        saved = RunConfig.from_dict(newest.config)  # keys that an older version lacked have their defaults
        if isinstance(run.model, PartialShape):
            run = dataclasses.replace(run, model=run.model.of(saved.shape))
        changed = differences(saved.to_dict(), run.to_dict())
        refused = {key: values for key, values in changed.items() if not key.startswith(_MAY_CHANGE) or key in _MAY_NOT}
        if refused:
            lines = "; ".join(f"{key} was {old!r}, is now {new!r}" for key, (old, new) in refused.items())
            raise ConfigError(
                f"{self.path} was trained with other settings: {lines}. Set them back to resume it, or set another "
                "output to start a new run"
            )
        if newest.objective != own_name(objective):
            words = [name or "the one of train.objective" for name in (newest.objective, own_name(objective))]
            raise ConfigError(
                f"{self.path} was trained with another loss: it was {words[0]}, is now {words[1]}. Give the same loss "
                "to train(..., loss=...), or set another output to start a new run"
            )
        for key, (old, new) in changed.items():
            say(f"{key} was {old!r}, is now {new!r}")
        return run

    def check_frozen(self, run: RunConfig, newest: Newest, frozen: Frozen) -> None:
        """Check that the frozen model is the one that the run was started with; ConfigError otherwise."""
        if newest.frozen != frozen.identity:
            raise ConfigError(
                f"init_from={run.init_from!r} is not the model that {self.path} was begun with, and its checkpoints "
                "fit no other: name that model, or set another output to start a new run"
            )

    def restore(self, program: Program, step: int, loader: Loader) -> TrainState:
        """The state of a checkpoint on this run's mesh; the loader moves to its batch."""
        abstract, rest = program.state, rest_of(program.state)
        if self.mirror is not None:
            self.mirror.fetch_arrays(step, {"params": abstract.best, "rest": rest})
        best, rest, meta = self.checkpoints.restore(step, params=abstract.best, rest=rest)
        loader.restore(meta["data"])
        if abstract.ema is None:
            return TrainState(params=best, ema=None, **rest)
        return TrainState(ema=best, **rest)

    def files_intact(self, newest: Newest) -> bool:
        """True if tokenizer, chat template and sampling defaults are those of the checkpoint. Prints which are not."""
        changed = manifest.changed(self.path, newest.files)
        for path in changed:
            say(f"warning: {path} was changed after it was written or is missing: making it again")
        return not changed

    def check_files(self, newest: Newest) -> None:
        """Check tokenizer, chat template and sampling defaults of a resumed run; ConfigError if they are others."""
        for path in manifest.changed(self.path, newest.files):
            raise ConfigError(
                f"{path} is not the one that the run was started with, and cannot be made again from init_from and the "
                "data: restore it from a backup, or set another output to start a new run"
            )

    def write_config(self, run: RunConfig, tokenizer: Tokenizer, frozen: str | None) -> None:
        """Write config.json: the run, its tokenizer's fingerprint, the frozen model's identity, and hashes.

        The file contains the hashes of the files of tokenizer, chat template and sampling defaults, and one of itself,
        so that readers notice when one of them was damaged.
        """
        self.files = manifest.digests(self.path, (*TOKENIZER_FILES, GENERATION_FILE))
        if jax.process_index() == 0:
            identities = {"tokenizer_fingerprint": tokenizer.fingerprint, "frozen": frozen, "files": self.files}
            values = {**run.to_dict(), "init_from": absolute(run.init_from), **identities}
            write_json(self.path / CONFIG_FILE, manifest.sealed(values))

    def write_results(self, program: Program, state: TrainState) -> None:
        """Write the picture of the loss, and LoRA's adapter unless it is already that of this step.

        Raises:
            SaveError: the adapter could not be written; or the store cannot be written to.
        """
        step, failure = int(state.step), None
        if program.run.lora.rank and not processes.agreed(self._adapter_step() == step):
            self.read_base(program.run)
            try:
                self.write_adapter(program.run, state.best, step)
            except OSError as error:
                failure = SaveError(
                    f"the adapter of step {step} could not be written ({one_line(error)}), its checkpoint is intact: "
                    "make room, or repair the folder, and start again, which writes it"
                )
        if jax.process_index() == 0:
            try:
                draw_loss(self.path, program.run.train.objective)
            except OSError as error:  # everything else is saved
                say(f"warning: the picture of the loss is not written: {one_line(error)}")
        if self.mirror is not None:
            self.mirror.close()
        if failure is not None:
            raise failure

    def _adapter_step(self) -> int | None:
        """The step of the adapter in the folder, or None if there is none, or it is damaged or lacks a file."""
        folder = self.path / "adapter"
        try:
            found = manifest.check_present(folder)
        except manifest.DamagedError:
            return None
        return found.step if all((folder / name).is_file() for name in found.files) else None

    def read_base(self, run: RunConfig) -> None:
        """Read the parts of LoRA's base that adapters take, once, so that no save needs the base's store."""
        if run.lora.rank and self._base is None:
            source = open_source(run.init_from)
            leaves = source.merged_leaves() if run.lora.trained_tokens else {}
            self._base = Base(source.metadata, lora_params.base_rows(run.lora, leaves))

    def write_adapter(self, run: RunConfig, trained: trainable.Trained, step: int) -> None:
        """Write LoRA's matrices as peft reads them, with tokenizer, chat template and a manifest that has the step.

        `read_base` must come first. Other files in the folder stay. The manifest is replaced last: until then it does
        not fit the files, so that no reader uses them, and a run that was killed writes them again.
        """
        fresh, final = self.path / "adapter.new", self.path / "adapter"
        lora = export.lazy_lora(lora_params.lora_by_path(run.lora, trained))
        assert self._base is not None
        rows = lora_params.token_rows(run.lora, trained, self._base.rows)
        adapter = Adapter(trainable.policy_config(run), lora, rows=rows)
        if jax.process_index() == 0:
            shutil.rmtree(fresh, ignore_errors=True)
        base = absolute(run.init_from)
        peft.write_adapter(fresh, adapter, base_model=base, dropout=run.lora.dropout)
        if jax.process_index() == 0:
            metadata = self._base.metadata.with_tokenizer(tokenizer_in(self.path))
            metadata = dataclasses.replace(metadata, chat_template=chat_template.read_folder(self.path))
            export.write_tokenizer(fresh, metadata, model_max_length=run.shape.max_seq_len)
            manifest.write(fresh, step=step, loss=None)
            final.mkdir(exist_ok=True)
            (final / _OLD_STEP).unlink(missing_ok=True)
            for file in sorted(fresh.iterdir(), key=lambda path: path.name == manifest.FILE):
                os.replace(file, final / file.name)
            fresh.rmdir()


def rest_of(state: TrainState) -> dict[str, Any]:
    """The part of the state that a checkpoint saves besides `state.best`; with an EMA it has the weights too."""
    rest = {name: getattr(state, name) for name in ("opt_state", "key", "skipped", "step")}
    return rest if state.ema is None else {**rest, "params": state.params}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a run folder against a second process that would train in it. A killed process loses its lock.

    Raises:
        ConfigError: another process trains in it.
    """
    if jax.process_index() > 0:
        yield
        return
    with open(path / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process trains in {path}: wait for it, stop it, or set another output"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
