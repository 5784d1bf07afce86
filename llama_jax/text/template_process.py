"""The process that renders chat templates. It runs this file alone, without the rest of the package.

A chat template is a Jinja program that comes with a model, so it is not trusted. It runs in Jinja's immutable sandbox,
as in transformers, and the process has limits of its own: address space, CPU time for each rendering, length of the
output, no new files and no network connections (a socket is a file). A rendering that uses too much CPU time ends the
process by a signal, even within one call of a C function.

Requests and answers are JSON on standard input and output, each with its length in bytes before it (8 bytes,
big-endian).

    request   {"source": str, "variables": {...}, "cuts": [[messages, add_generation_prompt], ...], "mark": bool,
               "date": [year, month, day] or null}
    answer    {"text": str, "cuts": [[length, common, tail], ...]}, {"refused": str} or {"broken": str}

`text` is the rendering of all messages. A cut is the rendering of only the first `messages` of them: its length, the
length of the beginning that it has in common with `text`, and its last TAIL characters. "refused" is the template's own
`raise_exception`, or an error while it renders this dialog. "broken" is a template that is invalid or exceeds a limit.
"""

import datetime
import html  # noqa: F401  Jinja imports this and the other unused modules when a template needs them: too late here.
import json
import pprint  # noqa: F401
import random  # noqa: F401
import resource
import signal
import sys
import textwrap  # noqa: F401
from typing import Any, BinaryIO

import jinja2
import jinja2.constants  # noqa: F401
import jinja2.debug  # noqa: F401
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

MEMORY = 256 << 20  # bytes of address space; Python and Jinja take 40 MB of it
CPU_SECONDS = 1.5  # for one rendering, compilation included; real templates take milliseconds
MOST_CHARACTERS = 8_000_000  # of one rendering
TAIL = 100
SPOKEN_START, SPOKEN_END = "\ufdd2", "\ufdd3"  # around what {% generation %} encloses, with `mark`

_TOO_LARGE = f"it needs more than the {MEMORY >> 20} MiB of memory that a template may use"

_marking = False
_date: tuple[int, int, int] | None = None


class Refused(jinja2.TemplateError):
    """Raised by a template's `raise_exception`, its own refusal of a dialog."""


class Generation(jinja2.ext.Extension):
    """The tag {% generation %}, which encloses the assistant's text."""

    tags = {"generation"}  # noqa: RUF012  Jinja's interface

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Parse the tag into a block of the template that calls `_spoken`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_spoken"), [], [], body).set_lineno(line)

    def _spoken(self, caller: jinja2.runtime.Macro) -> str:
        return SPOKEN_START + caller() + SPOKEN_END if _marking else caller()


class Dict:
    """The global `dict`: a function, so that a template cannot reach attributes of the type."""

    def __call__(self, *args: Any, **options: Any) -> dict:
        """Make a dict."""
        return dict(*args, **options)

    def fromkeys(self, *args: Any) -> dict:
        """Make a dict of keys with one value."""
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """The global `namespace`, without names that begin with an underscore."""

    def __init__(*args: Any, **options: Any) -> None:
        """Take the arguments of Python's `dict` as names and values."""
        self, rest = args[0], args[1:]
        values = dict(*rest, **options)
        for name in values:
            Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        """Set a name."""
        Namespace._check(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot have an attribute {name!r}")


def environment() -> jinja2.Environment:
    """The Jinja environment that transformers gives to chat templates."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = _strftime_now
    made.globals["dict"] = Dict()
    made.globals["namespace"] = Namespace
    return made


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: object) -> None:
    raise Refused(str(message))


def _strftime_now(form: str) -> str:
    now = datetime.datetime.now() if _date is None else datetime.datetime(*_date)
    return now.strftime(form)


def answer(request: dict[str, Any], compiled: dict[str, jinja2.Template]) -> dict[str, Any]:
    """The answer to one request. `compiled` caches the template of the last request."""
    global _marking, _date
    _marking, _date = request["mark"], request["date"]
    source = request["source"]
    if source not in compiled:
        compiled.clear()
        _start_clock()
        try:
            compiled[source] = environment().from_string(source)
        except MemoryError:
            return {"broken": _TOO_LARGE}
        except Exception as error:
            return {"broken": f"it is not a sound Jinja template: {_describe(error)}"}
    try:
        text = _render(compiled[source], request["variables"])
        cuts = []
        for messages, generation in request["cuts"]:
            variables = request["variables"] | {
                "messages": request["variables"]["messages"][:messages],
                "add_generation_prompt": generation,
            }
            part = _render(compiled[source], variables)
            cuts.append([len(part), _common(part, text), part[-TAIL:]])
        return {"text": text, "cuts": cuts}
    except MemoryError:
        return {"broken": _TOO_LARGE}
    except (OverflowError, RecursionError, jinja2.exceptions.SecurityError) as error:
        return {"broken": _describe(error)}
    except Exception as error:
        return {"refused": _describe(error)}


def _render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    _start_clock()
    text = template.render(**variables)
    if len(text) > MOST_CHARACTERS:
        raise OverflowError(f"the template writes {len(text):,} characters; at most {MOST_CHARACTERS:,} are allowed")
    return text


def _start_clock() -> None:
    """Allow CPU_SECONDS from now. The signal's default action ends the process."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)


def _common(a: str, b: str) -> int:
    """Length of the common beginning of two strings."""
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _describe(error: BaseException) -> str:
    line = getattr(error, "lineno", None)
    kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
    text = " ".join(f"{kind}{error}"[:500].split())
    return text + (f" (line {line})" if line else "")


def _limit() -> None:
    limits = {"RLIMIT_AS": MEMORY, "RLIMIT_NOFILE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def read(file: BinaryIO) -> dict[str, Any] | None:
    """The next message of a pipe, or None at its end."""
    head = file.read(8)
    size = int.from_bytes(head, "big")
    data = file.read(size) if len(head) == 8 else b""
    return json.loads(data.decode("utf-8", "surrogatepass")) if len(head) == 8 and len(data) == size else None


def write(file: BinaryIO, message: dict[str, Any]) -> None:
    """Write a message, which `read` reads."""
    data = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    file.write(len(data).to_bytes(8, "big") + data)
    file.flush()


def main() -> None:
    """Answer requests until standard input ends."""
    compiled: dict[str, jinja2.Template] = {}
    environment().from_string("{{ [1] | tojson }}{{ strftime_now('%Y') }}").render()  # imports what is needed
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _limit()
    while (request := read(sys.stdin.buffer)) is not None:
        reply = answer(request, compiled)
        signal.setitimer(signal.ITIMER_PROF, 0)
        write(sys.stdout.buffer, reply)


if __name__ == "__main__":
    main()
