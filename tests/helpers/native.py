"""The mark of tests of the CPU kernels."""

import os

import jax
import pytest

from llama_jax.ops import cpu
from llama_jax.ops.cpu import build

# Where they could be built, kernels that cannot be used are a failure of these tests.
OFF = os.environ.get(cpu.ENV, "").lower() in ("off", "0", "false")
needs_cpu_kernels = pytest.mark.skipif(
    OFF or build._compiler() is None or jax.default_backend() != "cpu", reason="no compiler, or the kernels are off"
)
