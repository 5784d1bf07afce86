"""The header of a GGUF file, read from front to back without trusting it. Imports no jax.

The format (github.com/ggml-org/ggml, docs/gguf.md): a magic word, a version and two counts; metadata as keys with typed
values; then the tensors. All numbers are little-endian. Every size in the header is checked against the size of the
file, and every error is one line that names the file.
"""

from __future__ import annotations

import os
import struct
import sys

import numpy as np

from llama_jax.errors import brief
from llama_jax.files import File

Value = str | bool | int | float | list[str] | np.ndarray

MAGIC = b"GGUF"
NUMBERS: dict[int, np.dtype] = dict(
    zip((0, 1, 2, 3, 4, 5, 6, 10, 11, 12), map(np.dtype, "u1 i1 <u2 <i2 <u4 <i4 <f4 <u8 <i8 <f8".split()), strict=True)
)
BOOL, STRING, ARRAY = 7, 8, 9
_LENGTH = struct.Struct("<Q")
_CHUNK = 1 << 20  # bytes of the header that are read at a time
_SPARE = 128_000_000  # bytes of memory beyond the file's size that its header may take; 256,000 tokens take 55
# Bytes of memory that each takes at least, longer strings apart.
_EMPTY = sys.getsizeof("")
_KEY_COST, _TENSOR_COST, _TEXT_COST = 250, 4000, _EMPTY + 8


class Header:
    """Reads the header of a GGUF file in order, and counts the bytes left in the file and in the memory allowance."""

    def __init__(self, file: File, spent: int):
        self.file, self.spent = file, spent
        self.at = self._start = 0
        self._chunk = b""

    def start(self) -> tuple[int, int, dict[str, Value]]:
        """Reads everything before the tensors: the format's version, the number of tensors, and metadata by key."""
        path = self.file.path
        magic = self.file.read(0, min(4, self.file.size))
        if magic != MAGIC:
            pointer = " (a Git LFS pointer: run `git lfs pull`)" if magic == b"vers" else ""
            raise ValueError(f"{path}: not a GGUF file, it begins with {magic!r}{pointer}")
        self.take(4, "the magic word")
        version = self.whole(4, "the version")
        if version & 0xFFFF == 0:
            raise ValueError(f"{path}: a big-endian file; only little-endian ones are read: fetch the ordinary one")
        if version not in (2, 3):
            raise ValueError(f"{path}: GGUF version {version} is not supported, only 2 and 3: convert the file again")
        tensors, keys = self.whole(8, "the count of tensors"), self.whole(8, "the count of keys")
        self.require(keys * 13 + tensors * 24, f"a header of {keys:,} keys and {tensors:,} tensors")
        self.spend(tensors * _TENSOR_COST + keys * _KEY_COST, f"a header of {keys:,} keys and {tensors:,} tensors")
        metadata: dict[str, Value] = {}
        for i in range(keys):
            key = self.text(f"metadata key {i + 1}")
            if key in metadata:
                raise ValueError(f"{path}: metadata key {brief(key)} appears twice")
            what = f"metadata {brief(key)}"
            metadata[key] = self.value(self.whole(4, what), what)
        return version, tensors, metadata

    def require(self, count: int, what: str) -> None:
        """Raises ValueError if the file has fewer than `count` bytes left."""
        if count > self.file.size - self.at:
            raise ValueError(
                f"{self.file.path}: {what} needs {count:,} bytes, but {self.file.size - self.at:,} are left (cut off?)"
            )

    def spend(self, count: int, what: str) -> None:
        """Raises ValueError if the header would take more memory than allowed."""
        self.spent += count
        if self.spent > _SPARE:
            raise ValueError(f"{self.file.path}: {what} would take more memory than the {_SPARE:,} bytes allowed")

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        begin = self.at - self._start
        if begin + count > len(self._chunk):
            self.require(count, what)
            self._start, begin = self.at, 0
            self._chunk = self.file.read(self.at, min(max(count, _CHUNK), self.file.size - self.at))
        self.at += count
        return self._chunk[begin : begin + count]

    def whole(self, width: int, what: str) -> int:
        """An unsigned whole number of `width` bytes."""
        return int.from_bytes(self.take(width, what), "little")

    def text(self, what: str) -> str:
        """A string: its length in 8 bytes, and UTF-8."""
        length = self.whole(8, what)
        if length > _CHUNK:  # in memory three times at once, and with up to four bytes a character
            self.require(length, what)
            self.spend(6 * length, what)
        try:
            text = self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.file.path}: {what} is not valid UTF-8") from None
        self.spend(sys.getsizeof(text) - _EMPTY, what)
        return text

    def _texts(self, count: int, what: str) -> list[str]:
        """Reads `count` strings, those within the buffered chunk in one fast loop: a vocabulary has very many."""
        texts: list[str] = []
        while len(texts) < count:
            texts.append(self.text(what))
            chunk, at, before = self._chunk, self.at - self._start, len(texts)
            try:
                while len(texts) < count and at + 8 <= len(chunk):
                    end = at + 8 + _LENGTH.unpack_from(chunk, at)[0]
                    if end > len(chunk):
                        break
                    texts.append(chunk[at + 8 : end].decode("utf-8"))
                    at = end
            except UnicodeDecodeError:
                raise ValueError(f"{self.file.path}: {what} is not valid UTF-8") from None
            self.at = self._start + at
            self.spend(sum(map(sys.getsizeof, texts[before:])) - _EMPTY * (len(texts) - before), what)
        return texts

    def value(self, kind: int, what: str) -> Value:
        """A value of the type of this number."""
        if kind == STRING:
            return self.text(what)
        if kind == BOOL:
            return self.whole(1, what) != 0
        if kind in NUMBERS:
            number = np.frombuffer(self.take(NUMBERS[kind].itemsize, what), NUMBERS[kind])[0]
            return float(str(number)) if number.dtype == np.float32 else number.item()
        if kind != ARRAY:
            raise ValueError(f"{self.file.path}: {what} is of type {kind}; types are 0 to 12")
        kind, count = self.whole(4, what), self.whole(8, what)
        if kind == STRING:
            self.require(8 * count, what)
            self.spend(_TEXT_COST * count, what)
            return self._texts(count, what)
        dtype = np.dtype(np.uint8) if kind == BOOL else NUMBERS.get(kind)
        if dtype is None:
            raise ValueError(f"{self.file.path}: {what} is an array of type {kind}; an array holds numbers or strings")
        self.require(count * dtype.itemsize, what)
        array = np.empty(count, dtype)
        self.file.read_into(array.view(np.uint8).data, self.at)
        self.at += array.nbytes
        return np.not_equal(array, 0, out=array.view(np.bool_)) if kind == BOOL else array


def shown(value: Value | None) -> str:
    """A value of metadata for an error message, in one line."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.size:,} numbers"
    return f"an array of {len(value):,} strings" if isinstance(value, list) else brief(value)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Value]:
    """The metadata of a GGUF file by key. Raises ValueError (one line) for a file that is not sound."""
    return Header(File(path), 0).start()[2]
