"""Llama 3.1 in JAX and Flax: one decoder for sharded fine-tuning and compiled sampling."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Resolved on first use, so that `import llama_jax` costs nothing and a tokenizer does not need jax.
_PUBLIC = {
    "load": "llama_jax.infer.llama",
    "Llama": "llama_jax.infer.llama",
    "Tokenizer": "llama_jax.text.tokenizer",
    "ModelConfig": "llama_jax.config",
    "RopeScaling": "llama_jax.config",
    "ConfigError": "llama_jax.config",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'llama_jax' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
