"""A parent process for runs of several processes, which reports a crash of jax's runtime in one line.

When another process of a run is lost, the C++ runtime of jax writes a stack trace and aborts; nothing in the same
process can prevent that. So `train.py` starts itself once more where there are several processes, passes signals on to
that child, and holds back what the runtime wrote if the child is ended by it. No jax here.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from typing import IO

from llama_jax.errors import TRY_AGAIN
from llama_jax.train.stop import StopSignal, write_error

_CHILD = "LLAMA_JAX_SUPERVISED"  # in the environment of the child
_PR_SET_PDEATHSIG = 1  # prctl(2)
_LOG = re.compile(rb"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ \S+:\d+\]")  # how the runtime's log lines begin
_FATAL = re.compile(rb"distributed service detected fatal errors|coordination service")
_OURS = (b"error: ", b"warning: ", b"stop", b"Traceback")  # how a line of this program may begin after those
_MOST_HELD = 1 << 20  # bytes

LOST = (
    "another process of this run was lost or has ended: see what it wrote last. Start all processes again with the "
    "same commands: the run continues from its last checkpoint"
)


def is_child() -> bool:
    """True in a process that `run` has started. It is killed when its parent is."""
    parent = os.environ.pop(_CHILD, "")
    if not parent:
        return False
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # the parent was lost before
        os._exit(128 + signal.SIGKILL)
    return True


def run(stop: StopSignal) -> int:
    """Repeat this process's command in a child process.

    Returns:
        Its exit status: 75 if another process was lost, and as in a shell 128 and the number of a signal that ended it.
    """
    environment = os.environ | {_CHILD: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *sys.orig_argv[1:]]
    # In a session of its own, so that a terminal's Ctrl-C reaches it only once, by way of this process.
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True) as child:
        stop.child = child.pid
        held = _relayed(child.stderr)
        status = child.wait()
    if status >= 0:
        return status
    if _FATAL.search(held):
        write_error(f"error: {LOST}\n")
        return TRY_AGAIN
    if status == -signal.SIGKILL:
        write_error("error: the training process was killed; if not by you, the machine may be out of memory\n")
    else:
        write_error(held)
        write_error(f"error: the training process was ended by {signal.Signals(-status).name}\n")
    return 128 - status


def _relayed(stream: IO[bytes] | None) -> bytes:
    """Passes standard error on, and returns what it holds back: the runtime's errors, which may have several lines."""
    held, holds = b"", False
    for line in iter(stream.readline if stream else bytes, b""):
        log = _LOG.match(line)
        if log:
            holds = line[:1] in b"EF"  # an error may have more lines, and some of them may be empty
        elif line.startswith(_OURS):
            holds = False
        if log or holds:
            held = (held + line)[-_MOST_HELD:]
        else:
            write_error(line)
    return held
