"""The token store: every document tokenised once, in one flat file that is mapped into memory.

A store is a folder: `tokens.bin` (uint16 where the vocabulary fits, otherwise uint32, little-endian),
`offsets.npy` (int64, where each document starts, and the end), `targets.bin` (a bit a token, whether the loss counts
it; only where some document is not a plain text) and `meta.json`, written last. It is built
beside its final place and renamed into it, so whatever is found there is whole, however the builder ended.
Bad lines are listed beside it, in `KEY.quarantine.jsonl`. A store of preference pairs holds nothing else: of each pair
the chosen answer, then the rejected one, as two documents.
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
from typing import Any

import numpy as np

from llama_jax.data.records import BadLine, Encoder, Sample, refuse_many_bad, try_encode
from llama_jax.data.sources import documents_from, fingerprint_of

_FORMAT = 1  # part of the cache key: raise it when the files' meaning changes
_GROUP_CHARACTERS = 1 << 18  # text given to a thread at a time
_ABANDONED_S = 3600  # a leftover build that nobody has written to for this long is swept away


class DamagedStore(ValueError):
    """A store whose files are missing, cut short or contradict each other."""


class TokenStore:
    """A store on disk, mapped: `tokens` (num_tokens,) uint16 or uint32, `offsets` (num_documents + 1,) int64.

    Document d is `tokens[offsets[d]:offsets[d + 1]]`. `fingerprint` (hex) is a hash of the arrays' contents.
    `masked`: some documents are dialogs or completions, so that not every token is a target. `num_targets` are,
    each document's first token aside. `num_bad` lines were left out; `quarantine` lists them. `pairs`: documents 2k and
    2k + 1 are the chosen and the rejected answer of pair k. A `unit` is what its records are: a "pair" or a "document",
    of which there are `num_units`.
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
            self.masked: bool = meta.get("masked", False)
            self.num_targets: int = meta.get("num_targets", self.num_tokens - self.num_documents)
            self.num_bad: int = meta.get("num_bad", 0)
            self.pairs: bool = meta.get("pairs", False)
            dtype = np.dtype(meta["dtype"])
            self._check_size("tokens.bin", self.num_tokens * dtype.itemsize)
            if self.masked:
                self._check_size("targets.bin", -(-self.num_tokens // 8))
                self._targets = np.memmap(self.path / "targets.bin", dtype=np.uint8, mode="r")
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
        if self.pairs and self.num_documents % 2:
            raise self._damaged(f"{self.num_documents} documents are not pairs")

    @property
    def unit(self) -> str:
        """What a record is here."""
        return "pair" if self.pairs else "document"

    @property
    def num_units(self) -> int:
        """Of records that were used."""
        return self.num_documents // 2 if self.pairs else self.num_documents

    @property
    def quarantine(self) -> Path:
        """Where bad lines are listed, if there were any."""
        return _quarantine(self.path)

    def targets(self, start: int, stop: int) -> np.ndarray:
        """Whether the loss counts each of `tokens[start:stop]`, bool."""
        if not self.masked:
            return np.ones(stop - start, bool)
        first = start // 8
        bits = np.unpackbits(self._targets[first : -(-stop // 8)])
        return bits[start - first * 8 : stop - first * 8].astype(bool)

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
    split: str = "train",
    pairs: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """Tokenise what the patterns name (see `documents_from`, also for `split` and `pairs`), unless already done.

    Documents are as `records.encode` has them. Preference pairs and other records do not go together: what is not as
    the first good one counts as bad. The cache key covers the sources, the tokenizer, `pairs` and the store's format,
    and where there is anything but sound plain texts `max_length`, which refuses longer ones. `workers` threads encode
    (default: one a core); memory stays bounded by a few groups of documents. `progress(documents, tokens)` is called as
    they finish. A damaged store in the cache is rebuilt with a warning.

    Raises:
        ValueError: a source cannot be read, or more than 5 % of all documents cannot be used.
    """
    sources = fingerprint_of(patterns, split=split)
    identity = [_FORMAT, sources, tokenizer.fingerprint, tokenizer.vocab_size, *(["pairs"] if pairs else [])]
    plain, masked = _key(identity), _key([*identity, max_length])
    cache = Path(cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    for key in (plain, masked):
        _sweep(cache, key)
        if (cache / key).exists():
            try:
                return TokenStore(cache / key)
            except DamagedStore as error:
                warnings.warn(f"{error}: rebuilding it now", stacklevel=2)
                _remove(cache / key)
    meta = {"key": plain, "sources": list(patterns), "sources_fingerprint": sources}
    scratch = Path(tempfile.mkdtemp(prefix=f"{plain}.partial-", dir=cache))
    try:
        samples = documents_from(patterns, split=split, pairs=pairs)
        encoded = _encoded(samples, tokenizer, max_length=max_length, workers=workers)
        first_bad = _write(scratch, encoded, tokenizer, meta=meta, progress=progress)
        # A line may be bad for its length alone.
        final = cache / (masked if meta["masked"] or first_bad is not None else plain)
        if first_bad is not None:
            os.replace(scratch / _QUARANTINE, _quarantine(final))
            good = meta["num_documents"] // (2 if meta["pairs"] else 1)
            refuse_many_bad(meta["num_bad"], good, first_bad, listed=_quarantine(final))
        try:
            os.rename(scratch, final)
        except OSError:  # another process finished first: its store is the same
            if not final.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return TokenStore(final)


_QUARANTINE = "quarantine.jsonl"


def _quarantine(store: Path) -> Path:
    return store.with_name(f"{store.name}.{_QUARANTINE}")


def _key(identity: list[Any]) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


# The ids of a document, and where not all of them are targets, which are.
_Encoded = tuple[np.ndarray, np.ndarray | None]
# What a record became: its name, and its documents, two of a pair and else one.
_Unit = tuple[str, list[_Encoded]]


def _write(
    folder: Path,
    encoded: Iterator[list[_Unit | BadLine]],
    tokenizer: Encoder,
    *,
    meta: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> BadLine | None:
    """Write the files of a store into `folder`, and what is known into `meta` too; return the first bad line."""
    digest, bits_digest = hashlib.sha256(), hashlib.sha256()
    dtype = _dtype(tokenizer)
    offsets = [0]
    masked, targets, bad = False, 0, 0
    pairs: bool | None = None  # not known before the first good record
    first_bad: BadLine | None = None
    waiting = np.zeros(0, bool)  # bits that do not fill a byte yet

    with (
        open(folder / "tokens.bin", "wb") as file,
        open(folder / "targets.bin", "wb") as bits_file,
        open(folder / _QUARANTINE, "w", encoding="utf-8") as bad_file,
    ):

        def write_bits(bits: np.ndarray) -> None:
            data = np.packbits(bits).tobytes()
            bits_digest.update(data)
            bits_file.write(data)

        for group in encoded:
            group_bits = [waiting]
            for item in group:
                if not isinstance(item, BadLine):
                    name, documents = item
                    pairs = len(documents) == 2 if pairs is None else pairs
                    if pairs != (len(documents) == 2):
                        item = BadLine.of(name, _STRANGER[pairs])
                if isinstance(item, BadLine):
                    bad_file.write(item.to_json() + "\n")
                    bad += 1
                    first_bad = first_bad or item
                    continue
                for tokens, mask in documents:
                    data = tokens.tobytes()
                    digest.update(data)
                    file.write(data)
                    offsets.append(offsets[-1] + len(tokens))
                    masked |= mask is not None
                    group_bits.append(np.ones(len(tokens), bool) if mask is None else mask)
                    targets += int(group_bits[-1][1:].sum())
            bits = np.concatenate(group_bits)
            whole = len(bits) // 8 * 8
            write_bits(bits[:whole])
            waiting = bits[whole:]
            if progress:
                progress(len(offsets) - 1, offsets[-1])
        write_bits(waiting)
        for each in (file, bits_file, bad_file):
            _flush(each)
    starts = np.array(offsets, dtype=np.int64)
    digest.update(starts.tobytes())
    if masked:
        digest.update(bits_digest.digest())
    else:
        (folder / "targets.bin").unlink()
    if not bad:
        (folder / _QUARANTINE).unlink()
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
        "masked": masked,
        "num_targets": targets,
        "num_bad": bad,
        "pairs": bool(pairs),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }
    with open(folder / "meta.json", "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        _flush(file)
    return first_bad


# What does not go with the records before it, by whether those are pairs.
_STRANGER = {
    True: "not a preference pair, as the records before it are",
    False: "a preference pair among other records",
}


def _dtype(tokenizer: Encoder) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _encoded(
    samples: Iterator[Sample | BadLine], tokenizer: Encoder, *, max_length: int | None = None, workers: int | None
) -> Iterator[list[_Unit | BadLine]]:
    """Encode groups of samples in threads (tiktoken lets go of the GIL) and yield them in order."""
    workers = workers or os.cpu_count() or 1
    dtype = _dtype(tokenizer)

    def encode(sample: Sample | BadLine) -> _Unit | BadLine:
        found = sample if isinstance(sample, BadLine) else try_encode(sample, tokenizer, max_length=max_length)
        if isinstance(found, BadLine):
            return found
        documents: list[_Encoded] = []
        for given, targets in found:
            ids = np.array(given)
            if len(ids) == 0 or ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
                limit = f"[0, {tokenizer.vocab_size})"
                raise ValueError(f"{sample.name}: the tokenizer gave no ids, or ids outside {limit}")
            documents.append((ids.astype(dtype), None if targets is None else np.array(targets, bool)))
        return sample.name, documents

    def encode_group(group: list[Sample | BadLine]) -> list[_Unit | BadLine]:
        return [encode(sample) for sample in group]

    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[list[_Unit | BadLine]]] = deque()
        try:
            for group in _groups(samples):
                waiting.append(pool.submit(encode_group, group))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _groups(samples: Iterator[Sample | BadLine]) -> Iterator[list[Sample | BadLine]]:
    group: list[Sample | BadLine] = []
    size = 0
    for sample in samples:
        group.append(sample)
        size += len(sample.reason if isinstance(sample, BadLine) else sample.text)
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
