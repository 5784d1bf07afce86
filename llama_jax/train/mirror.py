"""The copy of a run folder in a store, for output=gs://BUCKET/RUN and other addresses of fsspec.

A run works in a folder of this machine, and a background thread copies what is committed there. Stores have no rename,
so that the manifest of a checkpoint is its commit: it is copied after all other files of the step, and it is deleted
before them. A step without a manifest does not exist for readers. After a kill the store has the steps that were copied
before, and the local folder also has later ones.
"""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from llama_jax import manifest, storage
from llama_jax.checkpoint import SaveError
from llama_jax.errors import ConfigError
from llama_jax.storage import Store, Stored
from llama_jax.train.metrics import say

_ID = "run_id"  # file that says which run a folder and its copy belong to


class Mirror:
    """The copy of one run folder.

    Args:
        url: The address of the copy.
        folder: The run folder on this machine.
    """

    def __init__(self, url: str, folder: Path) -> None:
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
        steps = _steps(there)
        if same and max(steps, default=0) <= max(_local_steps(self._folder), default=0):
            return
        for path in self._folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()
        if _ID in there and steps:
            newest = f"checkpoints/{max(steps)}/"
            wanted = [f for name, f in there.items() if name.startswith(newest) or name.split("/")[0] != "checkpoints"]
            say(f"fetching step {max(steps)} of {self._url}")
            storage.download(self._url, wanted, self._folder)
            return
        (self._folder / _ID).write_text(uuid.uuid4().hex)
        self._store.write(_ID, (self._folder / _ID).read_bytes())

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
            say(f"warning: {error}; the next checkpoint tries again")

    def _push(self) -> None:
        """Copy new steps and then the small files, and delete steps that are no longer in the folder."""
        there = self._store.files()
        local = _local_steps(self._folder)
        for step in sorted(local - _steps(there)):
            self._push_step(step)
        for name, path in _small_files(self._folder):
            stat = path.stat()
            if self._copied.get(name) != (stat.st_size, stat.st_mtime_ns):
                self._store.write(name, path.read_bytes())
                self._copied[name] = (stat.st_size, stat.st_mtime_ns)
        for name in there:
            parts = name.split("/")
            if parts[0] == "checkpoints" and parts[1].isdecimal() and int(parts[1]) not in local:
                self._drop_step(int(parts[1]), there)

    def _push_step(self, step: int) -> None:
        """Copy a step, its manifest last."""
        folder = self._folder / "checkpoints" / str(step)
        try:
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            for path in sorted(files, key=lambda path: path.name == manifest.FILE and path.parent == folder):
                self._store.put(path, path.relative_to(self._folder).as_posix())
        except FileNotFoundError:
            return  # the run has deleted the step meanwhile

    def _drop_step(self, step: int, there: dict[str, Stored]) -> None:
        """Delete a step, its manifest first."""
        own = [name for name in there if name.startswith(f"checkpoints/{step}/")]
        for name in sorted(own, key=lambda name: name != f"checkpoints/{step}/{manifest.FILE}"):
            self._store.delete(name)

    def _read_id(self) -> str | None:
        path = self._folder / _ID
        return path.read_text(errors="replace") if path.is_file() else None


def _steps(files: dict[str, Stored]) -> set[int]:
    """The steps in a store that have a manifest."""
    parts = (name.split("/") for name in files)
    return {int(p[1]) for p in parts if p[0] == "checkpoints" and p[2:] == [manifest.FILE] and p[1].isdecimal()}


def _local_steps(folder: Path) -> set[int]:
    """The committed steps of a run folder."""
    names = (path.parent.name for path in folder.glob(f"checkpoints/*/{manifest.FILE}"))
    return {int(name) for name in names if name.isdecimal()}


def _small_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of a run folder besides its checkpoints: (name, path). Hidden and partial ones are left out."""
    tree = os.walk(folder)  # which passes over folders of checkpoints that are renamed meanwhile
    for path in sorted(Path(parent, name) for parent, _, names in tree for name in names):
        parts = path.relative_to(folder).parts
        if path.is_file() and parts[0] != "checkpoints" and not any(part.startswith(".") for part in parts):
            yield "/".join(parts), path
