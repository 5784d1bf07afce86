"""The token store: every document tokenised once, in one flat file that is mapped into memory.

A store is a folder: `tokens.bin` (uint16 where the vocabulary fits, otherwise uint32, little-endian),
`offsets.npy` (int64, where each document starts, and the end) and `meta.json`, written last. It is built
beside its final place and renamed into it, so whatever is found there is whole, however the builder ended.
"""

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llama_jax.data.corpus import Document
from llama_jax.data.sources import documents_from, fingerprint_of

_FORMAT = 1  # part of the cache key: raise it when the files' meaning changes
_GROUP_CHARACTERS = 1 << 18  # text given to a thread at a time
_ABANDONED_S = 3600  # a leftover build that nobody has written to for this long is swept away


class Encoder(Protocol):
    """What a store needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the ids of some text would."""

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of a text."""


class DamagedStore(ValueError):
    """A store whose files are missing, cut short or contradict each other."""


class TokenStore:
    """A store on disk, mapped: `tokens` (num_tokens,) uint16 or uint32, `offsets` (num_documents + 1,) int64.

    Document d is `tokens[offsets[d]:offsets[d + 1]]`. `fingerprint` (hex) is a hash of both arrays' contents.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a store; raises DamagedStore (a ValueError) where it cannot be trusted."""
        self.path = Path(path)
        try:
            meta = json.loads((self.path / "meta.json").read_text(encoding="utf-8"))
            if meta["format"] != _FORMAT:
                raise self._damaged(f"format {meta['format']}, this version reads {_FORMAT}")
            self.num_tokens: int = meta["num_tokens"]
            self.num_documents: int = meta["num_documents"]
            self.fingerprint: str = meta["fingerprint"]
            dtype = np.dtype(meta["dtype"])
            size = (self.path / "tokens.bin").stat().st_size
            if size != self.num_tokens * dtype.itemsize:
                wanted = self.num_tokens * dtype.itemsize
                raise self._damaged(f"tokens.bin has {size} bytes, meta.json says {wanted}")
            self.tokens = np.memmap(self.path / "tokens.bin", dtype=dtype, mode="r")
            self.offsets = np.load(self.path / "offsets.npy", mmap_mode="r")
        except DamagedStore:
            raise
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from error
        self.meta: dict[str, Any] = meta
        expected = (self.num_documents + 1,)
        if self.offsets.shape != expected or self.offsets.dtype != np.int64:
            found = f"{self.offsets.dtype}{list(self.offsets.shape)}"
            raise self._damaged(f"offsets.npy holds {found}, meta.json says int64{list(expected)}")
        if self.offsets[0] != 0 or self.offsets[-1] != self.num_tokens or np.any(np.diff(self.offsets) <= 0):
            raise self._damaged(f"offsets.npy does not rise from 0 to {self.num_tokens}")

    def _damaged(self, what: str) -> DamagedStore:
        return DamagedStore(f"the token store {self.path} is damaged ({what}); delete that folder and build it again")


def build_store(
    patterns: Sequence[str],
    tokenizer: Encoder,
    *,
    cache_dir: str | os.PathLike[str],
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """Tokenise what the patterns name (see `documents_from`) as bos + text + eos, unless already done.

    The cache key covers the sources, the tokenizer and the store's format. `workers` threads encode (default:
    one a core); memory stays bounded by a few groups of documents. `progress(documents, tokens)` is called as
    they finish. A damaged store in the cache is rebuilt with a warning.
    """
    sources = fingerprint_of(patterns)
    identity = json.dumps([_FORMAT, sources, tokenizer.fingerprint, tokenizer.vocab_size])
    key = hashlib.sha256(identity.encode()).hexdigest()[:32]
    cache = Path(cache_dir)
    final = cache / key
    cache.mkdir(parents=True, exist_ok=True)
    _sweep(cache, key)
    if final.exists():
        try:
            return TokenStore(final)
        except DamagedStore as error:
            warnings.warn(f"{error}: rebuilding it now", stacklevel=2)
            _remove(final)
    meta = {"key": key, "sources": list(patterns), "sources_fingerprint": sources}
    scratch = Path(tempfile.mkdtemp(prefix=f"{key}.partial-", dir=cache))
    try:
        _write(scratch, documents_from(patterns), tokenizer, meta=meta, workers=workers, progress=progress)
        try:
            os.rename(scratch, final)
        except OSError:  # another process finished first: its store is the same
            if not final.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return TokenStore(final)


def _write(
    folder: Path,
    documents: Iterator[Document],
    tokenizer: Encoder,
    *,
    meta: dict[str, Any],
    workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    digest = hashlib.sha256()
    offsets = [0]
    with open(folder / "tokens.bin", "wb") as file:
        for group in _encoded(documents, tokenizer, dtype=dtype, workers=workers or os.cpu_count() or 1):
            for tokens in group:
                data = tokens.tobytes()
                digest.update(data)
                file.write(data)
                offsets.append(offsets[-1] + len(tokens))
            if progress:
                progress(len(offsets) - 1, offsets[-1])
        _flush(file)
    starts = np.array(offsets, dtype=np.int64)
    digest.update(starts.tobytes())
    with open(folder / "offsets.npy", "wb") as file:
        np.save(file, starts)
        _flush(file)
    meta |= {
        "format": _FORMAT,
        "fingerprint": digest.hexdigest(),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.str,
        "num_tokens": offsets[-1],
        "num_documents": len(offsets) - 1,
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }
    with open(folder / "meta.json", "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        _flush(file)


def _encoded(
    documents: Iterator[Document], tokenizer: Encoder, *, dtype: np.dtype, workers: int
) -> Iterator[list[np.ndarray]]:
    """Encode groups of documents in threads (tiktoken lets go of the GIL) and yield them in order."""

    def encode(group: list[Document]) -> list[np.ndarray]:
        encoded = [np.array(tokenizer.encode(doc.text, bos=True, eos=True)) for doc in group]
        for doc, ids in zip(group, encoded, strict=True):
            if len(ids) == 0 or ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
                raise ValueError(f"{doc.name}: the tokenizer gave no ids, or ids outside [0, {tokenizer.vocab_size})")
        return [ids.astype(dtype) for ids in encoded]

    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[list[np.ndarray]]] = deque()
        try:
            for group in _groups(documents):
                waiting.append(pool.submit(encode, group))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _groups(documents: Iterator[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= _GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _remove(folder: Path) -> None:
    """Take a folder out of its place at once, then delete it."""
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        os.rename(folder, aside / "damaged")
    except FileNotFoundError:
        pass  # another process was faster
    shutil.rmtree(aside, ignore_errors=True)


def _sweep(cache: Path, key: str) -> None:
    """Delete what killed builds of this store left behind; a live one is written to all the time."""
    for leftover in cache.glob(f"{key}.partial-*"):
        try:
            newest = max(path.stat().st_mtime for path in [leftover, *leftover.iterdir()])
        except OSError:
            continue  # its owner just finished
        if time.time() - newest > _ABANDONED_S:
            shutil.rmtree(leftover, ignore_errors=True)
