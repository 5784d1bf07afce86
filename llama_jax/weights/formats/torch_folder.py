"""Weights of older Hugging Face folders: pytorch_model.bin, or shards and their index, as torch.save writes them.

The pickle inside is read by torch_pickle.py, which runs no code.
"""

from __future__ import annotations

import os
from pathlib import Path

from llama_jax.weights.formats import torch_file
from llama_jax.weights.formats.shard_index import open_shards
from llama_jax.weights.tensor import LazyTensor

WEIGHTS = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


def open_folder(folder: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """The tensors of a folder by their names: those of pytorch_model.bin, else of the shards that its index lists.

    Raises:
        ValueError: a file is missing or damaged, or contains anything but tensors.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return torch_file.open_file(folder / WEIGHTS)
    return open_shards(folder / INDEX, ".bin", torch_file.open_file)
