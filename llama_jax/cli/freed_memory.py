"""Settings of the C library for training on CPUs. jax is not imported."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

# Parameters of glibc's mallopt (malloc.h)
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_MOST = 1 << 30  # bytes that a process may have taken before
_TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def at_start() -> None:
    """The settings of a training process without an accelerator. Call it before other threads exist.

    The process may start again here, with the same arguments and number: glibc reads the variable that gives it huge
    pages only at the start. XLA on a CPU allocates the temporaries of a step anew in each step, and the kernel clears
    their pages, which took a quarter of a step in pages of 4 KiB
    (docs/measurements/finetuning-speed.md#huge-pages). $GLIBC_TUNABLES, if it is set, is left as it is.
    """
    unset = _TUNABLES not in os.environ and sys.executable
    if unset and _mallopt() is not None and _only_cpus() and _on_request():
        os.environ[_TUNABLES] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    one_arena()


def _on_request() -> bool:
    """True if the kernel gives huge pages to processes that ask for them, and only to those."""
    try:
        return "[madvise]" in _HUGE_PAGES.read_text()
    except OSError:
        return False


def one_arena() -> None:
    """Lets all threads of a process that has no accelerator share one arena of glibc. Call it before they exist.

    An arena that belongs to a thread has no blocks above 64 MB, which `keep` could keep.
    """
    _set((_ARENA_MAX, 1))


@functools.cache
def keep() -> None:
    """Lets glibc keep freed memory from now on, in a small process without an accelerator. Call it after a step.

    XLA on a CPU allocates the temporaries of a step as one block and frees it after the step. By default glibc returns
    such a block to the kernel, which clears every page of it again at the next step
    (docs/measurements/finetuning-speed.md#memory-between-steps). Blocks of other sizes leave gaps, which more than
    doubled the memory of a larger model, so that a process that has taken 1 GiB before is left as it is.
    """
    if _peak() < _MOST:
        _set((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))


def _peak() -> float:
    """The most bytes that this process has taken. (`getrusage` counts those of the process that started it, too.)"""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    return 1024 * int(found[1]) if found else math.inf


def _mallopt() -> Callable[[int, int], int] | None:
    return getattr(ctypes.CDLL(None), "mallopt", None)  # no other C library has it


def _set(*parameters: tuple[int, int]) -> None:
    mallopt = _mallopt()
    if mallopt is not None and _only_cpus():
        for parameter, value in parameters:
            mallopt(parameter, value)


def _only_cpus() -> bool:
    """True if jax will find no accelerator, as far as that can be known before it looks."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and not any(map(importlib.util.find_spec, ("libtpu", "jax_plugins")))
