"""A helper of the tests: small valid models of every format, written by our own exporter."""

import dataclasses
from pathlib import Path

import numpy as np

from llama_jax.config import SIZES
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.weights import export, name_table
from llama_jax.weights.model_files import Metadata
from llama_jax.weights.tensor import of_array

CONFIG = dataclasses.replace(
    SIZES["tiny"], vocab_size=520, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=64
)


def lazy(array):
    """A numpy array as a lazy tensor."""
    return of_array(lambda: array, array.dtype, array.shape)


def random_leaves(config=CONFIG, seed=0):
    """Random float32 tensors by path."""
    rng = np.random.default_rng(seed)

    def leaf(weight):
        array = (rng.standard_normal(weight.shape) * 0.1).astype(np.float32)
        return lazy(array)

    return {weight.path: leaf(weight) for weight in name_table.weights(config, "huggingface")}


def tokenizer():
    """256 bytes, eight merges and Llama 3's control tokens."""
    merged = [b"th", b"he", b"in", b"the", b" t", b"er", b" the", b"an"]
    return Tokenizer.from_ranks({token: i for i, token in enumerate([*(bytes([b]) for b in range(256)), *merged])})


def save_params(folder: Path, config, params) -> Path:
    """A Hugging Face folder in float32 of params, without a tokenizer."""
    metadata = Metadata()
    return export.save(folder, config, export.leaves_of(config, params), metadata, format="hf", dtype="float32")


def make_sound(folder: Path, format: str) -> Path:
    """Writes a model into `folder`. Returns the folder, or the model's file in it."""
    metadata = Metadata(tokenizer(), tokenizer().bos_id, tokenizer().stop_tokens)
    path = folder / "model.gguf" if format == "gguf" else folder
    dtype = "q8_0" if format == "gguf" else "bfloat16"
    return export.save(path, CONFIG, random_leaves(), metadata, format=format, dtype=dtype)
