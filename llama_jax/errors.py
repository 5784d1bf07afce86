"""Error messages: the exception for settings, suggestions of near names, and values shortened to one line.

Floor 0: this module does not import jax.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class")

_LONGEST_NAME, _MOST_NAMES = 100, 1500
_LONGEST_PATH = 300
_REPR = reprlib.Repr()


class ConfigError(ValueError):
    """A setting that cannot work. The message says what was given, what is allowed and how to fix it."""


def nearest(word: str, known: Sequence[str], *, cutoff: float = 0.5) -> str:
    """A `; did you mean ...?` clause for `word`, or an empty string when no known name is near.

    Names are near when difflib's ratio (from 0 to 1) reaches `cutoff`.

    Names from files may be many and long, and a search among them would take minutes. Names over 100 characters get
    no suggestion, and only the first 1,500 known names are searched.
    """
    if len(str(word)) > _LONGEST_NAME:
        return ""
    candidates = [name for name in known[:_MOST_NAMES] if len(name) <= _LONGEST_NAME]
    matches = difflib.get_close_matches(str(word), candidates, n=1, cutoff=cutoff)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def one_line(message: object) -> str:
    """The message without line breaks and terminal control codes, which names from files may contain.

    An operating system error becomes its file and reason. If the file does not exist, the nearest existing name is
    added.
    """
    if isinstance(message, OSError) and message.filename and message.strerror:
        name = os.fsdecode(message.filename)
        folder, last = os.path.split(name)
        missing = isinstance(message, FileNotFoundError) and os.path.isdir(folder or ".")
        name = name if len(name) <= _LONGEST_PATH else f"{name[:100]}...{name[-100:]}"
        message = f"{name}: {message.strerror}{nearest(last, os.listdir(folder or '.')) if missing else ''}"
    elif isinstance(message, OSError) and message.strerror:
        message = message.strerror
    return "".join(c if c.isprintable() else " " for c in str(message))


def checked_keywords(function: Function) -> Function:
    """Decorates a public function: an unknown keyword argument raises a TypeError with the nearest known one."""
    parameters = inspect.signature(function).parameters
    known = [name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]

    @functools.wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        for name in keywords:
            if name not in parameters:
                near = nearest(name, known) or ";"
                title = function.__qualname__.removesuffix(".__init__")
                raise TypeError(f"{title}() has no argument {name!r}{near} allowed: {', '.join(known)}")
        return function(*args, **keywords)

    return cast(Function, checked)


def checked_fields(cls: type[Class]) -> type[Class]:
    """Decorates a dataclass: a field that does not exist raises a TypeError with the nearest that does."""
    setattr(cls, "__init__", checked_keywords(cls.__init__))  # noqa: B010  (an assignment would not be typed)
    return cls


def brief(value: Any, length: int = 80) -> str:
    """The repr of a value, cut to `length` characters. Long values are never formatted whole."""
    _REPR.maxstring = _REPR.maxother = _REPR.maxlong = length
    text = _REPR.repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."
