"""Renders chat templates as transformers does, in a process of its own with limits (`template_process`).

The process starts at the first rendering and serves all later ones of this program. If a template ends the process by
exceeding a limit, the next rendering starts a new one.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.errors import ConfigError

_PROGRAM = Path(__file__).with_name("template_process.py")
SPOKEN_START, SPOKEN_END = "\ufdd2", "\ufdd3"  # those of template_process
_SECONDS = 20.0  # most seconds of waiting for an answer beyond its CPU time, for an overloaded machine
_SECONDS_PER_CUT = 0.1
_MOST_BYTES = 200_000_000  # largest request


class Refused(ValueError):
    """Raised for a dialog that the template refuses or fails to render, with the template's own reason."""


class Cut(NamedTuple):
    """The rendering of the first messages of a dialog.

    Attributes:
        length: length of this rendering.
        common: length of the beginning that it has in common with the rendering of the whole dialog.
        tail: its last 100 characters.
    """

    length: int
    common: int
    tail: str


class Rendering(NamedTuple):
    """A rendered dialog: its text, and the requested cuts."""

    text: str
    cuts: list[Cut]


def render(
    source: str,
    variables: Mapping[str, Any],
    *,
    cuts: Sequence[tuple[int, bool]] = (),
    mark: bool = False,
    date: tuple[int, int, int] | None = None,
) -> Rendering:
    """Render a template.

    Args:
        source: the template.
        variables: the template's variables, which are JSON values. `messages` is a list.
        cuts: (number of messages, add_generation_prompt) of each shorter dialog to render too.
        mark: True puts SPOKEN_START and SPOKEN_END around the text inside the tag {% generation %}.
        date: year, month and day for `strftime_now`; None is the current time.

    Raises:
        Refused: the template refuses the dialog, or an error happens while it renders this dialog.
        ConfigError: the template is not valid Jinja, or exceeds its limits of time, memory or output.
        ValueError: a variable is not JSON.
    """
    request = {
        "source": source,
        "variables": dict(variables),
        "cuts": [list(cut) for cut in cuts],
        "mark": mark,
        "date": date,
    }
    answer = _worker.ask(request, seconds=_SECONDS + _SECONDS_PER_CUT * len(cuts))
    if "broken" in answer:
        raise ConfigError(f"the chat template cannot be used: {answer['broken']}")
    if "refused" in answer:
        raise Refused(f"the chat template cannot write this dialog: {answer['refused']}")
    return Rendering(answer["text"], [Cut(*cut) for cut in answer["cuts"]])


class _Worker:
    """The process and the pipes to it, shared by all threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0

    def ask(self, request: dict[str, Any], *, seconds: float) -> dict[str, Any]:
        """The answer to a request."""
        try:
            data = json.dumps(request, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass")
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"messages and tools must be JSON values for a chat template: {error}") from None
        if len(data) > _MOST_BYTES:
            raise ValueError(f"the dialog has {len(data):,} bytes; a chat template takes at most {_MOST_BYTES:,}")
        with self.lock:
            try:
                process = self._started()
                answer = self._exchange(process, data, seconds)
            except BaseException:  # also Ctrl-C: an answer that comes later would be taken for that of the next request
                self.stop()
                raise
        return json.loads(answer.decode("utf-8", "surrogatepass"))

    def _started(self) -> subprocess.Popen[bytes]:
        if self.owner != os.getpid():  # a fork may not share the pipes of its parent
            self.process, self.owner = None, os.getpid()
        if self.process is None or self.process.poll() is not None:
            environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal is for this program
            )
        return self.process

    def _exchange(self, process: subprocess.Popen[bytes], data: bytes, seconds: float) -> bytes:
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(len(data).to_bytes(8, "big") + data)
            process.stdin.flush()
            head = process.stdout.read(8)
            size = int.from_bytes(head, "big")
            answer = process.stdout.read(size) if len(head) == 8 else b""
        except BrokenPipeError:
            head = answer = b""
        finally:
            timer.cancel()
        if len(head) < 8 or len(answer) < size:
            raise ConfigError(f"the chat template cannot be used: {self._end(process)}")
        return answer

    def _end(self, process: subprocess.Popen[bytes]) -> str:
        """The reason why the process has ended, for an error."""
        code = process.wait()
        if code == -signal.SIGPROF:
            return "it takes more CPU time than a template may use (1.5 s for a dialog)"
        if code == -signal.SIGKILL:
            return "it takes too long"
        return f"the process that renders it ended with status {code}; is jinja2 3.1.6 or later installed?"

    def stop(self) -> None:
        """End the process."""
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()
        self.process = None


_worker = _Worker()
atexit.register(_worker.stop)
