"""Hugging Face folders of the old Flax Llama: config.json beside flax_model.msgpack, or its shards and their index.

transformers wrote them (FlaxLlamaForCausalLM, 4.36 to 4.57) and has dropped their support. The names are those of its
modules joined by "/"; kernels are (in, out), embeddings (V, D); the rotary pairs of a head are (i, i + H/2), as in its
torch models (modeling_flax_llama.py, `rotate_half`). It kept no frequencies among the params.
"""

from __future__ import annotations

import os
from pathlib import Path

from llama_jax.config import nearest
from llama_jax.jsonfile import brief, read_json
from llama_jax.weights import msgpack
from llama_jax.weights.entry import Entry, File

WEIGHTS = "flax_model.msgpack"
INDEX = "flax_model.msgpack.index.json"
_ROOT = "params/"  # some files hold flax's whole variables, of which the params are one collection


def open_folder(folder: str | os.PathLike[str]) -> dict[str, Entry]:
    """The tensors of a folder by the names of layout.FORMATS["flax"]: flax_model.msgpack, else what its index lists.

    Shards must be files of the folder itself. Raises ValueError (one line) for whatever is not sound.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        found = msgpack.open_file(File(folder / WEIGHTS))
    elif (folder / INDEX).is_file():
        found = _open_shards(folder, folder / INDEX)
    else:
        raise ValueError(f"{folder}: no {WEIGHTS} and no {INDEX} in this folder")
    if all(name.startswith(_ROOT) for name in found):
        return {name.removeprefix(_ROOT): entry for name, entry in found.items()}
    return found


def _open_shards(folder: Path, index: Path) -> dict[str, Entry]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: weight_map must be an object of file names, got {brief(places)}")
    shards: dict[str, dict[str, Entry]] = {}
    for name, shard in places.items():
        if not isinstance(shard, str) or not shard.endswith(".msgpack") or set(shard) & set("/\\:\0"):
            raise ValueError(
                f"{index}: tensor {brief(name)} is said to be in {brief(shard)}; it must be the bare name of a "
                ".msgpack file in this folder"
            )
        if shard not in shards:
            if not (folder / shard).is_file():
                raise ValueError(f"{folder / shard}: missing, though {index.name} lists it: download it again")
            shards[shard] = msgpack.open_file(File(folder / shard))
        if name not in shards[shard]:
            near = nearest(name, list(shards[shard]))
            raise ValueError(f"{folder / shard}: no tensor {brief(name)}, though {index.name} lists it{near}")
    return {name: shards[shard][name] for name, shard in places.items()}
