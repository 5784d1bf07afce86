"""The records of inference that cross between the scheduler and the compiled programs. This module has no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llama_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from llama_jax.infer.grammar import Matcher

SPECULATE = ("lookup", "draft")
# Most steps in one dispatch: enough to hide the host's work, few enough that a cancelled request ends soon.
DISPATCH = 64
MAX_STOPS = 64  # stop tokens of a request; Llama 3.1 has three


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue, with everything that decides its continuation.

    Attributes:
        tokens: ids of the prompt, at least one.
        max_new_tokens: limit of new tokens, at least one.
        sampling: sampling settings.
        seed: seed of the request's noise.
        stop_tokens: ids that end the continuation.
        stops: texts that end the continuation. They need a `Scheduler` with a tokenizer.
        top_logprobs: number of likeliest tokens to report at each new position; 0 reports none.
        speculate: one of SPECULATE, or "" to compute one token at a time. It changes no output.
        matcher: state of the request's grammar, or None.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParams
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()
    top_logprobs: int = 0
    speculate: str = ""
    matcher: Matcher | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """The new tokens of one row.

    Attributes:
        tokens: new ids, including a stop token that ended the row.
        logprobs: log-probability of each under the model's own distribution.
        top: at each position the likeliest (id, log-probability) pairs; empty if none were asked for.
        done: True if the row has generated all that it may.
        steps: forward passes that the row took part in.
        error: the reason for which the tokens cannot be used, or None.
    """

    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    done: bool
    steps: int
    error: Exception | None = None


@dataclasses.dataclass(frozen=True)
class Fill:
    """Prompt tokens to write into the cache: `tokens` at the positions from `start` on, in row `row`."""

    row: int
    start: int
    tokens: np.ndarray
