"""Files of a store that are read in place, by byte range, instead of being downloaded.

A file of no bytes stands for each of them in a folder of the cache, so that readers of formats find it by its name.
`files.File` reads such a file from the store while this process has registered it. A stand-in that is not registered
reads as a file that was cut short, never as zeros.

Floor 0: this module does not import jax.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llama_jax import files, storage
from llama_jax.errors import ConfigError
from llama_jax.storage import Stored

_BLOCK = 1 << 22  # bytes of a request; headers are read in small pieces of one
_BLOCKS_KEPT = 16
_THREADS = 16
_TRIES = 4

Read = Callable[[str, int, int], bytes]

_in_parts = False
_unchecked: set[tuple[str, Stored]] = set()  # (address, file) of what was read since the last `check_unchanged`


@contextlib.contextmanager
def reading_in_parts(enabled: bool) -> Iterator[None]:
    """A context in which the weights of models in stores and on the hub are read in place, if `enabled`."""
    global _in_parts
    before, _in_parts = _in_parts, enabled
    try:
        yield
    finally:
        _in_parts = before


def in_parts() -> bool:
    """True inside of `reading_in_parts`."""
    return _in_parts


def stand_in(url: str, stored: Sequence[Stored], folder: Path, *, read: Read | None = None) -> None:
    """Make a file of no bytes in `folder` for each file of a store, and register it to be read in place.

    Args:
        url: The address, for errors.
        stored: The files.
        folder: The folder in the cache.
        read: Reads bytes of a version of a file that cannot change: (path, start, stop). By default fsspec reads the
            present version, and `check_unchanged` compares it with that of `stored`.
    """
    may_change = read is None
    if read is None:
        fs, _ = storage.open_store(url)
        read = lambda path, start, stop: bytes(fs.cat_file(path, start=start, end=stop))  # noqa: E731
    pool = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="ranges")
    for file in stored:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        files.register(path, _Ranges(url, read, file, pool, may_change=may_change))


def check_unchanged() -> None:
    """Check that the files that were read in place since the last call still have the versions that were opened.

    Raises:
        ConfigError: a file has changed, so that the arrays may be a mixture of two versions; or the store cannot be
            read.
    """
    read = list(_unchecked)
    _unchecked.clear()
    for url in {url for url, _ in read}:
        fs, _ = storage.open_store(url)
        fs.invalidate_cache()
        present = set(storage.find(url))
        for at, file in read:
            if at == url and file not in present:
                raise ConfigError(f"{url}: {os.path.basename(file.path)} changed while it was being read: start again")


class _Ranges:
    """A file of a store, read by byte range from any thread.

    Attributes:
        size: Bytes of the file.
    """

    def __init__(
        self, url: str, read: Read, file: Stored, pool: concurrent.futures.Executor, *, may_change: bool
    ) -> None:
        self.size = file.size
        self._url, self._read, self._path, self._pool = url, read, file.path, pool
        self._version = (url, file) if may_change else None
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, out: memoryview, start: int) -> None:
        """Fill `out` from byte `start` on. Raises ConfigError if the store fails again and again."""
        if len(out) < _BLOCK:
            done = 0
            while done < len(out):
                at = start + done
                piece = self._block(at // _BLOCK)[at % _BLOCK :][: len(out) - done]
                out[done : done + len(piece)] = piece
                done += len(piece)
            return

        def fetch(begin: int) -> None:
            end = min(begin + _BLOCK, len(out))
            out[begin:end] = self._fetch(start + begin, start + end)

        list(self._pool.map(fetch, range(0, len(out), _BLOCK)))

    def _block(self, number: int) -> bytes:
        with self._lock:
            if number in self._blocks:
                self._blocks.move_to_end(number)
                return self._blocks[number]
        data = self._fetch(number * _BLOCK, min((number + 1) * _BLOCK, self.size))
        with self._lock:
            self._blocks[number] = data
            while len(self._blocks) > _BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        return data

    def _fetch(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`."""
        if self._version is not None:
            _unchecked.add(self._version)
        for trial in range(_TRIES):
            try:
                data = self._read(self._path, start, stop)
                if len(data) == stop - start:
                    return data
                error: Exception = OSError(f"{len(data):,} bytes came, and {stop - start:,} were asked for")
            except Exception as failure:  # each store raises errors of its own
                error = failure
            if trial < _TRIES - 1:
                time.sleep(2**trial)
        raise storage.refused(f"{self._url} ({os.path.basename(self._path)})", error)
