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
from helpers import attention_compile as aot_attention
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


def _tpu_environment() -> dict[str, str]:
    """The environment of a process that compiles for TPUs; the test is skipped where libtpu is not installed."""
    library = _library()
    if library is None:
        pytest.skip("libtpu is not installed: pip install libtpu==0.0.42.1, or set TPU_LIBRARY_PATH to a libtpu.so")
    return os.environ | {
        "XLA_FLAGS": "",
        "PYTHONPATH": f"{ROOT}:{TESTS}",
        "TPU_LIBRARY_PATH": library,
        "TPU_SKIP_MDS_QUERY": "1",
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def _compiled(*what: str | Path) -> dict:
    environment = _tpu_environment()
    command = [sys.executable, "-m", "helpers.aot_compile", *what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _attention(chip: str, environment: dict[str, str], *cases: str) -> dict:
    """The facts of helpers/attention_compile.py for a chip."""
    command = [sys.executable, "-m", "helpers.attention_compile", chip, *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _cuda_environment() -> dict[str, str]:
    """The environment of a process that compiles for GPUs; the test is skipped where the plugin is not installed."""
    folder = os.environ.get("CUDA_PLUGIN_PATH", "")
    installed = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
    if not installed and not (Path(folder) / "jax_plugins").is_dir():
        pytest.skip(
            'the CUDA plugin is not installed: pip install --target DIR "jax-cuda13-plugin[with-cuda]==0.10.2", '
            "and set CUDA_PLUGIN_PATH=DIR"
        )
    paths = ":".join([str(ROOT), str(TESTS), *filter(None, [folder])])
    return os.environ | {"XLA_FLAGS": "", "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_quantized_products_on_an_h100_write_no_dequantized_weight():
    found = _attention("h100", _cuda_environment(), *aot_attention.QUANTIZED)
    for name, one in found.items():
        expected = {
            "engine": ["quantized_product", "split_decode", "split_decode_join"],
            "engine, CUDA kernels": ["products", "split_decode", "split_decode_join"],
            "engine, one row": ["few_rows", "layers"],  # few_rows multiplies by the unembedding
        }
        assert one["kernels"] == expected.get(name, ["few_rows"]), (name, one)
        assert one["temporary_bytes"] < 32 << 20, (name, one)  # the smallest dequantized weight would be 117 MB
    assert [found[f"engine, {rows}"]["launches"] for rows in ("CUDA kernels", "one row")] == [6, 2]


@pytest.mark.slow
def test_attention_on_an_h100_runs_its_kernels_without_scores_in_memory():
    found = _attention("h100", _cuda_environment())
    expected = {
        "documents": ["flash_backward_keys", "flash_backward_queries", "flash_forward"],
        "one document": ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"],
        "decode": ["split_decode", "split_decode_join"],
        "decode int8": ["split_decode", "split_decode_join"],
        "prefill": ["flash_forward"],
        "prefill int8": ["flash_forward"],
        "kept, documents": ["flash_backward_queries", "flash_forward"],  # the gradient of the queries alone
        "kept, one document": ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"],
        "offloaded, documents": ["flash_backward_queries", "flash_forward"],
    }
    assert {name: one["kernels"] for name, one in found.items()} == expected
    _check_rematerialization(found)
    # The scores of one head of a row of 8,192 are 256 MiB. A prefill reads its half of the cache as a copy.
    window = found["prefill"]["argument_bytes"] // 2
    for name, one in found.items():
        assert one["temporary_bytes"] < (window if "prefill" in name else 64 << 20), (name, one)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "gpus", "gib"), sorted(aot_attention.RECIPES))
def test_a_recipe_fits_h100s_in_the_memory_that_the_measurement_states(recipe, gpus, gib):
    environment = _cuda_environment()
    command = [
        sys.executable,
        "-m",
        "llama_jax",
        "plan",
        "--config",
        f"configs/{recipe}.py",
        "--device",
        f"h100:{gpus}",
    ]
    done = subprocess.run([*command, "--json"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads(done.stdout)
    assert plan["by"] == "compiler" and plan["attention"]["kernel"] == "flash"
    # The forward pass, its recomputation, and two backward kernels; several layers where XLA unrolls the scan.
    assert plan["kernels"]["flash attention"] % 4 == 0
    assert plan["peak_bytes"] / _GIB < 1.03 * gib, plan["peak_bytes"]


def _check_rematerialization(found: dict) -> None:
    """The backward pass runs no forward kernel again, and offloaded residuals are in the host's memory."""
    for name in ("kept, documents", "kept, one document", "offloaded, documents"):
        assert found[name]["forward_calls"] == 1, name
    residuals = 1024 * aot_attention.N * (aot_attention.H * 2 + 4)  # the result, and a float32 for each query and head
    assert found["offloaded, documents"]["host_bytes"] == residuals


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e:1x1", "v6e:1x1", "v5p:1x1x1"])
def test_attention_on_a_tpu_reads_the_live_slots_only(chip):
    found = _attention(chip, _tpu_environment())
    for name, one in found.items():
        kernel = "splash" if "document" in name else "ragged_attention"
        assert any(found.startswith(kernel) for found in one["kernels"]), (name, one)
    _check_rematerialization(found)
    for name, width in (("decode", 2 * 128), ("decode int8", 128 + 2)):
        live = 2 * aot_attention.ROWS * aot_attention.BOUND * aot_attention.K * width
        assert live <= found[name]["bytes_accessed"] < 1.1 * live, (name, found[name])


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
