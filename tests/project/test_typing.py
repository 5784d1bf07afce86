"""The public types of the package, as an editor completes them and a type checker checks them."""

import subprocess
import sys

import pytest

import llama_jax
from helpers.paths import ROOT

USE = """
from typing import assert_type
import llama_jax
from llama_jax import Llama, Result, SamplingParams

llama = llama_jax.load("runs/x", dtype="float32", mesh={"tensor": 2}, adapters={"a": "runs/x/adapter"})
assert_type(llama, Llama)
assert_type(llama.generate("x", max_new_tokens=3), Result)
assert_type(llama.generate([1, 2]), Result)
assert_type(llama.generate(["x", "y"], temperature=0.0), list[Result])
assert_type(llama.generate([[1], [2]]), list[Result])
assert_type(llama.chat([{"role": "user", "content": "x"}]).text, str)
assert_type(SamplingParams(temperature=0.5).top_k, int)
"""
WRONG = """
llama.generate("x", temprature=1)
llama_jax.load("x", quantise="int8")
llama.generate("x").txt
"""


def test_the_public_names_are_listed_and_exist():
    assert set(llama_jax.__all__) <= set(dir(llama_jax))
    for name in llama_jax.__all__:
        assert getattr(llama_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'lode'; it has load, Llama"):
        _ = llama_jax.lode
    assert (ROOT / "llama_jax" / "py.typed").is_file()


def test_a_type_checker_knows_the_public_surface(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed (requirements-dev.txt)")
    path = tmp_path / "use.py"
    path.write_text(USE + WRONG)
    first = USE.count("\n") + 2
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run([*command, str(path)], cwd=ROOT, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    lines = {int(line.split(":")[1]) for line in errors}
    assert lines == {first, first + 1, first + 2}, done.stdout + done.stderr
