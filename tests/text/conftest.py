"""Fixtures of the tests of text."""

import pytest

from helpers.tokenizers import small_tokenizer
from llama_jax.text import Tokenizer


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    """The small vocabulary with merges, with which Meta's code made half of the golden ids."""
    return small_tokenizer()
