"""A helper of the tests: data files."""

import json
from pathlib import Path


def write(path: Path, lines: list) -> str:
    """JSON lines; bytes are written as they are."""
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return str(path)
