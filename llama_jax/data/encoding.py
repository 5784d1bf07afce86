"""Samples as token ids and targets.

A target is a token that the loss counts. In a dialog these are the assistant's tokens in the messages that are learned;
in a completion, its tokens and its end token; in a text, all tokens; in a pair, the tokens after the shared prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from llama_jax.data.corpus import Document
from llama_jax.data.records import BadLine, Completion, Dialog, Pair, Sample
from llama_jax.errors import ConfigError
from llama_jax.text.record_encoder import NameInText

# Token ids, and a mask of the targets. None: all tokens are targets.
Encoded = tuple[list[int], list[bool] | None]
# Values of data.too_long: what happens to a record that is longer than a row.
TOO_LONG = ("drop", "cut", "refuse")


class Encoder(Protocol):
    """The interface of a tokenizer that the data pipeline uses."""

    @property
    def vocab_size(self) -> int:
        """The number of ids. All are below it."""

    @property
    def fingerprint(self) -> str:
        """A hash that changes whenever the ids of some text would."""

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of a text."""

    def encode_dialog(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        learn: Sequence[bool] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a dialog, and a mask of the assistant's tokens in the messages that `learn` flags.

        Raises:
            ValueError: the messages are not a valid dialog.
        """


class TooLong(ValueError):
    """Raised for a record that is longer than a row and may not be cut."""


class EncodedSample(NamedTuple):
    """A record as token ids.

    Attributes:
        name: name of the record, "file:line".
        documents: token ids and target mask of each document: two (chosen, rejected) for a pair, one for any other
            record.
        marked: True if a message of the assistant is marked as not to be learned.
        cut: True if its last tokens were dropped, because it is longer than a row.
    """

    name: str
    documents: tuple[Encoded, ...]
    marked: bool = False
    cut: bool = False


def encode(sample: Document | Dialog | Completion, tokenizer: Encoder, *, max_length: int | None) -> Encoded:
    """The token ids of a sample, with a mask of its targets.

    A text is encoded as bos + text + eos, and a completion as bos + prompt + completion + eos without a separator. A
    dialog is encoded by the run's chat format.

    Args:
        sample: the sample.
        tokenizer: the run's tokenizer.
        max_length: the most tokens of a dialog or a completion. None sets no limit. Texts have none.

    Raises:
        ValueError: the sample cannot be used. The message says why.
        TooLong: it is longer than max_length.
        ConfigError: the tokenizer cannot be used for it.
    """
    if isinstance(sample, Document):
        return tokenizer.encode(sample.text, bos=True, eos=True), None
    if isinstance(sample, Completion):
        prompt = tokenizer.encode(sample.prompt, bos=True)
        completion = tokenizer.encode(sample.completion, eos=True)
        ids, targets = prompt + completion, [False] * len(prompt) + [True] * len(completion)
    else:
        ids, targets = tokenizer.encode_dialog(sample.messages, tools=sample.tools, learn=sample.learn)
        _check_answers(sample)
        if not any(targets[1:]):
            raise ValueError("the chat format counts no token of the assistant's messages: there is nothing to learn")
    if max_length is None or len(ids) <= max_length:
        return ids, targets
    raise TooLong(f"{len(ids):,} tokens are more than data.sequence_length={max_length}")


def cut(encoded: Encoded, max_length: int | None) -> Encoded:
    """The first `max_length` tokens of a dialog or a completion.

    Training on a cut sample is sound: the remaining tokens are predicted from the tokens before them, and no end of a
    turn is learned at the cut.

    Raises:
        TooLong: none of the remaining tokens is a target.
    """
    ids, targets = encoded
    if max_length is None or targets is None or len(ids) <= max_length:
        return encoded
    if not any(targets[1:max_length]):
        raise TooLong(
            f"{len(ids):,} tokens are more than data.sequence_length={max_length}, and the first {max_length} of them "
            "have nothing to learn"
        )
    return ids[:max_length], targets[:max_length]


def encode_pair(pair: Pair, tokenizer: Encoder, *, max_length: int | None) -> tuple[Encoded, Encoded]:
    """Encodes the chosen and the rejected answer of a pair, each after the prompt, like `encode`.

    Targets are the assistant's tokens after the prompt, without its earlier turns in the prompt. For texts they are the
    answer and its eos. TRL 1.16 counts everything after the prompt, including turns of users and tools within an
    answer, and merges tokens across the border of prompt and answer. For a single turn of the assistant both agree.

    Args:
        pair: the pair.
        tokenizer: the run's tokenizer.
        max_length: the most tokens of both answers together, since they share a row. None sets no limit.

    Raises:
        ValueError: the pair cannot be used. The message says why.
        TooLong: it is longer than max_length. Pairs are not cut: their losses compare whole answers.
        ConfigError: the tokenizer cannot be used for it.
    """
    chosen, rejected = (encode(answer, tokenizer, max_length=None) for answer in (pair.chosen, pair.rejected))
    if chosen[0] == rejected[0]:
        raise ValueError("'chosen' and 'rejected' are the same: there is nothing to prefer")
    one, other = len(chosen[0]), len(rejected[0])
    if max_length is not None and one + other > max_length:
        raise TooLong(
            f"{one:,} tokens of 'chosen' and {other:,} of 'rejected' are more than data.sequence_length={max_length}, "
            "and a pair must fit into one row"
        )
    return chosen, rejected


def try_encode(
    sample: Sample, tokenizer: Encoder, *, max_length: int | None, too_long: str = "drop"
) -> EncodedSample | BadLine:
    """A sample as token ids, or a BadLine with the reason why it cannot be used.

    `too_long` is one of TOO_LONG; "drop" and "refuse" give a BadLine for a record that is longer than `max_length`.
    """
    try:
        if isinstance(sample, Pair):
            return EncodedSample(sample.name, encode_pair(sample, tokenizer, max_length=max_length))
        marked = isinstance(sample, Dialog) and sample.marked
        if too_long != "cut":
            return EncodedSample(sample.name, (encode(sample, tokenizer, max_length=max_length),), marked)
        whole = encode(sample, tokenizer, max_length=None)
        kept = cut(whole, max_length)
        return EncodedSample(sample.name, (kept,), marked, cut=len(kept[0]) < len(whole[0]))
    except NameInText as error:
        raise NameInText(f"{sample.name}: {error}") from None
    except ConfigError:
        raise
    except ValueError as error:
        return BadLine.of(sample.name, error, too_long=isinstance(error, TooLong))
    except RecursionError:
        return BadLine.of(sample.name, "nested too deeply")


def _check_answers(dialog: Dialog) -> None:
    """Raises an error for a valid dialog without a token to learn."""
    spoken = [message["role"] == "assistant" for message in dialog.messages]
    if not any(spoken):
        raise ValueError("no message is the assistant's: there is nothing to learn")
    learn = spoken if dialog.learn is None else dialog.learn
    if not any(learn):
        raise ValueError("no message of the assistant is to be learned: there is nothing to learn")
    for i, (message, learned) in enumerate(zip(dialog.messages, learn, strict=True)):
        if learned and not message.get("tool_calls") and not _has_text(message.get("content")):
            raise ValueError(f"messages[{i}]: the assistant's answer is empty")


def _has_text(content: Any) -> bool:
    """True if a message's content, a string or a list of parts, has more than white space."""
    texts = [content] if isinstance(content, str) else [part["text"] for part in content or ()]
    return any(text.strip() for text in texts)
