"""Readers of data files: text, JSON lines, JSON lists and Parquet, with bounds on memory and time for each file.

Files come from outside and are not trusted. A document (a line, an item of a list, or a row of a table) may have
MAX_DOCUMENT bytes. A larger one becomes a BadLine, and is never held in memory as a whole. A text file that is larger
is read as several documents. A file that is compressed more than MAX_RATIO times is refused once it has yielded
MAX_UNCHECKED bytes, because real data do not compress so well. Memory grows with these bounds and not with the file.
"""

import codecs
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
_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_HINT = "fetch or compress it again"
_NOT_DATA = (
    "which is implausible for training data; to train on it, write the file again without compression and dictionaries"
)


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
                yield BadLine.of(name, _too_large("line"))
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
            yield _parse_record(record, f"{path.as_posix()}:{number}", pairs)


def table(path: Path, *, pairs: bool) -> Iterator[Sample | BadLine]:
    """The rows of a Parquet file. Columns that no record has a use for are not read.

    Raises:
        ValueError: the file is damaged, or compressed more than MAX_RATIO times.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=_CHUNK, pre_buffer=False) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name in records.KEYS]
            others = dict.fromkeys(name for name in names if name not in columns)
            if not columns:
                raise ValueError(f"{path}: {records.why_unknown(others)}")
            allowed = max(MAX_UNCHECKED, MAX_RATIO * path.stat().st_size)
            for number, row in enumerate(_table_rows(file, columns, path), start=1):
                name = f"{path.as_posix()}:{number}"
                allowed -= _characters(row)
                if allowed < 0:  # a dictionary may repeat one text a million times, in pages that are small
                    raise ValueError(
                        f"{path}: its rows are more than {MAX_RATIO} times as large as the file, {_NOT_DATA}"
                    )
                if isinstance(row, str):
                    yield BadLine.of(name, row)
                else:
                    yield _parse_record(others | _without_nulls(row), name, pairs)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a whole Parquet file ({reason}); fetch or write it again") from error


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
        if self._compressed and _size_in_trailer(self._path) > self._allowed:
            while self.read(_CHUNK):  # the trailer may be wrong: decompress up to the bound, before anything is encoded
                pass
            self._file.seek(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

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


def _too_large(part: str) -> str:
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
    return _parse_record(record, name, pairs)


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


def _parse_record(record: object, name: str, pairs: bool) -> Sample | BadLine:
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
                raise self._error(_too_large("item") if size > MAX_DOCUMENT else _too_many_values(), self._next)
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


# ---- tables -------------------------------------------------------------------------------------------------


def _table_rows(file: Any, columns: list[str], path: Path) -> Iterator[dict[str, Any] | str]:
    """The rows of an open Parquet file as dicts, or as the reason why one cannot be read."""
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        size = _group_size(file, group, columns, path)
        if size > MAX_DOCUMENT * rows:  # then some row is too large, perhaps by much: none is read
            reason = f"its row group has {size >> 20:,} MiB in {rows:,} rows, and one document may have "
            yield from [f"{reason}{MAX_DOCUMENT >> 20:,} MiB: split the large ones"] * rows
            continue
        batch_size = max(1, min(256, MAX_DOCUMENT // (1 + size // max(rows, 1))))
        for batch in file.iter_batches(batch_size=batch_size, row_groups=[group], columns=columns):
            yield from _rows(batch)


def _group_size(file: Any, group: int, columns: list[str], path: Path) -> int:
    """The uncompressed bytes of the columns that are read of a row group.

    Raises:
        ValueError: a column is compressed more than MAX_RATIO times.
    """
    meta = file.metadata.row_group(group)
    total = 0
    for i in range(meta.num_columns):
        column = meta.column(i)
        if column.path_in_schema.split(".")[0] not in columns:
            continue
        size, stored = column.total_uncompressed_size, column.total_compressed_size
        if size > max(MAX_UNCHECKED, MAX_RATIO * stored):
            raise ValueError(
                f"{path}: column {column.path_in_schema!r} is compressed more than {MAX_RATIO} times, {_NOT_DATA}"
            )
        total += size
    return total


def _rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch as dicts, or as the reason why one cannot be read."""
    if batch.nbytes <= MAX_DOCUMENT:
        try:
            yield from batch.to_pylist()
            return
        except (ValueError, OverflowError, RecursionError):  # of some row: they are tried one by one
            pass
    for i in range(batch.num_rows):
        row = batch.slice(i, 1)
        if row.nbytes > MAX_DOCUMENT:
            yield _too_large("row")
            continue
        try:
            (record,) = row.to_pylist()
            yield record
        except UnicodeDecodeError as error:
            yield f"not UTF-8 at byte {error.start} of a string (0x{error.object[error.start]:02x})"
        except (ValueError, OverflowError) as error:
            yield " ".join(str(error).split())
        except RecursionError:
            yield "nested too deeply"


def _characters(value: Any) -> int:
    """The characters of all strings in a cell, and one for each other value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, (dict, list)):
        return sum(map(_characters, value.values() if isinstance(value, dict) else value))
    return 1


def _without_nulls(value: Any) -> Any:
    """A cell of a table without keys that hold null.

    Parquet gives every struct of a column the keys of all the others.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
