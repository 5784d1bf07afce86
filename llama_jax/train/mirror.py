"""The copy of a run folder in a store, for output=gs://BUCKET/RUN and other addresses of fsspec.

A run works in a folder of this machine, and what is committed there is copied. Stores have no rename, so that the
manifest of a checkpoint is its commit: it is copied after all other files of the step, and it is deleted before them. A
step without a manifest does not exist for readers. After a kill the store has the steps that were copied before, and
the local folder may also have later ones.

`Mirror` copies the folder of one process. `PartMirror` is that of several processes, each of which has a folder of its
own and copies the shards of its own devices.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llama_jax import manifest, storage, stored_run
from llama_jax.checkpoint import SaveError, kept
from llama_jax.errors import ConfigError, one_line
from llama_jax.files import read_json
from llama_jax.parallel import processes
from llama_jax.run_keys import CheckpointConfig
from llama_jax.storage import Store, Stored
from llama_jax.train.metrics import say

_ID = "run_id"  # file that says which run a folder and its copy belong to
_PARTS = "parts"  # folder of the store with the list of the files that each process has copied
_ADAPTER = f"adapter/{manifest.FILE}"
_CHUNK = re.compile(r"(?:params|rest)/.+/\d+(?:\.\d+)*")  # a shard of an array in a file of its own


class Mirror:
    """The copy of one run folder.

    Args:
        url: The address of the copy.
        folder: The run folder on this machine.
        checkpoint: The settings of the run, which say how many steps to keep in the store.
    """

    def __init__(self, url: str, folder: Path, checkpoint: CheckpointConfig) -> None:
        self._checkpoint = checkpoint
        self._losses: dict[int, float | None] = {}  # validation loss of each step in the store
        self._dropped: set[int] = set()
        self._url, self._folder, self._store = url, folder, Store(url)
        self._background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="mirror")
        self._pending: concurrent.futures.Future[None] | None = None
        self._copied: dict[str, tuple[int, int]] = {}  # (bytes, time of change) of each small file as it was copied

    def fetch(self) -> None:
        """Bring the folder up to date before a run starts in it.

        A folder of the same run with all steps of the store is kept. Any other is replaced by the run in the store, or
        emptied if the store has none.

        Raises:
            ConfigError: the store cannot be read or written to, or there is no room.
        """
        there = self._store.files()
        same = _ID in there and self._read_id() == self._store.read(_ID).decode(errors="replace")
        steps = stored_run.steps(there)
        if same and max(steps, default=0) <= max(_local_steps(self._folder), default=0):
            return
        self._empty()
        if _ID in there and steps:
            newest = max(steps)
            say(f"fetching step {newest} of {self._url}")
            storage.download(self._url, _outside_of_checkpoints(there), self._folder)
            stored_run.fetch_step(self._url, newest, there, self._folder)
            return
        (self._folder / _ID).write_text(uuid.uuid4().hex)
        self._store.write(_ID, (self._folder / _ID).read_bytes())

    def fetch_arrays(self, step: int, items: Mapping[str, Any]) -> None:
        """Bring the arrays of a step into the folder; here `fetch` has done it."""

    def push_soon(self) -> None:
        """Copy changed files in the background. A copy that is already waiting includes them."""
        if self._pending is None or self._pending.running() or self._pending.done():
            self._pending = self._background.submit(self._try_push)

    def close(self) -> None:
        """Copy changed files, and wait until they are copied.

        Raises:
            SaveError: the store cannot be written to. The run folder on this machine is complete.
        """
        self._background.shutdown()
        try:
            self._push()
        except ConfigError as error:
            raise SaveError(
                f"{error}. The run is complete in {self._folder}: start it again to copy it, or copy that folder"
            ) from error

    def _try_push(self) -> None:
        try:
            self._push()
        except ConfigError as error:
            print(f"warning: {error}; the next checkpoint tries again", file=sys.stderr, flush=True)

    def _push(self) -> None:
        """Copy new steps and then the small files, and delete steps that are no longer in the folder."""
        there = self._store.files()
        for step in sorted(_local_steps(self._folder) - stored_run.steps(there) - self._dropped):
            self._push_step(step)
        self._push_small_files()
        self._drop_old_steps()

    def _push_small_files(self) -> None:
        """Copy the files besides checkpoints that have changed.

        The manifest of the adapter is copied last, and not at all if the run replaced the adapter meanwhile: the next
        copy has all of the new one.
        """
        commit = self._folder / _ADAPTER
        adapter = commit.read_bytes() if commit.is_file() else b""
        for name, path in sorted(_small_files(self._folder), key=lambda file: file[0] == _ADAPTER):
            with contextlib.suppress(FileNotFoundError):  # the run has replaced an adapter meanwhile
                stat, data = path.stat(), path.read_bytes()
                replaced = name == _ADAPTER and data != adapter
                if self._copied.get(name) != (stat.st_size, stat.st_mtime_ns) and not replaced:
                    self._store.write(name, data)
                    self._copied[name] = (stat.st_size, stat.st_mtime_ns)

    def _drop_old_steps(self) -> None:
        """Delete the steps in the store that are neither among the newest nor among the best."""
        there = self._store.files()
        for step in stored_run.steps(there) - self._losses.keys():
            with contextlib.suppress(ConfigError):  # a damaged step is not counted and not deleted
                self._losses[step] = stored_run.read_manifest(self._url, step).loss
        keep = kept(self._losses, keep=self._checkpoint.keep, keep_best=self._checkpoint.keep_best)
        for step in self._losses.keys() - keep:
            self._drop_step(step, there)
            self._dropped.add(step)
            del self._losses[step]

    def _push_step(self, step: int) -> None:
        """Copy a step, its manifest last."""
        folder = self._folder / stored_run.CHECKPOINTS / str(step)
        try:
            for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / manifest.FILE):
                self._store.put(path, path.relative_to(self._folder).as_posix())
            self._check_copied(manifest.read(folder))
            self._store.put(folder / manifest.FILE, f"{stored_run.CHECKPOINTS}/{step}/{manifest.FILE}")
        except (FileNotFoundError, manifest.DamagedError):
            return  # the run has deleted the step meanwhile

    def _check_copied(self, whole: manifest.Manifest) -> None:
        """Check that the store has all files of a step, with the right sizes; ConfigError otherwise."""
        there = self._store.files()
        for name, (size, _) in whole.files.items():
            found = there.get(f"{stored_run.CHECKPOINTS}/{whole.step}/{name}")
            if found is None or found.size != size:
                have = "nothing" if found is None else f"{found.size:,} bytes"
                raise ConfigError(
                    f"{self._url} has {have} of {name} of step {whole.step} after {size:,} bytes were copied"
                )

    def _drop_step(self, step: int, there: Mapping[str, Stored]) -> None:
        """Delete a step, its manifest first."""
        own = [name for name in there if name.startswith(f"checkpoints/{step}/")]
        for name in sorted(own, key=lambda name: name != f"checkpoints/{step}/{manifest.FILE}"):
            self._store.delete(name)

    def _empty(self, *, but: int | None = None) -> None:
        """Delete what is in the folder, but for the lock and the checkpoint of one step."""
        for path in self._folder.iterdir():
            if path.name == stored_run.CHECKPOINTS and but is not None:
                for step in path.iterdir():
                    if step.name != str(but):
                        shutil.rmtree(step)
            elif path.is_dir():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()

    def _read_id(self) -> str | None:
        path = self._folder / _ID
        return path.read_text(errors="replace") if path.is_file() else None


class PartMirror(Mirror):
    """The copy of a run of several processes. Every process must make every call.

    A step is in the store once every process has copied its files and their hashes, and process 0 has written one
    manifest of all of them.

    Args:
        url: The address of the copy.
        folder: The run folder of this process, which no other process uses.
        checkpoint: The settings of the run, which say how many steps to keep in the store.
    """

    def __init__(self, url: str, folder: Path, checkpoint: CheckpointConfig) -> None:
        super().__init__(url, folder, checkpoint)
        self._first = jax.process_index() == 0
        self._copies = itertools.count()

    def fetch(self) -> None:
        """Bring the folder up to date before a run starts in it, but for arrays.

        The newest step in the store is the one to continue from; later steps of the folder are deleted.

        Raises:
            ConfigError: the store cannot be read or written to, or there is no room.
        """
        if self._first:
            self._tidy()
        processes.meet("the store is tidy")
        there, identity = self._store.files(), self._store.read(_ID)
        newest = max(stored_run.steps(there), default=None)
        same = self._read_id() == identity.decode(errors="replace")
        self._empty(but=newest if same else None)
        (self._folder / _ID).write_bytes(identity)
        if newest is not None:
            say(f"fetching step {newest} of {self._url}")
            small = [
                file for file in _outside_of_checkpoints(there) if self._first or stored_run.is_of_model(file.name)
            ]
            storage.download(self._url, [file for file in small if file.name != _ID], self._folder)
            stored_run.fetch_step(
                self._url, newest, there, self._folder, wanted=lambda name: not _CHUNK.fullmatch(name)
            )

    def fetch_arrays(self, step: int, items: Mapping[str, Any]) -> None:
        """Bring the shards of this process's devices into the folder.

        Args:
            step: The step.
            items: The abstract trees of the checkpoint's items, with their shardings.
        """
        folder = self._folder / stored_run.CHECKPOINTS / str(step)
        chunks: dict[str, set[str]] = {}  # by the folder of an array
        for item, tree in items.items():
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                name = f"{item}/{jax.tree_util.keystr(path, simple=True, separator='.')}"
                if (folder / name / ".zarray").is_file():
                    chunks[name] = _chunks(read_json(folder / name / ".zarray")["chunks"], leaf)

        def wanted(name: str) -> bool:
            array, _, chunk = name.rpartition("/")
            return array not in chunks or chunk.startswith(".") or chunk in chunks[array]

        stored_run.fetch_step(self._url, step, self._store.files(), self._folder, wanted=wanted)
        processes.meet("arrays are fetched")

    def push_soon(self) -> None:
        """Copy the newest step and changed files. The background thread of the checkpoints calls it."""
        self._try_push()

    def _push(self) -> None:
        """Copy the newest step unless the store has it; the first process then writes its manifest."""
        step = max(_local_steps(self._folder), default=None)
        copy = f"{self._url} copy {next(self._copies)}"
        problems: list[Exception] = []
        try:
            if step is not None and step not in stored_run.steps(self._store.files()):
                self._push_part(step)
        except (ConfigError, manifest.DamagedError, OSError) as error:
            problems.append(error)
        processes.barrier(f"{copy} is done")
        try:
            if self._first:
                there = self._store.files()
                if step is not None and step not in stored_run.steps(there):
                    self._commit(step, there)
                self._push_small_files()
                self._drop_old_steps()
        except (ConfigError, manifest.DamagedError, OSError) as error:
            problems.append(error)
        processes.barrier(f"{copy} is committed")  # after an error too: the others wait here
        if problems:
            first = problems[0]
            raise (
                first
                if isinstance(first, ConfigError)
                else ConfigError(f"step {step} cannot be copied to {self._url} ({one_line(first)})")
            )

    def _push_part(self, step: int) -> None:
        """Copy the files of a step that this process wrote, and then the list of them with their hashes."""
        folder = self._folder / stored_run.CHECKPOINTS / str(step)
        own = manifest.read(folder)
        names = [name for name in own.files if self._first or _is_own(name)]
        for name in names:
            self._store.put(folder / name, f"{stored_run.CHECKPOINTS}/{step}/{name}")
        self._store.write(_part(step, jax.process_index()), manifest.dumps(manifest.part(own, names)))

    def _commit(self, step: int, there: Mapping[str, Stored]) -> None:
        """Write the manifest of a step, if every process has copied its part."""
        parts = [_part(step, index) for index in range(jax.process_count())]
        if missing := [name for name in parts if name not in there]:
            raise ConfigError(
                f"step {step} is not complete in {self._url}, since {len(missing)} of {len(parts)} processes have not "
                "copied their files"
            )
        lists = [manifest.parse(self._store.read(name)) for name in parts]
        whole = manifest.Manifest(step, lists[0].loss, {k: v for part in lists for k, v in part.files.items()})
        self._check_copied(whole)
        self._store.write(f"{stored_run.CHECKPOINTS}/{step}/{manifest.FILE}", manifest.dumps(whole))
        for name in parts:
            self._store.delete(name)

    def _tidy(self) -> None:
        """Delete the remains of interrupted copies, and name the run if it has no name."""
        there = self._store.files()
        steps = {f"{stored_run.CHECKPOINTS}/{step}" for step in stored_run.steps(there)}
        for name in there:
            parts = name.split("/")
            if parts[0] == _PARTS or (parts[0] == stored_run.CHECKPOINTS and "/".join(parts[:2]) not in steps):
                self._store.delete(name)
        if _ID not in there:
            self._store.write(_ID, uuid.uuid4().hex.encode())


def _part(step: int, index: int) -> str:
    """The file of the store that lists the files of a step that a process has copied."""
    return f"{_PARTS}/{step}-{index}.json"


def _is_own(name: str) -> bool:
    """True for a file of a checkpoint that no other process writes as well."""
    return bool(_CHUNK.fullmatch(name)) or "/array_metadatas/" in name


def _chunks(chunk: Sequence[int], leaf: jax.ShapeDtypeStruct) -> set[str]:
    """The names of the chunks of a stored array that the devices of this process hold a part of.

    Args:
        chunk: The shape of a chunk.
        leaf: The abstract array with its sharding.
    """
    names = set()
    for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values():
        bounds = [part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True)]
        ranges = [range(a // n, -(-b // n)) for (a, b), n in zip(bounds, chunk, strict=True)]
        names |= {".".join(map(str, place)) or "0" for place in itertools.product(*ranges)}
    return names


def _outside_of_checkpoints(files: Mapping[str, Stored]) -> list[Stored]:
    """The files of a run folder that belong to no checkpoint."""
    return [file for name, file in files.items() if name.split("/")[0] not in (stored_run.CHECKPOINTS, _PARTS)]


def _local_steps(folder: Path) -> set[int]:
    """The committed steps of a run folder."""
    names = (path.parent.name for path in folder.glob(f"checkpoints/*/{manifest.FILE}"))
    return {int(name) for name in names if name.isdecimal()}


def _small_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of a run folder besides its checkpoints: (name, path). Hidden and partial ones are left out."""
    tree = os.walk(folder)  # which passes over folders of checkpoints that are renamed meanwhile
    for path in sorted(Path(parent, name) for parent, _, names in tree for name in names):
        parts = path.relative_to(folder).parts
        partial = parts[0] == "adapter.new" or any(part.startswith(".") for part in parts)
        if parts[0] != stored_run.CHECKPOINTS and not partial and path.is_file():
            yield "/".join(parts), path
