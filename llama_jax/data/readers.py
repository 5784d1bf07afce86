"""Readers of data files: text, JSON lines and JSON lists, with bounds on memory and time for each file.

Files come from outside and are not trusted. A document (a line or an item of a list) may have MAX_DOCUMENT bytes.
A larger one becomes a BadLine, and is never held in memory as a whole. A text file that is larger is read as several
documents. A file that is compressed more than MAX_RATIO times is refused once it has yielded
MAX_UNCHECKED bytes, because real data do not compress so well. Memory grows with these bounds and not with the file.
"""

import codecs
import contextlib
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llama_jax.data import records
from llama_jax.data.corpus import Document
from llama_jax.data.records import BadLine, Sample
from llama_jax.errors import json_fault

MAX_DOCUMENT = 32 << 20  # bytes
MAX_VALUES = 1_000_000  # values of one JSON record: each takes up to 100 bytes of memory
MAX_RATIO = 100  # of uncompressed to compressed bytes
MAX_UNCHECKED = 64 << 20  # bytes that a file may yield whatever its ratio
_MAX_SKIPPED = 8  # times MAX_DOCUMENT that are read to find the end of a line that is too long
_CHUNK = 1 << 20
_BOM = codecs.BOM_UTF8
# First bytes of formats that are not text in UTF-8.
_COMPRESSED = (b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"\x04\x22\x4d\x18", b"\x1f\x9d", b"]\0\0")
_SIGNATURES = {
    b"\x1f\x8b": "gzip: end its name in .gz, or decompress it",
    **dict.fromkeys(_COMPRESSED, "compressed: decompress it, or compress it with gzip"),
    b"7z\xbc\xaf": "an archive: extract its files",
    b"Rar!": "an archive: extract its files",
    b"PK\x03\x04": "a zip archive, or a document in one: extract its text",
    b"%PDF-": "a PDF document: extract its text",
    b"PAR1": "Parquet: end its name in .parquet",
    b"ARROW1": "Arrow: write it as Parquet",
    codecs.BOM_UTF16_LE: "in UTF-16: convert it to UTF-8",
    codecs.BOM_UTF16_BE: "in UTF-16: convert it to UTF-8",
}
_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_HINT = "fetch or compress it again"


def text_file(path: Path) -> Iterator[Document]:
    """A text file as one document, or as several of at most MAX_DOCUMENT bytes, cut at ends of paragraphs or lines.

    Raises:
        ValueError: the file is not UTF-8, or not a whole gzip file.
    """
    with _Reader(path) as file:
        start, rest = 0, file.read(len(_BOM)).removeprefix(_BOM)
        while data := rest + file.read(MAX_DOCUMENT - len(rest)):
            size = len(data) if len(data) < MAX_DOCUMENT else _end_of_piece(data)
            yield Document(path.as_posix(), _decode(data[:size], path, start))
            start, rest = start + size, data[size:]


def json_lines(path: Path, *, pairs: bool) -> Iterator[Sample | BadLine]:
    """The records of a file that has one on each line. Empty lines are skipped.

    Raises:
        ValueError: the file is not a whole gzip file, or a line does not end for hundreds of megabytes.
    """
    with _Reader(path) as file:
        number = 0
        while line := file.readline(MAX_DOCUMENT + 1):
            number += 1
            name = f"{path.as_posix()}:{number}"
            if len(line) > MAX_DOCUMENT:
                _skip_line(file, line, name)
                yield BadLine.of(name, too_large("line"))
            elif line.strip():
                yield _parse_line(line.removeprefix(_BOM) if number == 1 else line, name, pairs=pairs)


def json_list(path: Path, *, pairs: bool) -> Iterator[Sample | BadLine]:
    """The items of a file that is one list, numbered from 1, or its lines if it is none: both are published as .json.

    Raises:
        ValueError: the list is not whole, or an item is larger than MAX_DOCUMENT.
    """
    with _Reader(path) as file:
        is_list = file.read(4096).removeprefix(_BOM).lstrip().startswith(b"[")
    if not is_list:
        yield from json_lines(path, pairs=pairs)
        return
    with _Reader(path) as file:
        items = _Items(file, path)
        for number, record in enumerate(items, start=1):
            yield parse_record(record, f"{path.as_posix()}:{number}", pairs)


# ---- files --------------------------------------------------------------------------------------------------


class _Reader:
    """A binary file, perhaps gzipped, that is refused if it is compressed more than MAX_RATIO times."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._compressed = path.suffix.lower() == ".gz"
        self._allowed = max(MAX_UNCHECKED, MAX_RATIO * path.stat().st_size)

    def __enter__(self) -> "_Reader":
        opened: Any = gzip.open(self._path, "rb") if self._compressed else open(self._path, "rb")
        self._file: IO[bytes] = opened
        with contextlib.ExitStack() as if_refused:
            if_refused.callback(self._file.close)
            if self._compressed and _size_in_trailer(self._path) > self._allowed:
                while self.read(_CHUNK):  # the trailer may be wrong: decompress to the bound, before any is encoded
                    pass
                self._file.seek(0)
            self._check_head(self.read(64))
            self._file.seek(0)
            if_refused.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _check_head(self, head: bytes) -> None:
        """Raises ValueError for first bytes that show the format of the file to be another than text in UTF-8."""
        words = next((words for signature, words in _SIGNATURES.items() if head.startswith(signature)), None)
        zeros = b"\0" in head  # a text may begin with a signature that is text, such as BZh
        try:
            codecs.getincrementaldecoder("utf-8")().decode(head)
            words = words if zeros else None
        except UnicodeDecodeError:  # a line that is not UTF-8 has an error of its own
            pass
        if zeros:
            words = words or "binary, or a text in another encoding: convert it to UTF-8"
        if words:
            raise ValueError(f"{self._path}: {'after decompression, it' if self._compressed else 'it'} is {words}")

    def read(self, size: int) -> bytes:
        return self._checked(self._file.read, size)

    def readline(self, size: int) -> bytes:
        return self._checked(self._file.readline, size)

    def _checked(self, read: Any, size: int) -> bytes:
        if not self._compressed:
            return read(size)
        try:
            data = read(size)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{self._path}: not a whole gzip file ({error}); {_HINT}") from error
        self._check(self._file.tell())
        return data

    def _check(self, size: int) -> None:
        if size > self._allowed:
            raise ValueError(
                f"{self._path}: it is compressed more than {MAX_RATIO} times, which is implausible for training data; "
                "to train on it, decompress it yourself"
            )


def _size_in_trailer(path: Path) -> int:
    """The uncompressed size, modulo 4 GiB, that a gzip file says that its last member has. It may be wrong."""
    with open(path, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 4))
        return int.from_bytes(file.read(4), "little")


def _end_of_piece(data: bytes) -> int:
    """The length of the longest part of `data` that ends a paragraph, or else a line, or else a character."""
    for mark in (b"\n\n", b"\n"):
        if (end := data.rfind(mark)) >= 0:
            return end + len(mark)
    end = len(data)
    while end > len(data) - 4 and data[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 or len(data)


def _decode(data: bytes, path: Path, start: int) -> str:
    """The text of a part of a file that begins at byte `start`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 at byte {start + error.start} (0x{data[error.start]:02x}); convert it to UTF-8"
        ) from error


def too_large(part: str) -> str:
    """The reason why a document that is larger than MAX_DOCUMENT is not read."""
    return f"the {part} is larger than {MAX_DOCUMENT >> 20:,} MiB, the most that one document may have: split it"


# ---- JSON ---------------------------------------------------------------------------------------------------


def _skip_line(file: _Reader, line: bytes, name: str) -> None:
    """Read and discard the rest of a line that begins with `line`."""
    for _ in range(_MAX_SKIPPED):
        if line.endswith(b"\n") or not line:
            return
        line = file.readline(MAX_DOCUMENT)
    if not line.endswith(b"\n") and line:
        size = (_MAX_SKIPPED * MAX_DOCUMENT) >> 20
        raise ValueError(f"{name}: a line has more than {size:,} MiB; write one JSON record on each line")


def _parse_line(data: bytes, name: str, *, pairs: bool) -> Sample | BadLine:
    """The record of a line. Columns in reasons count characters of the line from 1."""
    if _has_many_values(data):
        return BadLine.of(name, _too_many_values())
    try:
        line = data.decode("utf-8").rstrip("\r\n")
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return BadLine.of(name, f"not UTF-8 at byte {error.start} of the line (0x{data[error.start]:02x})")
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")
        return BadLine.of(name, f"not a line of JSON ({reason} at column {error.pos + 1}): {line.strip()[:60]!r}")
    except RecursionError:
        return BadLine.of(name, "nested too deeply")
    except ValueError as error:
        return BadLine.of(name, json_fault(error))
    return parse_record(record, name, pairs)


def _has_many_values(data: bytes | str) -> bool:
    """True if JSON has more than MAX_VALUES values. Only long JSON is counted, and text in it is not."""
    if len(data) <= MAX_VALUES:
        return False
    text = data if isinstance(data, str) else data.decode("utf-8", "replace")
    if sum(map(text.count, ",[{")) <= MAX_VALUES:
        return False
    return sum(map(_STRING.sub("", text).count, ",[{")) > MAX_VALUES


def _too_many_values() -> str:
    return f"more than {MAX_VALUES:,} values, the most that one record may have: split it"


def parse_record(record: object, name: str, pairs: bool) -> Sample | BadLine:
    """The sample of a record (`records.parse`), or the reason why it cannot be used."""
    try:
        return records.parse(record, name, pairs=pairs)
    except RecursionError:
        return BadLine.of(name, "nested too deeply")
    except ValueError as error:
        return BadLine.of(name, error)


class _Items:
    """The items of a JSON list, parsed one by one from a buffer that holds little more than one of them."""

    def __init__(self, file: _Reader, path: Path) -> None:
        self._file, self._path = file, path
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._text, self._next = "", 0  # the buffer, and the first character of it that is not parsed
        self._line, self._column = 1, 1  # the position of that character in the file
        self._bytes = 0
        self._ended = False
        self._number = 0

    def __iter__(self) -> Iterator[object]:
        self._read_more()
        self._advance(self._text.index("[") + 1)
        while self._mark() != "]":
            self._number += 1
            yield self._item()
            mark = self._mark()
            if mark == ",":
                self._advance(self._next + 1)
                if self._mark() == "]":
                    self._number += 1
                    raise self._error("Expecting value", self._next)
            elif mark != "]":
                raise self._error("no , or ]", self._next)
        self._advance(self._next + 1)
        if self._mark():
            raise ValueError(f"{self._path}: not one JSON list: text follows its end, at {self._place(self._next)}")

    def _item(self) -> object:
        """The next item. An item that does not end within the buffer is parsed again from a buffer twice as long."""
        size = 0
        while True:
            while not self._ended and len(self._text) - self._next < 2 * size:
                self._read_more()
            if size > MAX_DOCUMENT or _has_many_values(self._text[self._next : self._next + size]):
                raise self._error(too_large("item") if size > MAX_DOCUMENT else _too_many_values(), self._next)
            size = len(self._text) - self._next
            try:
                record, end = json.JSONDecoder().raw_decode(self._text, self._next)
            except RecursionError:
                raise self._error("nested too deeply", self._next) from None
            except json.JSONDecodeError as error:
                if self._ended:
                    raise self._error(error.msg, error.pos) from None
                continue
            except ValueError as error:
                raise self._error(json_fault(error), self._next) from None
            if end - self._next > MAX_DOCUMENT:
                raise self._error(too_large("item"), self._next)
            if end < len(self._text) or self._ended:  # otherwise a number may go on
                self._advance(end)
                return record

    def _mark(self) -> str:
        """The next character that is no white space, or "" at the end of the file."""
        while True:
            space = _SPACE.match(self._text, self._next)
            self._advance(space.end() if space else self._next)
            if self._next < len(self._text) or self._ended:
                return self._text[self._next : self._next + 1]
            self._read_more()

    def _read_more(self) -> None:
        data = self._file.read(_CHUNK)
        self._ended = not data
        if self._bytes == 0 and data.startswith(_BOM):
            self._bytes, data = len(_BOM), data.removeprefix(_BOM)
        waiting = len(self._utf8.getstate()[0])
        try:
            self._text = self._text[self._next :] + self._utf8.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            offset = self._bytes - waiting + error.start
            byte = error.object[error.start]
            raise ValueError(f"{self._path}: not UTF-8 at byte {offset} (0x{byte:02x}); convert it to UTF-8") from error
        self._next = 0
        self._bytes += len(data)

    def _advance(self, to: int) -> None:
        self._line, self._column = self._line_and_column(to)
        self._next = to

    def _line_and_column(self, at: int) -> tuple[int, int]:
        lines = self._text.count("\n", self._next, at)
        if lines == 0:
            return self._line, self._column + at - self._next
        return self._line + lines, at - self._text.rindex("\n", self._next, at)

    def _place(self, at: int) -> str:
        return "line {} column {}".format(*self._line_and_column(at))

    def _error(self, reason: str, at: int) -> ValueError:
        reason = " ".join(reason.split())
        return ValueError(
            f"{self._path}: not a whole JSON list: item {self._number}: {reason} at {self._place(at)}; fetch or write "
            "it again"
        )
