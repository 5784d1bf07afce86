"""Small files: untrusted JSON, read with bounds and one-line errors, and atomic writes.

Floor 0: this module does not import jax.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from llama_jax.errors import ConfigError, brief, json_fault

MAX_BYTES = 2_000_000  # parsed, JSON takes up to 25 times its size; a config or an index is far smaller
_LONGEST_PATH, _LONGEST_NAME = 4095, 255  # bytes, on Linux
MAX_VALUES = 1_500_000  # in a larger file


def read_json(
    path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES, max_values: int = MAX_VALUES
) -> dict[str, Any]:
    """The JSON object in a file of at most `max_bytes`. Anything else raises a one-line ValueError."""
    return parse_json(read_small(path, max_bytes=max_bytes), str(path), max_values=max_values)


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with a leading ~ or ~user replaced.

    Raises:
        FileNotFoundError: the home folder of that user is not known.
        ConfigError: the path is longer than the operating system allows, or has a zero byte.
    """
    data = str(path).encode("utf-8", "surrogatepass")
    if len(data) > _LONGEST_PATH or max(map(len, data.split(b"/"))) > _LONGEST_NAME:
        raise ConfigError(f"{brief(str(path))} cannot be the path of a file: it has {len(data):,} bytes, too many")
    if b"\0" in data:
        raise ConfigError(f"{brief(str(path))} cannot be the path of a file: it has a zero byte")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, "its home folder is not known", os.fspath(path)) from None


def read_small(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a file of at most `max_bytes`. Anything else raises a one-line ValueError.

    At most as many bytes are read as the file's size says, since a link may lead to an endless device.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path}: {size:,} bytes is more than the {max_bytes:,} allowed")
    with open(path, "rb") as file:
        return file.read(size) if size else b""


def parse_json(data: bytes, where: str, *, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """The JSON object in `data`. Errors name it by `where`. Anything else raises a one-line ValueError."""
    if len(data) > MAX_BYTES and sum(map(data.count, (b",", b"[", b"{"))) > max_values:
        raise ValueError(f"{where} has over {max_values:,} values, more than any valid file of its kind has")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, or a repeated name
        raise ValueError(f"{where} is not valid JSON: {json_fault(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, got {brief(value)}")
    return value


class Ranges(Protocol):
    """A file that is somewhere else.

    Attributes:
        size: Bytes of the file.
    """

    size: int

    def read_into(self, out: memoryview, start: int) -> None:
        """Fill `out`, which holds bytes of the file, from `start` on."""


_registered: dict[str, Ranges] = {}  # by path


def register(path: Path, ranges: Ranges) -> None:
    """Let `File` read a path of this machine from elsewhere, in this process. See remote_files.py."""
    _registered[os.path.realpath(path)] = ranges


class File:
    """A file read by byte range, from any thread. Raises ValueError (one line) where bytes are missing."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{path}: no such file")
        self._elsewhere = _registered.get(os.path.realpath(path))
        if self._elsewhere is not None:
            self.size = self._elsewhere.size
            return
        self._file = open(self.path, "rb", buffering=0)
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start` on."""
        out = bytearray(length)
        self.read_into(memoryview(out), start)
        return bytes(out)

    def read_into(self, out: memoryview, start: int) -> None:
        """Fill `out`, which holds bytes, from `start` on."""
        if self._elsewhere is not None and start + len(out) <= self.size:
            return self._elsewhere.read_into(out, start)
        done = 0
        while done < len(out):
            count = 0 if self._elsewhere else os.preadv(self._file.fileno(), [out[done:]], start + done)
            if count <= 0:
                raise ValueError(f"{self.path}: ends at byte {start + done:,}; {len(out) - done:,} more were expected")
            done += count


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Atomically write a value as JSON with two spaces of indent."""
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file for writing that appears under its name only when it is complete.

    Several processes may write the same path at once: each has a temporary file of its own, and the last rename
    wins. An error removes the temporary file and leaves what was there before.
    """
    path = Path(path)
    partial = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False)
    try:
        with naming(path), partial:
            yield cast(BinaryIO, partial)
            os.fchmod(partial.fileno(), 0o666 & ~_umask())
        os.replace(partial.name, path)
    finally:
        Path(partial.name).unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """A context in which errors of reading and writing name this file. A full disk raises one without a name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Atomically write a file."""
    with whole_file(path) as file:
        file.write(data)


@functools.cache
def _umask() -> int:
    """The permission mask of this process. It can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {brief(twice)} appears twice")
    return found
