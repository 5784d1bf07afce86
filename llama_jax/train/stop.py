"""The orderly stop of a run: SIGTERM, SIGHUP and Ctrl-C end it after the running step, with a checkpoint.

A thread reads each signal as it arrives, also while the main thread imports a library, compiles or does a long step,
when Python's own handlers have to wait. This module does not import jax, so that `train.py` can watch signals from its
first line on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import types
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """Raised when a signal arrives inside `StopSignal.interruptible`."""


class StopSignal:
    """A context in which SIGTERM, SIGHUP and Ctrl-C stop a run.

    Before `begin_work` and after `end_work`, a stop loses nothing: the process exits at once. In between, the first
    signal sets `.requested`, the loop saves the running step, and a second Ctrl-C exits at once. If the main thread has
    not called `acknowledge` within `grace` seconds of a SIGTERM or SIGHUP, the process exits without a further
    checkpoint, before the scheduler kills it. Ctrl-C waits for as long as the step takes.

    In a process that does more than train, such as a notebook, Ctrl-C raises KeyboardInterrupt instead of ending it.

    Attributes:
        requested: True once a signal has arrived.
        number: The number of the first signal, or None.
        grace: Seconds from SIGTERM or SIGHUP to the exit.
        child: The child process that trains, if there is one. Every signal is passed on to it.
    """

    def __init__(self, *, grace: float = 8.0, owns_process: bool = False) -> None:
        self.grace = grace
        self.requested = False
        self.number: int | None = None
        self.child: int | None = None
        self._owns_process = owns_process
        self._works = self._interruptible = False
        self._acknowledged = threading.Event()
        self._previous: dict[int, object] = {}
        self._lock = threading.Lock()

    def begin_work(self) -> None:
        """Declare that an exit would lose steps. It costs nothing, so call it every step."""
        if not self._works:
            with self._lock:
                self._works = True

    def end_work(self) -> None:
        """Declare that everything is saved."""
        self._works = False

    def acknowledge(self) -> None:
        """Declare that the stop is handled: saving may now take any time."""
        self._acknowledged.set()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A context in which a signal raises `Interrupted` in the main thread, for long work that may be dropped."""
        self._interruptible = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stop-signal", daemon=True).start()
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._acknowledged.set()
        if not self._previous:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._old_fd)
        self._writer.close()

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        """Python's handler, which the main thread runs when it can; `_watch` reads the same signal in a thread."""
        if not self._owns_process:
            if number == signal.SIGINT and (self.requested or not self._works):
                raise KeyboardInterrupt
            self._request(number)
        if self._interruptible:
            self._interruptible = False
            raise Interrupted

    def _watch(self) -> None:
        """Read the signals as they arrive, in a thread."""
        while data := self._reader.recv(16):
            for number in (number for number in data if number in self._previous):
                if number == signal.SIGINT and not self._owns_process:
                    continue
                if self.child is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self.child, number)
                    continue
                with self._lock:
                    if not self._works or (number == signal.SIGINT and self.requested):
                        leave(number)
                    self._request(number)
        self._reader.close()

    def _request(self, number: int) -> None:
        if self.requested:
            return
        self.number, self.requested = number, True
        if number == signal.SIGINT:
            write_error("\nstopping after this step; Ctrl-C again leaves at once\n")
        else:
            threading.Thread(target=self._leave_in_time, args=(number,), name="grace", daemon=True).start()

    def _leave_in_time(self, number: int) -> None:
        if not self._acknowledged.wait(self.grace):
            leave(number, "stopped inside a step (checkpoint.grace_seconds); the last checkpoint, if any, is intact\n")


def leave(number: int, line: str = "") -> None:
    """Exit the process with the status of a signal, after one line."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    write_error(line or f"\nstopped by {name}; the same command continues\n")
    os._exit(128 + number)


def write_error(text: str | bytes) -> None:
    """Write to standard error from any thread. The main thread may hold the lock of sys.stderr."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode() if isinstance(text, str) else text)
