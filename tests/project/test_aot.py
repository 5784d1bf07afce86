"""Ahead-of-time compilation: every recipe compiles for the TPUs that its docstring names, with the memory it states.

libtpu compiles without a chip: `pip install libtpu==0.0.42.1` anywhere, and name its libtpu.so in TPU_LIBRARY_PATH
(it is not in the requirements, because jax would then look for a TPU at every start).
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import aot_compile
from helpers.paths import ROOT, TESTS

_GIB = 1 << 30
_HBM = {"v5e": 15.75, "v6e": 31.25, "v5p": 95.74}  # GiB a chip that the compiler allows a program
_RECIPES = sorted((ROOT / "configs").glob("llama*.py"))


def _library() -> str | None:
    path = os.environ.get("TPU_LIBRARY_PATH", "")
    if Path(path).is_file():
        return path
    spec = importlib.util.find_spec("libtpu")
    return None if spec is None else str(Path(spec.origin).parent / "libtpu.so")


def _compiled(*what: str | Path) -> dict:
    library = _library()
    if library is None:
        pytest.skip("libtpu is not installed: pip install libtpu==0.0.42.1, or set TPU_LIBRARY_PATH to a libtpu.so")
    environment = os.environ | {
        "XLA_FLAGS": "",
        "PYTHONPATH": f"{ROOT}:{TESTS}",
        "TPU_LIBRARY_PATH": library,
        "TPU_SKIP_MDS_QUERY": "1",
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    command = [sys.executable, "-m", "helpers.aot_compile", *what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("path", _RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_its_chips_in_the_memory_that_it_states(path):
    topology, gib = aot_compile.stated(path)
    found = _compiled(path)
    chip, shape = topology.split(":")
    assert found["devices"] == math.prod(int(n) for n in shape.split("x"))
    assert found["peak_bytes"] < _HBM[chip] * _GIB, found
    assert found["peak_bytes"] / _GIB < 1.03 * gib, found
    assert found["kernels"] >= 3  # the forward pass, the recomputation of a layer, and the backward pass


@pytest.mark.slow
def test_the_8b_decode_step_compiles_for_eight_v5e_chips_and_fits():
    found = _compiled("decode")
    assert found["devices"] == 8
    # At least the bfloat16 weights of an eighth of the model and its cache, and within 15.75 GiB of HBM.
    assert 8_030_261_248 * 2 / 8 + found["cache_bytes"] / 8 < found["peak_bytes"] < 15.75 * _GIB, found
    assert found["aliased_bytes"] >= found["cache_bytes"] / 8, "the donated cache is not updated in place"
