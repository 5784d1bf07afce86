"""One record of data: which of the known shapes it has, and the token ids and targets that it becomes.

The shape is told by a record's keys, the first that fits: `messages` (OpenAI, with `tools`), `conversations`
(ShareGPT), `chosen` and `rejected` (a preference pair), `prompt` and `completion`, `instruction` and `output` (Alpaca),
`text`. A target is a token that the loss counts: what the assistant says, a completion with the token that ends it, or
all of a text; of a pair, what comes after the prompt that both answers share.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llama_jax.data.corpus import Document
from llama_jax.errors import ConfigError, brief
from llama_jax.text.record_encoder import NameInText


class Encoder(Protocol):
    """What data needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the ids of some text would."""

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of a text."""

    def encode_dialog(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        learn: Sequence[bool] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a dialog, and which of them the assistant says in messages that `learn` flags."""


@dataclass(frozen=True)
class Dialog:
    """Messages in OpenAI's style, not checked yet: `encode` does that. The first `prompt` of them are not learnt."""

    name: str
    messages: Any
    tools: Any
    prompt: int = 0

    @property
    def text(self) -> str:
        """Every string in the messages, for a vocabulary to be learnt from."""
        return "\n".join(_strings(self.messages))


@dataclass(frozen=True)
class Completion:
    """Two plain texts, of which the second is learnt."""

    name: str
    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """Both."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which the first is the better: both dialogs, or both completions."""

    name: str
    chosen: Dialog | Completion
    rejected: Dialog | Completion

    @property
    def text(self) -> str:
        """Both, each with the prompt."""
        return f"{self.chosen.text}\n{self.rejected.text}"


Sample = Document | Dialog | Completion | Pair


@dataclass(frozen=True)
class BadLine:
    """A record that cannot be used: its name ("file:line", or a file) and why, in one line that can be printed."""

    name: str
    reason: str

    @classmethod
    def of(cls, name: str, why: object) -> "BadLine":
        """With all that is not printable written as its escape."""
        text = " ".join(str(why).split())
        return cls(name, "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))

    def to_json(self) -> str:
        """A line of the quarantine file."""
        file, _, line = self.name.rpartition(":")
        where = (file, int(line)) if file and line.isdecimal() else (self.name, None)
        return json.dumps({"file": where[0], "line": where[1], "reason": self.reason})


_MAX_BAD = 0.05  # of all documents: with more, it is the data or what it is taken for that is wrong


def refuse_many_bad(bad: int, good: int, first: BadLine, *, listed: Path) -> None:
    """Raise ValueError if more than 5 % of documents are bad: names the first, and the file that lists all of them."""
    if bad > _MAX_BAD * (bad + good):
        raise ValueError(
            f"{bad:,} of {bad + good:,} documents cannot be used ({bad / (bad + good):.1%}; at most {_MAX_BAD:.0%} may "
            f"be left out), the first: {first.name}: {first.reason}; all of them are listed in {listed}"
        )


# ---- what a record is --------------------------------------------------------------------------------------


def parse(record: object, name: str, *, pairs: bool = False) -> Sample:
    """The sample that a record of JSON or Parquet stands for; ValueError says what is wrong with it.

    A key that holds null counts as absent: tables have every column in every row. With `pairs`, a record that is a
    dialog and a preference pair too (published pairs often repeat the chosen dialog as `messages`) is the pair.
    """
    if not isinstance(record, dict):
        raise ValueError(f'expected a record such as {{"text": ...}}, found a JSON {type(record).__name__}')
    found = {key: value for key, value in record.items() if value is not None}
    if pairs and {"chosen", "rejected"} <= found.keys():
        return _pair(found, name)
    if "messages" in found:
        messages = found["messages"]
        if system := _system(found):  # beside the messages, as Anthropic has it
            first = messages[0] if isinstance(messages, list) and messages else None
            if isinstance(first, dict) and first.get("role") == "system":
                raise ValueError("'system' stands beside 'messages' that begin with a system message: keep one of them")
            messages = [*system, *messages] if isinstance(messages, list) else messages
        return Dialog(name, messages, _tools(found))
    if "conversations" in found:
        return Dialog(name, [*_system(found), *_share_gpt(found["conversations"])], _tools(found))
    if {"chosen", "rejected"} <= found.keys():
        return _pair(found, name)
    if {"prompt", "completion"} <= found.keys():
        _refuse(found, "system", "tools", mend="put all into 'prompt', or give 'messages'")
        return Completion(name, _string(found, "prompt"), _answer(found, "completion"))
    if {"instruction", "output"} <= found.keys():
        given = _string(found, "input") if "input" in found else ""
        question = _string(found, "instruction") + (f"\n\n{given}" if given else "")
        answer = {"role": "assistant", "content": _answer(found, "output")}
        _refuse(found, "history", mend="give the whole dialog as 'messages'")
        return Dialog(name, [*_system(found), {"role": "user", "content": question}, answer], _tools(found))
    if "text" not in record:
        raise ValueError(_unknown(record))
    return Document(name, _string(record, "text"))


def _pair(record: Mapping[str, Any], name: str) -> Pair:
    """A preference pair, in one of the three shapes that TRL's DPOTrainer reads.

    Texts: `prompt`, `chosen` and `rejected` are strings. Answers: `prompt` is a list of messages, the others are what
    the assistant then says. Dialogs: no list of a prompt, and the messages that both dialogs begin with are it (a
    `prompt` that is text beside them says the same again, and is not read).
    """
    chosen, rejected = record["chosen"], record["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(record.get("prompt"), list):
        if "prompt" not in record:
            raise ValueError("'chosen' and 'rejected' are texts without a 'prompt'")
        _refuse(record, "system", "tools", mend="put all into 'prompt', or give lists of messages")
        prompt = _string(record, "prompt")
        if chosen == rejected:
            raise ValueError(_SAME)
        one, other = (Completion(name, prompt, _answer(record, key)) for key in ("chosen", "rejected"))
        return Pair(name, one, other)
    given = record.get("prompt")
    if isinstance(given, list) and not given:
        raise ValueError("'prompt' is empty: an answer needs a question")
    asked = given if isinstance(given, list) else []
    dialogs = {key: [*_system(record), *asked, *_messages(record, key)] for key in ("chosen", "rejected")}
    chosen, rejected = dialogs["chosen"], dialogs["rejected"]
    if chosen == rejected:
        raise ValueError(_SAME)
    shared = len(_system(record)) + len(asked)
    if not asked:
        shorter = min(len(chosen), len(rejected))
        shared = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
        if shared == 0:
            raise ValueError("'chosen' and 'rejected' share no first message: give 'prompt' as a list of messages")
    for key, messages in dialogs.items():
        if shared == len(messages):
            raise ValueError(f"{key!r} is empty after the {shared} messages that it shares with the other")
        answer = messages[shared]
        if not isinstance(answer, dict) or answer.get("role") != "assistant":
            raise ValueError(
                f"the answers must begin with the assistant, and share all that comes before: message {shared} of "
                f"{key!r} is {brief(answer)}"
            )
    tools = _tools(record)
    return Pair(name, *(Dialog(name, messages, tools, shared) for messages in dialogs.values()))


def _refuse(record: Mapping[str, Any], *keys: str, mend: str) -> None:
    """Raise ValueError for keys that a record of this kind has no place for; nothing is left out in silence."""
    if unread := [key for key in keys if record.get(key)]:
        raise ValueError(f"{unread[0]!r} is not read in a record of this kind: {mend}")


_SAME = "'chosen' and 'rejected' are the same: there is nothing to prefer"


def _messages(record: Mapping[str, Any], key: str) -> list[Any]:
    value = record[key]
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        raise ValueError(
            f"{key!r} must be a list of messages, or a string where 'prompt', 'chosen' and 'rejected' all are, found "
            f"{type(value).__name__}"
        )
    return value


_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
_LEARNT = ("weight", "train")  # of a message, by other trainers: whether it is learnt
_PARTNERS = {
    "prompt": "completion",
    "completion": "prompt",
    "instruction": "output",
    "output": "instruction",
    "chosen": "rejected",
    "rejected": "chosen",
}


def _share_gpt(turns: object) -> Iterator[dict[str, Any]]:
    if not isinstance(turns, list):
        raise ValueError(f"'conversations' must be a list of {{from, value}}, found {type(turns).__name__}")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f"conversations[{i}] must be {{'from': ..., 'value': str}}, found {brief(turn)}")
        role = turn.get("from")
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(f"conversations[{i}]: from {brief(role)} is not known; allowed: {', '.join(_ROLES)}")
        yield {"role": _ROLES[role], "content": turn["value"]} | {k: turn[k] for k in _LEARNT if k in turn}


def _system(record: Mapping[str, Any]) -> list[dict[str, str]]:
    text = _string(record, "system") if "system" in record else ""
    return [{"role": "system", "content": text}] if text else []


def _tools(record: Mapping[str, Any]) -> object:
    if "functions" in record:
        raise ValueError("'functions' is not read; write them as 'tools': [{'type': 'function', 'function': ...}]")
    tools = record.get("tools")
    if isinstance(tools, str):  # as tables hold them, whose cells cannot differ in shape
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise ValueError(f"'tools' must be a list, or one as a string of JSON, found {brief(tools)}") from None
    return tools or None


def _string(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        hint = "; put a list of messages under 'messages'" if isinstance(record[key], list) else ""
        raise ValueError(f"{key!r} must be a string, found {type(record[key]).__name__}{hint}")
    return record[key]


def _answer(record: Mapping[str, Any], key: str) -> str:
    if not _string(record, key).strip():
        raise ValueError(f"{key!r} is empty: there is nothing to learn")
    return record[key]


def _unknown(record: Mapping[str, Any]) -> str:
    empty = [key for key in ("messages", "conversations", *_PARTNERS) if key in record and record[key] is None]
    if empty:
        return f"{empty[0]!r} is null"
    for key in sorted(record, key=lambda key: key == "prompt"):  # whose partner may be 'chosen' too
        if key in _PARTNERS:
            return f"{key!r} without {_PARTNERS[key]!r}, found {brief(sorted(record))}"
    near = difflib.get_close_matches("text", record, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? Rename it to 'text'" if near else "put the document under 'text'"
    return (
        f"no key 'text', found {brief(sorted(record))}; {hint}, or give 'messages', 'conversations', 'prompt' and "
        "'completion', 'instruction' and 'output', or 'chosen' and 'rejected'"
    )


def _strings(value: object) -> Iterator[str]:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict | list):
            waiting += reversed(list(item.values() if isinstance(item, dict) else item))


# ---- what it becomes ---------------------------------------------------------------------------------------


# Ids, and which of them are targets; None for all.
Encoded = tuple[list[int], list[bool] | None]


def encode(sample: Document | Dialog | Completion, tokenizer: Encoder, *, max_length: int | None) -> Encoded:
    """The ids of a sample, and which of them are targets; None for all, as in a text.

    A text is bos + text + eos, a completion bos + prompt + completion + eos with nothing between, and a dialog what
    `chat.encode_dialog` makes of it.

    Args:
        sample: it.
        tokenizer: of the run.
        max_length: tokens that a dialog or a completion may have: cut, it would lose its answer. None for any number.

    Raises:
        ValueError: the sample cannot be used; says why.
        ConfigError: the tokenizer cannot be used for it.
    """
    if isinstance(sample, Document):
        return tokenizer.encode(sample.text, bos=True, eos=True), None
    if isinstance(sample, Completion):
        prompt = tokenizer.encode(sample.prompt, bos=True)
        completion = tokenizer.encode(sample.completion, eos=True)
        ids, targets = prompt + completion, [False] * len(prompt) + [True] * len(completion)
    else:
        ids, targets = tokenizer.encode_dialog(sample.messages, tools=sample.tools)
        _check_answers(sample.messages, sample.prompt)
        if sample.prompt:  # messages are encoded one by one, so that these ids are the first of all
            learn = [i >= sample.prompt for i in range(len(sample.messages))]
            ids, targets = tokenizer.encode_dialog(sample.messages, tools=sample.tools, learn=learn)
    if max_length is not None and len(ids) > max_length:
        raise ValueError(f"{len(ids):,} tokens are more than data.sequence_length={max_length}, and may not be cut")
    return ids, targets


def encode_pair(pair: Pair, tokenizer: Encoder, *, max_length: int | None) -> tuple[Encoded, Encoded]:
    """The chosen and the rejected answer of a pair, each after the prompt, as `encode` has them.

    Targets are what the assistant says after the prompt, not its earlier turns in it; of texts the answer and its eos.
    (TRL 1.16 counts everything after the prompt, users' and tools' turns within an answer too, and merges text across
    the border of prompt and answer; for one answer of the assistant the two are the same.)

    Args:
        pair: it.
        tokenizer: of the run.
        max_length: tokens that both may have together: they share a row. None for any number.

    Raises:
        ValueError: the pair cannot be used; says why.
        ConfigError: the tokenizer cannot be used for it.
    """
    chosen, rejected = (encode(answer, tokenizer, max_length=None) for answer in (pair.chosen, pair.rejected))
    if chosen[0] == rejected[0]:
        raise ValueError(_SAME)
    one, other = len(chosen[0]), len(rejected[0])
    if max_length is not None and one + other > max_length:
        raise ValueError(
            f"{one:,} tokens of 'chosen' and {other:,} of 'rejected' are more than data.sequence_length={max_length}, "
            "and a pair must fit into one row"
        )
    return chosen, rejected


def try_encode(sample: Sample, tokenizer: Encoder, *, max_length: int | None) -> tuple[Encoded, ...] | BadLine:
    """The documents of a sample, two of a pair and else one, or what is wrong with it as a BadLine."""
    try:
        if isinstance(sample, Pair):
            return encode_pair(sample, tokenizer, max_length=max_length)
        return (encode(sample, tokenizer, max_length=max_length),)
    except NameInText as error:
        raise NameInText(f"{sample.name}: {error}") from None
    except ConfigError:
        raise
    except ValueError as error:
        return BadLine.of(sample.name, error)
    except RecursionError:
        return BadLine.of(sample.name, "nested too deeply")


def _check_answers(messages: Sequence[Mapping[str, Any]], first: int) -> None:
    """Refuse a sound dialog that has nothing to learn from message `first` on, or that says more than is read."""
    answers = [(i, message) for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
    if not answers:
        raise ValueError("no message is the assistant's: there is nothing to learn")
    for i, message in answers:
        for key in _LEARNT:
            if message.get(key) not in (None, 1):  # True is 1
                raise ValueError(f"messages[{i}]: {key!r} {brief(message[key])} is not read; every answer is learnt")
        if not message.get("tool_calls") and not any(text.strip() for text in _texts(message.get("content"))):
            raise ValueError(f"messages[{i}]: the assistant's answer is empty")


def _texts(content: object) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content or ()]
