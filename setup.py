"""The packages of the wheel, for `pip install .`. Everything else is in pyproject.toml.

The recipes of configs/ become llama_jax/configs, so that `llama-jax train --config quickstart` works without a clone.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["llama_jax*"]), "llama_jax.configs"],
    package_dir={"llama_jax.configs": "configs"},
)
