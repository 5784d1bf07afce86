"""The persistent compilation cache: a program compiled once starts at once the next time, in any process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ENV = "LLAMA_JAX_CACHE"


def folder() -> Path | None:
    """Where compiled programs go: $LLAMA_JAX_CACHE/jax, or the user's cache folder; None where the former is "off"."""
    chosen = os.environ.get(ENV, "")
    if chosen.lower() == "off":
        return None
    if chosen:
        return Path(chosen).expanduser() / "jax"
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "llama_jax" / "jax"


def enable() -> Path | None:
    """Turn the cache on for this process, before anything compiles; jax's own setting, where there is one, wins.

    Programs are kept however short they took: a small model is many short ones.

    Returns:
        The folder, or None where it is off or cannot be written (which is said once, on standard error).
    """
    import jax

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    path = folder()
    if path is None:
        return None
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{path} is not writable")
    except OSError as error:
        print(f"no compilation cache ({error}): set {ENV} to a folder, or to off", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    return path
