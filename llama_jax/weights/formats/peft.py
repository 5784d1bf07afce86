"""Reader and writer of peft's LoRA adapters: adapter_config.json and adapter_model.safetensors (or .bin).

The layout is that of Hugging Face's peft (github.com/huggingface/peft). A linear module under LoRA has two tensors,
base_model.model.MODULE.lora_A.weight (rank, in) and lora_B.weight (out, rank), and its weight becomes W + scale * B A.
The embedding (V, D) has lora_embedding_A (rank, V) and lora_embedding_B (D, rank), the transposes of b and a here.
DoRA adds lora_magnitude_vector. MODULE.base_layer.weight and MODULE.weight are whole weights that replace those of the
base. MODULE.token_adapter.trainable_tokens_delta (n, D) has rows that replace rows of the base. Rotary pairs are split
in halves, as in params here.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llama_jax import manifest
from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError, brief, nearest, one_line
from llama_jax.files import expanded, read_json, write_json
from llama_jax.params import Params
from llama_jax.storage import download_folder, is_url
from llama_jax.text import chat_template
from llama_jax.weights import export, hub_models, name_table
from llama_jax.weights.adapters import EMBED, Adapter, LazyLora, LazyRows
from llama_jax.weights.formats import huggingface, peft_config, safetensors, torch_file
from llama_jax.weights.formats.peft_config import PeftSettings
from llama_jax.weights.model_files import Metadata, tokenizer_in
from llama_jax.weights.tensor import FLOATS, Index, LazyTensor, equal, of_array, transposed

_log = logging.getLogger(__name__)
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
WEIGHTS_BIN = "adapter_model.bin"
_WAITS = (0.1, 0.3, 1.0)  # seconds before an adapter that is being replaced is read again

_EMBED, _UNEMBED = _VOCABULARY = tuple(name.removesuffix(".weight") for name in name_table.tied_names("huggingface"))
_ROOT = "base_model.model."  # the prefix that peft's wrapper puts before the names of the model inside
_WEIGHT = ".weight"
# The part of a module by the suffix of its tensor's name. The name of a whole weight depends on the wrapping module.
_A, _B, _MAGNITUDE, _WHOLE, _ROWS, _BIAS, _COPY = "a", "b", "magnitude", "whole", "rows", "bias", "copy"
_LINEAR_ENDS = {".lora_A.weight": _A, ".lora_B.weight": _B, ".lora_B.bias": _BIAS}
_EMBED_ENDS = {".lora_embedding_B": _A, ".lora_embedding_A": _B}
_MATRIX_ENDS = {
    ".lora_magnitude_vector": _MAGNITUDE,
    ".lora_magnitude_vector.weight": _MAGNITUDE,
    ".token_adapter.trainable_tokens_delta": _ROWS,
    ".token_adapter.base_layer.weight": _WHOLE,
    ".base_layer.weight": _WHOLE,
}
_WHOLE_ENDS = {".weight": _WHOLE, ".modules_to_save.weight": _WHOLE, ".original_module.weight": _COPY}


class _Part(NamedTuple):
    name: str  # in the file
    tensor: LazyTensor


_Parts = Mapping[str, Mapping[str, _Part]]  # keys: module, part


def is_adapter(folder: Path) -> bool:
    """True if a folder contains an adapter and no model."""
    if not (folder / CONFIG).is_file() or (folder / "checkpoints").is_dir():
        return False
    return all(path.name.startswith("adapter_") for path in folder.glob("*.safetensors"))


def base_of(folder: Path) -> str:
    """The name of the base model in an adapter's config, or "another model" if it has no usable name."""
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    return base if isinstance(base, str) and base.isprintable() and 0 < len(base) < 200 else "another model"


def open_adapter(folder: str | os.PathLike[str], config: ModelConfig) -> Adapter:
    """Opens the adapter in a folder, or on the hub, for a model of this config. Only the headers of weights are read.

    adapter_config.json and the tensors must agree on the modules that have LoRA and on their ranks. The adapter of a
    run has a manifest, which its files are validated against. A run that ends replaces one file after the other, so
    that files that do not fit the manifest are read again.

    Raises:
        ConfigError: there is no adapter, a setting is not supported, or the adapter belongs to another model.
        ValueError: a file is damaged, or the tensors do not match adapter_config.json.
    """
    if hub_models.is_hub_id(str(folder)):
        folder = hub_models.download_adapter(str(folder), CONFIG, (WEIGHTS, WEIGHTS_BIN))
    waits = iter(_WAITS)
    while True:
        path = expanded(download_folder(str(folder)) if is_url(str(folder)) else folder)
        if not (path / manifest.FILE).is_file():
            return _open(path, config)
        try:
            return _open_validated(path, config)
        except manifest.DamagedError as error:
            wait = next(waits, None)
            if wait is None:
                raise ConfigError(
                    f"{folder}: {error}: restore it from a backup, or repeat the command that trained the run, which "
                    f"writes its adapter again; after a change of your own, delete {manifest.FILE} there"
                ) from None
            time.sleep(wait)


def _open_validated(folder: Path, config: ModelConfig) -> Adapter:
    """Opens an adapter that has a manifest. Raises DamagedError for files that differ from it."""
    before = manifest.read(folder)
    try:
        adapter = _open(folder, config)
    finally:  # afterwards, since a run may replace files while they are opened; damage explains other errors
        after = manifest.check_present(folder)
    if after != before:
        raise manifest.DamagedError("its files were replaced while they were read")
    return adapter


def _open(folder: Path, config: ModelConfig) -> Adapter:
    weights = folder / (
        WEIGHTS if (folder / WEIGHTS).is_file() or not (folder / WEIGHTS_BIN).is_file() else WEIGHTS_BIN
    )
    if not (folder / CONFIG).is_file() or not weights.is_file():
        absent = CONFIG if not (folder / CONFIG).is_file() else WEIGHTS
        fault = f"has no {absent}" if folder.exists() else "does not exist"
        if (folder / "adapter" / CONFIG).is_file():
            raise ConfigError(
                f"adapter {str(folder)!r} {fault}: it is a run; its adapter is {str(folder / 'adapter')!r}"
            )
        raise ConfigError(
            f"adapter {str(folder)!r} {fault}: give a folder that peft saved, with {CONFIG} and {WEIGHTS}, "
            "or its id on the Hugging Face hub (owner/name)"
        )
    table = _table(config)
    matrices = [module for module, weight in table.items() if len(weight.shape) == 2]
    config_file = folder / CONFIG
    settings = peft_config.resolve(read_json(config_file), matrices, _EMBED, _UNEMBED, str(config_file))
    tensors = (torch_file if weights.suffix == ".bin" else safetensors).open_file(weights)
    parts = _parts(tensors, table, str(weights))
    if config.tied_embeddings:
        settings = _with_tied_tokens(parts, settings)
    _check_agreement(parts, settings, config, str(weights))
    config = _config_with(parts, settings, config, str(weights))
    if config.tied_embeddings:
        parts.pop(_UNEMBED, None)  # a copy of the embedding
    table = _table(config)
    _check_shapes(parts, settings, table, str(weights))
    return Adapter(
        config,
        lora={table[m].path: _lora(m, its, settings) for m, its in parts.items() if _A in its},
        whole={table[m].path: its[_WHOLE].tensor for m, its in parts.items() if _WHOLE in its},
        rows={
            table[m].path: LazyRows(_ids(m, settings), its[_ROWS].tensor) for m, its in parts.items() if _ROWS in its
        },
        folder=folder,
    )


def adapted_metadata(metadata: Metadata, adapter: Adapter, base: ModelConfig) -> Metadata:
    """The metadata of a model with an adapter, which may come with a chat template and with a tokenizer of its own.

    The tokenizer is used if the adapter adds rows to the vocabulary: only it has the names of the new tokens. A
    tokenizer that cannot be used is left out with a warning.

    Args:
        metadata: metadata of the model without the adapter.
        adapter: adapter from `open_adapter`.
        base: config of the model without the adapter.

    Raises:
        ValueError: the adapter's chat template is damaged.
    """
    if adapter.folder is None:
        return metadata
    if template := chat_template.read_folder(adapter.folder):  # the adapter was trained with it
        metadata = dataclasses.replace(metadata, chat_template=template)
    if adapter.config.vocab_size == base.vocab_size:
        return metadata
    try:
        tokenizer = tokenizer_in(adapter.folder)
        tokenizer = tokenizer and tokenizer.for_model(adapter.config.vocab_size)
    except (OSError, ValueError) as error:
        _log.warning("warning: the tokenizer of the adapter cannot be used: %s", one_line(error))
        return metadata
    if tokenizer is None:
        return metadata
    files = huggingface.tokenizer_files(adapter.folder)
    return dataclasses.replace(metadata, tokenizer_files=files).with_tokenizer(tokenizer)


def _table(config: ModelConfig) -> dict[str, name_table.Weight]:
    """The weights by peft's module names. As in peft, the unembedding of a tied model is a module of its own."""
    untied = dataclasses.replace(config, tied_embeddings=False)
    return {w.name.removesuffix(_WEIGHT): w for w in name_table.weights(untied, "huggingface")}


def _parts(tensors: Mapping[str, LazyTensor], table: Mapping[str, name_table.Weight], where: str) -> dict[str, Any]:
    """The tensors by module and part, in the order of the table.

    Raises:
        ValueError: a tensor does not belong to any module of this model.
        ConfigError: a tensor is a bias, which is not supported.
    """
    known: dict[str, tuple[str, str]] = {}
    for module, weight in table.items():
        matrix = _MATRIX_ENDS | (_EMBED_ENDS if module == _EMBED else _LINEAR_ENDS) if len(weight.shape) == 2 else {}
        known |= {_ROOT + module + end: (module, part) for end, part in (matrix | _WHOLE_ENDS).items()}
    found: dict[str, dict[str, _Part]] = {}
    for name, tensor in tensors.items():
        if name not in known:
            near = nearest(name[:200], [full for full in known if full.endswith(tuple(_LINEAR_ENDS))])
            raise ValueError(f"{where}: tensor {name[:200]!r} does not belong to a module of this model{near}")
        module, part = known[name]
        if part == _BIAS:
            raise ConfigError(f"{where}: {name!r} is a bias, which a Llama does not have: train with lora_bias=False")
        found.setdefault(module, {})[part] = _Part(name, tensor)
    return {module: found[module] for module in table if module in found}


def _check_agreement(parts: _Parts, settings: PeftSettings, config: ModelConfig, where: str) -> None:
    """Raises an error for tensors that the config does not name, and for settings whose tensors are missing."""
    targets = settings.targets
    if targets is not None and settings.ensure_tied and config.tied_embeddings and not targets.isdisjoint(_VOCABULARY):
        targets = {*targets, *_VOCABULARY}
    adapted = [module for module, its in parts.items() if _A in its or _B in its]
    for module in adapted:
        if targets is not None and module not in targets:
            name = next(parts[module][part].name for part in (_A, _B) if part in parts[module])
            raise ValueError(
                f"{where}: it has the tensor {name}, but target_modules of {CONFIG} does not name its module"
            )
    wanted = [module for module in _table(config) if module in {*adapted, *(targets or ())}]
    needed = (_A, _B, _MAGNITUDE) if settings.dora else (_A, _B)
    missing = [_full_name(m, part) for m in wanted for part in needed if part not in parts.get(m, {})]
    if missing:
        raise ValueError(f"{where}: missing {len(missing)} tensors, the first {missing[0]!r}")
    for its in parts.values():
        if _MAGNITUDE in its and not settings.dora:
            raise ValueError(f"{where}: {its[_MAGNITUDE].name} belongs to DoRA, but use_dora of {CONFIG} is false")
    for key, named, part in (
        ("modules_to_save", settings.whole, _WHOLE),
        ("trainable_token_indices", settings.token_ids, _ROWS),
    ):
        there = {module for module, its in parts.items() if part in its}
        if config.tied_embeddings and not there.isdisjoint(_VOCABULARY):
            there |= {*_VOCABULARY}  # the tensor of either may be stored for both
        ends = {end for module in there for inside in _containers(module) for end in peft_config.ends(inside)}
        if absent := [name for name in named if name not in ends]:
            what = "weight is" if part == _WHOLE else "rows are"
            raise ConfigError(f"{where}: {key} of {CONFIG} names {brief(absent[0])}, whose {what} missing")
    if not any(part in its for its in parts.values() for part in (_A, _WHOLE, _ROWS)):
        raise ConfigError(f"{where}: none of its tensors belongs to a module of this model")


def _containers(module: str) -> Iterable[str]:
    """The module and those that it is a part of: a.b.c, a.b and a."""
    words = module.split(".")
    return (".".join(words[: i + 1]) for i in range(len(words)))


def _full_name(module: str, part: str) -> str:
    ends = _MATRIX_ENDS | (_EMBED_ENDS if module == _EMBED else _LINEAR_ENDS)
    return _ROOT + module + next(end for end, its in ends.items() if its == part)


def _with_tied_tokens(parts: dict[str, Any], settings: PeftSettings) -> PeftSettings:
    """The settings for tied embeddings, in which rows trained in the embedding are also rows of the unembedding.

    LoRA on the unembedding unties the two. Its base then has these rows, which are added to `parts`.
    """
    ids = _ids(_EMBED, settings)
    if not ids or _ids(_UNEMBED, settings):
        return settings
    embed, unembed = parts.get(_EMBED, {}), parts.get(_UNEMBED, {})
    if _ROWS in embed and _A in unembed:
        unembed.setdefault(_ROWS, embed[_ROWS])
    return settings._replace(token_ids={**settings.token_ids, _UNEMBED: ids})


def _ids(module: str, settings: PeftSettings) -> tuple[int, ...]:
    """The trained token ids of a module, in the order of its rows; () if the config names none."""
    return next((settings.token_ids[end] for end in peft_config.ends(module) if end in settings.token_ids), ())


def _config_with(parts: _Parts, settings: PeftSettings, config: ModelConfig, where: str) -> ModelConfig:
    """The config of the model with the adapter, which may have a larger vocabulary or untied embeddings.

    Raises:
        ConfigError: the adapter has new tokens, but lacks their rows in the embedding or in the unembedding.
    """
    sizes = {}
    for module in _VOCABULARY:
        its = parts.get(module, {})
        size = its[_WHOLE].tensor.shape[0] if _WHOLE in its and its[_WHOLE].tensor.shape else config.vocab_size
        new = sorted(i for i in _ids(module, settings) if i >= size) if _ROWS in its else []
        if new != list(range(size, size + len(new))):
            raise ConfigError(
                f"{where}: it has a row for token {new[-1]}, but the base has {size} rows, and some rows from "
                f"{size} on are missing: give a base with resized embeddings (transformers: resize_token_embeddings)"
            )
        sizes[module] = size + len(new)
    if config.tied_embeddings and _stays_tied(parts, config):
        return dataclasses.replace(config, vocab_size=sizes[_EMBED])
    if sizes[_EMBED] != sizes[_UNEMBED]:
        raise ConfigError(
            f"{where}: with the adapter {_EMBED} has {sizes[_EMBED]} rows and {_UNEMBED} has {sizes[_UNEMBED]}: save "
            "it from peft with save_embedding_layers=True, or give a base with resized embeddings"
        )
    return dataclasses.replace(config, vocab_size=sizes[_EMBED], tied_embeddings=False)


def _stays_tied(parts: _Parts, config: ModelConfig) -> bool:
    """True if the embeddings of a tied model remain tied with the adapter.

    peft wraps one of the two matrices and does not change the other. They remain tied if the adapter has equal weights
    for both, if the vocabulary was resized, or if only rows of the embedding are trained, which peft ties.
    """
    embed, unembed = parts.get(_EMBED, {}), parts.get(_UNEMBED, {})
    if _A in embed or _A in unembed or _ROWS in unembed:
        return False
    if _WHOLE in unembed:
        return _WHOLE in embed and equal(embed[_WHOLE].tensor, unembed[_WHOLE].tensor)
    if _WHOLE in embed:
        return _ROWS in embed or embed[_WHOLE].tensor.shape[:1] != (config.vocab_size,)
    return True


def _check_shapes(parts: _Parts, settings: PeftSettings, table: Mapping[str, name_table.Weight], where: str) -> None:
    """Raises a ValueError for a tensor whose shape or dtype does not match the model and the config."""
    for module, its in parts.items():
        shape = table[module].shape
        ids = _ids(module, settings)
        needed: dict[str, tuple[int, ...]] = {_WHOLE: shape}
        if len(shape) == 2:
            rank, (out, inner) = settings.lora[module].rank, shape
            pair = {_A: (rank, inner), _B: (out, rank), _MAGNITUDE: (out,)}
            if module == _EMBED:
                pair = {_A: (inner, rank), _B: (rank, out), _MAGNITUDE: (inner,)}
            needed |= {**pair, _ROWS: (len(ids), inner)}
        for part, (name, tensor) in its.items():
            if part == _COPY:
                continue
            if tensor.shape != needed[part]:
                raise ValueError(
                    f"{where}: {name} has shape {tensor.shape}, but {CONFIG} and the model need {needed[part]}"
                )
            if tensor.dtype not in FLOATS:
                raise ValueError(f"{where}: {name} is {tensor.dtype}; adapters must be {', '.join(map(str, FLOATS))}")


def _lora(module: str, its: Mapping[str, _Part], settings: PeftSettings) -> LazyLora:
    a, b, scale = its[_A].tensor, its[_B].tensor, np.array(settings.lora[module].scale, np.float32)
    if module == _EMBED:
        a, b = transposed(a), transposed(b)
    magnitude = _matrix_of(its[_MAGNITUDE].tensor, row=module == _EMBED) if settings.dora else None
    return LazyLora(a, b, of_array(lambda: scale, scale.dtype, ()), magnitude)


def _matrix_of(vector: LazyTensor, *, row: bool) -> LazyTensor:
    """A vector (n,) as a matrix (1, n) or (n, 1)."""

    def fill(out: np.ndarray, index: Index) -> None:
        np.copyto(out.reshape(-1), vector.read((index[row],)), casting="unsafe")

    shape = (1, *vector.shape) if row else (*vector.shape, 1)
    return dataclasses.replace(vector, shape=shape, fill=fill)


def save_adapter(
    folder: str | os.PathLike[str], config: ModelConfig, params: Params, *, base_model: str | None = None
) -> Path:
    """Saves the LoRA of params in peft's format. Every process of a run must call it.

    Args:
        folder: a new folder, or one without an adapter.
        config: the model's config.
        params: stacked or unrolled params in which some leaves are LoraTensors. a and b are saved in their dtype.
        base_model: name or path of the base model, which is written to adapter_config.json.

    Returns:
        The folder.

    Raises:
        ConfigError: no leaf is a LoraTensor, one has DoRA, or the folder already has an adapter.
    """
    lora = export.lora_of(config, params)
    if not lora:
        raise ConfigError(f"{folder} is not written: the params have no LoRA weights")
    return write_adapter(folder, Adapter(config, lora), base_model=base_model)


def write_adapter(
    folder: str | os.PathLike[str], adapter: Adapter, *, base_model: str | None, dropout: float = 0.0
) -> Path:
    """Writes LoRA's matrix pairs and trained rows in peft's format. Every process of a run must call it.

    Args:
        folder: a new folder, or one without an adapter.
        adapter: LoRA and rows. Adapters with whole weights or DoRA cannot be written.
        base_model: name or path of the base model, which is written to adapter_config.json.
        dropout: LoRA dropout rate of the training, which is written to adapter_config.json.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder already has an adapter, or this one has whole weights or DoRA.
    """
    folder = expanded(folder)
    taken = [name for name in (CONFIG, WEIGHTS) if (folder / name).exists()]
    if taken:
        raise ConfigError(f"{folder} already has {taken[0]}: give another folder, or remove it")
    if adapter.whole or any(lazy.magnitude is not None for lazy in adapter.lora.values()):
        what = "whole weights" if adapter.whole else "DoRA"
        raise ConfigError(f"{folder} is not written: an adapter with {what} cannot be saved; copy its folder instead")
    names = {weight.path: module for module, weight in _table(adapter.config).items()}
    scales = {names[path]: float(lazy.scale.read()) for path, lazy in adapter.lora.items()}
    tensors: dict[str, LazyTensor] = {}
    for path, lazy in adapter.lora.items():
        turned = transposed if path == EMBED else lambda tensor: tensor
        tensors |= {_full_name(names[path], _A): turned(lazy.a), _full_name(names[path], _B): turned(lazy.b)}
    tensors |= {_full_name(names[path], _ROWS): lazy.rows for path, lazy in adapter.rows.items()}
    if jax.process_count() > 1:  # all-gathers, which all processes do before the first one writes, and perhaps fails
        arrays = {name: tensor.read() for name, tensor in tensors.items()}
        tensors = {name: of_array(functools.partial(np.asarray, a), a.dtype, a.shape) for name, a in arrays.items()}
    if jax.process_index() > 0:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.save_file(folder / WEIGHTS, tensors, {"format": "pt"})
    ids = {names[path].rpartition(".")[2]: list(lazy.ids) for path, lazy in adapter.rows.items()}
    ranks = {names[path]: lazy.a.shape[0] for path, lazy in adapter.lora.items()}
    write_json(folder / CONFIG, _config_of(ranks, scales, list(names.values()), ids, base_model, dropout))
    return folder


def _config_of(
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    modules: Iterable[str],
    ids: Mapping[str, list[int]],
    base_model: str | None,
    dropout: float,
) -> dict[str, Any]:
    """The contents of adapter_config.json. Ranks and scales are by module, token ids by the last part of its name."""
    alphas = {module: _near_whole(scale * ranks[module]) for module, scale in scales.items()}
    r, lora_alpha = (collections.Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": dropout,
        "use_rslora": False,  # lora_alpha and alpha_pattern already give the scales
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != r},
        "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != lora_alpha},
        "target_modules": _shortest(ranks, modules),
        "trainable_token_indices": dict(ids) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def _shortest(adapted: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The value of target_modules. A last word of module names stands for all its modules if all of them have LoRA."""
    adapted = list(adapted)
    words = {module.rpartition(".")[2] for module in adapted}
    partial = {m.rpartition(".")[2] for m in modules if m not in adapted}
    return sorted(words - partial) + [m for m in adapted if m.rpartition(".")[2] in partial]


def _near_whole(value: float) -> int | float:
    """The nearest whole number if the value is within float32's rounding error of it, else the value itself."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-6) else value
