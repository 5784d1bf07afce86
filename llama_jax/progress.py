"""Progress bars on standard error, one look for all long phases, and the lines of a run on standard output.

Floor 0: this module does not import jax.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

Group = TypeVar("Group", bound=Sized)

enabled = True  # --quiet sets it to False
_DELAY = 3.0  # seconds: what ends before needs no bar


def counted(groups: Iterable[Group], title: str, *, unit: str, shown: bool) -> Iterator[Group]:
    """Yields the groups, with a progress bar that counts the items of finished ones."""
    groups = list(groups)
    with progress_bar(sum(map(len, groups)), title, unit=unit, shown=shown, delay=0) as progress:
        for group in groups:
            yield group
            progress.update(len(group))


def show(text: str) -> None:
    """Writes a line to standard output. Text that cannot be written is discarded, so that no run ends for lack of a
    reader.

    Characters that the encoding of standard output lacks become question marks.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no reader, a full disk; closed; no output at all
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError:
            encoding = sys.stdout.encoding or "ascii"
            sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()


def progress_bar(total: int | None, title: str, *, unit: str = "B", shown: bool = True, delay: float = _DELAY) -> Any:
    """A progress bar as a context manager with `update(count)`.

    Args:
        total: the number of units; None if it is not known.
        title: the phase, e.g. "loading".
        unit: the unit; "B" counts bytes with binary prefixes.
        shown: False makes a bar that prints nothing.
        delay: seconds before the bar appears, so that short phases stay silent.
    """
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=title,
        unit=unit,
        unit_scale=unit == "B",
        delay=delay,
        mininterval=0.5,
        leave=False,
        disable=not (shown and enabled),
    )


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
