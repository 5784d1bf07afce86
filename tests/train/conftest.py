"""Fixtures of the tests of training."""

import pytest


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A compilation cache that the subprocesses share."""
    return tmp_path_factory.mktemp("compiled")
