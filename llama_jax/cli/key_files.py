"""Config files that are data: keys and values in TOML, JSON or YAML, config.json of a run folder among them.

No code in them runs.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import ConfigError, brief, one_line
from llama_jax.files import parse_json, read_small
from llama_jax.run_config import default_dict, flat, key_of_flag, known_keys, unknown_key

_MOST_BYTES = 1 << 18
_MOST_VALUES = 1 << 17  # a file of so many bytes has no more, unless names of YAML repeat them
_DEEPEST = 20  # levels of sections and lists
_MOST_NAMED = 20  # wrong keys in one error
# A key of TOML that is nested too deeply. tomllib needs memory by the square of the parts of a dotted key.
_DEEP_KEY = re.compile(
    r"""(?<![\w-])(?:(?:[\w-]{1,200}|"(?:[^"\\\n]|\\.){0,200}"|'[^'\n]{0,200}')[ \t]*\.[ \t]*){20}"""
)
_OF_A_RUN = ("tokenizer_fingerprint", "frozen", "files", "sha256")  # what config.json of a run folder has besides keys


def cleared(given: Collection[str], found: Collection[str] = ()) -> dict[str, int]:
    """The key that a run's length clears: train.epochs for train.steps, and train.steps for train.epochs.

    Args:
        given: keys that have a value.
        found: keys that are named, with a value or without, which are not cleared.
    """
    lengths = ("train.steps", "train.epochs")
    return {other: 0 for key, other in (lengths, lengths[::-1]) if key in given and other not in {*given, *found}}


def read(path: Path) -> dict[str, Any]:
    """Every key of a run by its section: the values of the file, and defaults for the others.

    Names of other trainers are taken where their values mean the same, as on the command line.

    Raises:
        ConfigError: the file cannot be read, sets a key under two names, or has keys that no run has, which are named.
    """
    given = _parsed(path)
    _check_bounds(path, given)
    model = given.pop("model", None)
    if path.name == "config.json":
        given = {name: value for name, value in given.items() if name not in _OF_A_RUN}
    found = _by_key(path, given)
    found |= cleared({key for key, value in found.items() if value}, found)
    values = default_dict()
    defaults = flat(values)
    for key, value in found.items():
        *sections, last = key.split(".")
        functools.reduce(dict.__getitem__, sections, values)[last] = _as(value, defaults[key])
    if model is not None:
        model = model if isinstance(model, Mapping) else {"name": model}
        twice = found.keys() & flat(model, "model.").keys()
        if twice:
            raise ConfigError(
                f"{path}: {min(twice)} is set in the section model and outside of it: leave one of them out"
            )
        values["model"] = {**values["model"], **model}
    return values


def _by_key(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file by the keys that their names mean."""
    known = set(known_keys())
    found: dict[str, Any] = {}
    names: dict[str, str] = {}
    wrong: list[str] = []
    for name, value in flat(given).items():
        key = name if name in known else key_of_flag(name.replace("-", "_"))
        if key is None and len(wrong) == _MOST_NAMED:
            wrong.append("and more")
            break
        if key is None:
            wrong.append(str(unknown_key(name)).partition(" Allowed here: ")[0].removesuffix("."))
        elif key in found:
            raise ConfigError(f"{path}: {brief(names[key])} and {brief(name)} are both {key}: leave one of them out")
        else:
            found[key], names[key] = value, name
    if wrong:
        raise ConfigError(f"{path}: {'; '.join(wrong)}")
    return found


def _parsed(path: Path) -> dict[str, Any]:
    """The top-level mapping of a file."""
    try:
        data = read_small(path, max_bytes=_MOST_BYTES)
        if path.suffix == ".json":
            return parse_json(data, str(path))
        text = data.decode()
        if path.suffix == ".toml" and _DEEP_KEY.search(text):
            raise RecursionError
        found = tomllib.loads(text) if path.suffix == ".toml" else _yaml(text)
    except (Exception, RecursionError) as error:  # each parser has errors of its own
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise ConfigError(f"{path} is not {path.suffix[1:].upper()}: {reason}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold keys and values by section, such as [train] and steps = 100 in TOML")
    return found


def _yaml(text: str) -> Any:
    """The value of a YAML file, in which a name may not appear twice in one mapping, as the other formats demand."""
    import yaml

    class Loader(yaml.SafeLoader):
        merged = 0

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for name, _ in node.value:
                if isinstance(name, yaml.ScalarNode) and name.value in seen:
                    raise ValueError(f"the name {brief(name.value)} appears twice")
                seen.add(str(name.value))
            return node

        def flatten_mapping(self, node: Any) -> None:
            """Merges `<<: *name`, which may repeat a mapping without end."""
            super().flatten_mapping(node)
            self.merged += len(node.value)
            if self.merged > _MOST_VALUES:
                raise ValueError(f"its merged mappings have more than {_MOST_VALUES:,} values")

    return yaml.load(text, Loader)


def _check_bounds(path: Path, given: Mapping[Any, Any]) -> None:
    """Raise ConfigError for a name that is no text, and for more values or levels than a run has."""
    left: list[tuple[Any, int]] = [(given, 1)]
    count = 0
    while left:
        value, depth = left.pop()
        inner: Any = ()
        if isinstance(value, Mapping):
            wrong = next((name for name in value if not isinstance(name, str)), None)
            if wrong is not None or None in value:
                raise ConfigError(f"{path}: the name {brief(wrong)} must be a text: put it in quotes, such as 'on'")
            inner = value.values()
        elif isinstance(value, (list, tuple)):
            inner = value
        count += len(inner)
        if depth > _DEEPEST or count > _MOST_VALUES:
            raise ConfigError(
                f"{path} has more than {_DEEPEST} levels of sections or {_MOST_VALUES:,} values: keys have 3 levels"
            )
        left += [(part, depth + 1) for part in inner]


def _as(value: Any, default: Any) -> Any:
    """A value in the form of its key: a list as a tuple, and a number as a float, which YAML reads 1e-4 as a text."""
    if isinstance(default, tuple):
        return tuple(value) if isinstance(value, list) else (value,)
    if isinstance(default, float) and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return value
    return value
