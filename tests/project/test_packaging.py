"""Packaging by pyproject.toml and setup.py: the files and dependencies that `pip install .` installs."""

import ast
import importlib
import tomllib

from setuptools import find_packages

import llama_jax
from helpers.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(file):
    return [line for line in (ROOT / file).read_text().splitlines() if line and line[0] not in "#-"]


def test_the_extras_are_the_requirement_files():
    extras = PROJECT["project"]["optional-dependencies"]
    assert extras["dev"] == requirements("requirements-dev.txt")
    assert extras["docs"] == requirements("requirements-docs.txt")
    (jax,) = (line for line in requirements("requirements.txt") if line.startswith("jax>"))
    for extra, plugin in (("tpu", "tpu"), ("cuda", "cuda13"), ("cuda12", "cuda12")):
        assert extras[extra] == [jax.replace("jax", f"jax[{plugin}]", 1)]
    assert extras["data"] == [line for line in requirements("requirements-dev.txt") if line.startswith("pyarrow")]


def test_the_console_script_is_the_program():
    module, _, function = PROJECT["project"]["scripts"]["llama-jax"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_version_is_the_package_s():
    assert PROJECT["project"]["version"] == llama_jax.__version__


def test_every_package_and_the_recipes_are_in_the_wheel():
    packages = set(find_packages(str(ROOT), include=["llama_jax*"]))
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "llama_jax").rglob("*.py")}
    assert packages == {".".join(folder.parts) for folder in folders}
    (call,) = (node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Dict))
    assert ast.literal_eval(call) == {"llama_jax.configs": "configs"} and (ROOT / "configs" / "quickstart.py").is_file()
