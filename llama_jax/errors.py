"""Error messages: the exception for settings, suggestions of near names, and values shortened to one line.

Floor 0: this module does not import jax.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from llama_jax import peer_arguments

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class")

TRY_AGAIN = 75  # exit status of a process whose command may succeed when it is repeated (EX_TEMPFAIL of sysexits.h)

# Names that other programs have for dtypes.
DTYPE_ALIASES = {
    **dict.fromkeys(("bf16", "torch.bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "f16", "half", "torch.float16"), "float16"),
    **dict.fromkeys(("fp32", "f32", "float", "torch.float32"), "float32"),
}

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


def json_fault(error: Exception) -> str:
    """The reason why a text cannot be read or written as JSON."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if "int_max_str_digits" in str(error):
        return "a number in it has thousands of digits"
    return one_line(error)


def unknown_argument(function: str, name: str, known: Sequence[str]) -> TypeError:
    """The error for a keyword argument that does not exist, with what a name of other libraries means here."""
    meant = peer_arguments.BY_ALIAS.get(name)
    answer = peer_arguments.answer(function, name)
    if answer is not None and meant not in known:
        return TypeError(f"{function}() has no argument {name!r}: {answer}")
    near = f"; did you mean {meant!r}?" if meant in known else nearest(name, known)
    return TypeError(f"{function}() has no argument {name!r}{near or ';'} allowed: {', '.join(known)}")


def no_attribute(owner: object, name: str, peers: Mapping[str, str]) -> AttributeError:
    """The error for an attribute that does not exist.

    Args:
        owner: The object.
        name: The attribute.
        peers: What to write here, by the names that other libraries have for it. The message says "here it is" before.
    """
    known = [other for other in dir(owner) if not other.startswith("_")]
    near = f"; here it is {peers[name]}" if name in peers else nearest(name, known, cutoff=0.7)
    owner_name = owner.__name__ if isinstance(owner, type) else type(owner).__name__
    return AttributeError(f"{owner_name} has no attribute {name!r}{near}")


class Answering(type):
    """A metaclass of public classes: their attributes that do not exist, such as Llama.from_pretrained, are answered by
    `no_attribute` with the names in `_peers`.
    """

    if not TYPE_CHECKING:

        def __getattr__(cls, name: str) -> Any:
            tables = (vars(base)["_peers"] for base in cls.__mro__ if "_peers" in vars(base))
            raise no_attribute(cls, name, next(tables, {}))


def checked_keywords(function: Function) -> Function:
    """Decorates a public function: a wrong call raises a TypeError that names its arguments and the nearest known one.

    Keywords that a function takes as **options are left to it.
    """
    signature = inspect.signature(function)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items() if name != "self"}
    known = [name for name, kind in kinds.items() if kind is not inspect.Parameter.VAR_KEYWORD]
    title = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        if len(known) == len(kinds):
            for name in keywords:
                if name not in known:
                    raise unknown_argument(title, name, known)
        try:
            return function(*args, **keywords)
        except TypeError:
            try:
                signature.bind(*args, **keywords)
            except TypeError as error:
                for name in keywords:
                    answered = peer_arguments.answer(title, name) is not None
                    if name not in known and (answered or peer_arguments.BY_ALIAS.get(name) in known):
                        raise unknown_argument(title, name, known) from None
                more = ", ..." if len(known) < len(kinds) else ""
                reason = str(error).replace(" keyword-only", "")  # a word of Python 3.12 and later
                raise TypeError(f"{title}(): {reason}; its arguments are {', '.join(known)}{more}") from None
            raise

    return cast(Function, checked)


def checked_fields(cls: type[Class]) -> type[Class]:
    """Decorates a dataclass: a field that does not exist raises a TypeError with the nearest that does."""
    setattr(cls, "__init__", checked_keywords(cls.__init__))  # noqa: B010  (an assignment would not be typed)
    return cls


def brief(value: Any, length: int = 80) -> str:
    """The repr of a value, cut to `length` characters. Long values are never formatted whole."""
    _REPR.maxstring = _REPR.maxother = _REPR.maxlong = length
    try:
        text = _REPR.repr(value)
    except ValueError:  # Python refuses to write a whole number of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= length else text[: length - 3] + "..."
