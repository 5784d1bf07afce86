"""JSON from files that are not trusted: an object with every key once, of bounded size, or one line of error."""

from __future__ import annotations

import json
import os
import reprlib
from pathlib import Path
from typing import Any

MAX_BYTES = 2_000_000  # parsed, JSON takes up to 25 times its size; a config or an index is far smaller
_MAX_VALUES = 1_500_000  # of a larger file: a tokenizer.json of Llama 3 has half of that
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 80


def read_json(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most `max_bytes`; ValueError (one line) for anything else."""
    return parse_json(read_small(path, max_bytes=max_bytes), str(path))


def read_small(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> bytes:
    """A whole file of at most `max_bytes`; ValueError (one line) for anything else.

    Only as many bytes as it says it has: what a link of a folder leads to may be no file of an end.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path}: {size:,} bytes is more than the {max_bytes:,} allowed")
    with open(path, "rb") as file:
        return file.read(size) if size else b""


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The object in `data`; `where` is what errors call it. ValueError (one line) for anything else."""
    if len(data) > MAX_BYTES and sum(map(data.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise ValueError(f"{where} has over {_MAX_VALUES:,} values, more than any sound file of its kind")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, or a repeated name
        raise ValueError(f"{where} is not sound JSON: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, got {brief(value)}")
    return value


def write_json(path: str | os.PathLike[str], value: dict[str, Any]) -> None:
    """Write an object with two spaces of indent, whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def brief(value: Any) -> str:
    """A value as an error names it: its repr, of which no more than 80 characters are made."""
    text = _BRIEF.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the name {brief(twice)} appears twice")
    return found
