"""The persistent compilation cache: a program that was compiled once starts without compiling, in any process."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from pathlib import Path
from typing import Any

from llama_jax.files import expanded, write_whole

ENV = "LLAMA_JAX_CACHE"


def folder() -> Path | None:
    """The folder of compiled programs, or None if $LLAMA_JAX_CACHE is "off". By default it is in the user's cache."""
    chosen = os.environ.get(ENV, "")
    if chosen.lower() == "off":
        return None
    if chosen:
        return expanded(chosen) / "jax"
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expanded(root) / "llama_jax" / "jax"


def enable() -> Path | None:
    """Turns the cache on for this process, before anything compiles. A setting of jax's own takes precedence.

    Programs are cached however little time they took, since a small model consists of many such programs.

    Returns:
        The folder, or None if the cache is off or the folder cannot be written, which one line on standard error says.
    """
    import jax

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    chosen: str | None = getattr(jax.config, "jax_compilation_cache_dir", None)
    if chosen:
        return Path(chosen)
    try:
        path = folder()
        if path is None:
            return None
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{path} is not writable")
    except OSError as error:
        print(f"no compilation cache ({error}): set {ENV} to a folder, or to off", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    # The CUDA driver compiles the kernels of llama_jax/ops/gpu when a program is loaded, and keeps them here.
    os.environ.setdefault("CUDA_CACHE_PATH", str(path.parent / "cuda"))
    _write_whole_entries()
    return path


@functools.cache  # one line a process, where jax would print two for each program
def _say_full(path: str, reason: str) -> None:
    line = f"warning: {path} cannot be written ({reason}): make room, or programs are compiled again at the next start"
    print(line, file=sys.stderr, flush=True)


def _write_whole_entries() -> None:
    """Let jax write each entry atomically. By itself it never replaces the entry that a killed process left half.

    jax writes an entry only where it found none or one that cannot be read, so that an old entry is replaced.
    """
    with contextlib.suppress(ImportError, AttributeError):  # a jax that stores its entries in another way
        from jax._src import lru_cache

        limited = lru_cache.LRUCache.put
        if limited.__module__ == __name__:
            return

        def put(self: Any, key: str, value: bytes) -> None:
            if self.eviction_enabled:
                limited(self, key, value)
                return
            try:
                write_whole(f"{self.path}/{key}{lru_cache._CACHE_SUFFIX}", value)
            except OSError as error:
                _say_full(str(self.path), str(error.strerror))

        setattr(lru_cache.LRUCache, "put", put)  # noqa: B010  (an assignment would not be typed)
