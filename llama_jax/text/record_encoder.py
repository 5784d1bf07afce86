"""The encoder of a run's records: its tokenizer, its chat format, and its rule for names of control tokens in texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.errors import ConfigError
from llama_jax.text import control_tokens
from llama_jax.text.chat_format import ChatFormat
from llama_jax.text.tokenizer import Tokenizer

STOP, YES, NO = PARSE_SPECIAL = ("stop", "yes", "no")  # values of data.parse_special


class NameInText(ConfigError):
    """Raised for a text with the name of a control token if data.parse_special is `stop`."""


class RecordEncoder:
    """Encodes texts and dialogs for training.

    Attributes:
        tokenizer: tokenizer of the run.
        chat_format: chat format of the run.
        parse_special: one of PARSE_SPECIAL: "yes" reads names of control tokens in texts as these tokens, "no" as plain
            text, and "stop" refuses texts that hold one.
    """

    def __init__(self, tokenizer: Tokenizer, chat_format: ChatFormat, parse_special: str = STOP) -> None:
        """Sets the attributes of the same names."""
        self.tokenizer = tokenizer
        self.chat_format = chat_format
        self.parse_special = parse_special

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        return self.tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        """A hash of everything that ids depend on; that of the tokenizer if the other settings have their defaults."""
        others = [self.chat_format.fingerprint, "" if self.parse_special == STOP else self.parse_special]
        return " ".join([self.tokenizer.fingerprint, *others]) if any(others) else self.tokenizer.fingerprint

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Returns the ids of a text.

        Raises:
            NameInText: the text holds the name of a control token, and data.parse_special is `stop`.
        """
        if self.parse_special == STOP and (name := control_tokens.first_name(self.tokenizer, text)):
            raise NameInText(
                f"the text holds {name!r}, the name of a control token: set data.parse_special=yes if the text was "
                "rendered with a chat template, so that such names are control tokens, or data.parse_special=no if "
                "they are plain text"
            )
        parse = self.parse_special == YES
        return control_tokens.encode_text(self.tokenizer, text, parse_special=parse, bos=bos, eos=eos)

    def encode_dialog(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        learn: Sequence[bool] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """Returns the ids of a dialog and a mask of the assistant's tokens; see `ChatFormat.encode_for_training`."""
        return self.chat_format.encode_for_training(messages, tools=tools, learn=learn)
