"""Reader and writer of Hugging Face's model folders: config.json, weights, tokenizer files, generation_config.json.

Three kinds of weight files are read (safetensors, torch, the old Flax) and one is written (safetensors).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError, brief, one_line
from llama_jax.files import read_json, write_json
from llama_jax.sampling_params import GREEDY, SamplingParams
from llama_jax.text import chat_template
from llama_jax.text.chat_template import ChatTemplate
from llama_jax.text.vocabulary import MOST_BYTES
from llama_jax.weights import name_table
from llama_jax.weights.formats import compressed_tensors, flax, safetensors, torch_folder
from llama_jax.weights.formats.huggingface_config import export_config, read_config
from llama_jax.weights.model_files import Metadata, ModelFiles, tokenizer_in
from llama_jax.weights.tensor import LazyTensor, main_dtype

_log = logging.getLogger(__name__)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
GENERATION_FILE = "generation_config.json"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # in config.json
# The sampling settings of generation_config.json. SamplingParams has the same names.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def recognizes(path: Path) -> bool:
    """True for a folder with config.json and weights of one of the three kinds."""
    return (path / "config.json").is_file() and _weights_of(path) is not None


def read(folder: Path) -> ModelFiles:
    """Reads a folder's JSON files and the headers of its weights.

    Raises:
        ConfigError: a setting is not implemented.
        ValueError: a file is damaged.
    """
    config = read_config(folder)
    found = _weights_of(folder)
    assert found is not None  # `recognizes` has said so
    description, names, open_folder = found
    tensors = compressed_tensors.unpacked(open_folder(folder), str(folder))
    if names == "flax":  # that code had an unembedding of its own, whatever the config said about ties
        config = dataclasses.replace(config, tied_embeddings=name_table.tied_names(names)[1] not in tensors)
    return ModelFiles(
        folder, description, names, config, tensors, read_metadata(folder), functools.partial(tokenizer_in, folder)
    )


def _weights_of(folder: Path) -> tuple[str, str, Callable[[Path], Mapping[str, LazyTensor]]] | None:
    """The weights of a folder: their description, their column in the table of names, and the function to open them."""
    if any(folder.glob("*.safetensors")) or (folder / safetensors.INDEX).is_file():
        return "Hugging Face folder", "huggingface", safetensors.open_folder
    if any((folder / name).is_file() for name in (torch_folder.WEIGHTS, torch_folder.INDEX)):
        return "Hugging Face folder (torch)", "huggingface", torch_folder.open_folder
    if any(folder.glob("flax_model*.msgpack*")):
        return "old Flax folder", "flax", flax.open_folder
    return None


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a folder, from config.json, generation_config.json, chat template and tokenizer files.

    Every one of these files may be absent.
    """
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    generation = _read_generation(folder / GENERATION_FILE)
    return Metadata(
        bos_token=_bos_token(config),
        stop_tokens=_stop_tokens(generation, folder / GENERATION_FILE) or _stop_tokens(config, path),
        sampling=_sampling_defaults(generation, folder / GENERATION_FILE),
        chat_template=_chat_template(folder),
        tokenizer_files=tokenizer_files(folder),
        token_ids={key: config[key] for key in _TOKEN_IDS if key in config},
        generation=generation,
    )


def _read_generation(path: Path) -> dict[str, Any] | None:
    """The contents of generation_config.json, or None. A damaged file is ignored with a warning."""
    try:
        values = read_json(path) if path.exists() else None
        _stop_tokens(values, path)
    except (OSError, ValueError) as error:
        _log.warning("warning: the model is used without its sampling defaults: %s", one_line(error))
        return None
    return values


def _chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a folder, or None. A damaged one is ignored with a warning."""
    try:
        return chat_template.read_folder(folder)
    except ValueError as error:
        _log.warning("warning: the chat template cannot be used, and dialogs are in Meta's reference format: %s", error)
        return None


def _bos_token(config: Mapping[str, Any]) -> int | None:
    token = config.get("bos_token_id")
    return token if type(token) is int and 0 <= token < 1 << 31 else None


def _stop_tokens(values: Mapping[str, Any] | None, path: Path) -> tuple[int, ...]:
    """The ids that end a generation: `eos_token_id` of generation_config.json or config.json.

    Llama 3.1's instruct models have three (128001, 128008, 128009), in generation_config.json.
    """
    ids = (values or {}).get("eos_token_id")
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(i) is int and i >= 0 for i in listed):
        raise ConfigError(f"{path}: eos_token_id must be an id or a list of ids, got {brief(ids)}")
    return tuple(dict.fromkeys(listed))


def _sampling_defaults(values: Mapping[str, Any] | None, path: Path) -> SamplingParams | None:
    """The sampling settings of generation_config.json (`do_sample` and others), or None without them.

    A setting that is absent is off. (transformers would also keep only the 50 likeliest tokens, which Meta does not.)
    """
    values = values or {}
    if values.get("do_sample") is False:
        return GREEDY
    if not values.get("do_sample"):
        return None
    settings = {name: values[name] for name in _SAMPLING if values.get(name) is not None}
    try:
        return SamplingParams(**{"temperature": 1.0, "top_p": 1.0, **settings})
    except ConfigError as error:  # the model works without them
        _log.warning("warning: %s: %s: its settings are ignored", path, error)
        return None


def tokenizer_files(folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The files of a folder from which transformers reads the tokenizer.

    A link may lead to another file of the folder or to the blobs of a hub cache. Links to other places are left out.
    """
    folder = Path(folder).resolve()
    homes = {folder, folder.parent.parent / "blobs"}
    paths = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return tuple(p for p in paths if p.resolve().parent in homes and p.stat().st_size <= MOST_BYTES)


def save_folder(
    folder: Path,
    config: ModelConfig,
    leaves: name_table.Leaves,
    metadata: Metadata,
    *,
    shard_bytes: int,
    quantized: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes the files that transformers (and this module) reads, except those of the tokenizer.

    A block of one tensor at a time is in memory. config.json comes last: a folder without one is not complete.

    Args:
        folder: an existing folder without safetensors files.
        config: the model's shape.
        leaves: the tensors by path, in the dtypes to be written.
        metadata: token ids and sampling settings.
        shard_bytes: largest size of one file in bytes, unless a single tensor is larger.
        quantized: True stores the quantized parts of tensors, in the layout of compressed_tensors.py.
        progress: called with the number of bytes that were written since the last call.
    """
    stored = _stored(config, leaves, quantized)
    _save_weights(folder, stored, shard_bytes, progress)
    write_generation_config(folder, metadata)
    ids = metadata.token_ids or {
        "bos_token_id": metadata.bos_token,
        "eos_token_id": _one_or_all(metadata.stop_tokens),
    }
    bits = {
        weight.name.removesuffix(".weight"): parts.bits if (parts := leaves[weight.path].quantized) else None
        for weight in name_table.weights(config, "huggingface")
        if quantized and len(weight.shape) == 2
    }
    extra = {"quantization_config": compressed_tensors.config_of(bits)} if any(bits.values()) else {}
    dtype = str(main_dtype(leaves.values()))
    write_json(folder / "config.json", {**export_config(config), **ids, "torch_dtype": dtype, **extra})


def _stored(config: ModelConfig, leaves: name_table.Leaves, quantized: bool) -> list[dict[str, LazyTensor]]:
    """The tensors to store, by name. Those of one weight are together, since they belong into one file."""
    each = [{weight.name: weight.to_disk(leaves[weight.path])} for weight in name_table.weights(config, "huggingface")]
    return [dict(compressed_tensors.packed(tensors)) if quantized else tensors for tensors in each]


def _save_weights(
    folder: Path, stored: list[dict[str, LazyTensor]], shard_bytes: int, progress: Callable[[int], None]
) -> None:
    """Writes model.safetensors, or shards of at most `shard_bytes` and their index."""
    shards: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for tensors in stored:
        size = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1] |= tensors
        filled += size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        safetensors.save_file(folder / name, shard, {"format": "pt"}, progress=progress)
    if len(shards) > 1:
        places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(math.prod(e.shape) * e.dtype.itemsize for shard in shards for e in shard.values())
        write_json(folder / safetensors.INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def write_generation_config(folder: Path, metadata: Metadata) -> None:
    """Writes generation_config.json: the one that the model came with, or a new one from its metadata."""
    write_json(folder / GENERATION_FILE, _generation(metadata) if metadata.generation is None else metadata.generation)


def _generation(metadata: Metadata) -> Mapping[str, Any]:
    settings: dict[str, Any] = {
        "bos_token_id": metadata.bos_token,
        "eos_token_id": _one_or_all(metadata.stop_tokens),
    }
    if metadata.sampling is not None:
        draws = metadata.sampling.temperature > 0
        settings |= {"do_sample": draws}
        settings |= {name: getattr(metadata.sampling, name) for name in _SAMPLING} if draws else {}
    return settings


def _one_or_all(ids: tuple[int, ...]) -> int | list[int] | None:
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)
