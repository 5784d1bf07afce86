"""The orderly stop of a run: SIGTERM, SIGHUP and Ctrl-C end it after the running step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import types


class StopSignal:
    """A context in which SIGTERM, SIGHUP and Ctrl-C set `.requested` instead of ending the process.

    A thread reads the signal as it arrives, also while the main thread is inside a compilation or a long step, where
    Python's own handlers have to wait. If the main thread has not called `acknowledge` within `grace` seconds of a
    SIGTERM or SIGHUP, the process exits without a further checkpoint, before the scheduler kills it. Ctrl-C waits for
    as long as the step takes; a second one ends the process.

    Attributes:
        requested: True once a signal has arrived.
        number: The number of the first signal, or None.
    """

    def __init__(self, *, grace: float) -> None:
        self._grace = grace
        self.requested = False
        self.number: int | None = None
        self._acknowledged = threading.Event()
        self._previous: dict[int, object] = {}

    def acknowledge(self) -> None:
        """Declare that the stop is handled: saving may now take any time."""
        self._acknowledged.set()

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                self._previous[number] = signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, name="stop-signal", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._acknowledged.set()
        if not self._previous:
            return
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._writer.close()

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.number = self.number or number
        if number == signal.SIGINT:
            os.write(2, b"\nstopping after this step; Ctrl-C again leaves at once\n")  # print is not safe in a handler

    def _watch(self) -> None:
        while data := self._reader.recv(16):
            ending = [number for number in data if number in (signal.SIGTERM, signal.SIGHUP)]
            if ending:
                break
        else:
            return self._reader.close()
        if not self._acknowledged.wait(self._grace):
            print(
                "stopped inside a step (checkpoint.grace_seconds); the last checkpoint, if any, is intact",
                file=sys.stderr,
            )
            sys.stderr.flush()
            os._exit(128 + ending[0])
