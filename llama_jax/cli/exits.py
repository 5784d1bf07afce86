"""The end of every command: exit statuses, errors of one line, signals, and closed output pipes.

| status | meaning |
|---|---|
| 0 | the command did its work |
| 2 | an error, which is one line on standard error |
| 75 | another process of the run was lost or late; the same commands continue the run |
| 129, 130, 143 | stopped by SIGHUP, by Ctrl-C, by SIGTERM |
| 141 | the reader of standard output has closed it |
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from llama_jax.errors import one_line
from llama_jax.train.stop import leave as leave_process

_log = logging.getLogger(__name__)
_STDOUT = "standard output"
_PATIENCE = 5.0  # seconds from a signal to the end, for deleting partial files
CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_RAISED, _IGNORED = 64, 128  # added to the number of a signal (`_watch`)


class CommandError(Exception):
    """An error that ends a command with one line, for errors of libraries that are not ValueErrors.

    `status` is the exit status of the command.
    """

    def __init__(self, message: object, status: int = 2):
        super().__init__(message)
        self.status = status


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
    except SystemExit as end:  # of argparse, after --help and --version
        if isinstance(end.code, str):  # of a library: what it says, as Python itself would print it
            print(end.code, file=sys.stderr)
        return _flushed(end.code if isinstance(end.code, int) else int(end.code is not None))
    except Exception as error:
        line, number = _line(error), _number_of(error)  # a library may turn a signal's exception into one of its own
        if line is None and number:
            return _stopped(number)
        if line is None:
            raise
        _log.debug("the error's traceback", exc_info=True)
        print(f"error: {one_line(line)}", file=sys.stderr)
        if isinstance(error, OSError) and error.filename == _STDOUT:
            _discard_output()  # it would fail again
        return _flushed(128 + number if number else error.status if isinstance(error, CommandError) else 2)


def leave(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> None:
    """Run a command, and exit this process with its status.

    The process ends by `os._exit`. The usual end of Python would wait for threads that download or compile, and a
    signal during that wait would print a traceback.
    """
    _usable_streams()
    try:
        status = run(command, argv)
        signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)
    except Exception:
        traceback.print_exc()
        status = 1
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def unfailing_streams() -> Iterator[None]:
    """Replaces standard output and standard error by streams that discard text which cannot be written.

    It is for runs that must not end because the reader of a pipe is gone or a disk is full. One line on standard error
    reports the loss.
    """
    before = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__ and sys.stderr is sys.__stderr__:  # not where a test or a notebook captures them
        sys.stdout, sys.stderr = _unfailing(sys.stdout), _unfailing(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


class _Unfailing(io.RawIOBase):
    """A file descriptor for writing that never raises an error."""

    def __init__(self, descriptor: int):
        self._descriptor, self._failed = descriptor, False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            if not self._failed and self._descriptor != 2:
                line = f"warning: standard output cannot be written ({error.strerror}): going on without it\n"
                with contextlib.suppress(OSError):
                    os.write(2, line.encode())
            self._failed = True
            return len(data)


def _unfailing(stream: Any) -> Any:
    try:
        raw = _Unfailing(stream.fileno())
    except (OSError, ValueError):
        return stream  # the null device, in place of a descriptor that was closed
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stream.encoding, errors="replace", line_buffering=stream.line_buffering
    )


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
    """Flushes standard output, and returns the exit status: `status`, or that of a failed write."""
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
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
    print(_words(number), end="", file=sys.stderr)
    return _flushed(128 + number)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """A signal raises an exception in the main thread, so that files and locks are released.

    Libraries lose such an exception in places. While an extension of C++ is imported it may become another error or a
    segmentation fault: the process then ends at once, without deleting partial files. In callbacks of the garbage
    collector Python ignores it: the signal is sent again. After an `except` of a library, and while the main thread is
    in a library's code, where Python's handlers have to wait, `_watch` ends the process. So does a second signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    raised: set[int] = set()

    def tell(byte: int) -> None:
        with contextlib.suppress(OSError):
            writer.send(bytes([byte]))

    def stop(number: int, frame: FrameType | None) -> None:
        if _imports(frame) or number in raised:
            leave_process(number, _words(number))
        raised.add(number)
        tell(_RAISED + number)
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    def ignored(unraisable: sys.UnraisableHookArgs) -> None:
        if not (number := _number_of(unraisable.exc_value)):
            return hook(unraisable)
        raised.discard(number)
        tell(_IGNORED + number)

    hook, before = sys.unraisablehook, {number: signal.getsignal(number) for number in CAUGHT}
    threading.Thread(target=_watch, args=(reader, raised), name="signals", daemon=True).start()
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    sys.unraisablehook = ignored
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup ignores SIGHUP, and a shell SIGINT of what runs in the background
            signal.signal(number, stop)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        sys.unraisablehook = hook
        signal.set_wakeup_fd(wakeup)
        writer.close()


@contextlib.contextmanager
def surviving_ctrl_c() -> Iterator[None]:
    """A context in which Ctrl-C raises KeyboardInterrupt, and the process may go on afterwards."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    wakeup = signal.set_wakeup_fd(-1)  # `_watch` would end the process
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(wakeup)


def _watch(reader: socket.socket, raised: set[int]) -> None:
    """Ends the process if it still runs some seconds after a signal, or at the second one that Python has not handled.

    Args:
        reader: Yields a byte for each signal that arrives (its number, from `signal.set_wakeup_fd`), for each whose
            exception was raised (_RAISED and its number), and for each whose exception Python has ignored (_IGNORED and
            its number), which is sent again a little later.
        raised: The signals whose exceptions were raised.
    """
    first, deadline = 0, math.inf
    counts: dict[int, int] = {number: 0 for number in CAUGHT}
    while True:
        reader.settimeout(None if deadline == math.inf else max(0.001, deadline - time.monotonic()))
        try:
            data = reader.recv(64)
        except TimeoutError:
            leave_process(first, _words(first))
        if not data:
            reader.close()
            return
        for byte in data:
            number = byte % _RAISED
            if number not in counts:  # another signal that a library handles
                continue
            if byte >= _IGNORED:
                counts[number] = 0
                time.sleep(0.02)
                os.kill(os.getpid(), number)
                continue
            counts[number] += byte < _RAISED
            if counts[number] > 1 and number not in raised:
                leave_process(number, _words(number))
            if not first:
                first, deadline = number, time.monotonic() + _PATIENCE


def _number_of(error: BaseException | None) -> int:
    """The number of the signal that an exception, or one that it follows from, was raised for; 0 for any other."""
    while error is not None:
        if isinstance(error, Stopped):
            return error.number
        if isinstance(error, KeyboardInterrupt):
            return signal.SIGINT
        error = error.__cause__ or error.__context__
    return 0


def _imports(frame: FrameType | None) -> bool:
    """True if an import is under way."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _words(number: int) -> str:
    """The line of a command that a signal stops."""
    return f"\nstopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}\n"


def _usable_streams() -> None:
    """Standard streams that exist, of which the output never fails on a character that its encoding lacks.

    A stream whose file descriptor was closed before the program started is opened again, so that no other file gets its
    number: the input is empty, and writing to the output fails as it would on a closed descriptor.
    """
    for name, mode, flags in (("stdin", "r", os.O_RDONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY)):
        if getattr(sys, name) is None:
            stream = open(os.open(os.devnull, flags), mode, encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.stdout = sys.__stdout__ = _named(sys.stdout)  # type: ignore[misc]


def _named(stream: Any) -> Any:
    """Standard output with errors that name it; the stream itself if it has no descriptor."""
    try:
        raw = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
    except (OSError, ValueError):
        return stream
    return io.TextIOWrapper(
        raw, encoding=stream.encoding, errors="replace", line_buffering=stream.line_buffering or stream.write_through
    )


class _Output(io.FileIO):
    """Standard output, whose errors name it."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, _STDOUT) from None
