"""The token store: every document tokenized once, in one flat file that is mapped into memory.

A store is a folder: `tokens.bin` (uint16 where the vocabulary fits, otherwise uint32, little-endian), `offsets.npy`
(int64: where each document starts, and the end), `targets.bin` (one bit a token: whether the loss counts it; only where
some document is not a plain text) and `meta.json`, written last. A store is built next to its final path and renamed
when it is complete, so that a killed build leaves no incomplete store. Rejected records are listed next to it, in
`KEY.quarantine.jsonl`. A store of preference pairs holds only pairs: two documents for each, first the chosen and then
the rejected answer.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax import manifest
from llama_jax.data.encoding import TOO_LONG, EncodedSample, Encoder, try_encode
from llama_jax.data.records import MAX_BAD, BadLine, Sample, is_hopeless, refuse_many_bad
from llama_jax.data.sources import documents_from, fingerprint_of
from llama_jax.data.store_writer import FORMAT, QUARANTINE, StoreWriter, token_dtype
from llama_jax.files import naming

# Part of the cache key of everything but plain texts: raise it when a record may become other ids or targets, or may
# be refused where it was not. 2: marks of messages, developer, system messages anywhere.
_DIALOG_ENCODING = 3
_GROUP_CHARACTERS = 1 << 18  # text given to a thread at a time
_BLOCK = 1 << 23  # bytes that are hashed at a time
_ABANDONED_S = 3600  # an unfinished build that nobody has written to for this long is deleted


class DamagedStore(ValueError):
    """Raised for a store whose files are missing, cut short, changed, or contradict each other."""


class TokenStore:
    """A store on disk, mapped into memory.

    Attributes:
        tokens: (num_tokens,) uint16 or uint32. Document d is `tokens[offsets[d]:offsets[d + 1]]`.
        offsets: (num_documents + 1,) int64: index of each document's first token, and the number of tokens.
        fingerprint: hash (hex) of the contents of the arrays.
        masked: True if some documents are dialogs or completions, so that not every token is a target.
        marked: True if a message of the assistant is marked as not to be learned.
        num_targets: number of targets, without the first tokens of documents, which nothing predicts.
        num_bad: number of rejected records that cannot be used.
        first_bad: the first record that cannot be used, or None.
        num_too_long: number of rejected records that are longer than a row.
        num_cut: number of records whose last tokens were dropped, because they are longer than a row.
        pairs: True for a store of preference pairs. Documents 2k and 2k + 1 are the chosen and the rejected answer of
            pair k.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a store. Its files are compared with meta.json by their sizes; `verify` compares their contents.

        Raises:
            DamagedStore: a file is missing, or contradicts another.
        """
        self.path = Path(path)
        try:
            meta = json.loads((self.path / "meta.json").read_text(encoding="utf-8"))
            if manifest.SEAL in meta and not manifest.is_sealed(meta):
                raise self._damaged("meta.json was changed after it was written")
            self._read(meta)
        except DamagedStore:
            raise
        except (OSError, ValueError, KeyError, TypeError, EOFError, OverflowError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from error
        self.meta: dict[str, Any] = meta
        self._check_offsets()

    def _read(self, meta: dict[str, Any]) -> None:
        if meta["format"] != FORMAT:
            raise self._damaged(f"format {meta['format']}, this version reads {FORMAT}")
        self.num_tokens: int = meta["num_tokens"]
        self.num_documents: int = meta["num_documents"]
        self.fingerprint: str = meta["fingerprint"]
        self.masked: bool = meta.get("masked", False)
        self.marked: bool = meta.get("marked", False)
        self.num_targets: int = meta.get("num_targets", self.num_tokens - self.num_documents)
        self.num_bad: int = meta.get("num_bad", 0)
        self.num_too_long: int = meta.get("num_too_long", 0)
        self.num_cut: int = meta.get("num_cut", 0)
        self.pairs: bool = meta.get("pairs", False)
        self.first_bad = BadLine(*meta["first_bad"]) if meta.get("first_bad") else None
        dtype = np.dtype(meta["dtype"])
        self._check_size("tokens.bin", self.num_tokens * dtype.itemsize)
        if self.masked:
            self._check_size("targets.bin", -(-self.num_tokens // 8))
            self._targets = np.memmap(self.path / "targets.bin", dtype=np.uint8, mode="r")
        self.tokens = np.memmap(self.path / "tokens.bin", dtype=dtype, mode="r")
        try:
            self.offsets = np.load(self.path / "offsets.npy", mmap_mode="r")
        except Exception as error:  # numpy parses the header as Python, whose tokenizer has errors of its own
            raise self._damaged(f"offsets.npy: {type(error).__name__}: {error}") from error

    def _check_offsets(self) -> None:
        expected = (self.num_documents + 1,)
        if self.offsets.shape != expected or self.offsets.dtype != np.int64:
            actual = f"{self.offsets.dtype}{list(self.offsets.shape)}"
            raise self._damaged(f"offsets.npy holds {actual}, meta.json says int64{list(expected)}")
        if self.offsets[0] != 0 or self.offsets[-1] != self.num_tokens or np.any(np.diff(self.offsets) <= 0):
            raise self._damaged(f"the offsets in offsets.npy must ascend from 0 to {self.num_tokens}")
        if self.pairs and self.num_documents % 2:
            raise self._damaged(f"{self.num_documents} documents are not pairs")

    @property
    def record_kind(self) -> str:
        """The noun for a record of this store: "pair" or "document"."""
        return "pair" if self.pairs else "document"

    @property
    def num_records(self) -> int:
        """Number of records in the store."""
        return self.num_documents // 2 if self.pairs else self.num_documents

    @property
    def quarantine(self) -> Path:
        """The file that lists the rejected records, if there are any."""
        return _quarantine(self.path)

    def rejected(self) -> Iterator[BadLine]:
        """The rejected records, in order."""
        if self.quarantine.is_file():
            with open(self.quarantine, encoding="utf-8", errors="replace") as file:
                yield from map(BadLine.from_json, file)

    def targets(self, start: int, stop: int) -> np.ndarray:
        """A bool for each of `tokens[start:stop]`: True if it is a target."""
        if not self.masked:
            return np.ones(stop - start, bool)
        first = start // 8
        bits = np.unpackbits(self._targets[first : -(-stop // 8)])
        return bits[start - first * 8 : stop - first * 8].astype(bool)

    def verify(self) -> None:
        """Hash the arrays and compare the result with `fingerprint`.

        Raises:
            DamagedStore: they differ.
        """
        digest = hashlib.sha256()
        _hash_file(digest, self.path / "tokens.bin")
        digest.update(np.ascontiguousarray(self.offsets).tobytes())
        if self.masked:
            bits = hashlib.sha256()
            _hash_file(bits, self.path / "targets.bin")
            digest.update(bits.digest())
        if digest.hexdigest() != self.fingerprint:
            raise self._damaged("its contents are not those that its fingerprint was computed from")

    def _check_size(self, name: str, wanted: int) -> None:
        size = (self.path / name).stat().st_size
        if size != wanted:
            raise self._damaged(f"{name} has {size} bytes, meta.json says {wanted}")

    def _damaged(self, what: str) -> DamagedStore:
        return DamagedStore(f"the token store {self.path} is damaged ({what}); delete that folder and build it again")


def build_store(
    patterns: Sequence[str],
    tokenizer: Encoder,
    *,
    cache_dir: str | os.PathLike[str],
    max_length: int | None = None,
    too_long: str = "drop",
    max_bad: float = MAX_BAD,
    split: str = "train",
    pairs: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """Returns the store of the documents that the patterns name, from the cache or by tokenizing them.

    Preference pairs and other records cannot be mixed: the first good record decides, and one of the other kind counts
    as bad. The cache key covers the sources, the tokenizer, `pairs` and the store's format. If any record is not a
    valid plain text, the key also covers `max_length`, `too_long` and the version of the encoding of dialogs. A store
    from the cache is verified, and rebuilt with a warning if it is damaged. Memory stays bounded by a few groups of
    documents, or by one long document for each thread.

    Args:
        patterns: patterns as in `documents_from`.
        tokenizer: the run's tokenizer.
        cache_dir: folder of stores.
        max_length: tokens of a row, which dialogs, completions and pairs have to fit into. None sets no limit.
        too_long: treatment of longer ones. "drop" leaves them out, "cut" keeps the first max_length tokens of dialogs
            and completions, "refuse" raises ValueError for the first of them.
        max_bad: the fraction of all documents that may be unusable.
        split: as in `documents_from`.
        pairs: as in `documents_from`.
        workers: threads that encode. None: one for each core.
        progress: called as progress(documents, tokens) from time to time.

    Raises:
        ValueError: a source cannot be read, a record is too long and too_long is "refuse", or more than max_bad of all
            documents cannot be used.
    """
    if too_long not in TOO_LONG:
        raise ValueError(f"too_long must be one of {', '.join(TOO_LONG)}, got {too_long!r}")
    sources = fingerprint_of(patterns, split=split)
    identity = [FORMAT, sources, tokenizer.fingerprint, tokenizer.vocab_size, *(["pairs"] if pairs else [])]
    keys = _key(identity), _key([*identity, max_length, _DIALOG_ENCODING, too_long])
    cache = Path(cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    store = _from_cache(cache, keys)
    if store is not None:
        _refuse_bad(store, max_bad, listed=store.quarantine)
    else:
        samples = documents_from(patterns, split=split, pairs=pairs)
        encoded = _encoded(samples, tokenizer, max_length=max_length, too_long=too_long, workers=workers)
        with (
            contextlib.closing(encoded),  # its threads end here, and not at a collection of garbage at any instant
            naming(cache),
            tempfile.TemporaryDirectory(prefix=f"{keys[0]}.partial-", dir=cache, ignore_cleanup_errors=True) as folder,
        ):
            with StoreWriter(Path(folder), tokenizer) as writer:
                for _ in _written(writer, encoded, too_long=too_long, progress=progress):
                    _refuse_hopeless(writer, max_bad, listed=_quarantine(cache / keys[1]))
                writer.close(key=keys[0], sources=list(patterns), sources_fingerprint=sources)
            store = _publish(writer, cache, keys, max_bad)
    return store


def _from_cache(cache: Path, keys: tuple[str, str]) -> TokenStore | None:
    """The first store in the cache that has one of these keys, or None. A damaged store is deleted with a warning."""
    for key in keys:
        _sweep(cache, key)
        if (cache / key).exists():
            try:
                store = TokenStore(cache / key)
                store.verify()
                return store
            except DamagedStore as error:
                warnings.warn(f"{error}: rebuilding it now", stacklevel=3)
                _remove(cache / key)
    return None


def _written(
    writer: StoreWriter,
    encoded: Iterator[list[EncodedSample | BadLine]],
    *,
    too_long: str,
    progress: Callable[[int, int], None] | None,
) -> Iterator[None]:
    """Adds all records to the writer, and yields after each group so that the caller can check its counts."""
    for group in encoded:
        for sample in group:
            if isinstance(sample, EncodedSample):
                writer.add(sample)
                continue
            if sample.too_long and too_long == "refuse":
                raise ValueError(
                    f"{sample.name}: {sample.reason}, and data.too_long='refuse': raise data.sequence_length, or set "
                    "data.too_long to 'drop' or 'cut'"
                )
            writer.reject(sample)
        if progress:
            progress(writer.num_documents, writer.num_tokens)
        yield


def _refuse_hopeless(writer: StoreWriter, max_bad: float, *, listed: Path) -> None:
    """Raise ValueError if so many of the records so far are bad that reading the rest is useless."""
    if is_hopeless(writer.num_bad, writer.num_records, max_bad):
        writer.flush_rejected()
        os.replace(writer.folder / QUARANTINE, listed)
        _refuse_bad(writer, max_bad, listed=listed)


def _refuse_bad(store: StoreWriter | TokenStore, max_bad: float, *, listed: Path) -> None:
    """Raise ValueError if too many records are bad."""
    if store.first_bad is not None:
        refuse_many_bad(store.num_bad, store.num_records, store.first_bad, listed=listed, allowed=max_bad)


def _publish(writer: StoreWriter, cache: Path, keys: tuple[str, str], max_bad: float) -> TokenStore:
    """Moves the list of rejected records and then the complete store to their paths in the cache.

    Raises:
        ValueError: too many records are bad, or none is left.
    """
    plain, masked = keys
    left_out = writer.num_bad or writer.num_too_long  # a record may be left out for its length alone
    final = cache / (masked if writer.masked or left_out else plain)
    if left_out:
        os.replace(writer.folder / QUARANTINE, _quarantine(final))
    _refuse_bad(writer, max_bad, listed=_quarantine(final))
    if not writer.num_records and writer.first_bad:
        raise ValueError(
            f"none of the {writer.num_bad + writer.num_too_long:,} documents can be used, the first: "
            f"{writer.first_bad.name}: {writer.first_bad.reason}; all of them are listed in {_quarantine(final)}"
        )
    if not writer.num_records:
        raise ValueError(
            f"all {writer.num_too_long:,} documents are longer than data.sequence_length: raise it, or set "
            f"data.too_long='cut'; they are listed in {_quarantine(final)}"
        )
    try:
        os.rename(writer.folder, final)
    except OSError:  # another process finished first, with the same store
        if not final.exists():
            raise
    return TokenStore(final)


def _quarantine(store: Path) -> Path:
    return store.with_name(f"{store.name}.{QUARANTINE}")


def _key(identity: list[Any]) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _hash_file(digest: Any, path: Path) -> None:
    """Add a file's bytes to a hash."""
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)


def _encoded(
    samples: Iterator[Sample | BadLine],
    tokenizer: Encoder,
    *,
    max_length: int | None = None,
    too_long: str = "drop",
    workers: int | None,
) -> Generator[list[EncodedSample | BadLine], None, None]:
    """Encode groups of samples in threads (tiktoken releases the GIL) and yield them in order."""
    workers = workers or os.cpu_count() or 1

    def encode_group(group: list[Sample | BadLine]) -> list[EncodedSample | BadLine]:
        return [
            sample
            if isinstance(sample, BadLine)
            else _as_arrays(try_encode(sample, tokenizer, max_length=max_length, too_long=too_long), tokenizer)
            for sample in group
        ]

    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[int, Future[list[EncodedSample | BadLine]]]] = deque()
        try:
            for size, group in _groups(samples):
                waiting.append((size, pool.submit(encode_group, group)))
                del group
                while len(waiting) > 2 * workers or sum(size for size, _ in waiting) > _most_waiting(workers):
                    yield waiting.popleft()[1].result()
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            pool.shutdown(cancel_futures=True)


def _most_waiting(workers: int) -> int:
    """Characters of text that may wait to be encoded or written."""
    return 4 * workers * _GROUP_CHARACTERS


def _as_arrays(sample: EncodedSample | BadLine, tokenizer: Encoder) -> EncodedSample | BadLine:
    """An encoded sample with arrays instead of lists, which take ten times as much memory.

    Raises:
        ValueError: a document has no ids, or ids that are not of the vocabulary.
    """
    if isinstance(sample, BadLine):
        return sample
    documents = []
    for ids, targets in sample.documents:
        tokens = np.array(ids)
        if len(tokens) == 0 or tokens.min() < 0 or tokens.max() >= tokenizer.vocab_size:
            limit = f"[0, {tokenizer.vocab_size})"
            raise ValueError(f"{sample.name}: the tokenizer gave no ids, or ids outside {limit}")
        mask = None if targets is None else np.array(targets, bool)
        documents.append((tokens.astype(token_dtype(tokenizer)), mask))
    arrays: Any = tuple(documents)  # in the place of lists
    return sample._replace(documents=arrays)


def _groups(samples: Iterator[Sample | BadLine]) -> Iterator[tuple[int, list[Sample | BadLine]]]:
    """Samples in groups of about _GROUP_CHARACTERS, each with the number of characters that it has."""
    group: list[Sample | BadLine] = []
    size = 0
    for sample in samples:
        group.append(sample)
        size += len(sample.reason if isinstance(sample, BadLine) else sample.text)
        if size >= _GROUP_CHARACTERS:
            yield size, group
            group, size = [], 0
    if group:
        yield size, group


def _remove(folder: Path) -> None:
    """Rename a folder, so that nobody opens it any more, then delete it."""
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        os.rename(folder, aside / "damaged")
    except FileNotFoundError:
        pass  # another process was faster
    shutil.rmtree(aside, ignore_errors=True)


def _sweep(cache: Path, key: str) -> None:
    """Delete the remains of killed builds of this store. Recent writes show that a build still runs."""
    for leftover in cache.glob(f"{key}.partial-*"):
        try:
            newest = max(path.stat().st_mtime for path in [leftover, *leftover.iterdir()])
        except OSError:
            continue  # its owner just finished
        if time.time() - newest > _ABANDONED_S:
            shutil.rmtree(leftover, ignore_errors=True)
