"""The flags of a run: a config file and changes of its keys, --config FILE --config.KEY=VALUE.

Only this module and the recipes in configs/ import ml_collections.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from llama_jax.cli import key_files, recipes
from llama_jax.cli.parser import Parser
from llama_jax.errors import ConfigError, brief
from llama_jax.run_config import RunConfig, describe, differences, key_of_flag, kind_of, known_keys, unknown_key

_EXAMPLES = """\
examples:
  PROGRAM --config quickstart
  PROGRAM --config configs/llama31_8b_lora.py --config.optimizer.learning_rate=1e-4 --config.data.train='chats/*.jsonl'
  PROGRAM --keys
"""
_MODEL = "--init_from MODEL names a model to start from, and --config.model=SIZE the shape of a new one"
_PURPOSES = {
    "train": "Train a Llama as a config file says.",
    "plan": "Print what a training run needs on devices that need not be here: memory, communication, projected time.",
}


class _RunParser(Parser):
    """The parser of all flags but --config.KEY=VALUE. An error about an unknown flag treats it as a misspelled key."""

    def _unknown(self, arg: str) -> NoReturn:
        if not arg.startswith("-"):
            recipe = arg.endswith(".py") or arg in recipes.names()
            hint = f"; did you mean --config {arg}?" if recipe else ": keys are set with --config.KEY=VALUE"
            self.error(f"unexpected argument {brief(arg)}{hint}")
        try:
            super()._unknown(arg)
        except ConfigError as error:
            if "did you mean" in str(error):
                raise
        raise unknown_key(arg.lstrip("-").partition("=")[0])


def parse_run(argv: Sequence[str]) -> tuple[RunConfig, bool]:
    """The run that the arguments of `train` describe, and whether it may resume; errors as in `parse_run_flags`."""
    run, options = parse_run_flags(argv, command="train")
    return run, options.resume


def parse_run_flags(
    argv: Sequence[str],
    *,
    command: str,
    add: Callable[[argparse.ArgumentParser], None] | None = None,
    examples: str = _EXAMPLES,
) -> tuple[RunConfig, argparse.Namespace]:
    """The run that the arguments describe, and the command's flags that are not config keys.

    Args:
        argv: The arguments after the command's name.
        command: "train", "plan" or "inspect data".
        add: adds the flags that the command has besides these.
        examples: text at the end of --help.

    Raises:
        ConfigError: a flag, a key or a value that is not allowed; SystemExit after --help and --keys.
    """
    changes, rest = _split_changes(argv)
    parser = _RunParser(command, _PURPOSES.get(command, _PURPOSES["train"]), examples=examples)
    flag = parser.add_argument
    flag(
        "--config",
        metavar="FILE",
        help="name of a recipe, a Python file with get_config(), or a .toml, .json or .yaml file of keys. Recipes: "
        f"{_recipes()}",
    )
    flag(
        "--config.KEY",
        metavar="VALUE",
        dest="key",
        help="change a key of the config, e.g. --config.optimizer.learning_rate=1e-4; --keys lists the keys. The last "
        "part alone is enough where one key has it (--learning_rate 1e-4), and names of other trainers are taken where "
        "their values mean the same (--num_train_epochs 3)",
    )
    if add is not None:
        add(parser)
    else:
        (_add_train_flags if command == "train" else _add_data_flags)(parser)
    parser.refused |= dict.fromkeys(("--model", "-m"), _MODEL)
    parser.aliases |= {"--job.config_file": "--config", "--config_file": "--config"}
    flag("--keys", action="store_true", help="print every key with its value, type, allowed values and meaning")
    options = parser.parse(rest)
    changes = [_override(arg) for arg in changes]
    if options.config is None and options.keys:
        _print_keys({})
        sys.exit(0)
    if options.config is None:
        raise ConfigError(f"no config: give a recipe or a file, e.g. {parser.prog} --config quickstart")
    run = _run(recipes.find(options.config), changes)
    if options.keys:
        _print_keys(run.to_dict())
        sys.exit(0)
    return run, options


def _add_train_flags(parser: Parser) -> None:
    """The flags of `train` that are not config keys."""
    parser.add_argument(
        "--resume",
        action="store_true",
        default=True,
        help="continue from the newest checkpoint, as by default",
    )
    parser.add_argument(
        "--noresume",
        dest="resume",
        action="store_false",
        help="refuse a run folder that already has a checkpoint",
    )
    parser.add_argument(
        "--plan", metavar="DEVICE", help="print what the run needs on DEVICE, e.g. v5p:4x4x4, and do not train"
    )
    parser.aliases["--no_resume"] = "--noresume"


def _add_data_flags(parser: Parser) -> None:
    """The flags of `inspect data` that are not config keys."""
    parser.add_argument("--rows", type=int, metavar="N", help="rows of the preview (by default what fits the screen)")
    parser.add_argument("--full", action="store_true", help="show whole rows instead of what fits the screen")


def _recipes() -> str:
    return ", ".join(recipes.names())


def _split_changes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that set keys, each joined with its value, and the others.

    `--config.KEY VALUE` and `--KEY=VALUE` are taken too, with hyphens or underscores, and names of `key_of_flag`.
    """
    changes, rest, left = [], [], list(argv)
    sections = {key.partition(".")[0] for key in known_keys() if "." in key}
    while left:
        arg = left.pop(0)
        name, equals, value = arg.partition("=")
        word = name.lstrip("-").replace("-", "_")
        full = word.removeprefix("config.") if word.startswith("config.") else None
        key = key_of_flag(full or word) if name.startswith("--") and full not in sections else None
        key = key or full
        if key is None or not name.startswith("-"):
            rest.append(arg)
            continue
        if not equals and left and not left[0].startswith("--"):
            equals, value = "=", left.pop(0)
        changes.append(f"--config.{key}{equals}{value}")
    return changes, rest


def _run(path: Path, changes: Sequence[str]) -> RunConfig:
    """The run of a config file with changes, each `--config.KEY=VALUE`."""
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    argv, shape = _split_shape(["train", *_one_length(_last_of_each(changes))])
    values = flags.FlagValues()
    if path.suffix != ".py":
        config_flags.DEFINE_config_dict("config", ConfigDict(key_files.read(path)), flag_values=values, sys_argv=argv)
    else:
        argv.insert(1, f"--config={path}")
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
        config = values.config
    except ConfigError:
        raise
    except flags.Error as error:
        wrong = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
        if wrong and wrong[1] in known_keys():
            raise ConfigError(f"{wrong[1]} must be {kind_of(wrong[1])}, got {brief(wrong[2])}") from None
        raise ConfigError(str(error).replace("\n", " ")) from None
    except Exception as error:  # a config file is a program and may raise anything
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config() must return an ml_collections.ConfigDict, got {brief(config)}")
    return RunConfig.from_dict(_with_shape(config.to_dict(), shape))


def _last_of_each(args: Iterable[str]) -> list[str]:
    """The changes without those that a later one of the same key replaces. absl would join two values of a tuple."""
    last: dict[str, str] = {}
    for i, arg in enumerate(args):
        key = arg.partition("=")[0]
        name = key if key.lstrip("-").startswith("config.") else str(i)
        last.pop(name, None)
        last[name] = arg
    return list(last.values())


def _override(arg: str) -> str:
    """The change with its key checked. A key that is a tuple takes a bare string, or paths separated by commas."""
    name, equals, value = arg.partition("=")
    if not name.lstrip("-").startswith("config."):
        return arg
    key = name.lstrip("-").removeprefix("config.")
    if key != "model" and key not in known_keys():
        raise unknown_key(key)
    if not equals:
        raise ConfigError(f"--config.{key} needs its value after an equals sign: --config.{key}=VALUE")
    if key in _TUPLE_KEYS:
        parts = _literal(value)
        if key in _NUMBER_KEYS and isinstance(parts, (int, float)):
            parts = (parts,)
        if not isinstance(parts, (tuple, list)):
            parts = [value] if key == "log.sample_prompts" else [p.strip() for p in value.split(",") if p.strip()]
        if key in _NUMBER_KEYS:
            parts = [p if isinstance(p, (int, float)) or _literal(p) is None else _literal(p) for p in parts]
        value = repr(tuple(parts))
    return f"--config.{key}={value}"


def _one_length(argv: list[str]) -> list[str]:
    """The arguments, in which setting train.epochs or train.steps clears the recipe's value of the other."""
    given = {arg.lstrip("-").partition("=")[0].removeprefix("config.") for arg in argv if "=" in arg}
    return [*argv, *(f"--config.{key}={value}" for key, value in key_files.cleared(given).items())]


def _split_shape(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Separates the flags of the section model from the other arguments.

    They are separated because ml_collections cannot set a key whose default is None.

    Returns:
        The other arguments, and a dict from key of the section model to the flag's text. The key of
        `--config.model=NAME` is "name".
    """
    rest, shape = [], {}
    for arg in argv:
        name, _, value = arg.partition("=")
        key = name.lstrip("-").removeprefix("config.")
        if name.startswith("-") and (key == "model" or key.startswith("model.")) and key != name.lstrip("-"):
            shape[key.removeprefix("model").removeprefix(".") or "name"] = value
        else:
            rest.append(arg)
    return rest, shape


def _with_shape(values: dict[str, Any], shape: dict[str, str]) -> dict[str, Any]:
    """The values of a config with the flags of the section model."""
    model = values.get("model") or {}
    model = {"name": model} if isinstance(model, str) else dict(model)
    for key, text in shape.items():
        value = text if key == "name" else _literal(text)
        section, _, last = key.rpartition(".")
        if section:
            model[section] = {**(model.get(section) or {}), last: text if value is None else value}
        else:
            model[last] = text if value is None else value
    return {**values, "model": model} if shape else values


_NUMBER_KEYS = ("data.weights", "lora.trained_tokens", "log.profile")
_TUPLE_KEYS = (
    "data.train", "data.weights", "data.validation", "optimizer.rates", "lora.targets", "lora.trained_tokens",
    "log.sample_prompts", "log.to", "log.profile",
)  # fmt: skip


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _print_keys(values: dict[str, Any]) -> None:
    """Print every key: its value on a line, and below it the type, the allowed values, the default and the meaning."""
    given = {key: new for key, (_, new) in differences({}, values).items()}
    width = min(110, max(60, shutil.get_terminal_size((100, 24)).columns - 2))
    for key in describe():
        default = "set by the model's size" if key.default is None else repr(key.default)
        value = given.get(key.name, key.default)
        facts = [key.type, *([key.allowed] if key.allowed else []), f"default {default}"]
        print(f"{key.name} = {value!r}" if key.name in given or key.default is not None else key.name)
        print(
            textwrap.fill(
                f"{'; '.join(facts)}. {key.meaning}",
                width,
                initial_indent="    ",
                subsequent_indent="    ",
                break_on_hyphens=False,
            )
        )
