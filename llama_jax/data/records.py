"""Records of data: the known shapes, and the samples made of them.

The keys of a record decide its shape. If several shapes fit, the first of this list is used: `messages` (OpenAI, with
`tools`), `conversations` or `conversation` (ShareGPT), `chosen` and `rejected` or OpenAI's `preferred_output` and
`non_preferred_output` (a preference pair), `prompt` and `completion` (texts, or TRL's lists of messages), `instruction`
and `output` (Alpaca), `text`. The styles of messages are those of `messages`.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax.data import messages
from llama_jax.data.corpus import Document
from llama_jax.data.messages import Message, present
from llama_jax.errors import brief
from llama_jax.text import control_tokens


@dataclass(frozen=True)
class Dialog:
    """A dialog in OpenAI's style. Its roles, contents and calls are checked when it is encoded.

    Attributes:
        name: name of the record, "file:line".
        messages: the messages.
        tools: the tools that the assistant may call, or None.
        learn: one flag for each message, True if the loss counts it. None: it counts every message of the assistant.
        marked: True if a message of the assistant is marked as not to be learned.
    """

    name: str
    messages: Any
    tools: Any
    learn: tuple[bool, ...] | None = None
    marked: bool = False

    @property
    def text(self) -> str:
        """Every string in the messages, as text to train a tokenizer on."""
        return "\n".join(control_tokens.strings(self.messages))


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion as plain texts. The loss counts the completion only."""

    name: str
    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """The two texts joined."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the better one first: two dialogs or two completions."""

    name: str
    chosen: Dialog | Completion
    rejected: Dialog | Completion

    @property
    def text(self) -> str:
        """Both answers, each with the prompt."""
        return f"{self.chosen.text}\n{self.rejected.text}"


Sample = Document | Dialog | Completion | Pair


@dataclass(frozen=True)
class BadLine:
    """A record that cannot be used.

    Attributes:
        name: name of the record, "file:line", or of the file.
        reason: the reason why it cannot be used, in one printable line.
        too_long: True if the only reason is that it is longer than a row.
    """

    name: str
    reason: str
    too_long: bool = False

    @classmethod
    def of(cls, name: str, why: object, *, too_long: bool = False) -> "BadLine":
        """A BadLine with a printable reason. Characters of the reason that cannot be printed are escaped."""
        text = " ".join(str(why).split())
        return cls(name, "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text), too_long)

    def to_json(self) -> str:
        """A line of the quarantine file."""
        file, _, line = self.name.rpartition(":")
        where = (file, int(line)) if file and line.isdecimal() else (self.name, None)
        entry = {"file": where[0], "line": where[1], "reason": self.reason}
        return json.dumps(entry | ({"too_long": True} if self.too_long else {}))

    @classmethod
    def from_json(cls, line: str) -> "BadLine":
        """The bad line that `to_json` wrote; one that says so for a damaged line."""
        try:
            entry = json.loads(line)
            name = entry["file"] if entry["line"] is None else f"{entry['file']}:{entry['line']}"
            return cls(str(name), str(entry["reason"]), bool(entry.get("too_long", False)))
        except (ValueError, KeyError, TypeError, AttributeError):
            return cls("(unknown)", "this line of the list of rejected records is damaged")


MAX_BAD = 0.05  # default of data.max_bad
# Reading stops at this many records if more than half of them are bad: then it is the data, or their format.
_HOPELESS_AT = 10_000
_HOPELESS = 0.5


def refuse_many_bad(bad: int, good: int, first: BadLine, *, listed: Path, allowed: float = MAX_BAD) -> None:
    """Check that at most a fraction `allowed` of all documents is bad.

    Raises:
        ValueError: more are bad. The message has the first of them and the file that lists all of them.
    """
    if bad > allowed * (bad + good):
        raise ValueError(
            f"{bad:,} of {bad + good:,} documents cannot be used ({bad / (bad + good):.1%}; data.max_bad={allowed:g} "
            f"allows {allowed:.0%}), the first: {first.name}: {first.reason}; all of them are listed in {listed}"
        )


def is_hopeless(bad: int, good: int, allowed: float) -> bool:
    """True if so many of the documents so far are bad that reading the rest is useless."""
    seen = bad + good
    return seen >= _HOPELESS_AT and bad > max(_HOPELESS, allowed) * seen


# ---- shapes ------------------------------------------------------------------------------------------------

_SAME = "'chosen' and 'rejected' are the same: there is nothing to prefer"
_PARTNERS = {
    "prompt": "completion",
    "completion": "prompt",
    "instruction": "output",
    "output": "instruction",
    "chosen": "rejected",
    "rejected": "chosen",
    "preferred_output": "non_preferred_output",
    "non_preferred_output": "preferred_output",
}
# A question and its answer, as Alpaca, Dolly, ms-swift and data sets such as GSM8K name them.
_QUESTIONS = (("instruction", "output"), ("instruction", "response"), ("query", "response"), ("question", "answer"))
_DIALOGS = ("messages", "conversations", "conversation")
# Keys that other trainers read, and that would change what is learned.
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_MASKS = ("loss_mask", "assistant_masks", "completion_mask")
_RENDERING = ("chat_template_kwargs", "chat_template")
_CONTEXTS = tuple("input context".split())  # of a question, in Alpaca and in Dolly
_OTHERS = (*_CONTEXTS, *"text choices options system tools functions history label weight".split())
# Marks of messages (see `messages`), by the value that would say of a whole record that it is not to be learned.
_RECORD_MARKS = {"train": 0, "training": 0, "trainable": 0, "loss": 0, "loss_mask": 0, "weight": 0, "masked": 1}
_ASKED = tuple(key for pair in _QUESTIONS for key in pair)
# Every key that is read.
KEYS = frozenset((*_PARTNERS, *_ASKED, *_DIALOGS, *_MEDIA, *_MASKS, *_RENDERING, *_OTHERS, *_RECORD_MARKS))


def parse(record: object, name: str, *, pairs: bool = False) -> Sample:
    """Converts a record of JSON or Parquet to a sample.

    A key that holds null counts as absent: tables have every column in every row. Keys without a meaning here, such as
    an id or a source, are not read.

    Args:
        record: the record.
        name: its name, "file:line".
        pairs: preference pairs are wanted. A record that is a dialog and a pair too (published pairs often repeat the
            chosen dialog as `messages`) is then the pair.

    Raises:
        ValueError: the record cannot be used. The message says why.
    """
    if not isinstance(record, dict):
        raise ValueError(f'expected a record such as {{"text": ...}}, found a JSON {type(record).__name__}')
    fields = present(record)
    _refuse_marks(fields)
    is_pair = {"chosen", "rejected"} <= fields.keys()
    if pairs and is_pair:
        return _pair(fields, name)
    for key in _DIALOGS:
        if key in fields:
            return _dialog(fields, name, _with_system(fields, messages.read(fields[key], key)))
    if is_pair:
        return _pair(fields, name)
    if {"preferred_output", "non_preferred_output"} <= fields.keys():
        return _pair(_openai_pair(fields), name)
    if {"prompt", "completion"} <= fields.keys():
        return _completion(fields, name)
    for question, answer in _QUESTIONS:
        if {question, answer} <= fields.keys() and (answer == "output" or "text" not in record):
            return _dialog(fields, name, _instruction(fields, question, answer))
    if "text" not in record:
        raise ValueError(why_unknown(record))
    return Document(name, _string(record, "text"))


def _dialog(record: Mapping[str, Any], name: str, read: Sequence[Message], *, first: int = 0) -> Dialog:
    """A dialog whose messages before number `first` are not learned."""
    _refuse(record, *_MEDIA, remedy="the model reads text only; remove the key, or leave the record out")
    _refuse(record, *_MASKS, remedy="mark the messages themselves, each with 'train': true or false")
    _refuse(
        record, *_RENDERING, remedy="set data.chat_format to a template that writes the dialog so, and remove the key"
    )
    learn = tuple(message.learn and i >= first for i, message in enumerate(read))
    marked = any(message.content["role"] == "assistant" and not message.learn for message in read)
    return Dialog(name, [message.content for message in read], messages.read_tools(record), learn, marked)


def _completion(record: Mapping[str, Any], name: str) -> Dialog | Completion:
    """Prompt and completion: two texts, or two lists of messages, of which the loss counts the second."""
    prompt = record["prompt"]
    if isinstance(prompt, list):
        asked = _with_system(record, messages.read(prompt, "prompt"))
        return _dialog(record, name, [*asked, *_answers(record, "completion")], first=len(asked))
    if isinstance(prompt, str) and not isinstance(record["completion"], str):
        raise ValueError("'completion' holds messages and 'prompt' a string: give both as lists of messages")
    remedy = "put all into 'prompt', or give 'messages'"
    _refuse(record, "system", "tools", "functions", *_MEDIA, *_MASKS, remedy=remedy)
    return Completion(name, _string(record, "prompt"), _answer(record, "completion"))


def _instruction(record: Mapping[str, Any], question: str, answer: str) -> list[Message]:
    """The messages of a question and its answer: those of `history`, pairs of texts, come before it."""
    _refuse(record, "choices", "options", remedy=f"write the choices into {question!r}")
    rounds = record.get("history", [])
    if not isinstance(rounds, list) or not all(isinstance(each, list) and len(each) == 2 for each in rounds):
        raise ValueError(f"'history' must be a list of [instruction, output], found {brief(rounds)}")
    turns = [{"human": asked, "assistant": answer} for asked, answer in rounds]
    contexts = [text for key in _CONTEXTS if key in record and (text := _string(record, key))]
    asked = "\n\n".join([_string(record, question), *contexts])
    turns.append({"human": asked, "assistant": _answer(record, answer)})
    return _with_system(record, messages.read(turns, "history"))


def _openai_pair(record: Mapping[str, Any]) -> dict[str, Any]:
    """A pair in the shape of OpenAI's preference fine-tuning, rewritten in TRL's."""
    asked = record.get("input")
    if not isinstance(asked, dict) or "messages" not in asked:
        raise ValueError(f"'input' must have 'messages' if the record has 'preferred_output', got {brief(asked)}")
    answers = {"chosen": record["preferred_output"], "rejected": record["non_preferred_output"]}
    return {"prompt": asked["messages"], "tools": asked.get("tools"), **answers}


def _pair(record: Mapping[str, Any], name: str) -> Pair:
    """A preference pair, in one of the three shapes that TRL's DPOTrainer reads.

    Texts: `prompt`, `chosen` and `rejected` are strings. Answers: `prompt` is a list of messages, the others are what
    the assistant then says. Dialogs: there is no list of a prompt, and the messages that both dialogs begin with are
    the prompt. A `prompt` that is a string repeats it, and is not read.
    """
    prompt = record.get("prompt")
    if isinstance(record["chosen"], str) and isinstance(record["rejected"], str) and not isinstance(prompt, list):
        return _pair_of_texts(record, name)
    if isinstance(prompt, list) and not prompt:
        raise ValueError("'prompt' is empty: an answer needs a question")
    asked = messages.read(prompt, "prompt") if isinstance(prompt, list) else []
    before = _with_system(record, asked) if asked else []
    dialogs = {}
    for key in ("chosen", "rejected"):
        answers = _answers(record, key) if asked else _with_system(record, _answers(record, key))
        dialogs[key] = [*before, *answers]
    contents = {key: [message.content for message in dialog] for key, dialog in dialogs.items()}
    if contents["chosen"] == contents["rejected"]:
        raise ValueError(_SAME)
    shared = len(before) if asked else _shared(*contents.values())
    for key, dialog in contents.items():
        if shared == len(dialog):
            raise ValueError(f"{key!r} is empty after the {shared} messages that it shares with the other")
        if dialog[shared]["role"] != "assistant":
            raise ValueError(
                f"'chosen' and 'rejected' must share their messages up to one of the assistant: message {shared} of "
                f"{key!r} is {brief(dialog[shared])}"
            )
    return Pair(name, *(_dialog(record, name, dialog, first=shared) for dialog in dialogs.values()))


def _pair_of_texts(record: Mapping[str, Any], name: str) -> Pair:
    if "prompt" not in record:
        raise ValueError("'chosen' and 'rejected' are texts, and 'prompt' is missing: add the prompt")
    _refuse(record, "system", "tools", "functions", remedy="put all into 'prompt', or give lists of messages")
    prompt = _string(record, "prompt")
    if record["chosen"] == record["rejected"]:
        raise ValueError(_SAME)
    return Pair(name, *(Completion(name, prompt, _answer(record, key)) for key in ("chosen", "rejected")))


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The number of messages that two dialogs both begin with, at least one."""
    shorter = min(len(one), len(other))
    shared = next((i for i in range(shorter) if one[i] != other[i]), shorter)
    if shared == 0:
        raise ValueError("'chosen' and 'rejected' share no first message: give 'prompt' as a list of messages")
    return shared


def _answers(record: Mapping[str, Any], key: str) -> list[Message]:
    """The messages of an answer: a list, one message, or its text where the prompt is a list of messages."""
    value = record[key]
    if isinstance(value, str) and isinstance(record.get("prompt"), list):
        return messages.read([{"role": "assistant", "content": _answer(record, key)}], key)
    if not isinstance(value, list | dict):
        raise ValueError(
            f"{key!r} must be a list of messages, or a string where 'prompt', 'chosen' and 'rejected' all are, found "
            f"{type(value).__name__}"
        )
    return messages.read([value] if isinstance(value, dict) else value, key)


def _with_system(record: Mapping[str, Any], read: list[Message]) -> list[Message]:
    """Messages after the system message that some records hold in a key of its own, as Anthropic's do."""
    if not record.get("system"):
        return read
    if not isinstance(record["system"], str | list):
        raise ValueError(f"'system' must be a string, found {type(record['system']).__name__}")
    (system,) = messages.read([{"role": "system", "content": record["system"]}], "system")
    if read and read[0].content["role"] in ("system", "developer"):
        if read[0].content.get("content") == system.content["content"]:
            return read
        raise ValueError("'system' is given, and the messages begin with another system message: keep one of them")
    return [system, *read]


def _refuse_marks(record: Mapping[str, Any]) -> None:
    """Raise ValueError for a record that is marked as one not to learn, or that counts for more or less than others."""
    if record.get("label") is False and "text" not in record:  # unpaired preferences, as for KTO
        raise ValueError("'label' is false: the answer is marked as one not to give; leave the record out")
    for key, unwanted in _RECORD_MARKS.items():
        value = record.get(key)
        if isinstance(value, bool | int | float) and (value == unwanted or (key == "weight" and value != 1)):
            raise ValueError(
                f"{key!r} is {brief(value)}, and a record cannot be weighted as a whole: leave it "
                "out, or mark its messages"
            )


def _refuse(record: Mapping[str, Any], *keys: str, remedy: str) -> None:
    """Raise ValueError for keys that have no meaning in a record of this shape, so that none is ignored silently."""
    if unread := [key for key in keys if record.get(key)]:
        raise ValueError(f"{unread[0]!r} has no meaning in a record of this shape: {remedy}")


def _string(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        hint = "; put a list of messages under 'messages'" if isinstance(record[key], list) else ""
        raise ValueError(f"{key!r} must be a string, found {type(record[key]).__name__}{hint}")
    return record[key]


def _answer(record: Mapping[str, Any], key: str) -> str:
    if not _string(record, key).strip():
        raise ValueError(f"{key!r} is empty: there is nothing to learn")
    return record[key]


def why_unknown(record: Mapping[str, Any]) -> str:
    """The reason why a record has none of the known shapes."""
    empty = [key for key in (*_DIALOGS, *_PARTNERS, *_ASKED) if key in record and record[key] is None]
    if empty:
        return f"{empty[0]!r} is null: give it a value, or leave the record out"
    for key in sorted(map(str, record), key=lambda key: key == "prompt"):  # its partner may be 'chosen' too
        if key in _PARTNERS:
            return f"{key!r} without {_PARTNERS[key]!r}, found {brief(sorted(map(str, record)))}"
    texts = [key for key, value in record.items() if value is None or isinstance(value, str)]
    near = difflib.get_close_matches("text", texts, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? Rename it to 'text'" if near else "put the document under 'text'"
    return (
        f"no key 'text', found {brief(sorted(map(str, record)))}; {hint}, or give 'messages', 'conversations', "
        "'prompt' and 'completion', 'instruction' and 'output', 'question' and 'answer', or 'chosen' and 'rejected'"
    )
