"""benchmarks/accelerator.py runs in small on any machine, and writes what it measured."""

import json
import subprocess
import sys

import pytest

from helpers.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "accelerator.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=900)


@pytest.mark.slow  # a minute: it compiles every kernel, training and decoding
def test_all_of_it_runs_in_small(tmp_path):
    out = tmp_path / "out.json"
    done = run("--small", "--seconds", "800", "--out", out)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert list(found) == [
        "peaks",
        "attention",
        "decoding",
        "all weights",
        "LoRA",
        "all weights in fp8",
        "prefill",
        "peers",
        "products",
    ]
    assert all(items for items in found.values())
    assert {"xla", "splash", "flash", "split", "ragged"} <= {item["backend"] for item in found["attention"]}
    for item in found["attention"]:
        assert max(item["errors"]) < 2e-2, item  # bfloat16 has 8 bits: 4e-3 a rounding
    for item in found["products"]:
        assert item["error"] < 4e-3, item
    for item in found["decoding"]:
        assert item["of_bandwidth"] == pytest.approx(item["bytes"] / item["seconds"] / rate(found), rel=1e-6)
    for item in (*found["all weights"], *found["LoRA"], *found["prefill"]):
        assert item["of_peak"] > 0


def rate(found):
    return max(item["bytes"] / item["seconds"] for item in found["peaks"] if "bytes" in item)


def test_a_section_that_runs_out_of_time_is_in_the_file_and_in_the_status(tmp_path):
    out = tmp_path / "out.json"
    done = run("--small", "--only", "prefill", "--seconds", "0.1", "--out", out)
    assert done.returncode == 1 and "prefill failed: out of time" in done.stderr
    assert json.loads(out.read_text())["prefill"] == [{"name": "prefill", "failed": "out of time"}]
