"""The writer of a token store's files, which are those that `store` describes."""

import array
import hashlib
import json
import os
import platform
from pathlib import Path
from typing import IO, Any

import numpy as np

from llama_jax.data.encoding import EncodedSample, Encoder
from llama_jax.data.records import BadLine
from llama_jax.manifest import sealed

FORMAT = 1  # part of the cache key: raise it when the meaning of the files changes
QUARANTINE = "quarantine.jsonl"
_MOST_BITS = 1 << 16  # targets that are kept in memory before they are written

# Why a record does not go with the ones before it, by whether those are pairs.
_OTHER_KIND = {
    True: "not a preference pair, as the records before it are",
    False: "a preference pair among other records",
}


def token_dtype(tokenizer: Encoder) -> np.dtype:
    """The dtype of stored ids: uint16 where the vocabulary fits into it, otherwise uint32, little-endian."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


class StoreWriter:
    """Writes the files of a store: `add` and `reject` records in their order, then `close`.

    Attributes:
        first_bad: the first record that cannot be used, or None.
        num_records: records that were added.
        num_bad: records that cannot be used.
        num_too_long: valid records that were rejected because they are longer than a row.
        masked: True if some document is not a plain text, so that not every token is a target.
        num_cut: records that were added without their last tokens, because they are longer than a row.
    """

    def __init__(self, folder: Path, tokenizer: Encoder) -> None:
        """Open the files in an existing, empty folder."""
        self.folder = folder
        self.first_bad: BadLine | None = None
        self.num_records = self.num_bad = self.num_too_long = self.num_cut = 0
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer)
        self._offsets = array.array("q", [0])
        self._digest, self._bits_digest = hashlib.sha256(), hashlib.sha256()
        self._bits: list[np.ndarray] = []  # targets that are not written yet
        self._num_bits = 0
        self.masked = self._marked = False
        self._num_targets = 0
        self._pairs: bool | None = None  # unknown before the first good record
        self._tokens_file = open(folder / "tokens.bin", "wb")
        self._bits_file = open(folder / "targets.bin", "wb")
        self._bad_file = open(folder / QUARANTINE, "w", encoding="utf-8")

    def __enter__(self) -> "StoreWriter":
        """The writer itself. Leaving the block closes its files, complete or not."""
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._tokens_file, self._bits_file, self._bad_file):
            file.close()

    @property
    def num_documents(self) -> int:
        """Documents so far: two of each pair, otherwise one of each record."""
        return len(self._offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return self._offsets[-1]

    def add(self, sample: EncodedSample) -> None:
        """Append a record. A pair after other records, and any other record after pairs, is rejected."""
        is_pair = len(sample.documents) == 2
        if self._pairs is None:
            self._pairs = is_pair
        if is_pair != self._pairs:
            self.reject(BadLine.of(sample.name, _OTHER_KIND[self._pairs]))
            return
        for ids, targets in sample.documents:
            data = np.asarray(ids).astype(self._dtype).tobytes()
            self._digest.update(data)
            self._tokens_file.write(data)
            self._offsets.append(self._offsets[-1] + len(ids))
            self.masked |= targets is not None
            bits = np.ones(len(ids), bool) if targets is None else np.asarray(targets, bool)
            self._num_targets += int(bits[1:].sum())
            self._bits.append(bits)
            self._num_bits += len(bits)
        if self._num_bits >= _MOST_BITS:
            self._write_bits(self._num_bits // 8 * 8)
        self.num_records += 1
        self.num_cut += sample.cut
        self._marked |= sample.marked

    def reject(self, bad: BadLine) -> None:
        """Add a record to the list of rejected ones, and count it as bad or as too long."""
        self._bad_file.write(bad.to_json() + "\n")
        if bad.too_long:
            self.num_too_long += 1
        else:
            self.num_bad += 1
            self.first_bad = self.first_bad or bad

    def flush_rejected(self) -> None:
        """Write the list of the records rejected so far."""
        self._bad_file.flush()

    def close(self, **about: Any) -> dict[str, Any]:
        """Write the remaining data, meta.json last, and close the files.

        Args:
            about: further entries of meta.json.

        Returns:
            The contents of meta.json.
        """
        self._write_bits(self._num_bits)
        for file in (self._tokens_file, self._bits_file, self._bad_file):
            _flush(file)
        offsets = np.frombuffer(self._offsets, dtype=np.int64)
        self._digest.update(offsets.tobytes())
        if self.masked:
            self._digest.update(self._bits_digest.digest())
        else:
            (self.folder / "targets.bin").unlink()
        if not self.num_bad and not self.num_too_long:
            (self.folder / QUARANTINE).unlink()
        with open(self.folder / "offsets.npy", "wb") as file:
            np.save(file, offsets)
            _flush(file)
        meta = sealed(about | self._meta())
        with open(self.folder / "meta.json", "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
            _flush(file)
        self.__exit__()
        return meta

    def _write_bits(self, count: int) -> None:
        """Write the first `count` of the buffered target bits. Only the last byte of a store may be incomplete."""
        bits = np.concatenate([np.zeros(0, bool), *self._bits])
        data = np.packbits(bits[:count]).tobytes()
        self._bits_digest.update(data)
        self._bits_file.write(data)
        self._bits, self._num_bits = [bits[count:]], len(bits) - count

    def _meta(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "fingerprint": self._digest.hexdigest(),
            "tokenizer_fingerprint": self._tokenizer.fingerprint,
            "vocab_size": self._tokenizer.vocab_size,
            "dtype": self._dtype.str,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "masked": self.masked,
            "marked": self._marked,
            "num_targets": self._num_targets,
            "num_bad": self.num_bad,
            "first_bad": self.first_bad and [self.first_bad.name, self.first_bad.reason],
            "num_too_long": self.num_too_long,
            "num_cut": self.num_cut,
            "pairs": bool(self._pairs),
            "versions": {"python": platform.python_version(), "numpy": np.__version__},
        }


def _flush(file: IO[Any]) -> None:
    """Force a file's contents to disk."""
    file.flush()
    os.fsync(file.fileno())
