"""Manifests: the size and SHA-256 of each file of a folder, against which the files are validated before use.

Checkpoints and the adapter of a run have a manifest each. A manifest contains a hash of itself (`sealed`), so that a
flipped bit in it is detected as in any other file. The config of a run is sealed in the same way. This module handles
folders and files, and knows nothing about arrays.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_jax.files import parse_json, read_json, write_json
from llama_jax.progress import progress_bar

FILE = "manifest.json"
_VERSION = 1
_MAX_BYTES = 1 << 26  # largest manifest, of half a million files
_BLOCK = 1 << 20
SEAL = "sha256"  # name of the hash of a JSON object in itself
_THREADS = 8  # hashlib releases the interpreter lock


class DamagedError(ValueError):
    """Raised for a folder that differs from its manifest or has none. The message names the file and the damage."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The files of one folder.

    Attributes:
        step: training step at which the files were written.
        loss: validation loss at that step, or None.
        files: (bytes, SHA-256 in hex) of each file, by its path below the folder, with slashes.
    """

    step: int
    loss: float | None
    files: Mapping[str, tuple[int, str]]


def write(folder: Path, *, step: int, loss: float | None) -> None:
    """Hashes every file of `folder` and writes the manifest. Returns when everything is on disk."""
    sizes = {name: os.path.getsize(path) for name, path in _files(folder)}
    digests = _digests(folder, sizes)
    save(folder, Manifest(step, loss, {name: (size, digests[name]) for name, size in sizes.items()}))
    for parent, _, names in os.walk(folder):
        for name in (*names, "."):
            sync(Path(parent, name))


def part(whole: Manifest, names: Iterable[str]) -> Manifest:
    """The manifest of a folder that has only some of the files."""
    return dataclasses.replace(whole, files={name: whole.files[name] for name in names})


def save(folder: Path, manifest: Manifest) -> None:
    """Writes a manifest without reading the files that it lists."""
    write_json(folder / FILE, _content(manifest))


def dumps(manifest: Manifest) -> bytes:
    """The contents of a manifest's file."""
    return json.dumps(_content(manifest), indent=2).encode()


def parse(data: bytes) -> Manifest:
    """The manifest in the contents of its file. Raises DamagedError if they are damaged."""
    if len(data) > _MAX_BYTES:
        raise DamagedError(f"{FILE} has {len(data):,} bytes, more than the {_MAX_BYTES:,} allowed")
    return _parsed(lambda: parse_json(data, FILE))


def read(folder: Path) -> Manifest:
    """The manifest of `folder`. Raises DamagedError if it is missing or damaged."""
    if not (folder / FILE).is_file():
        raise DamagedError(f"{FILE} is missing")
    return _parsed(lambda: read_json(folder / FILE, max_bytes=_MAX_BYTES))


def _parsed(contents: Callable[[], dict[str, Any]]) -> Manifest:
    """The manifest in a JSON object. Raises DamagedError."""
    try:
        content = contents()
        if not is_sealed(content):
            raise DamagedError(f"{FILE} was changed after it was written")
        if content["version"] != _VERSION:
            raise DamagedError(f"{FILE} has version {content['version']}, and this program reads {_VERSION}")
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in content["files"].items()}
        return Manifest(int(content["step"]), None if content["loss"] is None else float(content["loss"]), files)
    except DamagedError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{FILE} cannot be read: {type(error).__name__}: {error}") from None


def read_exact(folder: Path, *, step: int) -> Manifest:
    """The manifest of `folder`. Raises DamagedError unless exactly its files exist, with the right sizes."""
    manifest = read(folder)
    if manifest.step != step:
        raise DamagedError(f"{FILE} belongs to step {manifest.step}, not to step {step}")
    try:  # only files below the folder are ever opened, whatever the manifest names
        sizes = {name: os.path.getsize(path) for name, path in _files(folder)}
    except OSError as error:
        raise DamagedError(f"{error.filename} cannot be read: {error.strerror}") from None
    for name, (size, _) in manifest.files.items():
        if name not in sizes:
            raise DamagedError(f"{name} is missing")
        if sizes[name] != size:
            raise DamagedError(f"{name} has {sizes[name]:,} bytes, not {size:,}")
    for name in sizes.keys() - manifest.files.keys():  # Orbax reads every file of some folders
        raise DamagedError(f"{name} is not in the manifest: delete it")
    return manifest


def check(folder: Path, *, step: int, items: Collection[str] = ()) -> None:
    """Validates the sizes of all files, and the hashes of the files that will be read.

    Args:
        folder: folder of the checkpoint.
        step: step that its manifest must have.
        items: subfolders whose files will be read; all by default. Files at the top are always hashed.

    Raises:
        DamagedError: a file differs. The message names it.
    """
    files = {
        name: entry
        for name, entry in read_exact(folder, step=step).files.items()
        if not items or "/" not in name or name.partition("/")[0] in items
    }
    _check_digests(folder, files, f"checking step {step}")


def check_present(folder: Path) -> Manifest:
    """The manifest of `folder`, after the files that it lists and that exist were validated.

    People copy files of an adapter elsewhere and add others, such as a model card. Files that are not in the manifest
    are ignored, and missing ones are allowed.

    Raises:
        DamagedError: a file differs, or the manifest is missing or damaged.
    """
    manifest = read(folder)
    present = {name: path for name, path in _files(folder) if name in manifest.files}
    _check_digests(folder, {name: manifest.files[name] for name in present})
    return manifest


def prune_files(folder: Path, whole: Manifest) -> list[str]:
    """Deletes the files of a folder that are not those of `whole`, and returns the names of the others."""
    try:
        paths = dict(_files(folder))
        sizes = {name: os.path.getsize(path) for name, path in paths.items()}
        expected = {name: whole.files.get(name) for name in sizes}
        right = {name: size for name, size in sizes.items() if (entry := expected[name]) and entry[0] == size}
        found = _digests(folder, right)
        intact = [name for name in right if (entry := expected[name]) and entry[1] == found[name]]
        for name in paths.keys() - set(intact):
            paths[name].unlink()
    except OSError as error:
        raise DamagedError(f"{error.filename} cannot be read: {error.strerror}") from None
    return intact


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object with a hash of itself, under the name "sha256"."""
    return {**content, SEAL: _own_digest(content)}


def is_sealed(content: Mapping[str, Any]) -> bool:
    """True if the hash in a JSON object made by `sealed` still matches its contents."""
    return content.get(SEAL) == _own_digest({name: value for name, value in content.items() if name != SEAL})


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 (hex) of those of the named files that exist in `folder`."""
    sizes = {name: os.path.getsize(folder / name) for name in names if (folder / name).is_file()}
    return _digests(folder, sizes)


def changed(folder: Path, expected: Mapping[str, str]) -> list[Path]:
    """The files of `folder` whose SHA-256 is not the expected one, or that are missing."""
    found = digests(folder, expected)
    return [folder / name for name, digest in expected.items() if found.get(name) != digest]


def sync(path: Path) -> None:
    """Flushes a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _content(manifest: Manifest) -> dict[str, Any]:
    """The JSON object of a manifest."""
    files = {name: list(entry) for name, entry in manifest.files.items()}
    return sealed({"version": _VERSION, "step": manifest.step, "loss": manifest.loss, "files": files})


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields (relative path, path) of each regular file below a folder, except the manifest and what is hidden.

    The shapes of arrays in Zarr's format are in files named .zarray.
    """
    for parent, folders, names in os.walk(folder):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        for path in (Path(parent, name) for name in sorted(names)):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name != FILE and (path.name == ".zarray" or not path.name.startswith(".")):
                yield name, path


def _digests(folder: Path, sizes: Mapping[str, int], title: str | None = None) -> dict[str, str]:
    """SHA-256 of each file, computed in threads. A title gives a progress bar if it takes long."""
    bar = progress_bar(sum(sizes.values()), title or "", shown=title is not None)

    def digest(name: str) -> str:
        hasher, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
        with (folder / name).open("rb", buffering=0) as file:
            while count := file.readinto(block):
                hasher.update(block[:count])
                bar.update(count)
        return hasher.hexdigest()

    largest_first = sorted(sizes, key=lambda name: -sizes[name])
    with bar, concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(largest_first, pool.map(digest, largest_first), strict=True))


def _check_digests(folder: Path, files: Mapping[str, tuple[int, str]], title: str | None = None) -> None:
    """Raise DamagedError for the first file whose hash differs."""
    try:
        digests = _digests(folder, {name: size for name, (size, _) in files.items()}, title)
    except OSError as error:
        raise DamagedError(f"{error.filename} cannot be read: {error.strerror}") from None
    for name, (_, digest) in files.items():
        if digests[name] != digest:
            raise DamagedError(f"{name} was changed after it was written")


def _own_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
