"""Mutated checkpoints of three formats: none runs, hangs, crashes, or takes memory beyond its bound."""

import json
import subprocess
import sys

import pytest

from helpers.paths import ROOT, TESTS


def fuzzed(format: str, count: int) -> dict:
    """The outcomes of helpers/fuzz.py, run in a separate process. It fails at the first file that misbehaves."""
    command = [sys.executable, "-m", "helpers.fuzz", format, "--count", str(count)]
    environment = {"PYTHONPATH": f"{ROOT}:{TESTS}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout)["outcomes"])


@pytest.mark.parametrize("format", ["hf", "meta", "gguf"])
def test_mutated_models_open_or_are_refused_in_one_line(format):
    outcomes = fuzzed(format, 400)
    assert sum(outcomes.values()) == 400
    assert 0 < outcomes["opened"] < 300  # a change within the numbers is not noticed; one in a header is


@pytest.mark.slow
@pytest.mark.parametrize("format", ["hf", "meta", "gguf"])
def test_very_many_mutated_models_open_or_are_refused_in_one_line(format):
    assert sum(fuzzed(format, 33_334).values()) == 33_334
