"""The section `model` of a run: a shape by name, by its keys, or taken from the model that the run starts from.

Floor 0: no jax here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llama_jax.config import SIZES, ModelConfig, RopeScaling
from llama_jax.errors import ConfigError, brief, nearest

_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))
_SCALING = tuple(field.name for field in dataclasses.fields(RopeScaling))


@dataclasses.dataclass(frozen=True)
class PartialShape:
    """The shape of a model as far as a run sets it. The model of init_from has the rest.

    Attributes:
        name: One of `config.SIZES`, or "".
        keys: Values by key for the keys that are set by hand; rope_scaling is a dict of its own.
    """

    name: str
    keys: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict; `parse` reads it back."""
        return {"name": self.name, **self.keys}

    def whole(self) -> ModelConfig:
        """The shape of a run without init_from; ConfigError if keys are missing."""
        if self.name:
            return _replaced(SIZES[self.name], self.keys)
        if not self.keys:
            raise ConfigError(
                "the model has no shape: set model to the name of a size (--config.model=llama3.2-1b), or init_from to "
                f"a model to start from; the sizes are {', '.join(SIZES)}"
            )
        return ModelConfig.from_dict({"rope_scaling": None, **self.keys})

    def of(self, config: ModelConfig) -> ModelConfig:
        """The shape that this gives to a model of `config`; it is `config` where this does not contradict it."""
        return _replaced(SIZES[self.name] if self.name else config, self.keys)


def parse(model: object) -> ModelConfig | PartialShape:
    """The shape in a run's config: the name of a size, a dict of keys, or a ModelConfig.

    A dict with every key and no name is a ModelConfig. Keys that are None are not set.

    Raises:
        ConfigError: an unknown size or key, or another type.
    """
    if isinstance(model, ModelConfig):
        return model
    if isinstance(model, str):
        return PartialShape(_known(model), {})
    if not isinstance(model, Mapping):
        raise ConfigError(f"model must be the name of a size or its fields, got {brief(model)}: e.g. 'llama3.1-8b'")
    keys = dict(model)
    name = keys.pop("name", "") or ""
    if not name and set(keys) == set(_FIELDS) and all(keys[key] is not None for key in keys if key != "rope_scaling"):
        scaling = keys["rope_scaling"]
        if not isinstance(scaling, Mapping) or None not in scaling.values():
            return ModelConfig.from_dict(keys)
    _check_names(keys, _FIELDS, "model")
    if isinstance(keys.get("rope_scaling"), Mapping):
        _check_names(keys["rope_scaling"], _SCALING, "model.rope_scaling")
        keys["rope_scaling"] = {key: value for key, value in keys["rope_scaling"].items() if value is not None} or None
    return PartialShape(_known(name) if name else "", {key: value for key, value in keys.items() if value is not None})


def unset(name: str) -> dict[str, Any]:
    """The section `model` of a config file with the name of a size, or "", and no other key set."""
    keys: dict[str, Any] = dict.fromkeys(_FIELDS)
    return {"name": name and _known(name), **keys, "rope_scaling": dict.fromkeys(_SCALING)}


def _known(name: object) -> str:
    if name not in SIZES:
        raise ConfigError(
            f"model={brief(name)} is no known size{nearest(str(name), list(SIZES))} Known: {', '.join(SIZES)}"
        )
    return str(name)


def _check_names(keys: Mapping[str, Any], known: tuple[str, ...], section: str) -> None:
    for key in keys:
        if key not in known:
            raise ConfigError(f"unknown key {section}.{key}{nearest(str(key), known)} Allowed: {', '.join(known)}")


def _replaced(config: ModelConfig, keys: Mapping[str, Any]) -> ModelConfig:
    """`config` with some keys changed; ConfigError for values that are no shape."""
    keys = dict(keys)
    if isinstance(keys.get("rope_scaling"), Mapping):
        old = {} if config.rope_scaling is None else dataclasses.asdict(config.rope_scaling)
        keys["rope_scaling"] = old | keys["rope_scaling"]
    return ModelConfig.from_dict(config.to_dict() | keys)
