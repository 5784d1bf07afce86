"""Sources of documents: files, folders, globs, datasets of the hub, and by name the quickstart corpora.

A text file (.txt, .md) is one document. A record, in one of the shapes of `records`, is a line of a JSON-lines file
(.jsonl, .json-lines, .ndjson), a row of a Parquet file (.parquet) or an item of a JSON list (.json). Text and JSON may
be gzipped (.gz).
"""

import difflib
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from llama_jax import storage
from llama_jax.data import corpus, hub_datasets, questions, readers, tables
from llama_jax.data.corpus import Document
from llama_jax.data.records import BadLine, Dialog, Sample

CORPUS = ("stdlib:train", "stdlib:validation")
_NAMED = (*CORPUS, *questions.PARTS)
_TEXT = (".txt", ".md")
_JSON = (".jsonl", ".json-lines", ".ndjson")
_TABLE = (".parquet",)
_LIST = (".json",)
# Formats that are not read. Taken for texts, they would be learned with their markup.
_NOT_TEXT = (
    *(".csv", ".tsv", ".jl", ".json5", ".arrow", ".orc", ".avro", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst"),
    *(".lz4", ".lzma", ".br", ".z", ".7z", ".rar", ".pdf", ".docx", ".xlsx", ".epub"),
)

# Sources by path, or by the name of a part of the corpus. The value of a file of the hub is its name with the commit
# and its size, which are the same on any machine.
_Sources = dict[Path | str, tuple[str, int] | None]


def documents_from(patterns: Sequence[str], *, split: str = "train", pairs: bool = False) -> Iterator[Sample | BadLine]:
    """An iterator over every document that the patterns name, and every record that cannot be used.

    A pattern is one of: a file (an unknown ending counts as text); a folder, which is searched recursively for the
    endings above except .json, since such files may be anything; a glob (`**` crosses folders); the address of any of
    these in a store, such as gs://BUCKET/FOLDER (see `storage`); a dataset of the hub (see `hub_datasets`);
    stdlib:train or stdlib:validation, the quickstart corpus; stdlib:chat-train or stdlib:chat-validation, its chat set.
    Documents come pattern by pattern, sorted by path within each. A file that is named twice is read once. Patterns are
    resolved, and files of stores and of the hub downloaded, at once; files are read one by one.

    Args:
        patterns: the patterns.
        split: "train" or "validation": the files of a dataset of the hub that is named without any.
        pairs: as in `records.parse`.

    Raises:
        FileNotFoundError: a pattern matches nothing.
        ConfigError: a package is not installed, or a dataset cannot be downloaded.
        ValueError: a file cannot be read, or all documents are empty.
    """
    return _read(list(_resolve(patterns, split)), patterns, pairs)


def fingerprint_of(patterns: Sequence[str], *, split: str = "train") -> str:
    """A hash (hex) that identifies the files of the patterns by path, size and time of change, without reading them.

    Files of the hub are identified by their names with the commit and their sizes, so that the hash is the same on
    another machine. The quickstart corpora are identified by their contents.
    """
    identity: list[object] = []
    for source, known in _resolve(patterns, split).items():
        if isinstance(source, str):
            identity.append([source, corpus.fingerprint(_corpus(source))])
        elif known:
            identity.append(known)
        else:
            stat = source.stat()
            suffix = ["list"] if _kind(source) == "list" else []  # earlier versions read such a file as a text
            identity.append([os.path.abspath(source), stat.st_size, stat.st_mtime_ns, *suffix])
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _corpus(name: str) -> Sequence[Document | Dialog]:
    if name in questions.PARTS:
        return questions.dialogs(name)
    return corpus.split(corpus.documents())[CORPUS.index(name)]


def hub_files(patterns: Sequence[str], *, split: str) -> list[str]:
    """The names, with the commit, of the files of the hub that the patterns match."""
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
            found |= dict[Path | str, tuple[str, int] | None](hub_datasets.find(pattern, split).items())
            continue
        if storage.is_url(pattern):
            found |= _stored(pattern)
            continue
        pattern = storage.local_path(pattern) or pattern
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
    _check_readable([source for source, known in found.items() if isinstance(source, Path) and not known])
    return found


def _check_readable(paths: Sequence[Path]) -> None:
    """Check the formats of files by their endings; ValueError or ConfigError for the first that is not read."""
    for path in paths:
        if path.suffix.lower() in _NOT_TEXT:
            raise ValueError(
                f"{path}: files ending in {path.suffix} are not supported; write records as lines of a .jsonl file, or "
                "texts as .txt or .md (each perhaps with .gz)"
            )
        inner = [suffix for suffix in path.suffixes if suffix.lower() in (*_JSON, *_TABLE, *_LIST)]
        if inner and not _kind(path):  # taken for a text, it would be learned with its markup
            raise ValueError(f"{path}: its name has {inner[-1]} before another ending: end it in {inner[-1]}")
    hub_datasets.check_readable(map(str, paths))


def _stored(url: str) -> _Sources:
    """The files of an address, which are downloaded unless the cache has them; of a folder those of known endings."""
    files = storage.find(url)
    if len(files) > 1 or files[0].name != url.rpartition("/")[2]:  # neither a folder's files nor a pattern's
        files = [file for file in files if "*" in url or _kind(Path(file.name)) not in ("", "list")]
    if not files:
        raise FileNotFoundError(
            f"{url!r} holds no file ending in {', '.join(_TEXT + _JSON + _TABLE)}, or in .gz after it"
        )
    _check_readable([Path(file.name) for file in files])
    paths = storage.download(url, files, storage.cache_folder(url, files))
    return {paths[file.name]: (f"{url}#{file.name}@{file.version}", file.size) for file in files}


def _kind(path: Path) -> str:
    """ "text", "json", "list", "table" or "" by the file's ending; the first three may have a .gz after it."""
    if path.suffix.lower() in _TABLE:
        return "table"
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return "text" if suffix in _TEXT else "json" if suffix in _JSON else "list" if suffix in _LIST else ""


def _nothing_matched(pattern: str) -> str:
    if pattern.startswith("stdlib:"):
        return f"{pattern!r} is not a part of the quickstart corpus; its parts are {', '.join(_NAMED)}"
    if os.path.isdir(pattern):
        return f"the folder {pattern!r} holds no file ending in {', '.join(_TEXT + _JSON + _TABLE)}, or in .gz after it"
    if os.path.exists(pattern):
        return f"{pattern!r} is a pipe or a device, and data are read more than once: copy them to a file"
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
    return tables.table(source, pairs=pairs) if kind == "table" else readers.text_file(source)
