"""The record that sampling returns for each prompt."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Result:
    """The continuation of one prompt.

    Attributes:
        text: the new tokens as text, without control tokens; "" if the model has no tokenizer.
        tokens: the new ids, including the stop token that ended them.
        logprobs: natural log-probability of each new token under the model's own distribution, before temperature,
            repetition penalty, top-k, top-p and min-p.
        finish_reason: "stop" after a stop token, "length" after max_new_tokens.
        message: the answer of `chat` as the next message of the dialog: `role`, `content` and `tool_calls` in OpenAI's
            schema, and `tokens`, the generated ids, with which the dialog is encoded again. None for other calls.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    message: dict[str, Any] | None = None
