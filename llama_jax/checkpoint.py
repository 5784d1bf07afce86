"""Checkpoints: weights, the rest of the state and metadata, saved together or not at all.

Orbax writes a step into `checkpoints/saving-STEP`. A background thread then hashes the files, adds a manifest, and
renames the folder to `checkpoints/STEP` once all of it is on disk. That rename is the commit, and older steps are
deleted only after it. A process that is killed or a disk that is full, at any time, leaves the earlier checkpoints
intact. Nothing is read from a step before its files are validated against its manifest.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from llama_jax import manifest
from llama_jax.errors import ConfigError
from llama_jax.parallel import processes
from llama_jax.params import Params

_FOLDER = "checkpoints"
_SAVING, _DELETING, _DAMAGED = "saving-", "deleting-", "damaged-"
_NONE, _ALL_DAMAGED = -1, -2
# Warnings of Orbax where each process has a disk of its own.
_USUAL, _MERGE = "logging disabled for `primary_host=None`.", "Skipping merge of OCDBT checkpoints"
_commits = itertools.count()  # all processes commit the same steps in the same order


class SaveError(OSError):
    """A checkpoint could not be written. The checkpoints before it are intact."""


class Deleted(ConfigError):
    """A checkpoint that does not exist, or that a training run deleted while it was read. Newer ones may exist."""


class Checkpoints:
    """The checkpoints of one run folder. With several processes, every process must make every call.

    Args:
        run_folder: the folder that contains `checkpoints/`.
        keep: number of newest steps to keep; None keeps all.
        keep_best: number of steps of the lowest validation loss to keep in addition.
        create: create the folder if it does not exist; False for reading only.
        on_commit: called in the background after each commit, in the first process, or with `own_disks` in every one.
        own_disks: each of several processes has a disk of its own. It writes, validates and deletes the files of its
            own shards, and a step is not complete on any of them. The arrays are then files of their own, one a shard.
    """

    def __init__(
        self,
        run_folder: str | Path,
        *,
        keep: int | None = None,
        keep_best: int = 0,
        create: bool = True,
        on_commit: Callable[[], None] | None = None,
        own_disks: bool = False,
    ):
        self.folder = Path(run_folder).resolve() / _FOLDER
        if create:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._keep, self._keep_best, self._on_commit = keep, keep_best, on_commit
        self._own_disks = own_disks
        self._writes = own_disks or jax.process_index() == 0
        self._orbax = _orbax(own_disks)
        self._background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: concurrent.futures.Future[None] | None = None
        self._validated: set[tuple[int, str]] = set()  # (step, item) pairs that were validated

    def steps(self) -> list[int]:
        """All committed steps, the newest first. Their files are not validated."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted((int(name) for name in names if name.isdecimal() and name == str(int(name))), reverse=True)

    def best(self) -> int | None:
        """The kept step of the lowest validation loss, or None if no loss was measured."""
        return next(iter(_by_loss({step: found.loss for step, found in self._manifests().items()})), None)

    def latest(self, *items: str) -> int | None:
        """The newest step whose files are intact, or None if there is no step at all.

        A warning names each newer step that is skipped, and the reason. Steps that a training run deletes during this
        call are ignored.

        Args:
            *items: the items that will be read, of "params", "rest" and "meta"; all by default.

        Raises:
            ConfigError: there are steps, but all of them are damaged.
        """
        items = items or ("params", "rest", "meta")
        why = ""

        def choose() -> int:
            nonlocal why
            damaged: set[int] = set()
            while steps := [step for step in self.steps() if step not in damaged]:
                step, *older = steps
                if not damaged and self._without_manifests():
                    _warn(
                        f"no checkpoint in {self.folder} has a manifest (they are of an older version): not validated"
                    )
                try:
                    problem = self._problem(step, items)
                except Deleted:
                    continue
                if problem is None:
                    return step
                damaged.add(step)
                why = f"checkpoint {self.folder / str(step)} is damaged: {problem}"
                if older:
                    _warn(f"{why}; trying step {older[0]}")
            return _ALL_DAMAGED if damaged else _NONE

        step = self._agree(choose)
        if step == _ALL_DAMAGED:
            raise ConfigError(
                f"{why or f'no checkpoint in {self.folder} is intact'}, and there is no older one: restore one from a "
                "backup, or set another output to start a new run"
            )
        if step == _NONE:
            return None
        self._validated |= {(step, item) for item in items}
        return step

    def go_on_from(self, step: int | None) -> None:
        """Prepares the folder for a run that continues from `step`; None means that it starts from the beginning.

        Checkpoints of later steps are damaged, because a restore takes the newest intact one. They are not deleted but
        renamed to `damaged-STEP`. Partial files of saves that were killed or failed are deleted.
        """
        if not self._writes or not self.folder.is_dir():
            return
        for newer in (s for s in self.steps() if step is None or s > step):
            names = (f"{_DAMAGED}{newer}{again}" for again in ("", *(f"-{i}" for i in range(2, 1000))))
            aside = next(name for name in names if not (self.folder / name).exists())
            os.rename(self.folder / str(newer), self.folder / aside)
            _warn(f"moved {self.folder / str(newer)} to {aside}")
        self._sweep(_SAVING, _DELETING)

    def save(self, step: int, *, params: Params, rest: Any, meta: dict[str, Any], loss: float | None = None) -> None:
        """Starts saving a step. Returns once the arrays are copied; writing continues in the background.

        Args:
            step: the training step, which names the checkpoint.
            params: stacked weights.
            rest: a pytree of the other arrays of the state.
            meta: metadata that can be written as JSON: the data position, the config.
            loss: validation loss at this step, for keep_best; None if it was not measured.

        Raises:
            SaveError: this save or the previous one failed, or a step that is not older exists.
        """
        _silence_libraries()
        self.wait()
        newest = max(self.steps(), default=_NONE)
        if step <= newest:
            raise SaveError(f"step {step} was not saved: {self.folder} already has step {newest}, from another run")
        try:
            self._orbax.save(
                self.folder / f"{_SAVING}{step}",
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    rest=ocp.args.StandardSave(rest),
                    meta=ocp.args.JsonSave(meta),
                ),
            )
        except Exception as error:  # whatever Orbax and TensorStore raise
            raise self._save_error(step, error) from error
        self._saving = self._background.submit(self._commit, step, loss)

    def check(self) -> None:
        """Raises the SaveError of a save that failed in the background. It costs nothing, so call it every step."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is committed, or raises its SaveError."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Waits for the last save, and ends the background threads."""
        self.wait()
        self._background.shutdown()
        self._orbax.close()

    def restore(self, step: int, *, params: Params, rest: Any) -> tuple[Params, Any, dict[str, Any]]:
        """The (params, rest, meta) of a step, with the shapes, dtypes and shardings of the abstract trees.

        Raises:
            ConfigError: the step is damaged, or its arrays have other names, shapes or dtypes than the abstract trees.
        """
        restored = self._restored(
            step,
            params=ocp.args.StandardRestore(params),
            rest=ocp.args.StandardRestore(rest),
            meta=ocp.args.JsonRestore(),
        )
        return restored["params"], restored["rest"], restored["meta"]

    def restore_params(self, step: int, params: Params) -> Params:
        """The weights of a step alone. Raises as `restore`."""
        return self._restored(step, params=ocp.args.StandardRestore(params))["params"]

    def meta(self, step: int) -> dict[str, Any]:
        """The metadata of a step alone. Raises as `restore`."""
        return self._restored(step, meta=ocp.args.JsonRestore())["meta"]

    def digests(self, step: int) -> dict[str, str]:
        """SHA-256 of each file of a step's weights, by name. Together they identify the weights.

        Raises:
            Deleted: there is no such step.
            ConfigError: its manifest is damaged.
        """
        folder = self.folder / str(step)
        try:
            if self._without_manifests():
                paths = (path.relative_to(folder).as_posix() for path in (folder / "params").rglob("*"))
                return manifest.digests(folder, paths)
            files = manifest.read_exact(folder, step=step).files
        except (manifest.DamagedError, OSError) as error:
            self._check_exists(step)
            raise ConfigError(f"checkpoint {folder} is damaged: {error}") from None
        return {name: digest for name, (_, digest) in files.items() if name.startswith("params/")}

    def _restored(self, step: int, **items: Any) -> Any:
        _silence_libraries()
        folder = self.folder / str(step)
        why = ""

        def validate() -> int:
            nonlocal why
            try:
                why = self._problem(step, items) or ""
            except Deleted:
                return _NONE
            return _ALL_DAMAGED if why else step

        if not self._validated.issuperset((step, item) for item in items):
            found = self._agree(validate)
            if found == _NONE:
                raise self._deleted(step)
            if found == _ALL_DAMAGED:
                raise ConfigError(
                    f"checkpoint {folder} is damaged: {why or 'see process 0'}; continue from another step"
                )
        try:
            restored = self._orbax.restore(folder, args=ocp.args.Composite(**items))
            self._check_exists(step)  # arrays whose files are deleted meanwhile may be read as zeros
            return restored
        except Deleted:
            raise
        except Exception as error:  # whatever Orbax and TensorStore raise
            self._check_exists(step)
            older = [s for s in self.steps() if s < step]
            remedy = f"move it away to continue from step {max(older)}" if older else "it is the only one"
            raise ConfigError(f"checkpoint {folder} cannot be read: {remedy} ({_one_line(error)})") from error

    def _agree(self, decide: Callable[[], int]) -> int:
        """The decision of process 0, which alone reads and hashes files, or the same decision of all `own_disks`.

        Raises:
            ConfigError: the disks differ.
        """
        if jax.process_count() == 1:
            return decide()
        decision = decide() if self._writes else 0
        if not self._own_disks:
            return processes.agreed(decision)
        processes.meet("decision")
        decisions = np.asarray(multihost_utils.process_allgather(np.int32(decision))).ravel()
        if len(set(decisions.tolist())) > 1:
            raise ConfigError(
                f"{self.folder} is not intact in every process, which found steps {', '.join(map(str, decisions))}: "
                "delete that folder in each, and start again from the copy in the store"
            )
        return decision

    def _problem(self, step: int, items: Collection[str]) -> str | None:
        """The damage that the manifest of a step reveals, in words; None if the step is intact. Raises Deleted."""
        try:
            manifest.check(self.folder / str(step), step=step, items=items)
        except manifest.DamagedError as error:
            self._check_exists(step)
            return None if self._without_manifests() else str(error)
        return None

    def _check_exists(self, step: int) -> None:
        """Raise Deleted for a step that does not exist. A step is renamed before any of its files is deleted."""
        if not (self.folder / str(step)).is_dir():
            raise self._deleted(step)

    def _deleted(self, step: int) -> Deleted:
        steps = ", ".join(map(str, self.steps()))
        return Deleted(f"{self.folder} has no checkpoint of step {step}: the steps in it are {steps or 'none'}")

    def _without_manifests(self) -> bool:
        """True if no step has a manifest: an older version wrote them all. If some have one, the others are damaged."""
        folders = [self.folder / str(step) for step in self.steps()]
        return any(map(Path.is_dir, folders)) and not any((folder / manifest.FILE).exists() for folder in folders)

    def _commit(self, step: int, loss: float | None) -> None:
        """Waits for Orbax, hashes and commits the step, and prunes older ones. It runs in the background."""
        try:
            self._orbax.wait_until_finished()
            if self._writes:
                whole = self.folder / f"{_SAVING}{step}"
                manifest.write(whole, step=step, loss=loss if loss is not None and math.isfinite(loss) else None)
                os.rename(whole, self.folder / str(step))
                manifest.sync(self.folder)
            processes.barrier(f"checkpoint {next(_commits)}")
        except Exception as error:
            raise self._save_error(step, error) from error
        if self._writes:
            self._prune()
            if self._on_commit is not None:
                self._on_commit()

    def _manifests(self) -> dict[int, manifest.Manifest]:
        """The manifest of each step, the newest first, without damaged ones."""
        manifests = {}
        for step in self.steps():
            with contextlib.suppress(manifest.DamagedError):
                manifests[step] = manifest.read_exact(self.folder / str(step), step=step)
        return manifests

    def _prune(self) -> None:
        """Deletes all steps but the newest and the best. Damaged steps are not counted and not deleted."""
        losses = {step: found.loss for step, found in self._manifests().items()}
        keep = kept(losses, keep=self._keep, keep_best=self._keep_best)
        for step in losses.keys() - keep:  # renamed first, so that no step is ever seen half deleted
            os.rename(self.folder / str(step), self.folder / f"{_DELETING}{step}")
        self._sweep(_DELETING)

    def _sweep(self, *prefixes: str) -> None:
        for path in self.folder.iterdir():
            if path.name.startswith(prefixes):
                shutil.rmtree(path, ignore_errors=True)  # one that a process still reads is deleted next time

    def _save_error(self, step: int, error: Exception) -> SaveError:
        newest = max(self.steps(), default=None)
        remaining = "none was saved before" if newest is None else f"that of step {newest} is intact"
        return SaveError(
            f"the checkpoint of step {step} could not be saved, {remaining} ({_one_line(error)}): make room, or repair "
            "the folder, and start again"
        )


def kept(losses: Mapping[int, float | None], *, keep: int | None, keep_best: int) -> set[int]:
    """The steps to keep of those with these validation losses: the `keep` newest (None: all) and the best."""
    return {*sorted(losses, reverse=True)[:keep], *_by_loss(losses)[:keep_best]}


def _by_loss(losses: Mapping[int, float | None]) -> list[int]:
    """The steps with a validation loss, sorted by it. Equal losses are sorted from new to old."""
    scored = [(loss, -step) for step, loss in losses.items() if loss is not None]
    return [-step for _, step in sorted(scored)]


def _orbax(own_disks: bool) -> ocp.AsyncCheckpointer:
    """Orbax's writer and reader of a step."""
    hosts = ocp.options.MultiprocessingOptions(primary_host=None if own_disks else 0)
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for name in ("params", "rest"):
        for arguments in (ocp.args.StandardSave, ocp.args.StandardRestore):
            # OCDBT puts the shards of a process into files that another process would have to read.
            arrays = ocp.StandardCheckpointHandler(multiprocessing_options=hosts, use_ocdbt=not own_disks)
            handlers.add(name, arguments, arrays)
    for arguments in (ocp.args.JsonSave, ocp.args.JsonRestore):
        handlers.add("meta", arguments, ocp.JsonCheckpointHandler(multiprocessing_options=hosts))
    # A folder that is created in the background raises its failure only after minutes, and a process with a disk of its
    # own would not wait for its own folder.
    at_once = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    options = ocp.CompositeOptions(multiprocessing_options=hosts, async_options=at_once)
    handler = ocp.CompositeCheckpointHandler(handler_registry=handlers, composite_options=options)
    return ocp.AsyncCheckpointer(handler, multiprocessing_options=hosts, async_options=at_once)


def _one_line(error: Exception) -> str:
    """An error of a library in one line. The system's reason is at the end of TensorStore's errors."""
    text = " ".join(str(error).split()).partition(" [tensorstore_spec=")[0]
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:140] + ' ... ' + text[-140:]}"


@functools.cache  # once in a process
def _silence_libraries() -> None:
    """Silences what Orbax and asyncio log before the one line of an error, and what they log of every save.

    After a failure, other reads and writes of TensorStore fail as well, some because their event loop is closed. Python
    would print those errors when it collects their coroutines.
    """
    for logger in map(logging.getLogger, ("absl", "asyncio")):
        logger.addFilter(lambda record: not (record.exc_info and _is_from_orbax(record)))
        logger.addFilter(lambda record: not record.getMessage().endswith(_USUAL) and _MERGE not in record.getMessage())
    previous_hook = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        closed = unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"
        code = getattr(unraisable.object, "cr_code", None)
        if not closed and "orbax" not in getattr(code, "co_filename", ""):
            previous_hook(unraisable)

    sys.unraisablehook = hook


def _is_from_orbax(record: logging.LogRecord) -> bool:
    """True for a record of Orbax or asyncio. asyncio runs for Orbax alone, so its errors belong to the same save."""
    return record.name == "asyncio" or "orbax" in record.pathname + record.getMessage()


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
