"""The end of every command: exit statuses, errors of one line, signals, and closed output pipes.

| status | meaning |
|---|---|
| 0 | the command did its work |
| 2 | an error, which is one line on standard error |
| 129, 130, 143 | stopped by SIGHUP, by Ctrl-C, by SIGTERM |
| 141 | the reader of standard output has closed it |
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from llama_jax.errors import one_line

_log = logging.getLogger(__name__)
_CAUGHT = (signal.SIGTERM, signal.SIGHUP)
_interrupted: list[int] = []  # the signals that ended a command in the middle of its work


class CommandError(Exception):
    """An error that ends a command with one line, for errors of libraries that are not ValueErrors."""


class Stopped(BaseException):
    """A signal that ends the process. `number` is the signal's number."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def run(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a command with its arguments and return the exit status of the process.

    Errors of settings, files and memory become one line on standard error. Any other exception is a defect of this
    program and keeps its traceback.
    """
    try:
        with _signals_raise():
            return _flushed(command(argv))
    except BrokenPipeError:
        return _without_reader()
    except KeyboardInterrupt:
        return _stopped(signal.SIGINT)
    except Stopped as stop:
        return _stopped(stop.number)
    except Exception as error:
        line = _line(error)
        if line is None:
            raise
        _log.debug("the error's traceback", exc_info=True)
        print(f"error: {one_line(line)}", file=sys.stderr)
        return _flushed(2)


def leave(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> None:
    """Run a command, and exit this process with its status."""
    _usable_streams()
    status = run(command, argv)
    if _interrupted:  # threads that download or compile would delay the exit
        os._exit(status)
    sys.exit(status)


def _line(error: Exception) -> object | None:
    """The text of an expected error, or None for a defect."""
    if isinstance(error, (CommandError, ValueError, OSError)):
        return error
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        detail = str(error).partition("\n")[0]
        return (
            f"out of memory{': ' + detail if detail else ''}; take a smaller batch, shorter texts, --quantize int8, or "
            "more devices (--mesh)"
        )
    return None


def _flushed(status: int) -> int:
    """The status, after what was printed has reached its reader."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _without_reader()
    except OSError as error:  # a full disk, for example
        _discard_output()
        print(f"error: standard output: {error.strerror}", file=sys.stderr)
        return status or 2
    return status


def _without_reader() -> int:
    _discard_output()
    return 141


def _discard_output() -> None:
    """Discard buffered output. Otherwise Python reports the failed write with a traceback when it exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stopped(number: int) -> int:
    if number != signal.SIGTERM:
        _interrupted.append(number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    print(f"\nstopped by {name}", file=sys.stderr)
    return _flushed(128 + number)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Stopped` in the main thread, so that files and locks are released."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in _CAUGHT}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _usable_streams() -> None:
    """Standard output and error that exist and never fail on a character that their encoding lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the file descriptor was closed before the program started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        else:
            stream.reconfigure(errors="replace")
