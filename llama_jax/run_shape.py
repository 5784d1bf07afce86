"""The section `model` of a run: a shape by name, by its keys, or taken from the model that the run starts from.

Floor 0: this module does not import jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llama_jax import peer_keys
from llama_jax.config import SIZES, ModelConfig, RopeScaling
from llama_jax.errors import ConfigError, brief, nearest

_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))
_SCALING = tuple(field.name for field in dataclasses.fields(RopeScaling))


@dataclasses.dataclass(frozen=True)
class PartialShape:
    """The keys of a model's shape that a run sets by hand. The model of init_from has the others.

    Attributes:
        keys: Values by key; rope_scaling is a dict of its own.
    """

    keys: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict; `parse` reads it back."""
        return dict(self.keys)

    def of(self, config: ModelConfig) -> ModelConfig:
        """The shape `config` with these keys changed; ConfigError for values that are no shape."""
        keys = dict(self.keys)
        if isinstance(keys.get("rope_scaling"), Mapping):
            old = {} if config.rope_scaling is None else dataclasses.asdict(config.rope_scaling)
            keys["rope_scaling"] = old | keys["rope_scaling"]
        return ModelConfig.from_dict(config.to_dict() | keys)


def parse(model: object, *, init_from: str) -> ModelConfig | PartialShape:
    """The shape in a run's config: the name of a size, a dict of keys, or a ModelConfig.

    A dict has `name`, the name of a size, or every key of a shape. With init_from it may have any keys. Keys that are
    None are not set.

    Raises:
        ConfigError: an unknown size or key, a missing key, or a value of another type.
    """
    if isinstance(model, ModelConfig):
        return model
    if isinstance(model, str):
        return _known(model)
    if not isinstance(model, Mapping):
        raise ConfigError(f"model must be the name of a size or its fields, got {brief(model)}: e.g. 'llama3.1-8b'")
    keys = dict(model)
    name = keys.pop("name", None)
    _check_names(keys, _FIELDS, "model")
    is_whole = all(keys.get(key) is not None for key in _FIELDS if key != "rope_scaling") and "rope_scaling" in keys
    if isinstance(keys.get("rope_scaling"), Mapping):
        _check_names(keys["rope_scaling"], _SCALING, "model.rope_scaling")
        keys["rope_scaling"] = {key: value for key, value in keys["rope_scaling"].items() if value is not None} or None
    shape = PartialShape({key: value for key, value in keys.items() if value is not None})
    if name:
        return shape.of(_known(name))
    if init_from and not is_whole:
        return shape
    if not shape.keys:
        raise ConfigError(
            "the model has no shape: set model to the name of a size (--config.model=llama3.2-1b), or init_from to a "
            f"model to start from; the sizes are {', '.join(SIZES)}"
        )
    return ModelConfig.from_dict({"rope_scaling": None, **shape.keys})


def unset(name: str) -> dict[str, Any]:
    """The section `model` of a config file with the name of a size, or "", and no other key set."""
    if name:
        _known(name)
    keys: dict[str, Any] = dict.fromkeys(_FIELDS)
    return {"name": name, **keys, "rope_scaling": dict.fromkeys(_SCALING)}


def _known(name: object) -> ModelConfig:
    if not isinstance(name, str) or name not in SIZES:
        near = nearest(str(name), list(SIZES))
        raise ConfigError(f"model={brief(name)} is no known size{near or '.'} The sizes are {', '.join(SIZES)}")
    return SIZES[name]


def _check_names(keys: Mapping[str, Any], known: tuple[str, ...], section: str) -> None:
    for key in keys:
        if key in peer_keys.NOTES:
            raise ConfigError(f"unknown key {section}.{key}: {peer_keys.NOTES[key]}")
        if key not in known:
            raise ConfigError(
                f"unknown key {section}.{key}{nearest(str(key), known) or '.'} Allowed: {', '.join(known)}"
            )
