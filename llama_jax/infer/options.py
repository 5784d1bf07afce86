"""The options of `generate` and its siblings: their types, their defaults and their checks."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from llama_jax.errors import ConfigError, brief, nearest, unknown_argument
from llama_jax.infer import inputs
from llama_jax.infer.grammar import KINDS, Constraint
from llama_jax.infer.request import MAX_STOPS, SPECULATE
from llama_jax.sampling_params import SamplingParams

_MOST_TOP = 1000
_MOST_SAMPLES = 10_000  # of one prompt
_SETTINGS = tuple(field.name for field in dataclasses.fields(SamplingParams))


class SamplingOptions(TypedDict, total=False):
    """Options of one continuation; `Options` documents them."""

    max_new_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    min_tokens: int | None
    logit_bias: Mapping[int, float] | None
    allowed_tokens: Sequence[int] | None
    banned_tokens: Sequence[int] | None
    stop: str | Sequence[str] | None
    stop_tokens: Sequence[int] | None
    ignore_eos: bool
    top_logprobs: int
    prompt_logprobs: int | None
    json_schema: Mapping[str, Any] | bool | str | None
    regex: str | None
    choices: Sequence[str] | None
    grammar: str | None
    speculate: str | None


class GenerateOptions(SamplingOptions, total=False):
    """Options of a whole call of `Llama.generate`, with those of each continuation."""

    seed: int | Sequence[int]
    n: int
    best_of: int | None
    overrides: Sequence[Mapping[str, Any]] | None
    batch_size: int
    progress: bool | None
    parse_special: bool | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The checked options of one continuation.

    Attributes:
        max_new_tokens: most new tokens; with the prompt they must fit config.max_seq_len.
        sampling: sampling settings (see `SamplingParams`), with the model's defaults where none is given.
        stop: texts that end the continuation, also across the borders of tokens. They are not part of the result.
        stop_tokens: ids that end it instead of the model's own.
        top_logprobs: number of likeliest tokens to report at each new position.
        prompt_logprobs: number of likeliest tokens to report at each position of the prompt, with the log-probability
            of the prompt's own tokens; None reports nothing.
        constraint: form that the continuation must have, or None.
        speculate: "lookup" guesses what followed the last tokens earlier in the text, "draft" asks the draft model of
            `load`. Guesses change the speed and never the text. "" guesses nothing.
    """

    max_new_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    stop_tokens: tuple[int, ...]
    top_logprobs: int
    prompt_logprobs: int | None
    constraint: Constraint | None
    speculate: str


_KNOWN = (*SamplingOptions.__annotations__,)


def resolve(
    options: Mapping[str, Any],
    *,
    default: SamplingParams,
    stop_tokens: tuple[int, ...],
    vocab_size: int,
    max_new_tokens: int,
    has_draft: bool,
) -> Options:
    """The checked options of a continuation.

    Args:
        options: options by name; None stands for an option's default.
        default: sampling settings of the model.
        stop_tokens: stop tokens of the model.
        vocab_size: number of ids.
        max_new_tokens: default of the option.
        has_draft: True if the model was loaded with a draft model.

    Raises:
        ConfigError: an unknown option, or a value that is not allowed.
    """
    for name in options:
        if name not in _KNOWN:
            near = nearest(name, _KNOWN) or "."
            raise ConfigError(f"unknown option {brief(name)}{near} Allowed: {', '.join(_KNOWN)}")
    given = {name: value for name, value in options.items() if value is not None}
    sampling = inputs.as_sampling({k: v for k, v in given.items() if k in _SETTINGS}, default)
    for token in sampling.token_ids:
        if not 0 <= token < vocab_size:
            raise ConfigError(f"the sampling settings name token {token}, but the ids are 0 to {vocab_size - 1}")
    stops = _stops(given, stop_tokens, vocab_size)
    _check_some_token_is_left(sampling, stops, vocab_size)
    forms = [name for name in KINDS if name in given]
    if len(forms) > 1:
        raise ConfigError(f"give one of {', '.join(KINDS)}, got {' and '.join(forms)}")
    speculate = given.get("speculate", "")
    if speculate != "" and speculate not in SPECULATE:
        raise ConfigError(f"speculate must be one of {', '.join(SPECULATE)}, got {brief(speculate)}")
    if speculate == "draft" and not has_draft:
        raise ConfigError('speculate="draft" needs a draft model: load(..., draft=SOURCE), or --draft SOURCE')
    prompt_logprobs = given.get("prompt_logprobs")
    return Options(
        max_new_tokens=inputs.as_whole(given.get("max_new_tokens", max_new_tokens), "max_new_tokens"),
        sampling=sampling,
        stop=as_stop(given.get("stop", ())),
        stop_tokens=stops,
        top_logprobs=_top(given.get("top_logprobs", 0), "top_logprobs", vocab_size),
        prompt_logprobs=None if prompt_logprobs is None else _top(prompt_logprobs, "prompt_logprobs", vocab_size),
        constraint=Constraint.make(forms[0], given[forms[0]]) if forms else None,
        speculate=speculate,
    )


def _stops(given: Mapping[str, Any], default: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """The stop tokens that the options choose."""
    ignore = given.get("ignore_eos", False)
    if not isinstance(ignore, bool):
        raise ConfigError(f"ignore_eos must be true or false, got {brief(ignore)}")
    if ignore and "stop_tokens" in given:
        raise ConfigError("ignore_eos ignores every stop token: give ignore_eos or stop_tokens")
    if ignore:
        return ()
    stops = inputs.as_stops(given["stop_tokens"], vocab_size) if "stop_tokens" in given else default
    if len(stops) > MAX_STOPS:
        where = "the option stop_tokens" if "stop_tokens" in given else "eos_token_id of the model's own files"
        raise ConfigError(
            f"{where} names {len(stops)} stop tokens, and at most {MAX_STOPS} are allowed: name fewer with the option "
            "stop_tokens, or set ignore_eos"
        )
    return stops


def _check_some_token_is_left(sampling: SamplingParams, stops: tuple[int, ...], vocab_size: int) -> None:
    """Refuses settings that no token of the vocabulary passes."""
    banned = {*sampling.banned_tokens, *(i for i, bias in sampling.logit_bias.items() if bias == -float("inf"))}
    if sampling.min_tokens:
        banned.update(stops)
    allowed = range(vocab_size) if sampling.allowed_tokens is None else sampling.allowed_tokens
    if all(token in banned for token in allowed):
        raise ConfigError(
            "allowed_tokens, banned_tokens, logit_bias and min_tokens together leave no token that could be sampled"
        )


def check_keywords(function: str, options: Mapping[str, Any], more: Sequence[str] = ()) -> None:
    """Refuses an unknown keyword argument with a TypeError that names the nearest known one."""
    known = (*_KNOWN, *more)
    for name in options:
        if name not in known:
            raise unknown_argument(function, name, known)


def as_stop(stop: Any) -> tuple[str, ...]:
    """Stop strings without repetitions, from a text or a list of texts."""
    listed = [stop] if isinstance(stop, str) else stop
    if not isinstance(listed, Sequence) or not all(isinstance(text, str) for text in listed):
        raise ConfigError(f"stop must be a text or a list of texts, got {brief(stop)}")
    if not all(listed):
        raise ConfigError("a stop string is empty: it would end every continuation at once")
    return tuple(dict.fromkeys(listed))


def _top(value: Any, name: str, vocab_size: int) -> int:
    most = min(_MOST_TOP, vocab_size)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 <= int(value) <= most:
        raise ConfigError(f"{name} must be a whole number from 0 to {most}, got {brief(value)}")
    return int(value)


def as_counts(n: Any, best_of: Any) -> tuple[int, int]:
    """The number of results and of samples of each prompt."""
    n = inputs.as_whole(n, "n")
    samples = n if best_of is None else inputs.as_whole(best_of, "best_of")
    if samples < n:
        raise ConfigError(
            f"best_of={samples} is smaller than n={n}: it is the number of samples that the best n are of"
        )
    if samples > _MOST_SAMPLES:
        raise ConfigError(f"n and best_of must be at most {_MOST_SAMPLES:,}, got {brief(samples)}")
    return n, samples


def as_overrides(overrides: Any, seeds: Sequence[int]) -> tuple[list[dict[str, Any]], list[int]]:
    """The options of each prompt that differ from those of the call, and the seed of each prompt."""
    if overrides is None:
        return [{} for _ in seeds], list(seeds)
    listed = isinstance(overrides, Sequence) and all(isinstance(item, Mapping) for item in overrides)
    if not listed or len(overrides) != len(seeds):
        raise ConfigError(
            f"overrides must be a list of {len(seeds)} dicts of options, one for each prompt, got {brief(overrides)}"
        )
    own = [dict(item) for item in overrides]
    found = [item.pop("seed", None) for item in own]
    seeds = list(seeds)
    for i, other in enumerate(found):
        if other is not None:
            if isinstance(other, bool) or not isinstance(other, numbers.Integral):
                raise ConfigError(f"prompt {i}: seed must be a whole number, got {brief(other)}")
            seeds[i] = int(other)
    return own, seeds
