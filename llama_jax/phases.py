"""Announcements of long phases of a program, each with the time that it took the last time on this machine.

Floor 0: this module does not import jax.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llama_jax.files import read_json, write_json
from llama_jax.progress import duration
from llama_jax.storage import cache_root

_FILE = "phases.json"
_SHORTEST = 2.0  # seconds: what took less needs no time
_MOST = 500  # phases that are remembered


@contextlib.contextmanager
def phase(title: str, say: Callable[[str], Any], *, of: str = "") -> Iterator[None]:
    """Announce a phase before it begins, and remember how long it took if it succeeds.

    Args:
        title: The line to print, e.g. "compiling the training step".
        say: Prints a line.
        of: A property that the time depends on, e.g. the size of a model. It is not printed.
    """
    key = f"{title} {of}".strip()
    last = _times().get(key)
    say(f"{title} (took {duration(last)} last time)" if isinstance(last, (int, float)) and last >= _SHORTEST else title)
    started = time.monotonic()
    yield
    times = {name: seconds for name, seconds in _times().items() if name != key}
    newest = dict([*times.items(), (key, round(time.monotonic() - started, 1))][-_MOST:])
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the times alone
        cache_root().mkdir(parents=True, exist_ok=True)
        write_json(_path(), newest)


def _times() -> dict[str, Any]:
    """The seconds of each phase the last time; none if the file is missing or damaged."""
    try:
        return read_json(_path())
    except (OSError, ValueError):
        return {}


def _path() -> Path:
    return cache_root() / _FILE
