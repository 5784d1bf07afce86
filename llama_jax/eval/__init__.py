"""Floor 5: evaluation. It has perplexity (`sliding_window`), EleutherAI's lm_eval (`harness`), and the comparison of
two models.

All of it uses `scoring`, the log-probabilities of tokens in their context, and the sampler.
"""

from __future__ import annotations

import importlib
from typing import Any

# Imported on first use, as in `llama_jax`, so that a command line is checked before jax is imported.
_PUBLIC = {
    "perplexity": "llama_jax.eval.sliding_window",
    "compare": "llama_jax.eval.comparison",
    "harness_model": "llama_jax.eval.harness",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'llama_jax.eval' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
