"""A helper of the tests: `python -m llama_jax convert`, and the tensors of what it wrote."""

from pathlib import Path

from helpers.program import program
from llama_jax.weights.open import open_source


def convert(source, dest, format, *options) -> Path:
    """`python -m llama_jax convert`, in this process."""
    assert program("convert", str(source), str(dest), "--to", format, *options) == 0
    return Path(dest)


def tensors(path):
    return {name: entry.read() for name, entry in open_source(path).leaves.items()}
