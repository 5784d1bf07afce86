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
from llama_jax.storage import Stored

_BLOCK = 1 << 22  # bytes of a request; headers are read in small pieces of one
_BLOCKS_KEPT = 16
_THREADS = 16
_TRIES = 4

Read = Callable[[str, int, int], bytes]

_in_parts = False


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
        read: Reads bytes of a file: (path, start, stop). By default fsspec does.
    """
    if read is None:
        fs, _ = storage.open_store(url)
        read = lambda path, start, stop: bytes(fs.cat_file(path, start=start, end=stop))  # noqa: E731
    pool = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="ranges")
    for file in stored:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        files.register(path, _Ranges(url, read, file, pool))


class _Ranges:
    """A file of a store, read by byte range from any thread.

    Attributes:
        size: Bytes of the file.
    """

    def __init__(self, url: str, read: Read, file: Stored, pool: concurrent.futures.Executor) -> None:
        self.size = file.size
        self._url, self._read, self._path, self._pool = url, read, file.path, pool
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
