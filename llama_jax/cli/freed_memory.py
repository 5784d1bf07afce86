"""Settings of the C library for training on CPUs. jax is not imported."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os

# Parameters of glibc's mallopt (malloc.h) and their values, which keep all memory in one growing arena: M_ARENA_MAX,
# M_MMAP_MAX and M_TRIM_THRESHOLD.
_SETTINGS = ((-8, 1), (-4, 0), (-1, -1))


def keep() -> None:
    """Lets glibc keep freed memory, in a process that has no accelerator. Call it before other threads exist.

    XLA on a CPU allocates the temporaries of a step as one block and frees it after the step. By default glibc returns
    such a block to the kernel, which clears every page of it again at the next step
    (docs/measurements/finetuning-speed.md#memory-between-steps). An arena that belongs to a thread has no blocks above
    64 MB, so that all threads share the first one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # no other C library has it
    if mallopt is not None and _only_cpus():
        for parameter, value in _SETTINGS:
            mallopt(parameter, value)


def _only_cpus() -> bool:
    """True if jax will find no accelerator, as far as that can be known before it looks."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and not any(map(importlib.util.find_spec, ("libtpu", "jax_plugins")))
