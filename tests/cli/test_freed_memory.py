"""The memory that glibc keeps for the next step of a training run on a CPU."""

import platform
import subprocess
import sys

import pytest

from helpers.paths import ROOT
from llama_jax.cli import freed_memory

MEASURE = """
import ctypes
import resource
import numpy as np
from llama_jax.cli import freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 23)  # 64 MB, which are freed again
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, which take fewer faults
freed_memory.one_arena()
freed_memory.keep()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such settings")
@pytest.mark.parametrize(("platforms", "kept"), [("cpu", True), ("cpu,tpu", False)])
def test_freed_memory_is_used_again_without_the_kernel_if_there_are_only_cpus(platforms, kept):
    environment = {"JAX_PLATFORMS": platforms, "PYTHONPATH": str(ROOT), "NUMPY_MADVISE_HUGEPAGE": "0"}
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 1000) == kept


AT_START = """
import os, sys
from llama_jax.cli import freed_memory

print(os.getpid(), flush=True)
freed_memory.at_start()
print(sys.argv[1:], os.environ.get("GLIBC_TUNABLES"))
"""


@pytest.mark.skipif(
    not freed_memory._on_request() or platform.libc_ver()[0] != "glibc",
    reason="the kernel has no huge pages on request",
)
@pytest.mark.parametrize(
    ("environment", "starts", "tunables"),
    [
        ({"JAX_PLATFORMS": "cpu"}, 2, "glibc.malloc.hugetlb=1"),
        ({"JAX_PLATFORMS": "cpu,tpu"}, 1, None),
        ({"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.perturb=0"}, 1, "glibc.malloc.perturb=0"),
    ],
)
def test_a_training_process_starts_again_once_to_have_huge_pages(tmp_path, environment, starts, tunables):
    script = tmp_path / "train.py"
    script.write_text(AT_START)
    command = [sys.executable, "-W", "error", str(script), "--config", "a b"]
    done = subprocess.run(
        command, env={"PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True, check=True
    )
    *numbers, last = done.stdout.splitlines()
    assert len(numbers) == starts and len(set(numbers)) == 1
    assert last == f"['--config', 'a b'] {tunables}"
