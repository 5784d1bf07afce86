"""What the root scripts share: config files with flags, and errors a person can act on.

The only place, with configs/, that sees ml_collections.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from llama_jax.errors import ConfigError, nearest, one_line
from llama_jax.run_config import RunConfig, kind_of, known_keys, unknown_key

_TRAIN_USAGE = """\
usage: python train.py --config configs/NAME.py [--config.KEY=VALUE ...] [--noresume]

  --config FILE          a Python file with get_config(); see configs/
  --config.KEY=VALUE     change one of its keys, e.g. --config.optimizer.learning_rate=1e-4
  --noresume             refuse a run folder that already has a checkpoint, instead of going on from it
  --keys                 print every key with the value that it has
"""


def fail(message: object) -> NoReturn:
    """Print one line on standard error and leave with status 2."""
    print("error: " + one_line(message), file=sys.stderr)
    sys.exit(2)


def reported(main: Callable[[], int | None], *errors: type[BaseException]) -> NoReturn:
    """Run `main`; the named errors become one line on standard error and status 2, Ctrl-C status 130."""
    try:
        sys.exit(main() or 0)
    except errors as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


def parse_run(argv: Sequence[str]) -> tuple[RunConfig, bool]:
    """The run that train.py's arguments describe, and whether it may resume.

    Args:
        argv: as in sys.argv, with the program's name first.

    Raises:
        ConfigError: a flag, a key or a value that is not allowed; SystemExit after --help and --keys.
    """
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    if {"-h", "--help", "-help"} & set(argv):
        print(_TRAIN_USAGE)
        sys.exit(0)
    path = _config_path(argv)
    if not path.is_file():
        there = sorted(str(p) for p in Path("configs").glob("*.py"))
        known = f" There are: {', '.join(there)}" if there else ""
        raise ConfigError(f"--config: no file {str(path)!r}{nearest(str(path), there)}{known}")
    argv = [argv[0], *_last_of_each(_override(arg) for arg in argv[1:])]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    flags.DEFINE_bool("resume", True, "", flag_values=values)
    flags.DEFINE_bool("keys", False, "", flag_values=values)
    try:
        rest = values(argv)[1:]
        config = values.config
    except ConfigError:
        raise
    except flags.Error as error:
        wrong = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
        if wrong and wrong[1] in known_keys():
            raise ConfigError(f"{wrong[1]} must be {kind_of(wrong[1])}, got {wrong[2]!r}") from None
        raise ConfigError(str(error).replace("\n", " ")) from None
    except Exception as error:  # whatever a config file raises: name the file, then say it
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    if rest:
        raise ConfigError(f"unexpected arguments {' '.join(rest)}: keys are set with --config.KEY=VALUE")
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config() must return an ml_collections.ConfigDict, got {config!r}")
    run = RunConfig.from_dict(config.to_dict())
    if values.keys:
        _print_keys(run.to_dict())
        sys.exit(0)
    return run, values.resume


def _config_path(argv: Sequence[str]) -> Path:
    for i, arg in enumerate(argv[1:], start=1):
        name, equals, value = arg.partition("=")
        if name.lstrip("-") == "config" and name != "config":
            return Path(value if equals else argv[i + 1] if i + 1 < len(argv) else "")
    raise ConfigError("no config: python train.py --config configs/quickstart.py")


def _last_of_each(args: Iterable[str]) -> list[str]:
    """Of a key that is given twice the last, for every kind of key: of tuples absl would take both together."""
    last: dict[str, str] = {}
    for i, arg in enumerate(args):
        key = arg.partition("=")[0]
        name = key if key.lstrip("-").startswith("config.") else str(i)
        last.pop(name, None)
        last[name] = arg
    return list(last.values())


def _override(arg: str) -> str:
    """Check the key of `--config.KEY=VALUE`; a tuple key takes a bare string, and paths with commas between."""
    name, equals, value = arg.partition("=")
    if not name.lstrip("-").startswith("config."):
        return arg
    key = name.lstrip("-").removeprefix("config.")
    if key not in known_keys():
        raise unknown_key(key)
    if not equals:
        raise ConfigError(f"--config.{key} needs its value after an equals sign: --config.{key}=VALUE")
    if key in _TUPLE_KEYS:
        parts = _literal(value)
        if key == "data.weights" and isinstance(parts, (int, float)):
            parts = (parts,)
        if not isinstance(parts, (tuple, list)):
            parts = [value] if key == "log.sample_prompts" else [p.strip() for p in value.split(",") if p.strip()]
        if key in ("data.weights", "lora.trained_tokens"):
            parts = [p if isinstance(p, (int, float)) or _literal(p) is None else _literal(p) for p in parts]
        value = repr(tuple(parts))
    return f"--config.{key}={value}"


_TUPLE_KEYS = (
    "data.train", "data.weights", "data.validation", "optimizer.rates", "lora.targets", "lora.trained_tokens",
    "log.sample_prompts",
)  # fmt: skip


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None


def _print_keys(values: dict[str, Any], prefix: str = "") -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            _print_keys(value, f"{prefix}{name}.")
        else:
            print(f"{prefix}{name} = {value!r}")
