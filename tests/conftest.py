"""Eight virtual CPU devices for every test, no accelerator, and no program compiled twice in a session.

Processes that a test starts inherit the settings in the environment.
"""

import functools
import importlib.metadata
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little. Without LLVM's optimizations, compiling a training step of the tiny model on
# eight devices takes 3.2 s of CPU time instead of 6.1 s, and with the older code for fusions 1.0 s. jaxlib 0.11 no
# longer has that code, and would abort at the flag.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    f"{' --xla_cpu_use_fusion_emitters=false' if importlib.metadata.version('jaxlib').startswith('0.10.') else ''}"
).strip()

import jax
import pytest

from llama_jax import compilation_cache

jax.config.update("jax_num_cpu_devices", 8)

# The CPU kernels are compiled once for this machine, not once for each folder that a test makes its cache.
if compilation_cache.folder() is not None:
    os.environ.setdefault("LLAMA_JAX_CPU_KERNELS", str(compilation_cache.folder().parent / "native"))

# Many tests build the same small runs anew: their programs are compiled once, and then read from this folder.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers of pytest-xdist share the folder of their parent
    _programs = tempfile.TemporaryDirectory(prefix="llama_jax_programs_")
    os.environ["LLAMA_JAX_CACHE"] = _programs.name
compilation_cache.enable()

pytest.register_assert_rewrite("helpers")  # before any of them is imported


@pytest.fixture
def one_device(monkeypatch):
    """Lets runs train on the first device alone, which is faster if sharding is not tested."""
    from llama_jax import parallel

    monkeypatch.setattr(parallel, "make_mesh", functools.partial(parallel.make_mesh, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def endpoint():
    """The address of a small hub of our own (helpers/hub.py), which answers for as long as a test file runs."""
    from helpers import hub

    with hub.serving() as address:
        yield address
