"""Fixtures of the tests of data: two vocabularies."""

import pytest

from helpers.tokenizers import byte_tokenizer, small_tokenizer
from llama_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One id per byte, so that ids can be read."""
    return byte_tokenizer()


@pytest.fixture(scope="module")
def merging() -> Tokenizer:
    """A vocabulary with merges, in which texts that are encoded separately get other ids than joined ones."""
    return small_tokenizer()
