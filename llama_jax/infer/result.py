"""The record that sampling returns for each prompt."""

from __future__ import annotations

import dataclasses
from typing import Any

Likeliest = list[list[tuple[int, float]]]


@dataclasses.dataclass(frozen=True)
class Result:
    """The continuation of one prompt.

    Attributes:
        text: the new tokens as text, without control tokens and without the stop string that ended them; "" if the
            model has no tokenizer.
        tokens: the new ids, including the stop token, or the tokens of the stop string, that ended them.
        logprobs: natural log-probability of each new token under the model's own distribution, before any setting
            changes it.
        finish_reason: "stop" after a stop token or a stop string, "length" after max_new_tokens, "error" for one of
            several prompts that failed.
        message: the answer of `chat` as the next message of the dialog: `role`, `content` and `tool_calls` in OpenAI's
            schema, and `tokens`, the generated ids, with which the dialog is encoded again. None for other calls.
        stop: the stop token (int) or the stop string (str) that ended the text, or None.
        index: number of the prompt in the call.
        prompt_tokens: ids of the prompt.
        top_logprobs: with top_logprobs=K, the K likeliest (id, log-probability) pairs at each new position.
        prompt_logprobs: with prompt_logprobs=K, the log-probability of each prompt token but the first.
        prompt_top_logprobs: the K likeliest pairs at each position of the prompt but the first.
        steps: forward passes that made the tokens; fewer than tokens with speculation.
        error: reason of the failure, or "".
        cached_tokens: prompt tokens whose keys and values were in the cache already.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    message: dict[str, Any] | None = None
    stop: int | str | None = None
    index: int = 0
    prompt_tokens: list[int] = dataclasses.field(default_factory=list)
    top_logprobs: Likeliest = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    prompt_top_logprobs: Likeliest = dataclasses.field(default_factory=list)
    error: str = ""
    steps: int = dataclasses.field(default=0, compare=False)
    cached_tokens: int = dataclasses.field(default=0, compare=False)

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of the new tokens, which `best_of` ranks by."""
        return sum(self.logprobs) / max(1, len(self.logprobs))
