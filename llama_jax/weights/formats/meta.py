"""Meta's download: params.json and consolidated.00.pth, .01.pth, ..., one file for each device of Meta's own code.

The files contain the shards of fairscale's model-parallel layers. Every matrix is split: along its rows if the layer's
output is spread over the devices, along its columns if its input is. Joined, they are the matrices of a single file.

Sources: llama_models/llama3/args.py and model.py of Meta's llama-models, and fairscale/nn/model_parallel/layers.py.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import SIZES, ModelConfig
from llama_jax.errors import ConfigError, brief, nearest
from llama_jax.files import read_json, write_json
from llama_jax.weights import name_table
from llama_jax.weights.formats import torch_file
from llama_jax.weights.model_files import Metadata, ModelFiles, tokenizer_in
from llama_jax.weights.tensor import LazyTensor, equal, joined

_NEEDED = ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps")
_OPTIONAL = ("n_kv_heads", "vocab_size", "ffn_dim_multiplier", "rope_theta", "use_scaled_rope")
# Settings of a run of Meta's code. They do not change the model.
_OF_A_RUN = ("max_seq_len", "max_batch_size", "model_parallel_size")
# Settings of other architectures, each with the value (besides null) that has no effect.
_OTHER_MODELS: dict[str, int | None] = {
    "quantization_args": None,
    "lora_args": None,
    "moe_args": None,
    "vision_chunk_size": -1,
    "vision_max_num_chunks": 4,
    "vision_num_cross_attention_layers": -1,
}
_MOST_TENSORS = 20_000  # in all files
_FILE = re.compile(r"consolidated\.([0-9]{2})\.pth")
_MOST = 1 << 20  # the largest whole number that is allowed in params.json
_COLUMNS = (".wo.weight", ".w2.weight")  # split along their columns
_SCALING = SIZES["llama3.1-8b"].rope_scaling  # the constants in Meta's `apply_scaling`
# (dim, ffn_dim) to the published (multiple_of, ffn_dim_multiplier): 8B, 70B, 405B, 1B, 3B.
_PUBLISHED = {
    (4096, 14_336): (1024, 1.3),
    (8192, 28_672): (4096, 1.3),
    (16_384, 53_248): (4096, 1.2),
    (2048, 8192): (256, 1.5),
    (3072, 8192): (256, 1.0),
}


def recognizes(path: Path) -> bool:
    """True for a folder with params.json."""
    return (path / "params.json").is_file()


def read(folder: Path) -> ModelFiles:
    """Reads a folder's params.json and the headers of its weights; errors are those of `open_folder`."""
    config, tensors = open_folder(folder)
    tokenizer = functools.partial(tokenizer_in, folder)
    return ModelFiles(folder, "Meta's download", "meta", config, tensors, Metadata(), tokenizer)


def open_folder(folder: str | os.PathLike[str]) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """The config of a folder and its tensors by Meta's names, the shards of each joined.

    A model is tied if its `output.weight` is absent or equals the embedding bit for bit; then it is left out.

    Raises:
        ConfigError: a setting in params.json is not implemented or not possible.
        ValueError: (one line) a file is missing or damaged, or does not fit the others or params.json.
    """
    folder = Path(folder)
    raw = read_json(folder / "params.json")
    try:
        _check_settings(raw)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'params.json'}: {error}") from None
    parts: dict[str, dict[str, LazyTensor]] = {}
    for path in _files(folder):
        parts[path.name] = torch_file.open_file(path)
        if sum(map(len, parts.values())) > _MOST_TENSORS:
            raise ValueError(f"{folder}: its files have over {_MOST_TENSORS:,} tensors; 405B has 18,208 in 16 files")
    entries = _whole(folder, parts, raw["dim"])
    embed, unembed = name_table.tied_names("meta")
    if embed not in entries or len(entries[embed].shape) != 2:
        raise ValueError(f"{folder}: no matrix {embed!r}{nearest(embed, [n for n in entries if n != embed])}")
    tied = unembed not in entries or equal(entries[unembed], entries[embed])
    if tied:
        entries.pop(unembed, None)
    try:
        config = _config(raw, vocab_size=entries[embed].shape[0], tied=tied)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'params.json'}: {error}") from None
    _check_shapes(folder, config, entries)
    return config, entries


def save_folder(
    folder: Path,
    config: ModelConfig,
    leaves: name_table.Leaves,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes files for one device that Meta's code (and this module) reads: consolidated.00.pth, then params.json.

    A block of one tensor at a time is in memory.

    Args:
        folder: an existing folder without *.pth files.
        config: the model's shape.
        leaves: the tensors by path, in the dtypes to be written.
        progress: called with the number of bytes that were written since the last call.

    Raises:
        ConfigError: Meta's code does not have a field of the config. Nothing is written then.
    """
    settings = export_params(config)
    tensors = {w.name: w.to_disk(leaves[w.path]) for w in name_table.weights(config, "meta")}
    if config.tied_embeddings:  # Meta's code has no setting for ties: both names get the same storage
        embed, unembed = name_table.tied_names("meta")
        tensors[unembed] = tensors[embed]
    torch_file.save_file(folder / "consolidated.00.pth", tensors, progress=progress)
    write_json(folder / "params.json", settings)


def context_of(config: ModelConfig) -> int:
    """The max_seq_len that a saved config has when it is read again, since params.json has no key for it."""
    return _context(config.vocab_size, config.rope_scaling is not None)


def _context(vocab_size: int, scaled: bool) -> int:
    """The number of positions that each generation of Llama was trained for."""
    return 131_072 if scaled else 8192 if vocab_size >= 128_000 else 4096


def export_params(config: ModelConfig) -> dict[str, Any]:
    """The params.json of a config. `open_folder` reads the same config back, apart from max_seq_len.

    Raises ConfigError for a field that Meta's code does not have.
    """
    if config.head_dim * config.num_heads != config.embed_dim:
        raise ConfigError(
            f"model.head_dim={config.head_dim} cannot be saved as Meta's files, whose heads are embed_dim / num_heads "
            f"= {config.embed_dim / config.num_heads:g} wide; a Hugging Face folder can hold it"
        )
    settings: dict[str, Any] = {
        "dim": config.embed_dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
    }
    exact = (config.ffn_dim + 0.5) / _ffn_dim(config.embed_dim, 1, None)
    pairs = [(256, None), (config.ffn_dim, None), (1, exact)]
    if (config.embed_dim, config.ffn_dim) in _PUBLISHED:
        pairs.insert(0, _PUBLISHED[config.embed_dim, config.ffn_dim])
    multiple_of, multiplier = next(p for p in pairs if _ffn_dim(config.embed_dim, *p) == config.ffn_dim)
    settings["multiple_of"] = multiple_of
    if multiplier is not None:
        settings["ffn_dim_multiplier"] = multiplier
    if config.rope_scaling is not None:
        settings["use_scaled_rope"] = True
    back = _config(settings, vocab_size=config.vocab_size, tied=config.tied_embeddings)
    for field in dataclasses.fields(config):
        given, kept = getattr(config, field.name), getattr(back, field.name)
        if given != kept and field.name != "max_seq_len":
            raise ConfigError(
                f"model.{field.name}={given} cannot be saved as Meta's files, which would make it {kept}; a Hugging "
                "Face folder can hold it"
            )
    return settings


# params.json.


def _check_settings(raw: dict[str, Any]) -> None:
    """Raises ConfigError for a setting that is missing, unknown, or of the wrong type."""
    for key, value in raw.items():
        if key in _OTHER_MODELS:
            if value is not None and value != _OTHER_MODELS[key]:
                raise ConfigError(f"{key}={brief(value)} belongs to another kind of model, which is not supported")
        elif value and key not in (*_NEEDED, *_OPTIONAL, *_OF_A_RUN):  # null, false and 0 turn a setting off
            near = nearest(key, [*_NEEDED, *_OPTIONAL])
            raise ConfigError(f"{brief(key)} is an unknown setting, which may change the model{near}")
    missing = [key for key in _NEEDED if raw.get(key) is None]
    if missing:
        raise ConfigError(f"lacks {', '.join(missing)}")
    for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"):
        value = raw.get(key)
        if value is None or (key == "vocab_size" and value == -1):
            continue
        if type(value) is not int or not 0 < value <= _MOST:
            raise ConfigError(f"{key} must be a whole number from 1 to {_MOST:,}, got {brief(value)}")
    for key in ("ffn_dim_multiplier", "norm_eps", "rope_theta"):
        value = raw.get(key)
        if value is not None and (type(value) not in (int, float) or not 0 < value < 1e12):
            raise ConfigError(f"{key} must be a number above 0, got {brief(value)}")
    scaled = raw.get("use_scaled_rope")
    if scaled is not None and type(scaled) is not bool:
        raise ConfigError(f"use_scaled_rope must be true or false, got {brief(scaled)}")


def _config(raw: dict[str, Any], *, vocab_size: int, tied: bool) -> ModelConfig:
    """The config of a params.json that has been checked.

    Args:
        raw: the settings.
        vocab_size: number of rows of the embedding, for a file without vocab_size.
        tied: True if the unembedding is the embedding.
    """
    dim, heads = raw["dim"], raw["n_heads"]
    vocab = vocab_size if raw.get("vocab_size") in (None, -1) else raw["vocab_size"]
    if dim % heads:
        raise ConfigError(f"dim={dim} must be a multiple of n_heads={heads}")
    scaled, llama3, theta = bool(raw.get("use_scaled_rope")), vocab >= 128_000, raw.get("rope_theta")
    if theta is None and (scaled or llama3):
        raise ConfigError("lacks rope_theta (500000.0 in Llama 3)")
    kv_heads = raw.get("n_kv_heads")
    config = ModelConfig(
        vocab_size=vocab,
        embed_dim=dim,
        num_layers=raw["n_layers"],
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=dim // heads,
        ffn_dim=_ffn_dim(dim, raw["multiple_of"], raw.get("ffn_dim_multiplier")),
        norm_eps=float(raw["norm_eps"]),
        rope_theta=10_000.0 if theta is None else float(theta),  # the constant in the code of Llama 1 and 2
        rope_scaling=_SCALING if scaled else None,
        max_seq_len=_context(vocab, scaled),
        tied_embeddings=tied,
    )
    # Meta's code always scales by 8; the config.json that Meta publishes for these two sizes says 32.
    for published in (SIZES["llama3.2-1b"], SIZES["llama3.2-3b"]):
        if scaled and published == dataclasses.replace(
            config, rope_scaling=published.rope_scaling, tied_embeddings=published.tied_embeddings
        ):
            return dataclasses.replace(config, rope_scaling=published.rope_scaling)
    return config


def _ffn_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The hidden width of the feed-forward layer, by the formula of `FeedForward` in Meta's model.py.

    It is 8/3 `dim` times `multiplier`, rounded up to a multiple of `multiple_of`.
    """
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


# consolidated.NN.pth.


def _files(folder: Path) -> list[Path]:
    """The files of a folder in order. Raises ValueError if a number is missing."""
    numbers = sorted(int(found[1]) for path in folder.iterdir() if (found := _FILE.fullmatch(path.name)))
    if not numbers:
        raise ValueError(f"{folder}: params.json is there, but no consolidated.00.pth: download it")
    lacking = sorted(set(range(numbers[-1])) - set(numbers))
    if lacking:
        raise ValueError(
            f"{folder}: consolidated.{lacking[0]:02}.pth is missing, although number {numbers[-1]:02} is there: "
            "download it"
        )
    return [folder / f"consolidated.{number:02}.pth" for number in numbers]


def _whole(folder: Path, parts: Mapping[str, dict[str, LazyTensor]], dim: int) -> dict[str, LazyTensor]:
    """Joins the tensors of all files.

    Args:
        folder: the folder, for error messages.
        parts: the tensors of each file by name, by the name of the file. Buffers, which follow from the config, are
            ignored: only some of the files may have them.
        dim: width of the residual stream.

    Raises:
        ValueError: a file lacks a tensor that another has, or has it in another shape or dtype.
    """
    parts = {
        file: {name: part for name, part in tensors.items() if not name.endswith(name_table.BUFFERS)}
        for file, tensors in parts.items()
    }
    first, *others = parts
    for file in others:
        for one, two in ((first, file), (file, first)):
            lacking = [name for name in parts[one] if name not in parts[two]]
            if lacking:
                raise ValueError(
                    f"{folder / two}: no tensor {brief(lacking[0])}, which {one} has: is it of this model?"
                )
    whole: dict[str, LazyTensor] = {}
    for name, entry in parts[first].items():
        pieces = [part[name] for part in parts.values()]
        for file, piece in zip(parts, pieces, strict=True):
            if (piece.shape, piece.dtype) != (entry.shape, entry.dtype):
                raise ValueError(
                    f"{folder / file}: {brief(name)} is {piece.dtype} {piece.shape}, but in {first} it is "
                    f"{entry.dtype} {entry.shape}: are both of this model?"
                )
        axis = _split_axis(name, entry, dim)
        # Every device has the whole of a norm, and the first device's is used. In training they may drift apart by a
        # bit, which is no reason to refuse a published model.
        whole[name] = entry if axis is None or len(pieces) == 1 else joined(pieces, axis)
    return whole


def _split_axis(name: str, part: LazyTensor, dim: int) -> int | None:
    """The axis along which a tensor is split over the files: 0 for rows, 1 for columns, None for no split."""
    if len(part.shape) != 2:
        return None
    if name == name_table.tied_names("meta")[0]:
        return 0 if part.shape[1] == dim else 1  # VocabParallelEmbedding in Llama 3, ParallelEmbedding before
    return 1 if name.endswith(_COLUMNS) else 0


def _check_shapes(folder: Path, config: ModelConfig, entries: Mapping[str, LazyTensor]) -> None:
    """Raises ValueError for a tensor of another shape than the config's. Missing and unknown ones are found later."""
    layers = {name.split(".")[1] for name in entries if name.startswith("layers.")}
    if len(layers) != config.num_layers:
        raise ConfigError(
            f"{folder / 'params.json'}: n_layers={config.num_layers}, but the files hold {len(layers)} layers"
        )
    for weight in name_table.weights(config, "meta"):
        entry = entries.get(weight.name)
        if entry is not None and entry.shape != weight.shape:
            raise ValueError(
                f"{folder}: {weight.name} of all files together has shape {entry.shape}, but params.json asks for "
                f"{weight.shape}: is a file missing, or params.json of another model?"
            )
