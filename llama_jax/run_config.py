"""A training run as a frozen record: the keys of `run_keys`, checked by themselves and together before any work.

`RunConfig.from_dict` takes the nested dict of a config file and refuses what cannot work, naming the key, what it got,
what is allowed and the nearest right key.

Floor 0: this module does not import jax.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax import peer_keys, run_checks, run_shape
from llama_jax.config import SIZES, ModelConfig
from llama_jax.errors import ConfigError, brief, checked_fields, nearest
from llama_jax.run_keys import (
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    DpoConfig,
    LogConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    bounded,
)
from llama_jax.run_shape import PartialShape


@checked_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole training run.

    Attributes:
        output: The run folder, which holds the config, the tokenizer, checkpoints, metrics and the picture of the loss.
            An address such as gs://BUCKET/RUN keeps it in a store, through a folder of the cache.
        seed: Seed of the first weights, of dropout and of sampling.
        init_from: The model to start from: a folder, a file or a hub id, as `llama_jax.load` takes it. Empty starts
            from random weights.
        model: The shape of the model: a ModelConfig, or a PartialShape until the model of init_from has been opened
            (`with_shape`). In a config file it is the name of a size or a section of keys.
    """

    output: str = bounded("")
    seed: int = bounded(0, low=0, high=2**31 - 1)
    init_from: str = bounded("")
    model: ModelConfig | PartialShape
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    dpo: DpoConfig = DpoConfig()
    mesh: MeshConfig = MeshConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    distributed: DistributedConfig = DistributedConfig()

    def __post_init__(self) -> None:
        """The checks that need more than one section; those of the mesh need the devices (`check_mesh`)."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind: Any = (ModelConfig, PartialShape) if field.name == "model" else type(field.default)
            if not isinstance(value, kind):
                names = "a ModelConfig" if field.name == "model" else kind.__name__
                raise ConfigError(
                    f"{field.name} must be {names}, got {brief(value)}: RunConfig.from_dict takes plain values"
                )
        if not self.output:
            raise ConfigError("output is empty: name the run folder, e.g. output='runs/my_run'")
        if not self.data.train:
            raise ConfigError("data.train is empty: name text files, folders or patterns, or 'stdlib:train'")
        if isinstance(self.model, ModelConfig):
            run_checks.check_length(self.data, self.model)
            run_checks.check_trained_tokens(self.lora, self.model)
        run_checks.check_batch(self.data, self.train)
        run_checks.check_lora(self.lora, self.optimizer, self.init_from)
        run_checks.check_offloaded_base(self.lora, self.train, self.log)
        run_checks.check_objective(self.train, self.dpo, self.init_from)
        if self.train.steps:
            run_checks.check_warmup(self.optimizer, self.train, self.train.steps)
        run_checks.check_patience(self.train, self.log, self.data)
        run_checks.check_best(self.checkpoint, self.log, self.data)

    @property
    def shape(self) -> ModelConfig:
        """The shape of the model; ConfigError while the model of init_from has not been opened (`with_shape`)."""
        if isinstance(self.model, PartialShape):
            raise ConfigError(f"the shape of the model is not known until init_from={self.init_from!r} is opened")
        return self.model

    def check_mesh(self, sizes: Mapping[str, int]) -> None:
        """Check that this model and batch can be split over a mesh, whose sizes are resolved (no -1).

        Raises:
            ConfigError: the mesh does not fit. The message names the axis and its allowed values.
        """
        run_checks.check_mesh(sizes, self.shape, self.data, self.train)
        run_checks.check_offload(sizes, self.optimizer, self.lora)

    def steps_for(self, rows: int, *, step: int = 0, position: int = 0) -> int:
        """The optimizer steps of this run on so many training rows; ConfigError if its warmup is longer.

        A resumed run is at `step`, and its steps so far took `position` rows.
        """
        steps = self.train.steps_for(rows, self.data.batch_size, step=step, position=position)
        run_checks.check_warmup(self.optimizer, self.train, steps)
        return steps

    def with_shape(self, config: ModelConfig) -> RunConfig:
        """The run with the shape of the model of init_from. model.max_seq_len may differ from that of the model.

        Raises:
            ConfigError: keys of the section model that are set by hand contradict the model.
        """
        model = self.model if isinstance(self.model, ModelConfig) else self.model.of(config)
        changed = differences(dataclasses.replace(config, max_seq_len=model.max_seq_len).to_dict(), model.to_dict())
        if changed:
            lines = "; ".join(f"model.{key}={old!r} there, {new!r} here" for key, (old, new) in changed.items())
            raise ConfigError(
                f"init_from={self.init_from!r} is another model: {lines}. Leave the keys of the section model out: its "
                "shape is taken from it"
            )
        return dataclasses.replace(self, model=model)

    def to_dict(self) -> dict[str, Any]:
        """A nested JSON-able dict; `from_dict` reads it back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {key: _as_dict(value) for key, value in values.items()}
        return {**plain, "model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The run of a nested dict. Keys that are absent have their defaults; `model` may be the name of a size.

        train.epochs without train.steps takes the place of the default of train.steps.

        Raises:
            ConfigError: unknown keys, wrong types, NaN, values out of bounds, and combinations that cannot work.
        """
        if not hasattr(values, "keys"):
            raise ConfigError(f"a run must be a dict of its keys, got {brief(values)}: e.g. {{'output': 'runs/mine'}}")
        values = dict(_plain(values))
        _check_known(cls, values)
        init_from = values.get("init_from") or ""
        model = run_shape.parse(values.pop("model", {} if init_from else None), init_from=init_from)
        train = values.get("train")
        if isinstance(train, Mapping) and train.get("epochs") and "steps" not in train:
            values["train"] = {**train, "steps": 0}
        log = values.get("log")
        if isinstance(log, Mapping) and isinstance(log.get("tensorboard"), bool):  # a key of earlier versions
            log = {"to": ("tensorboard",) if log["tensorboard"] else (), **log}
            log = {key: value for key, value in log.items() if key != "tensorboard"}
        if isinstance(log, Mapping) and "to" in log:
            names = _names(log["to"])
            values["log"] = {**log, "to": () if names in (("none",), ("None",)) else names}
        lora = values.get("lora")
        if isinstance(lora, Mapping) and "targets" in lora:
            values["lora"] = {**lora, "targets": _names(lora["targets"])}
        return _build(cls, values, "", model=model)


def _names(value: Any) -> Any:
    """The names of a list one by one: a text may hold several, separated by commas."""
    parts = value if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(part, str) for part in parts):
        return value
    return tuple(name.strip() for part in parts for name in part.split(","))


def _check_known(cls: type, values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that does not exist, before anything else is said about the run."""
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if name not in hints:
            raise unknown_key(str(name))
        if isinstance(value, Mapping) and name not in ("model", "log"):
            for inner in value:
                if inner not in typing.get_type_hints(hints[name]):
                    raise unknown_key(f"{name}.{inner}")


def _as_dict(value: Any) -> Any:
    """A section as a dict; any other value as it is."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def default_dict(size: str = "") -> dict[str, Any]:
    """Every key of a run with its default, for a config file to change.

    Args:
        size: One of `config.SIZES`. Empty leaves the shape to the model of init_from. Keys of `model` that are None
            are those of the size or of that model.
    """
    sections = {f.name: f.default for f in dataclasses.fields(RunConfig) if f.name != "model"}
    plain = {key: _as_dict(value) for key, value in sections.items()}
    return {**plain, "model": run_shape.unset(size)}


@dataclasses.dataclass(frozen=True)
class Key:
    """The description of one key of a run.

    Attributes:
        name: Dotted name, e.g. `optimizer.learning_rate`.
        type: Type in words, e.g. "a whole number".
        default: Default value, or None if it depends on the size of the model.
        allowed: Bounds or choices in words; "" where the type allows every value.
        meaning: Meaning and unit, from the Attributes of the key's section.
    """

    name: str
    type: str
    default: Any
    allowed: str
    meaning: str


_MODEL_NAME = Key(
    name="model.name",
    type="a string",
    default="",
    allowed=f"one of {', '.join(map(repr, SIZES))}",
    meaning="Size of the model by name; --config.model=NAME is short for it. Empty takes the shape of the model in "
    "init_from. The other keys of this section change a key of that size; with init_from they are checked against its "
    "model, except model.max_seq_len, which may differ.",
)


def describe() -> list[Key]:
    """Every key of a run in the order of `known_keys`, for --keys and the reference page."""
    keys = [*_described(RunConfig, ""), _MODEL_NAME]
    order = {name: place for place, name in enumerate(known_keys())}
    return sorted(keys, key=lambda key: order[key.name])


def _described(section: type, prefix: str) -> list[Key]:
    """The keys of one section and of the sections in it."""
    hints, meanings = typing.get_type_hints(section), _attributes(section)
    keys: list[Key] = []
    for field in dataclasses.fields(section):
        hint, name = hints[field.name], prefix + field.name
        kinds: tuple[Any, ...] = (hint, *typing.get_args(hint))
        inner: Any = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if inner is not None:
            keys += _described(inner, f"{name}.")
            continue
        default = None if field.default is dataclasses.MISSING else field.default
        allowed = _allowed(field.metadata) if field.metadata else ""
        if allowed and isinstance(hint, types.GenericAlias):
            allowed = f"each item {allowed}"
        keys.append(Key(name, _word(hint), default, allowed, meanings[field.name]))
    return keys


def _attributes(section: type) -> dict[str, str]:
    """The Attributes of a class's docstring: the meaning of each field, as a sentence on one line."""
    _, _, text = inspect.cleandoc(section.__doc__ or "").partition("Attributes:\n")
    items = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", text, re.MULTILINE)
    lines = {name: " ".join(meaning.split()).removesuffix(".") for name, meaning in items}
    return {name: f"{line[0].upper()}{line[1:]}." for name, line in lines.items()}


def _allowed(bounds: Mapping[str, Any]) -> str:
    """The bounds of a field in words."""
    low, high, choices = bounds["low"], bounds["high"], bounds["choices"]
    if choices:
        return f"one of {', '.join(map(repr, choices))}"
    if low is not None and high is not None:
        return f"from {low} to {high}"
    return f"at least {low}" if low is not None else f"at most {high}" if high is not None else ""


def known_keys() -> list[str]:
    """The dotted name of every key, such as `optimizer.learning_rate`."""
    return list(flat(default_dict()))


def kind_of(key: str) -> str:
    """The type of a key in words: "a whole number"."""
    return next(described.type for described in describe() if described.name == key)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested dict by their dotted keys."""
    keys: dict[str, Any] = {}
    for name, value in values.items():
        keys |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return keys


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two nested dicts, with both values."""
    a, b = flat(old), flat(new)
    plain = lambda v: list(v) if isinstance(v, tuple) else v  # noqa: E731  (JSON has no tuples)
    keys = sorted(a.keys() | b.keys())
    return {k: (a.get(k), b.get(k)) for k in keys if plain(a.get(k)) != plain(b.get(k))}


def key_of_flag(name: str) -> str | None:
    """The key that a flag sets, by its own name, by its last part alone, or by its name in another trainer.

    The last part, such as `learning_rate`, must be that of one key only. None if there is no such key.
    """
    known = known_keys()
    if name in known:
        return name
    section, _, last = name.rpartition(".")
    meant = peer_keys.SAME.get(name, peer_keys.SAME.get(last))
    if name in peer_keys.SAME or (section and meant is not None and meant.rpartition(".")[0] == section):
        return meant
    if section and last not in peer_keys.TORCHTITAN.get(section, "").split():
        return None
    ends = [key for key in known if key.rpartition(".")[2] == last]
    return ends[0] if len(ends) == 1 else meant


def unknown_key(name: str) -> ConfigError:
    """The error for a dotted key that does not exist, with the nearest that does."""
    known = known_keys()
    section = name.rpartition(".")[0]
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    sections = sorted({k.split(".")[0] for k in known})
    if name in sections:
        return ConfigError(f"{name} is a section: set one of {', '.join(k for k in known if k.startswith(name + '.'))}")
    plain = name.replace("-", "_")
    note = peer_keys.NOTES.get(plain, peer_keys.NOTES.get(plain.rpartition(".")[2]))
    near = _near_key(name, known, siblings, [] if section else sections)
    if note is not None:
        return ConfigError(f"unknown key {brief(name)}: {note}")
    suggestion = f"did you mean {near!r}?" if near else "no known name is near."
    allowed = siblings if section and siblings else sections
    return ConfigError(f"unknown key {brief(name)}: {suggestion} Allowed here: {', '.join(allowed)}")


def _near_key(name: str, known: Sequence[str], siblings: Sequence[str], sections: Sequence[str]) -> str | None:
    """The key that has this name in another trainer, or else the nearest key, or None if none is near.

    The right name in another section is the nearest; then come those of its own section, and then those of any.
    """
    *others, last = name.replace("-", "_").split(".")
    by_alias = peer_keys.SAME | peer_keys.SIMILAR
    for part in (last, *others):
        if part in by_alias and part not in sections:
            return by_alias[part]
    by_last = {k.rpartition(".")[2]: k for k in (*known, *sections, *siblings)}
    own = {k.rpartition(".")[2]: k for k in siblings}
    for candidates, cutoff in ((by_last, 1.0), (own, 0.6), (by_last, 0.65)):
        if near := difflib.get_close_matches(last, list(candidates), n=1, cutoff=cutoff):
            return candidates[near[0]]
    return None


def _plain(value: Any) -> Any:
    """Mappings (ml_collections' among them) as plain dicts."""
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _build(cls: type, values: Mapping[str, Any], prefix: str, **given: Any) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if name not in fields:
            raise unknown_key(prefix + str(name))
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}{name} is a section, and cannot be set to {brief(value)}")
            given[name] = _build(hints[name], value, f"{prefix}{name}.")
        else:
            given[name] = _check(prefix + name, value, hints[name], fields[name].metadata)
    return cls(**given)


def _check(name: str, value: Any, kind: Any, bounds: Mapping[str, Any]) -> Any:
    """`value` as the type that the key has, within its bounds."""
    wrong = ConfigError(f"{name} must be {_word(kind)}, got {brief(value)}")
    if isinstance(kind, types.GenericAlias):  # tuple[str, ...] or tuple[float, ...]
        item = typing.get_args(kind)[0]
        value = value if isinstance(value, (tuple, list)) else (value,)
        if item is str and not all(isinstance(v, (str, os.PathLike)) and v for v in value):
            raise wrong
        return tuple(_check(name, v, item, bounds) for v in value)
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise wrong
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value}")
    if bounds["choices"] and value not in bounds["choices"]:
        raise ConfigError(
            f"{name} must be {_allowed(bounds)}, got {brief(value)}"
            + nearest(str(value), [str(c) for c in bounds["choices"]])
        )
    low, high = bounds["low"], bounds["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        raise ConfigError(f"{name} must be {_allowed(bounds)}, got {brief(value)}")
    return value


def _word(kind: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}
    if kind in words:
        return words[kind]
    if kind == tuple[int, ...]:
        return "a tuple of whole numbers"
    return "a tuple of numbers" if kind == tuple[float, ...] else "a tuple of non-empty strings"
