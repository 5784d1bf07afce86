"""Eight virtual CPU devices for every test, no accelerator, and no program compiled twice in a session."""

import functools
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# Many tests build the same small runs anew: their programs are compiled once, and then read from this folder.
_programs = tempfile.TemporaryDirectory(prefix="llama_jax_programs_")
jax.config.update("jax_compilation_cache_dir", _programs.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

pytest.register_assert_rewrite("helpers")  # before any of them is imported


@pytest.fixture
def one_device(monkeypatch):
    """Lets runs train on the first device alone, which is faster where sharding is not the matter."""
    from llama_jax import parallel

    monkeypatch.setattr(parallel, "make_mesh", functools.partial(parallel.make_mesh, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def endpoint():
    """The address of a small hub of our own (helpers/hub.py), which answers for as long as a test file runs."""
    from helpers import hub

    with hub.serving() as address:
        yield address
