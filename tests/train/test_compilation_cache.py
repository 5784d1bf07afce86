"""A compilation cache that was left damaged costs a compilation, once."""

import functools
import os
import resource
import subprocess
import sys

from helpers.paths import ROOT

PROGRAM = """
import jax
from llama_jax import compilation_cache

compilation_cache.enable()
print(jax.jit(lambda x: 3 * x + 1)(2.0))
"""


def test_a_torn_entry_is_compiled_again_and_replaced(tmp_path):
    """A process that is killed while jax writes an entry may leave half of it."""
    environment = os.environ | {"LLAMA_JAX_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM]
    whole = {}
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, "7.0\n"), done.stderr
        (entry,) = (tmp_path / "jax").glob("*-cache")  # and no partial file
        whole.setdefault(entry, entry.stat().st_size)
        assert entry.stat().st_size > 0.9 * whole[entry]
        entry.write_bytes(entry.read_bytes()[: whole[entry] // 2])
    assert len(whole) == 1


def test_a_full_disk_costs_the_cache_and_one_line(tmp_path):
    environment = os.environ | {"LLAMA_JAX_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM + "print(jax.jit(lambda x: x - 5)(2.0))"]
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, preexec_fn=full
    )
    assert (done.returncode, done.stdout) == (0, "7.0\n-3.0\n")
    assert done.stderr.startswith(f"warning: {tmp_path / 'jax'} cannot be written (File too large): make room")
    assert done.stderr.count("\n") == 1 and not list((tmp_path / "jax").iterdir())
