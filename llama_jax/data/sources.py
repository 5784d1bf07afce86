"""Where documents come from: files, folders, globs, and by name the quickstart corpus and its chat set.

A text file (.txt, .md) is one document; each line of a JSON-lines file (.jsonl, .json-lines), and each row of a Parquet
file (.parquet), holds a record, as `records` describes them. Text and JSON may be gzipped (.gz).
"""

import difflib
import glob
import gzip
import hashlib
import importlib.util
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from llama_jax.config import ConfigError
from llama_jax.data import corpus, questions, records
from llama_jax.data.corpus import Document
from llama_jax.data.records import BadLine, Dialog, Sample

CORPUS = ("stdlib:train", "stdlib:validation")
_NAMED = (*CORPUS, *questions.PARTS)
_TEXT = (".txt", ".md")
_JSON = (".jsonl", ".json-lines")
_TABLE = (".parquet",)


def documents_from(patterns: Sequence[str]) -> Iterator[Sample | BadLine]:
    """Yield every document that the patterns name, pattern by pattern, paths sorted within each, and every bad line.

    A pattern is a file (any ending), a folder (searched to the bottom for .txt, .md, .jsonl, .json-lines, .gz of
    them and .parquet), a glob (`**` crosses folders), or the quickstart corpus or its chat set: stdlib:train,
    stdlib:validation, stdlib:chat-train, stdlib:chat-validation. A file named twice is read once.

    Raises FileNotFoundError where a pattern matches nothing and ValueError where what it matches cannot be used
    (ConfigError where that takes a package which is not installed); the patterns are resolved at once, the files
    read one at a time.
    """
    return _read(_resolve(patterns), patterns)


def fingerprint_of(patterns: Sequence[str]) -> str:
    """A cheap identity (hex) of what the patterns name: paths, sizes and times; the corpus' fingerprint."""
    identity: list[object] = []
    for source in _resolve(patterns):
        if isinstance(source, str):
            identity.append([source, corpus.fingerprint(_corpus(source))])
        else:
            stat = source.stat()
            identity.append([os.path.abspath(source), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _corpus(name: str) -> Sequence[Document | Dialog]:
    if name in questions.PARTS:
        return questions.dialogs(name)
    return corpus.split(corpus.documents())[CORPUS.index(name)]


def _resolve(patterns: Sequence[str]) -> list[Path | str]:
    if isinstance(patterns, str):
        raise TypeError(f"patterns must be a list of strings, got the string {patterns!r}; write [{patterns!r}]")
    if not patterns:
        raise ValueError("no data was named: give at least one file, folder or glob, or 'stdlib:train'")
    found: dict[Path | str, None] = {}  # ordered, without repeats
    for pattern in map(os.path.expanduser, patterns):
        if pattern in _NAMED:
            matches: list[Path | str] = [pattern]
        elif os.path.isfile(pattern):
            matches = [Path(pattern)]
        elif os.path.isdir(pattern):
            matches = sorted(path for path in Path(pattern).rglob("*") if path.is_file() and _kind(path))
        else:
            paths = map(Path, glob.glob(pattern, recursive=True))
            matches = sorted(path for path in paths if path.is_file())
        if not matches:
            raise FileNotFoundError(_nothing_matched(pattern))
        found.update(dict.fromkeys(matches))
    tables = [source for source in found if isinstance(source, Path) and _kind(source) == "table"]
    if tables and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"{tables[0]}: reading Parquet needs pyarrow, which is not installed: pip install pyarrow")
    return list(found)


def _kind(path: Path) -> str:
    """ "text", "json", "table" or "" by the file's ending; the first two may have a .gz after it."""
    if path.suffix.lower() in _TABLE:
        return "table"
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    return "text" if suffix in _TEXT else "json" if suffix in _JSON else ""


def _nothing_matched(pattern: str) -> str:
    if pattern.startswith("stdlib:"):
        return f"{pattern!r} is not a part of the quickstart corpus; its parts are {', '.join(_NAMED)}"
    if os.path.isdir(pattern):
        return f"the folder {pattern!r} holds no file ending in {', '.join(_TEXT + _JSON + _TABLE)}, or in .gz after it"
    folder = Path(pattern).parent
    while not folder.is_dir():  # "." and "/" always are
        folder = folder.parent
    names = sorted(os.listdir(folder))
    near = difflib.get_close_matches(Path(pattern).name, names, n=3, cutoff=0.4) or names[:3]
    near_by = f"the nearest in {folder.as_posix()!r}: {', '.join(near)}" if near else f"{folder} is empty"
    return f"{pattern!r} matches no file; {near_by}"


def _read(sources: Sequence[Path | str], patterns: Sequence[str]) -> Iterator[Sample | BadLine]:
    empty = True
    for source in sources:
        if isinstance(source, str):
            documents: Iterator[Sample | BadLine] = iter(_corpus(source))
        elif _kind(source) == "json":
            documents = _json_lines(source)
        elif _kind(source) == "table":
            documents = _table_rows(source)
        else:
            documents = iter([Document(source.as_posix(), _decode(_bytes(source), source))])
        for document in documents:
            if not isinstance(document, Document) or document.text.strip():
                empty = False
                yield document
    if empty:
        raise ValueError(f"{list(patterns)} holds no text: every document found is empty")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _bytes(path: Path) -> bytes:
    try:
        with _open(path) as file:
            return file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); fetch or compress it again") from error


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 at byte {error.start} (0x{data[error.start]:02x}); convert it, for example with"
            f" iconv -f latin1 -t utf-8"
        ) from error


def _json_lines(path: Path) -> Iterator[Sample | BadLine]:
    try:
        with _open(path) as file:
            for number, data in enumerate(file, start=1):
                if data.strip():
                    yield _parse_line(data, f"{path.as_posix()}:{number}", first=number == 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); fetch or compress it again") from error


def _parse_line(data: bytes, name: str, *, first: bool) -> Sample | BadLine:
    try:
        line = data.decode("utf-8-sig" if first else "utf-8")
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return BadLine.of(name, f"not UTF-8 at byte {error.start} of the line (0x{data[error.start]:02x})")
    except json.JSONDecodeError as error:
        return BadLine.of(name, f"not a line of JSON ({error.msg} at column {error.colno}): {line.strip()[:60]!r}")
    except RecursionError:
        return BadLine.of(name, "nested too deeply")
    except ValueError as error:  # a number of thousands of digits
        return BadLine.of(name, error)
    return _parse_record(record, name)


def _table_rows(path: Path) -> Iterator[Sample | BadLine]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield _parse_record(record, f"{path.as_posix()}:{number}")
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a whole Parquet file ({reason}); fetch or write it again") from error


def _parse_record(record: object, name: str) -> Sample | BadLine:
    try:
        return records.parse(record, name)
    except RecursionError:
        return BadLine.of(name, "nested too deeply")
    except ValueError as error:
        return BadLine.of(name, error)
