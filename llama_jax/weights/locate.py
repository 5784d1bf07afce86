"""The first step of opening a model: from its name to the path of its files."""

from __future__ import annotations

import os
from pathlib import Path

from llama_jax.errors import ConfigError, brief
from llama_jax.files import expanded
from llama_jax.weights import hub_models, packaged_models


def locate(name: str | os.PathLike[str]) -> Path:
    """The path of a model's files on this machine; it may not exist if `name` is a path.

    Args:
        name: a path, the short name of a model in a Python package (packaged_models.PACKAGES), or a hub id
            (hub_models.FORMS), which is downloaded unless the cache has it. A path that exists goes first.

    Raises:
        ConfigError: an empty name, a package that is not installed, or a download that failed.
    """
    if not isinstance(name, (str, os.PathLike)) or not str(name).strip():
        raise ConfigError(f"a model's name must be a path, a hub id or the name of a packaged model, got {brief(name)}")
    path = expanded(name)
    if packaged_models.is_packaged(str(name)):
        return packaged_models.locate(str(name))
    if hub_models.is_hub_id(str(name)):
        return hub_models.download(str(name))
    return path


def is_path(name: str | os.PathLike[str]) -> bool:
    """Returns whether this names a path, and neither a model in a package nor one on the hub."""
    return not packaged_models.is_packaged(str(name)) and not hub_models.is_hub_id(str(name))


def absolute(name: str) -> str:
    """The name in a form that means the same model from every working folder. Only paths that exist change."""
    path = expanded(name)
    return str(path.resolve()) if name and path.exists() else name
