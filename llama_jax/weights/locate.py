"""The first step of opening a model: from its name to the path of its files."""

from __future__ import annotations

import os
from pathlib import Path

from llama_jax.errors import ConfigError, brief
from llama_jax.files import expanded
from llama_jax.storage import is_url, local_path
from llama_jax.weights import hub_models, packaged_models, stored_models

_HUB = "hf://"


def locate(name: str | os.PathLike[str]) -> Path:
    """The path of a model's files on this machine; it may not exist if `name` is a path.

    Args:
        name: a path, the short name of a model in a Python package (packaged_models.PACKAGES), a hub id
            (hub_models.FORMS, also as hf://ID), or an address such as gs://BUCKET/FOLDER. Hub ids and addresses are
            downloaded unless the cache has them. An existing path has precedence.

    Raises:
        ConfigError: the name is empty, a package is not installed, or the download failed.
    """
    if not isinstance(name, (str, os.PathLike)) or not str(name).strip():
        raise ConfigError(f"a model's name must be a path, a hub id or the name of a packaged model, got {brief(name)}")
    path = expanded(local_path(str(name)) or name)
    if packaged_models.is_packaged(str(name)):
        return packaged_models.locate(str(name))
    if str(name).startswith(_HUB):
        return hub_models.download(str(name).removeprefix(_HUB))
    if is_url(str(name)):
        return stored_models.download(str(name))
    if hub_models.is_hub_id(str(name)):
        return hub_models.download(str(name))
    return path


def is_path(name: str | os.PathLike[str]) -> bool:
    """True if the name is a path, and neither a model in a package nor one on the hub or in a store."""
    return not is_url(str(name)) and not packaged_models.is_packaged(str(name)) and not hub_models.is_hub_id(str(name))


def absolute(name: str) -> str:
    """The name in a form that means the same model in every working folder: an existing path becomes absolute."""
    if is_url(name):
        return name
    path = expanded(local_path(name) or name)
    return str(path.resolve()) if name and path.exists() else name
