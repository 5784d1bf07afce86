"""The committed plans in docs/plans against the closed memory model, and the cheapest of them against the compiler."""

import importlib.util
import json
import os

import pytest

from helpers.paths import ROOT
from llama_jax.plan import planner
from llama_jax.plan.devices import parse

COMMITTED = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "docs" / "plans").glob("*.json"))}
CHEAP = "160m-v5e-4"


def made(name, monkeypatch, *, compiling):
    """A committed plan, made again."""
    spec = importlib.util.spec_from_file_location("plans", ROOT / "benchmarks" / "plans.py")
    plans = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plans)
    monkeypatch.chdir(ROOT)
    return plans.plan(name, compiling=compiling)


@pytest.mark.parametrize("name", [name for name, plan in COMMITTED.items() if plan["fits"]])
def test_the_closed_model_is_within_a_tenth_of_the_compiler(name, monkeypatch):
    again, compiled = made(name, monkeypatch, compiling=False), COMMITTED[name]
    assert abs(again["peak_bytes"] / compiled["peak_bytes"] - 1) < 0.1
    assert again["fits"] and again["limit_bytes"] == compiled["limit_bytes"]


@pytest.mark.slow
def test_the_cheapest_committed_plan_is_still_what_the_compiler_says(monkeypatch, tmp_path):
    if CHEAP not in COMMITTED:
        pytest.skip(f"docs/plans/{CHEAP}.json is not made yet: python benchmarks/plans.py {CHEAP}")
    if planner.environment_of(parse("v5e:4")) is None:
        pytest.skip("libtpu is not installed: pip install libtpu==0.0.42.1, or set TPU_LIBRARY_PATH to a libtpu.so")
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    again, compiled = made(CHEAP, monkeypatch, compiling=True), COMMITTED[CHEAP]
    exposed = [sum(one["exposed"] for one in plan["collectives"]) for plan in (again, compiled)]
    assert again["peak_bytes"] < 1.02 * compiled["peak_bytes"]
    assert exposed[0] <= 1.01 * exposed[1]
    assert again["kernels"] == compiled["kernels"]
    assert os.listdir(tmp_path / "plans")  # the answer is kept
