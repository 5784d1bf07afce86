"""Hugging Face folders of the old Flax Llama: config.json beside flax_model.msgpack, or its shards and their index.

transformers wrote them (FlaxLlamaForCausalLM, 4.36 to 4.57) and has dropped their support. The names are those of its
modules joined by "/"; kernels are (in, out), embeddings (V, D); the rotary pairs of a head are (i, i + H/2), as in its
torch models (modeling_flax_llama.py, `rotate_half`). It kept no frequencies among the params.
"""

from __future__ import annotations

import os
from pathlib import Path

from llama_jax.weights.formats import msgpack
from llama_jax.weights.formats.shard_index import open_shards
from llama_jax.weights.tensor import File, LazyTensor

WEIGHTS = "flax_model.msgpack"
INDEX = "flax_model.msgpack.index.json"
_ROOT = "params/"  # some files hold flax's whole variables, of which the params are one collection


def open_folder(folder: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """The tensors of a folder by the names of layout.FORMATS["flax"]: flax_model.msgpack, else what its index lists.

    Shards must be files of the folder itself. Raises ValueError (one line) for whatever is not sound.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        found = _open_file(folder / WEIGHTS)
    elif (folder / INDEX).is_file():
        found = open_shards(folder / INDEX, ".msgpack", _open_file)
    else:
        raise ValueError(f"{folder}: no {WEIGHTS} and no {INDEX} in this folder")
    if all(name.startswith(_ROOT) for name in found):
        return {name.removeprefix(_ROOT): entry for name, entry in found.items()}
    return found


def _open_file(path: Path) -> dict[str, LazyTensor]:
    return msgpack.open_file(File(path))
