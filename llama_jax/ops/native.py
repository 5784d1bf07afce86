"""Shared by the compiled kernels of CPUs and GPUs: the order of a layer's weights, their folder, and the process that
builds or checks them.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llama_jax import compilation_cache

# The weights of a layer, in the order of the kernels that compute whole layers.
_WEIGHTS = (
    *(("attention", name) for name in ("q", "k", "v", "o")),
    *(("ffn", name) for name in ("gate", "up", "down")),
)
# Statuses after which the next start tries again. A machine without free memory sends SIGKILL.
ENDED = (-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGKILL)


class Unavailable(Exception):
    """Raised if kernels cannot be built or used. The message is the reason, for one line of a log."""


def weights_of(layer: Mapping[str, Any]) -> list[Any]:
    """The weights of a layer's dict (params.py), in the order of the kernels: q, k, v, o, gate, up, down."""
    return [layer[module][name] for module, name in _WEIGHTS]


def folder() -> Path:
    """The folder of kernels and records in the cache folder. Raises Unavailable if the cache is off."""
    cache = compilation_cache.folder()
    if cache is None:
        raise Unavailable(f"{compilation_cache.ENV} is off, and they are built into that folder")
    return cache.parent / "native"


def prepare(folder: Path) -> None:
    """Makes a folder. Raises Unavailable if it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable")
    except OSError as error:
        raise Unavailable(f"{error}; {compilation_cache.ENV} may name another folder") from None


def digest(files: Iterable[Path], parts: Iterable[object]) -> str:
    """Sixteen digits that differ for other contents of files and other parts."""
    sha = hashlib.sha256()
    for path in files:
        sha.update(path.read_bytes())
    for part in parts:
        sha.update(f"\0{part}".encode())
    return sha.hexdigest()[:16]


def run_apart(
    module: str, arguments: Iterable[object], seconds: float, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs a module of this project in a process of its own, which may crash.

    Raises:
        OSError: it did not run.
        subprocess.TimeoutExpired: it did not end in time.
    """
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of the errors of a process, or its status."""
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
    return lines[-1].strip()[:300]
