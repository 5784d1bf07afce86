"""Hugging Face's index of a model in several files, which names the file of each tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llama_jax.errors import brief, nearest
from llama_jax.files import read_json
from llama_jax.weights.tensor import LazyTensor

_MOST_TENSORS = 20_000


def open_shards(index: Path, suffix: str, open_file: Callable[[Path], dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    """Opens the files that an index lists, and returns its tensors.

    Args:
        index: the JSON file. Its `weight_map` maps the name of each tensor to the name of a file.
        suffix: suffix of those files. They must be in the folder of the index.
        open_file: opens one of them and returns its tensors by name.

    Raises:
        ValueError: (one line) the index or a file is damaged or missing, or they contradict each other.
    """
    folder = index.parent
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must be an object of file names, got {brief(weight_map)}")
    shards: dict[str, dict[str, LazyTensor]] = {}
    for name, shard in weight_map.items():
        bare = isinstance(shard, str) and shard.endswith(suffix) and shard.isprintable()
        if not bare or set(shard) & set("/\\:\0"):
            raise ValueError(
                f"{index}: tensor {brief(name)} has the file {brief(shard)}; it must be the bare name of a "
                f"{suffix} file in this folder"
            )
        if shard not in shards:
            if not (folder / shard).is_file():
                raise ValueError(f"{folder / shard}: missing, though {index.name} lists it: download it again")
            shards[shard] = open_file(folder / shard)
            if sum(map(len, shards.values())) > _MOST_TENSORS:
                raise ValueError(f"{index}: its files have over {_MOST_TENSORS:,} tensors; 405B has 1,138")
        if name not in shards[shard]:
            near = nearest(name, list(shards[shard]))
            raise ValueError(f"{folder / shard}: no tensor {brief(name)}, though {index.name} lists it{near}")
    return {name: shards[shard][name] for name, shard in weight_map.items()}
