"""Datasets of the Hugging Face hub, by the notation of its own library: hf://datasets/OWNER/NAME[@REVISION][/PATH].

PATH is a file, a folder or a glob pattern (`**` crosses folders). Without one, files are chosen by a whole word in the
path that names the split: `train` or `training`; for validation `validation`, `valid`, `val` or `dev`, and otherwise
`test` or `eval`. If no path names a split, all files are used for training. If the files have several formats, only
those in the first of FORMATS are used, because the others usually repeat the data or describe them.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from llama_jax.errors import ConfigError, nearest
from llama_jax.hub import ID, Repo, check_there, fetch, listing, some

SCHEME = "hf://"
FORMS = "hf://datasets/OWNER/NAME[@REVISION][/PATH-OR-PATTERN]"
FORMATS = (
    (".parquet",),
    (".jsonl", ".json-lines"),
    (".json",),
    (".txt", ".md"),
)  # all but the first may be followed by .gz

_REVISION = r"refs/(?:pr|convert)/\w+|[^@/\s]+"
_ID = re.compile(rf"hf://datasets/({ID})(?:@({_REVISION}))?(?:/(\S+?))?/?", re.ASCII)
_WORDS = {"train": (("train", "training"),), "validation": (("validation", "valid", "val", "dev"), ("test", "eval"))}
_NOT_DATA = ("dataset_infos.json", "dataset_info.json", "README.md", "LICENSE.txt", "LICENSE.md")


def is_bare_id(text: str) -> bool:
    """True for OWNER/NAME, the name of a dataset without the scheme."""
    return re.fullmatch(ID, text, re.ASCII) is not None


@functools.cache  # a branch may move, so a name is resolved to a commit once in a process
def find(text: str, split: str) -> dict[Path, tuple[str, int]]:
    """Download the files that a name matches, except those in the hub's cache.

    Args:
        text: the name, in the notation of this module.
        split: "train" or "validation", for a name without a path.

    Returns:
        The paths of the files, in order. The values identify a file on any machine: its name with the commit, and its
        size.

    Raises:
        ConfigError: the dataset or file does not exist or is not accessible, or there is no network or no disk space.
    """
    found = _ID.fullmatch(text)
    if found is None or ".." in text:
        raise ConfigError(f"{text!r} names no dataset of the Hugging Face hub: write {FORMS}")
    name, revision, pattern = found.groups()
    repo = Repo("dataset", text, name, revision, FORMS)
    folder = fetch(repo, (".gitattributes",))  # a file of every repo, to get the commit and the list of files
    files = _choose(repo, listing(repo, folder), pattern=pattern, split=split)
    check_readable(files)
    fetch(repo, files, commit=folder.name)
    check_there(repo, folder, files)
    base = f"hf://datasets/{name}@{folder.name}"
    return {folder / file: (f"{base}/{file}", (folder / file).stat().st_size) for file in files}


def check_readable(files: Iterable[str]) -> None:
    """Raise ConfigError if the format of some file needs a package that is not installed."""
    tables = [file for file in files if _format(file) == 0]
    if tables and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"{tables[0]}: reading Parquet needs pyarrow, which is not installed: pip install pyarrow")


def _choose(repo: Repo, files: Sequence[str], *, pattern: str | None, split: str) -> list[str]:
    """The files of the repo that the name matches, at least one."""
    if pattern is not None and pattern in files:
        return [pattern]
    data = [file for file in files if _format(file) is not None and Path(file).name not in _NOT_DATA]
    if pattern is not None:
        wanted = [f for f in data if f.startswith(f"{pattern}/") or _matches(pattern.split("/"), f.split("/"))]
        if not wanted:
            raise ConfigError(
                f"{repo.text} matches no data file{nearest(pattern, files)}; it has {some(data or list(files))}"
            )
        return wanted
    if not data:
        endings = ", ".join(ending for endings in FORMATS for ending in endings)
        raise ConfigError(f"{repo.text}: no file ends in {endings}; it has {some(list(files)) or 'no files'}")
    first = min(number for file in data if (number := _format(file)) is not None)
    data = [file for file in data if _format(file) == first]
    for words in _WORDS[split]:
        if says := [file for file in data if _says(file, words)]:
            return says
    others = [word for key, groups in _WORDS.items() if key != split for words in groups for word in words]
    rest = [file for file in data if not _says(file, others)]
    if split != "train" or not rest:
        raise ConfigError(
            f"{repo.text}: no path of a file has a word for {split}; add the path of a file, such as {some(data)}"
        )
    return rest


def _format(file: str) -> int | None:
    """The index in FORMATS of a file's ending, or None."""
    whole = file.lower()
    for number, endings in enumerate(FORMATS):
        if (whole if number == 0 else whole.removesuffix(".gz")).endswith(endings):
            return number
    return None


def _says(file: str, words: Sequence[str]) -> bool:
    """True if the path has one of the words, with no letter before or after it."""
    return re.search(rf"(?<![a-z])(?:{'|'.join(words)})(?![a-z])", file.lower()) is not None


def _matches(pattern: Sequence[str], file: Sequence[str]) -> bool:
    """True if a path matches, part by part. "**" matches any number of folders."""
    if not pattern or not file:
        return not pattern and not file
    if pattern[0] == "**":
        return len(pattern) == 1 or any(_matches(pattern[1:], file[i:]) for i in range(len(file)))
    return fnmatch.fnmatchcase(file[0], pattern[0]) and _matches(pattern[1:], file[1:])
