"""A helper of the tests: runs `python -m llama_jax convert`, and returns the tensors of the files that it wrote."""

from pathlib import Path

from helpers.program import program
from llama_jax.weights.open import open_source


def convert(source, dest, format, *options) -> Path:
    """`python -m llama_jax convert`, in this process."""
    assert program("convert", str(source), str(dest), "--to", format, *options) == 0
    return Path(dest)


def tensors(path):
    return {name: entry.read() for name, entry in open_source(path).leaves.items()}
