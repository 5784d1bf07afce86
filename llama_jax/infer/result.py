"""The record that sampling returns for each prompt."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Result:
    """The continuation of one prompt.

    Attributes:
        text: the new tokens as text, control tokens left out; "" without a tokenizer.
        tokens: the new ids, including the stop token that ended them.
        logprobs: natural log-probability of each new token in the model's own distribution, before temperature and
            cuts.
        finish_reason: "stop" after a stop token, "length" after max_new_tokens.
        message: for `chat`, the answer as the next message of the dialog: `role`, `content` and `tool_calls` in
            OpenAI's shape, and `tokens`, by which the same ids are written again. Otherwise None.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    message: dict[str, Any] | None = None
