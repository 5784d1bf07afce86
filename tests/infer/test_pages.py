"""The cache is one module: with another one in its place, nothing else changes."""

import os
import subprocess
import sys

import pytest

from helpers.paths import ROOT


@pytest.mark.slow
def test_a_cache_of_pages_needs_no_change_elsewhere():
    """A process of its own, because every module of the package imports the cache: 15 seconds of compilation."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-m", "helpers.pages"],
        env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.endswith("equal\n"), done.stderr[-2000:]
