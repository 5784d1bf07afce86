"""Names of control tokens in text, such as "<|eot_id|>": how they are found, shown and encoded.

Text from users keeps them as plain text. A prompt or a document that was rendered with a chat template needs them as
control tokens. Only its author knows which of the two it is, and says so with `parse_special`, llama.cpp's name for it.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llama_jax.text.tokenizer import Tokenizer

AS_TEXT = "⟨as text⟩"

# Around the name of a control token in a content, while it is rendered. Unicode keeps these for use within programs.
MARKS = ("\ufdd0", "\ufdd1")


def pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """A pattern that matches the name of any control token, the longest first."""
    return _pattern(tuple(tokenizer.special_tokens))


@functools.lru_cache(maxsize=8)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def first_name(tokenizer: Tokenizer, text: str) -> str | None:
    """The first name of a control token in a text, or None."""
    match = pattern(tokenizer).search(text)
    return None if match is None else match[0]


def shown(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of ids for people: a control token by its name, and a name that is plain text with a mark after it."""
    control = set(tokenizer.special_tokens.values())
    runs = itertools.groupby(map(int, ids), key=control.__contains__)
    names = pattern(tokenizer)
    texts = ((is_control, tokenizer.decode(list(run))) for is_control, run in runs)
    return "".join(text if is_control else names.sub(rf"\g<0>{AS_TEXT}", text) for is_control, text in texts)


def encode_text(
    tokenizer: Tokenizer, text: str, *, parse_special: bool, bos: bool = True, eos: bool = False
) -> list[int]:
    """Returns the ids of a whole text.

    Args:
        tokenizer: the tokenizer.
        text: the text.
        parse_special: True encodes names of control tokens in `text` as these tokens. A text that already begins with
            `bos_id`, or ends with a stop token, gets no second one.
        bos: True puts `bos_id` first, if there is one.
        eos: True puts `eos_id` last, if there is one.
    """
    ids = tokenizer.encode(text, special_tokens=parse_special)
    if bos and tokenizer.bos_id is not None and not (parse_special and ids[:1] == [tokenizer.bos_id]):
        ids = [tokenizer.bos_id, *ids]
    if eos and tokenizer.eos_id is not None and not (parse_special and ids and ids[-1] in tokenizer.stop_tokens):
        ids.append(tokenizer.eos_id)
    return ids


def strings(value: Any) -> Iterator[str]:
    """Every string in nested lists and dict values, in order. Keys of dicts are not included."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping | list | tuple):
            waiting += reversed(list(item.values() if isinstance(item, Mapping) else item))


def mark(value: Any, names: re.Pattern[str]) -> Any:
    """A value with MARKS around the names of control tokens in its strings, but not in its keys."""
    start, end = MARKS
    if isinstance(value, str):
        return names.sub(rf"{start}\g<0>{end}", value.replace(start, "").replace(end, ""))
    if isinstance(value, Mapping):
        return {key: mark(item, names) for key, item in value.items()}
    return [mark(item, names) for item in value] if isinstance(value, list | tuple) else value
