"""The build of the CPU kernels, and every way of having none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.native import needs_cpu_kernels
from llama_jax.ops import cpu
from llama_jax.ops.cpu import build

pytestmark = needs_cpu_kernels


@pytest.fixture(scope="module", autouse=True)
def registered():
    cpu.ready()


@pytest.mark.parametrize(("gain", "many"), [(1.4, True), (0.7, False), (None, False)])
def test_many_rows_use_the_kernels_where_they_were_faster_when_they_were_built(tmp_path, monkeypatch, gain, many):
    library = tmp_path / "cpu.so"
    if gain is not None:
        library.with_suffix(".json").write_text(json.dumps({"gain_of_many_rows": gain}))
    monkeypatch.setattr(cpu, "_loaded", lambda: library)
    monkeypatch.setattr(cpu, "_gain_of_many_rows", cpu._gain_of_many_rows.__wrapped__)
    assert cpu.multiplies(16) and cpu.multiplies(17) is many and not cpu.multiplies(0)


def test_a_library_says_how_fast_it_was():
    assert 0.1 < build.gain_of_many_rows(build.library()) < 100


SCRIPT = """
import logging; logging.basicConfig(format="%(message)s")
import jax.numpy as jnp
from llama_jax.ops import cpu, linear
print(linear.linear(jnp.ones((1, 64)), jnp.ones((3, 64))), linear.linear(jnp.ones((2, 64)), jnp.ones((3, 64)))[1])
print(cpu.ready())
"""


def run(**environment):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    inherited = {name: value for name, value in os.environ.items() if name != cpu.ENV}
    environment = {**inherited, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_without_kernels_it_works_and_says_why_once(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    failing = tmp_path / "failing-c++"
    failing.write_text("#!/bin/sh\necho 'kernels.cc:1: error: no such thing' >&2; exit 1\n")
    failing.chmod(0o755)
    interrupted = tmp_path / "interrupted-c++"
    interrupted.write_text("#!/bin/sh\nkill -TERM $PPID; sleep 1\n")
    interrupted.chmod(0o755)
    cases = {
        "off": ({cpu.ENV: "off"}, None),
        "no compiler": ({"CXX": str(tmp_path / "none"), "LLAMA_JAX_CACHE": str(tmp_path / "a")}, "no C++ compiler"),
        "no folder": ({"LLAMA_JAX_CACHE": str(blocked)}, str(blocked)),
        "no cache": ({"LLAMA_JAX_CACHE": "off"}, "LLAMA_JAX_CACHE is off"),
        "broken": ({"CXX": str(failing), "LLAMA_JAX_CACHE": str(tmp_path / "b")}, "no such thing"),
        "a signal": ({"CXX": str(interrupted), "LLAMA_JAX_CACHE": str(tmp_path / "c")}, "build was ended by SIGTERM"),
    }
    started = {name: (run(**environment), said) for name, (environment, said) in cases.items()}
    for name, (process, said) in started.items():
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, (name, error)
        assert out.split() == "[[64. 64. 64.]] [64. 64. 64.] False".split(), name
        lines = [line for line in error.splitlines() if "plain XLA" in line]
        assert len(lines) == (0 if said is None else 1) and (said or "") in error, (name, error)
    (failed,) = (tmp_path / "b" / "native").glob("*.failed")
    assert "no such thing" in failed.read_text()
    assert not any((tmp_path / "c" / "native").glob("*.failed"))  # the next start builds them


@pytest.mark.slow  # two runs of the compiler, 10 seconds each
def test_two_processes_may_build_at_once(tmp_path):
    both = [run(LLAMA_JAX_CACHE=str(tmp_path)) for _ in range(2)]
    for process in both:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0 and out.split()[-1] == "True", error
    (library,) = (tmp_path / "native").glob("*.so")
    assert {path.suffix for path in library.parent.iterdir()} == {".so", ".json"}


@pytest.mark.slow  # two runs of the compiler, 10 seconds each
@pytest.mark.parametrize(
    "flags",
    [
        "-march=x86-64-v3",
        "-march=x86-64",
        "-march=skylake-avx512",
        "-mno-avx512vbmi",
        "-mno-amx-bf16",
        "-DEMULATE_AMX",
    ],
)
def test_other_processors_compute_the_same(tmp_path, monkeypatch, flags):
    monkeypatch.setenv("LLAMA_JAX_CXXFLAGS", flags)
    subprocess.run([sys.executable, "-m", "llama_jax.ops.cpu.build", str(tmp_path / "cpu.so")], check=True, timeout=300)
    assert build._is_ours(tmp_path / "cpu.so")
    # The products of another library, in a process of its own: XLA registers the kernels of one.
    names = "kernels_are_built or products_are or products_of_gradients or softmax or does_not_depend or not_finite"
    names += " or residual or rotated or all_layers or any_number_of_groups or usual or other_memory"
    environment = {**os.environ, cpu.ENV: str(tmp_path / "used")}
    files = [str(Path(__file__).with_name(name)) for name in ("test_cpu.py", "test_cpu_layers.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
