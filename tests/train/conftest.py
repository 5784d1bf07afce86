"""Fixtures of the tests of training."""

import os

import pytest


@pytest.fixture(scope="session")
def compiled():
    """The compilation cache that all tests and their subprocesses share (tests/conftest.py)."""
    return os.environ["LLAMA_JAX_CACHE"]
