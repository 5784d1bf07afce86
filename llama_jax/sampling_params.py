"""Sampling settings: one record for users' settings, models' defaults and the command line.

Floor 0: this module does not import jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from llama_jax.errors import ConfigError, brief

_FLOAT32_MAX = 3.4e38


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The sampling settings of a request. The defaults are those of Meta's examples.

    Attributes:
        temperature: divisor of the logits. 0 takes the likeliest token (greedy) and ignores top_k, top_p and min_p.
        top_k: number of likeliest tokens to keep; 0 keeps all.
        top_p: probability mass to keep: the likeliest tokens up to and including the one with which their mass reaches
            top_p; 1 keeps all.
        min_p: smallest probability to keep, relative to the likeliest token; 0 keeps all.
        repetition_penalty: factor against repetition. Logits of tokens in the prompt or the text so far are divided by
            it if positive and multiplied by it if negative (Keskar et al., arXiv:1909.05858, section 4.1). It applies
            to greedy sampling too; 1 is off.
    """

    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "temperature", lambda x: x >= 0, "a finite number of at least 0 (0 is greedy)")
        _check(self, "top_p", lambda x: 1e-6 <= x <= 1, "from 0.000001 to 1 (1 keeps every token)")
        _check(self, "min_p", lambda x: 0 <= x <= 1, "from 0 to 1 (0 keeps every token)")
        _check(self, "repetition_penalty", lambda x: 1e-3 <= x <= 1e6, "from 0.001 to 1000000 (1 is off)")
        k = self.top_k
        if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k < 1 << 31:
            raise ConfigError(f"top_k must be a whole number from 0 (0 keeps every token), got {brief(k)}")


def _check(params: SamplingParams, name: str, legal: Callable[[float], bool], allowed: str) -> None:
    value = getattr(params, name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) < _FLOAT32_MAX or not legal(value):  # NaN fails the second
        raise ConfigError(f"{name} must be {allowed}, got {brief(value)}")


GREEDY = SamplingParams(temperature=0.0, top_p=1.0)
