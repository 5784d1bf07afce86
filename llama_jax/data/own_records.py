"""Records that a Python program gives, kept as a file of JSON lines, so that a run can be resumed and inspected."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import ConfigError, brief

Record = Mapping[str, Any] | str


def save(records: Iterable[Record], folder: Path, *, name: str) -> Path:
    """Write records as lines of FOLDER/HASH.jsonl, whose name is a hash of the contents. An equal file is kept.

    Args:
        records: Records in any form of `records.parse`, each a dict; a string is a text. They are read once, one by
            one, and must end.
        folder: The folder, which is made.
        name: Name of the argument, for errors.

    Raises:
        ConfigError: there are no records, one is neither a dict nor a string or cannot be written as JSON, or the
            folder cannot be written to.
    """
    if isinstance(records, (str, bytes, Mapping)) or not isinstance(records, Iterable):
        raise ConfigError(f'{name} must be an iterable of records such as {{"text": ...}}, got {brief(records)}')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: {folder} is not a writable folder ({error.strerror}): name another"
        ) from None
    digest, number = hashlib.sha256(), -1
    try:
        with partial:
            for number, record in enumerate(records):
                line = _line(record, f"{name}: record {number}")
                digest.update(line)
                partial.write(line)
        if number < 0:
            raise ConfigError(f"{name} is empty: give at least one record")
        path = folder / f"{digest.hexdigest()[:32]}.jsonl"
        if not path.exists():  # the time of a file is part of the identity of data, so that an equal file stays
            os.replace(partial.name, path)
        return path
    finally:
        Path(partial.name).unlink(missing_ok=True)


def _line(record: object, where: str) -> bytes:
    """A record as a line of JSON; `where` names it in errors."""
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, Mapping):
        raise ConfigError(f'{where} must be a dict such as {{"text": ...}}, or a string, got {brief(record)}')
    try:
        return (json.dumps(dict(record), ensure_ascii=False, default=_plain) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where} cannot be written as JSON: {error}") from None


def _plain(value: Any) -> Any:
    """Converts a mapping, a numpy array or a numpy number, none of which json can write, to a plain value."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{brief(value)} is not a value of JSON")
