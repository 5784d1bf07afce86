"""Checkpoints: weights, the rest of the state, and what is not arrays, saved together or not at all.

Orbax writes a step into `checkpoints/saving-STEP`. A background thread then hashes the files, puts a manifest beside
them, and renames the folder to `checkpoints/STEP` once all of it is on the disk: that rename is the commit, and only
after it are older steps deleted. A process that is killed, or a disk that is full, at any instant leaves the
checkpoints as they were. Nothing is read from a step before its files were held against its manifest.
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
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from llama_jax import manifest
from llama_jax.errors import ConfigError
from llama_jax.params import Params

_FOLDER = "checkpoints"
_SAVING, _DELETING, _DAMAGED = "saving-", "deleting-", "damaged-"
_NONE, _ALL_DAMAGED = -1, -2
_PATIENCE_MS = 24 * 3600 * 1000  # for process 0 to hash; one that is lost ends the others by itself
_meetings = itertools.count()  # all processes meet in the same order


class SaveError(OSError):
    """A checkpoint could not be written. Those before it are as they were."""


class Checkpoints:
    """The checkpoints of one run folder. Where there are several processes, all of them make every call.

    Args:
        run_folder: where `checkpoints/` is or will be.
        keep: newest steps to keep; None keeps all.
        keep_best: steps of the lowest validation loss that are kept besides.
        create: make the folder where it is not there; False to read only.
    """

    def __init__(self, run_folder: str | Path, *, keep: int | None = None, keep_best: int = 0, create: bool = True):
        self.folder = Path(run_folder).resolve() / _FOLDER
        if create:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._keep, self._keep_best = keep, keep_best
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for name in ("params", "rest"):
            handlers.add(name, ocp.args.StandardSave, ocp.StandardCheckpointHandler())
            handlers.add(name, ocp.args.StandardRestore, ocp.StandardCheckpointHandler())
        handlers.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        handlers.add("meta", ocp.args.JsonRestore, ocp.JsonCheckpointHandler())
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(handler_registry=handlers),
            # Made in the background, a folder that cannot be made is an error only after minutes of waiting for it.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        self._background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: concurrent.futures.Future[None] | None = None
        self._sound: set[tuple[int, str]] = set()  # (step, item) that were held against the manifest

    def steps(self) -> list[int]:
        """Every step that was committed, whether or not its files are still sound; the newest first."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted((int(name) for name in names if name.isdecimal() and name == str(int(name))), reverse=True)

    def best(self) -> int | None:
        """The step of the lowest validation loss of those that are kept; None where none was measured."""
        return next(iter(self._by_loss(self._manifests())), None)

    def latest(self, *items: str) -> int | None:
        """The newest step whose files are as they were written, or None where there is no step at all.

        Says in a line which newer ones are passed over, and why.

        Args:
            *items: of "params", "rest" and "meta", what will be read; all by default.

        Raises:
            ConfigError: there are steps, and every one is damaged.
        """
        items = items or ("params", "rest", "meta")
        why = ""

        def choose() -> int:
            nonlocal why
            steps = self.steps()
            if steps and self._unproven():
                _warn(f"no checkpoint in {self.folder} has a manifest (it is from an older version): unchecked")
            for step, older in itertools.zip_longest(steps, steps[1:]):
                problem = self._problem(step, items)
                if problem is None:
                    return step
                why = f"checkpoint {self.folder / str(step)} is damaged: {problem}"
                if older is not None:
                    _warn(f"{why}; trying step {older}")
            return _ALL_DAMAGED if steps else _NONE

        step = _decided_by_first(choose)
        if step == _ALL_DAMAGED:
            raise ConfigError(
                f"{why or f'no checkpoint in {self.folder} is sound'}, and no older one is left: copy one from a "
                "backup, or set another output to start anew"
            )
        if step == _NONE:
            return None
        self._sound |= {(step, item) for item in items}
        return step

    def go_on_from(self, step: int | None) -> None:
        """Make ready to save what comes after `step` (None: from the start).

        Newer steps were passed over as damaged: they are moved aside, not deleted. What a save that was killed or
        failed has left is deleted.
        """
        if jax.process_index() or not self.folder.is_dir():
            return
        for newer in (s for s in self.steps() if step is None or s > step):
            names = (f"{_DAMAGED}{newer}{again}" for again in ("", *(f"-{i}" for i in range(2, 1000))))
            aside = next(name for name in names if not (self.folder / name).exists())
            os.rename(self.folder / str(newer), self.folder / aside)
            _warn(f"moved {self.folder / str(newer)} to {aside}")
        self._sweep(_SAVING, _DELETING)

    def save(self, step: int, *, params: Params, rest: Any, meta: dict[str, Any], loss: float | None = None) -> None:
        """Start saving a step. Returns once the arrays are copied; the writing goes on in the background.

        Args:
            step: the name of the checkpoint.
            params: weights, stacked.
            rest: any pytree of arrays that goes with them.
            meta: JSON-able: the data position, the config.
            loss: of validation at this step, for keep_best.

        Raises:
            SaveError: this save, or the one before it; or this step is not newer than what is there.
        """
        _hush()
        self.wait()
        newest = max(self.steps(), default=_NONE)
        if step <= newest:
            raise SaveError(f"step {step} was not saved: {self.folder} has step {newest}, of another run")
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
        """Raise what a save failed with, if one has. Costs nothing: for every step."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Return when the last save is committed, or raise the SaveError that it failed with."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Wait, and let go of the background threads."""
        self.wait()
        self._background.shutdown()
        self._orbax.close()

    def restore(self, step: int, *, params: Params, rest: Any) -> tuple[Params, Any, dict[str, Any]]:
        """A step's (params, rest, meta), with the shapes, types and shardings of the abstract trees given.

        Raises:
            ConfigError: the step is damaged, or is not of these trees. So do the next two.
        """
        restored = self._restored(
            step,
            params=ocp.args.StandardRestore(params),
            rest=ocp.args.StandardRestore(rest),
            meta=ocp.args.JsonRestore(),
        )
        return restored["params"], restored["rest"], restored["meta"]

    def restore_params(self, step: int, params: Params) -> Params:
        """Only the weights of a step."""
        return self._restored(step, params=ocp.args.StandardRestore(params))["params"]

    def meta(self, step: int) -> dict[str, Any]:
        """Only what is not arrays."""
        return self._restored(step, meta=ocp.args.JsonRestore())["meta"]

    def digests(self, step: int) -> dict[str, str]:
        """What tells the weights of a step from all others: the SHA-256 of their files, by name."""
        files = manifest.read(self.folder / str(step), step=step).files
        return {name: digest for name, (_, digest) in files.items() if name.startswith("params/")}

    def _restored(self, step: int, **items: Any) -> Any:
        folder = self.folder / str(step)
        why = ""

        def sound() -> int:
            nonlocal why
            why = self._problem(step, items) or ""
            return not why

        if not self._sound.issuperset((step, item) for item in items) and not _decided_by_first(sound):
            raise ConfigError(f"checkpoint {folder} is damaged: {why or 'see process 0'}; go on from another step")
        try:
            return self._orbax.restore(folder, args=ocp.args.Composite(**items))
        except Exception as error:  # whatever Orbax and TensorStore raise
            older = [s for s in self.steps() if s < step]
            mend = f"move it away to go on from step {max(older)}" if older else "it is the only one"
            raise ConfigError(f"checkpoint {folder} cannot be read: {mend} ({_brief(error)})") from error

    def _problem(self, step: int, items: Collection[str]) -> str | None:
        """What is wrong with a step, as far as its manifest knows."""
        if self._unproven():
            return None
        try:
            manifest.check(self.folder / str(step), step=step, items=items)
        except manifest.DamagedError as error:
            return str(error)
        return None

    def _unproven(self) -> bool:
        """Whether all steps were made before there were manifests; one without among others is damaged."""
        return not any((self.folder / str(step) / manifest.FILE).exists() for step in self.steps())

    def _commit(self, step: int, loss: float | None) -> None:
        """In the background: when Orbax is done, prove the step, let it count, and delete what it makes superfluous."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                whole = self.folder / f"{_SAVING}{step}"
                manifest.write(whole, step=step, loss=loss if loss is not None and math.isfinite(loss) else None)
                os.rename(whole, self.folder / str(step))
                manifest.sync(self.folder)
            _meet(f"{self.folder} {step}")
        except Exception as error:
            raise self._save_error(step, error) from error
        if jax.process_index() == 0:
            self._prune()

    def _manifests(self) -> dict[int, manifest.Manifest]:
        """What each step says of itself, the newest first; damaged ones are left out."""
        found = {}
        for step in self.steps():
            with contextlib.suppress(manifest.DamagedError):
                found[step] = manifest.read(self.folder / str(step), step=step)
        return found

    @staticmethod
    def _by_loss(found: dict[int, manifest.Manifest]) -> list[int]:
        """The steps whose validation loss is known, the lowest first, and of equals the newest."""
        scored = [step for step in found if found[step].loss is not None]
        return sorted(scored, key=lambda step: found[step].loss)  # stable

    def _prune(self) -> None:
        """Delete all steps but the newest and the best. Damaged ones do not count, and are let be."""
        found = self._manifests()
        keep = list(found)[: self._keep] + self._by_loss(found)[: self._keep_best]
        for step in found.keys() - set(keep):  # first by name, so that none is ever found half deleted
            os.rename(self.folder / str(step), self.folder / f"{_DELETING}{step}")
        self._sweep(_DELETING)

    def _sweep(self, *prefixes: str) -> None:
        for path in self.folder.iterdir():
            if path.name.startswith(prefixes):
                shutil.rmtree(path, ignore_errors=True)  # one that another process still reads goes the next time

    def _save_error(self, step: int, error: Exception) -> SaveError:
        newest = max(self.steps(), default=None)
        stands = "none was saved before" if newest is None else f"that of step {newest} stands"
        return SaveError(
            f"the checkpoint of step {step} could not be saved, {stands} ({_brief(error)}): make room, or mend the "
            "folder, and start again"
        )


def _decided_by_first(decide: Callable[[], int]) -> int:
    """What process 0 decides, in every process: only it reads and hashes files."""
    if jax.process_count() == 1:
        return decide()
    decision = decide() if jax.process_index() == 0 else 0
    _meet(f"decision {next(_meetings)}")  # a collective would not wait for so long
    return int(multihost_utils.broadcast_one_to_all(np.int32(decision)))


def _meet(name: str) -> None:
    """Wait for all processes; from any thread."""
    ocp.multihost.get_barrier_sync_fn()(key=f"llama_jax {name}", timeout_ms=_PATIENCE_MS)


def _brief(error: Exception) -> str:
    """An error of another's making in one line; what the system said is at the end of TensorStore's."""
    text = " ".join(str(error).split()).partition(" [tensorstore_spec=")[0]
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:140] + ' ... ' + text[-140:]}"


@functools.cache  # once in a process
def _hush() -> None:
    """Let no traceback go before the line of a SaveError: what Orbax raises is also logged, by it and by asyncio, and
    what TensorStore still had to write then finds its event loop closed."""
    for logger in map(logging.getLogger, ("absl", "asyncio")):
        logger.addFilter(lambda record: not (record.exc_info and _is_orbaxs(record)))
    show = sys.unraisablehook

    def hook(found: sys.UnraisableHookArgs) -> None:
        if not (found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"):
            show(found)

    sys.unraisablehook = hook


def _is_orbaxs(record: logging.LogRecord) -> bool:
    """asyncio runs here for Orbax alone: what it finds that nobody waited for is an error of the same save."""
    return record.name == "asyncio" or "orbax" in record.pathname + record.getMessage()


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
