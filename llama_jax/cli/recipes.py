"""Recipes by name: `--config quickstart` is configs/quickstart.py, from any folder and without a clone."""

from __future__ import annotations

from pathlib import Path

import llama_jax
from llama_jax.errors import ConfigError, nearest

SUFFIXES = (".py", ".toml", ".json", ".yaml", ".yml")  # of config files


def folder() -> Path:
    """The folder of the recipes: inside an installed package, or next to the package in a clone."""
    package = Path(llama_jax.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """The names of all recipes."""
    return sorted(path.stem for path in folder().glob("*.py"))


def find(config: str) -> Path:
    """The file of a recipe's name, or of a path. `configs/NAME.py` works from any folder too.

    Raises:
        ConfigError: neither a file nor the name of a recipe, or a file of another kind.
    """
    path = Path(config)
    if config and path.is_file():
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"--config: {config!r} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
        return path
    if path.parent in (Path("."), Path("configs")) and path.stem in names() and path.suffix in ("", ".py"):
        return folder() / f"{path.stem}.py"
    near = nearest(path.stem, names(), cutoff=0.6)
    if "debug" in path.stem:
        near = "; --config quickstart --config.model=tiny trains a small model;"
    raise ConfigError(f"--config: {config!r} is neither a file nor a recipe{near or ';'} recipes: {', '.join(names())}")
