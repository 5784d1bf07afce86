"""Where documents come from: files, folders, globs, datasets of the hub, and by name the quickstart corpora.

A text file (.txt, .md) is one document; each line of a JSON-lines file (.jsonl, .json-lines, .ndjson), each row of a
Parquet file (.parquet), and each item of the list that a JSON file (.json) may be, holds a record, as `records` has it.
Text and JSON may be gzipped (.gz).
"""

import difflib
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from llama_jax.data import corpus, hub_datasets, questions, readers
from llama_jax.data.corpus import Document
from llama_jax.data.records import BadLine, Dialog, Sample

CORPUS = ("stdlib:train", "stdlib:validation")
_NAMED = (*CORPUS, *questions.PARTS)
_TEXT = (".txt", ".md")
_JSON = (".jsonl", ".json-lines", ".ndjson")
_TABLE = (".parquet",)
_LIST = (".json",)
# What would be learnt as it stands, marks and all, if it were taken for a text.
_NOT_TEXT = (".csv", ".tsv", ".jl", ".json5", ".arrow", ".orc", ".avro", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst")

# What a pattern names: a file or a part of the corpus. Files of the hub come with what they are on any machine.
_Sources = dict[Path | str, tuple[str, int] | None]


def documents_from(patterns: Sequence[str], *, split: str = "train", pairs: bool = False) -> Iterator[Sample | BadLine]:
    """Yield every document that the patterns name, pattern by pattern, paths sorted within each, and every bad line.

    A pattern is a file (one of an unknown ending is a text), a folder (searched to the bottom for what is named above
    but .json, which may be anything), a glob (`**` crosses folders), a dataset of the hub (see `hub`; `split` says
    which of its files when it is named without any), or the quickstart corpus or its chat set: stdlib:train,
    stdlib:validation, stdlib:chat-train, stdlib:chat-validation. A file named twice is read once. `pairs` is as in
    `records.parse`.

    Raises FileNotFoundError where a pattern matches nothing and ValueError where what it matches cannot be used
    (ConfigError where that takes a package which is not installed, or cannot be downloaded); the patterns are resolved,
    and files of the hub downloaded, at once; the files are read one at a time.
    """
    return _read(list(_resolve(patterns, split)), patterns, pairs)


def fingerprint_of(patterns: Sequence[str], *, split: str = "train") -> str:
    """A cheap identity (hex) of what the patterns name: paths, sizes and times; the corpus' fingerprint.

    Of files of the hub: names with the commit, and sizes, so that it is the same on another machine.
    """
    identity: list[object] = []
    for source, known in _resolve(patterns, split).items():
        if isinstance(source, str):
            identity.append([source, corpus.fingerprint(_corpus(source))])
        elif known:
            identity.append(known)
        else:
            stat = source.stat()
            kind = ["list"] if _kind(source) == "list" else []  # such a file was a text once
            identity.append([os.path.abspath(source), stat.st_size, stat.st_mtime_ns, *kind])
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _corpus(name: str) -> Sequence[Document | Dialog]:
    if name in questions.PARTS:
        return questions.dialogs(name)
    return corpus.split(corpus.documents())[CORPUS.index(name)]


def hub_files(patterns: Sequence[str], *, split: str) -> list[str]:
    """Which files of the hub the patterns came to, by their names with the commit."""
    ids = [pattern for pattern in patterns if pattern.startswith(hub_datasets.SCHEME)]
    return [name for text in ids for name, _ in hub_datasets.find(text, split).values()]


def _resolve(patterns: Sequence[str], split: str) -> _Sources:
    if isinstance(patterns, str):
        raise TypeError(f"patterns must be a list of strings, got the string {patterns!r}; write [{patterns!r}]")
    if not patterns:
        raise ValueError("no data was named: give at least one file, folder or glob, or 'stdlib:train'")
    found: _Sources = {}  # ordered, without repeats
    for pattern in map(os.path.expanduser, patterns):
        if pattern.startswith(hub_datasets.SCHEME):
            found |= hub_datasets.find(pattern, split)
            continue
        if pattern in _NAMED:
            matches: list[Path | str] = [pattern]
        elif os.path.isfile(pattern):
            matches = [Path(pattern)]
        elif os.path.isdir(pattern):
            matches = sorted(
                path for path in Path(pattern).rglob("*") if path.is_file() and _kind(path) not in ("", "list")
            )
        else:
            paths = map(Path, glob.glob(pattern, recursive=True))
            matches = sorted(path for path in paths if path.is_file())
        if not matches:
            raise FileNotFoundError(_nothing_matched(pattern))
        found.update(dict.fromkeys(matches))
    for source in found:
        if isinstance(source, Path) and source.suffix.lower() in _NOT_TEXT:
            raise ValueError(
                f"{source}: {source.suffix} is not read; write records as lines of a .jsonl file or as .parquet, and "
                "texts as .txt or .md (each perhaps with .gz)"
            )
    hub_datasets.check_readable(str(source) for source in found if isinstance(source, Path))
    return found


def _kind(path: Path) -> str:
    """ "text", "json", "list", "table" or "" by the file's ending; the first three may have a .gz after it."""
    if path.suffix.lower() in _TABLE:
        return "table"
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    return "text" if suffix in _TEXT else "json" if suffix in _JSON else "list" if suffix in _LIST else ""


def _nothing_matched(pattern: str) -> str:
    if pattern.startswith("stdlib:"):
        return f"{pattern!r} is not a part of the quickstart corpus; its parts are {', '.join(_NAMED)}"
    if os.path.isdir(pattern):
        return f"the folder {pattern!r} holds no file ending in {', '.join(_TEXT + _JSON + _TABLE)}, or in .gz after it"
    folder = Path(pattern).parent
    while not folder.is_dir():  # "." and "/" always are
        folder = folder.parent
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    near = difflib.get_close_matches(Path(pattern).name, names, n=3, cutoff=0.4) or names[:3]
    near_by = f"the nearest in {folder.as_posix()!r}: {', '.join(near)}" if near else f"{folder} is empty"
    if hub_datasets.is_bare_id(pattern) and not Path(pattern).parent.is_dir() and not _kind(Path(pattern)):
        near_by += f"; a dataset of the Hugging Face hub is named hf://datasets/{pattern}"
    return f"{pattern!r} matches no file; {near_by}"


def _read(sources: Sequence[Path | str], patterns: Sequence[str], pairs: bool) -> Iterator[Sample | BadLine]:
    empty = True
    for source in sources:
        for document in _documents_of(source, pairs):
            if not isinstance(document, Document) or document.text.strip():
                empty = False
                yield document
    if empty:
        raise ValueError(f"{list(patterns)} holds no text: every document found is empty")


def _documents_of(source: Path | str, pairs: bool) -> Iterator[Sample | BadLine]:
    if isinstance(source, str):
        return iter(_corpus(source))
    kind = _kind(source)
    if kind == "json":
        return readers.json_lines(source, pairs=pairs)
    if kind == "list":
        return readers.json_list(source, pairs=pairs)
    return readers.table(source, pairs=pairs) if kind == "table" else readers.text_file(source)
