"""Weights of the old Flax Llama in Hugging Face folders: flax_model.msgpack, or shards and their index.

transformers wrote them (FlaxLlamaForCausalLM, 4.36 to 4.57) and no longer supports them. Names are those of its
modules, joined by "/". Kernels are (in, out) and embeddings (V, D). The rotary pairs of a head are (i, i + H/2), as
in its torch models (modeling_flax_llama.py, `rotate_half`). The params hold no frequencies.
"""

from __future__ import annotations

import os
from pathlib import Path

from llama_jax.weights.formats import msgpack
from llama_jax.weights.formats.shard_index import open_shards
from llama_jax.weights.tensor import File, LazyTensor

WEIGHTS = "flax_model.msgpack"
INDEX = "flax_model.msgpack.index.json"
_ROOT = "params/"  # some files hold all variables of a flax module; the params are one collection of them


def open_folder(folder: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """The tensors of a folder by name, from flax_model.msgpack or else from the shards that its index lists.

    Shards must be files of the folder itself. Raises ValueError (one line) for a missing or damaged file.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        tensors = _open_file(folder / WEIGHTS)
    elif (folder / INDEX).is_file():
        tensors = open_shards(folder / INDEX, ".msgpack", _open_file)
    else:
        raise ValueError(f"{folder}: no {WEIGHTS} and no {INDEX} in this folder")
    if all(name.startswith(_ROOT) for name in tensors):
        return {name.removeprefix(_ROOT): tensor for name, tensor in tensors.items()}
    return tensors


def _open_file(path: Path) -> dict[str, LazyTensor]:
    return msgpack.open_file(File(path))
