"""Config files that are data: keys and values in TOML, JSON or YAML, config.json of a run folder among them.

No code in them runs.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import ConfigError, one_line
from llama_jax.files import read_small
from llama_jax.run_config import default_dict, flat, key_of_flag, known_keys, unknown_key

_MOST_BYTES = 1 << 20
_OF_A_RUN = ("tokenizer_fingerprint", "frozen", "files", "sha256")  # what config.json of a run folder has besides keys


def read(path: Path) -> dict[str, Any]:
    """Every key of a run by its section: the values of the file, and defaults for the others.

    Names of other trainers are taken where their values mean the same, as on the command line.

    Raises:
        ConfigError: the file cannot be read, or has keys that no run has; all of them are named.
    """
    given = _parsed(path)
    model = given.pop("model", None)
    for name in _OF_A_RUN:
        given.pop(name, None)
    values = default_dict()
    defaults = flat(values)
    wrong = []
    for name, value in flat(given).items():
        key = name if name in known_keys() else key_of_flag(name.replace("-", "_"))
        if key is None:
            wrong.append(str(unknown_key(name)).partition(" Allowed here: ")[0].removesuffix("."))
            continue
        section, _, last = key.rpartition(".")
        (values[section] if section else values)[last] = _as(value, defaults[key])
        if key in ("train.steps", "train.epochs") and value:
            other = "epochs" if last == "steps" else "steps"
            if f"train.{other}" not in flat(given):
                values["train"][other] = type(defaults[f"train.{other}"])()
    if wrong:
        raise ConfigError(f"{path}: {'; '.join(wrong)}")
    if model is not None:
        values["model"] = {**values["model"], **(model if isinstance(model, Mapping) else {"name": model})}
    return values


def _parsed(path: Path) -> dict[str, Any]:
    """The top-level mapping of a file."""
    try:
        text = read_small(path, max_bytes=_MOST_BYTES).decode()
        if path.suffix == ".toml":
            found = tomllib.loads(text)
        elif path.suffix == ".json":
            found = json.loads(text)
        else:
            import yaml

            found = yaml.safe_load(text)
    except (Exception, RecursionError) as error:  # each parser has errors of its own
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise ConfigError(f"{path} is not {path.suffix[1:].upper()}: {reason}") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"{path} must hold keys and values by section, such as [train] and steps = 100 in TOML")
    return found


def _as(value: Any, default: Any) -> Any:
    """A value in the form of its key: a list as a tuple, and a number as a float, which YAML reads 1e-4 as a text."""
    if isinstance(default, tuple):
        return tuple(value) if isinstance(value, list) else (value,)
    if isinstance(default, float) and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return value
    return value
