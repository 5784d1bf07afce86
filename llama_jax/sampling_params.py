"""Sampling settings: one record for users' settings, models' defaults and the command line.

Floor 0: this module does not import jax.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama_jax.errors import ConfigError, brief, checked_fields

_FLOAT32_MAX = 3.4e38
_DIGITS = 10  # of a token id as text


@checked_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The sampling settings of a request. The defaults are those of Meta's examples.

    The settings apply in this order: logit_bias, allowed_tokens, banned_tokens and min_tokens; repetition_penalty;
    frequency_penalty and presence_penalty; temperature; top_k; top_p; min_p; typical_p. Where transformers has the
    setting, its processors define it; the presence and frequency penalties and logit_bias are those of the OpenAI API.

    Attributes:
        temperature: divisor of the logits. 0 takes the likeliest token (greedy) and ignores top_k, top_p, min_p and
            typical_p.
        top_k: number of likeliest tokens to keep; 0 keeps all.
        top_p: probability mass to keep: the likeliest tokens up to and including the one with which their mass reaches
            top_p; 1 keeps all.
        min_p: smallest probability to keep, relative to the likeliest token; 0 keeps all.
        typical_p: probability mass to keep of the tokens whose surprise is nearest to the entropy (Meister et al.,
            arXiv:2202.00666); 1 keeps all.
        repetition_penalty: factor against repetition. Logits of tokens in the prompt or the text so far are divided by
            it if positive and multiplied by it if negative (Keskar et al., arXiv:1909.05858, section 4.1). It applies
            to greedy sampling too; 1 is off.
        presence_penalty: number subtracted from the logit of each token that occurs in the text so far (without the
            prompt).
        frequency_penalty: number that, times a token's count in the text so far, is subtracted from its logit.
        min_tokens: number of tokens before a stop token may be sampled.
        logit_bias: number added to the logit of a token, by token id; minus infinity is allowed.
        allowed_tokens: the only ids that may be sampled, or None for all.
        banned_tokens: ids that are never sampled.
    """

    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    allowed_tokens: Sequence[int] | None = None
    banned_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        _check(self, "temperature", lambda x: x >= 0, "a finite number of at least 0 (0 is greedy)")
        _check(self, "top_p", lambda x: 1e-6 <= x <= 1, "from 0.000001 to 1 (1 keeps every token)")
        _check(self, "min_p", lambda x: 0 <= x <= 1, "from 0 to 1 (0 keeps every token)")
        _check(self, "typical_p", lambda x: 1e-6 <= x <= 1, "from 0.000001 to 1 (1 keeps every token)")
        _check(self, "repetition_penalty", lambda x: 1e-3 <= x <= 1e6, "from 0.001 to 1000000 (1 is off)")
        _check(self, "presence_penalty", lambda x: abs(x) <= 1e6, "from -1000000 to 1000000 (0 is off)")
        _check(self, "frequency_penalty", lambda x: abs(x) <= 1e6, "from -1000000 to 1000000 (0 is off)")
        for name, note in (("top_k", "0 keeps every token"), ("min_tokens", "0 is off")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 <= int(value) < 1 << 31:
                raise ConfigError(f"{name} must be a whole number from 0 ({note}), got {brief(value)}")
            object.__setattr__(self, name, int(value))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        if self.allowed_tokens is not None:
            object.__setattr__(self, "allowed_tokens", _ids(self.allowed_tokens, "allowed_tokens"))
            if not self.allowed_tokens:
                raise ConfigError("allowed_tokens is empty: give at least one token id, or None for all tokens")
        object.__setattr__(self, "banned_tokens", _ids(self.banned_tokens, "banned_tokens"))
        if self.allowed_tokens is not None and not set(self.allowed_tokens) - set(self.banned_tokens):
            raise ConfigError("banned_tokens holds every one of allowed_tokens: no token could be sampled")

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Every token id that the settings name."""
        return (*self.logit_bias, *(self.allowed_tokens or ()), *self.banned_tokens)


def _check(params: SamplingParams, name: str, legal: Callable[[float], bool], allowed: str) -> None:
    value = getattr(params, name)
    if not _finite(value) or not legal(value):
        raise ConfigError(f"{name} must be {allowed}, got {brief(value)}")
    if not isinstance(value, (int, float)):  # a number of numpy, for instance
        object.__setattr__(params, name, float(value))


def _finite(value: Any) -> bool:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and abs(value) < _FLOAT32_MAX  # False for NaN


def _ids(values: Any, name: str) -> tuple[int, ...]:
    """Token ids as a tuple. numpy integers are accepted, and all other types that Python can use as an index."""
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise ConfigError(f"{name} must be a list of token ids, got {brief(values)}")
    values = tuple(values)
    if any(isinstance(i, bool) or not hasattr(i, "__index__") or int(i) < 0 for i in values):
        raise ConfigError(f"{name} must be a list of token ids, got {brief(list(values))}")
    return tuple(int(i) for i in values)


def _bias(bias: Any) -> dict[int, float]:
    """A logit bias by integer ids. Ids as strings are accepted, since JSON has no other keys."""
    if not isinstance(bias, Mapping):
        raise ConfigError(f'logit_bias must be numbers by token id such as {{"128009": -100}}, got {brief(bias)}')
    clean = {}
    for key, value in bias.items():
        text = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= _DIGITS
        if not (text or (hasattr(key, "__index__") and not isinstance(key, bool) and int(key) >= 0)):
            raise ConfigError(f"logit_bias names {brief(key)}, which is not a token id")
        if value != -float("inf") and not _finite(value):
            raise ConfigError(f"logit_bias of token {int(key)} must be a finite number or -inf, got {brief(value)}")
        clean[int(key)] = float(value)
    return clean


GREEDY = SamplingParams(temperature=0.0, top_p=1.0)
