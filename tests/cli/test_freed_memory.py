"""The memory that glibc keeps for the next step of a training run on a CPU."""

import platform
import subprocess
import sys

import pytest

from helpers.paths import ROOT

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
