"""What a checkpoint consists of: the size and SHA-256 of each of its files, held against them before they are used.

Knows folders and files only, nothing of arrays. A manifest carries a hash of itself, so that a bit flipped in it is
found like one in any other file.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_jax.files import read_json, write_json
from llama_jax.progress import progress_bar

FILE = "manifest.json"
_VERSION = 1
_MAX_BYTES = 1 << 26  # of a manifest: half a million files
_BLOCK = 1 << 20
_THREADS = 8  # hashlib lets go of the interpreter lock


class DamagedError(ValueError):
    """A checkpoint that is not what its manifest says, or has none: which file, and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The files of one checkpoint.

    Attributes:
        step: of the checkpoint.
        loss: of validation at that step, or None.
        files: path below the folder, with slashes -> (bytes, SHA-256 in hex).
    """

    step: int
    loss: float | None
    files: Mapping[str, tuple[int, str]]


def write(folder: Path, *, step: int, loss: float | None) -> None:
    """Hash every file of `folder`, write the manifest beside them, and return when all of it is on the disk."""
    sizes = {name: os.path.getsize(path) for name, path in _files(folder)}
    digests = _digests(folder, sizes)
    files = {name: [size, digests[name]] for name, size in sizes.items()}
    content = {"version": _VERSION, "step": step, "loss": loss, "files": files}
    write_json(folder / FILE, {**content, "sha256": _own_digest(content)})
    for parent, _, names in os.walk(folder):
        for name in (*names, "."):
            sync(Path(parent, name))


def read(folder: Path, *, step: int) -> Manifest:
    """The manifest of `folder`, after just its files were found there in their sizes; DamagedError otherwise."""
    if not (folder / FILE).is_file():
        raise DamagedError(f"{FILE} is missing")
    try:
        content = read_json(folder / FILE, max_bytes=_MAX_BYTES)
        if content.pop("sha256", None) != _own_digest(content):
            raise DamagedError(f"{FILE} is not as it was written")
        if content["version"] != _VERSION:
            raise DamagedError(f"{FILE} has version {content['version']}, and this program reads {_VERSION}")
        if content["step"] != step:
            raise DamagedError(f"{FILE} is of step {content['step']}")
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in content["files"].items()}
        loss = None if content["loss"] is None else float(content["loss"])
        # Only what lies below the folder is ever opened, whatever a manifest names.
        there = {name: os.path.getsize(path) for name, path in _files(folder)}
    except DamagedError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{FILE} cannot be read: {type(error).__name__}: {error}") from None
    for name, (size, _) in files.items():
        if name not in there:
            raise DamagedError(f"{name} is missing")
        if there[name] != size:
            raise DamagedError(f"{name} has {there[name]:,} bytes, not {size:,}")
    for name in there.keys() - files.keys():  # Orbax reads all that it finds in some folders
        raise DamagedError(f"{name} is none of its files: delete it")
    return Manifest(step, loss, files)


def check(folder: Path, *, step: int, items: Collection[str] = ()) -> None:
    """Hold the sizes of all files and the hashes of those that will be read against the manifest.

    Args:
        folder: of the checkpoint.
        step: that it must be of.
        items: the folders in it whose files will be read; all by default. Files at the top are always hashed.

    Raises:
        DamagedError: naming the file.
    """
    files = {
        name: entry
        for name, entry in read(folder, step=step).files.items()
        if not items or "/" not in name or name.partition("/")[0] in items
    }
    try:
        digests = _digests(folder, {name: size for name, (size, _) in files.items()}, f"checking step {step}")
    except OSError as error:
        raise DamagedError(f"{error.filename} cannot be read: {error.strerror}") from None
    for name, (_, digest) in files.items():
        if digests[name] != digest:
            raise DamagedError(f"{name} is not as it was written")


def sync(path: Path) -> None:
    """Return when a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Regular files below a folder by their paths in it, but for the manifest and hidden ones."""
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in sorted(names)):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name != FILE and not path.name.startswith("."):
                yield name, path


def _digests(folder: Path, sizes: Mapping[str, int], title: str | None = None) -> dict[str, str]:
    """SHA-256 of files, several at a time, with a bar if it takes long and has a title."""
    bar = progress_bar(sum(sizes.values()), title or "", shown=title is not None)

    def digest(name: str) -> str:
        found, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
        with (folder / name).open("rb", buffering=0) as file:
            while count := file.readinto(block):
                found.update(block[:count])
                bar.update(count)
        return found.hexdigest()

    largest_first = sorted(sizes, key=lambda name: -sizes[name])
    with bar, concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(largest_first, pool.map(digest, largest_first), strict=True))


def _own_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
