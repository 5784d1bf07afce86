"""PEFT's LoRA adapters: adapter_config.json beside adapter_model.safetensors, read and written as they are.

The layout is that of Hugging Face's peft (github.com/huggingface/peft, LoraConfig): each module that is adapted has two
tensors, base_model.model.MODULE.lora_A.weight (rank, in) and lora_B.weight (out, rank), and its weight becomes
W + scale * B A. Rotary pairs are halves, as they are here. What a config says and this code does not do is refused by
name, since it would change the numbers in silence.
"""

from __future__ import annotations

import collections
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError, brief, nearest
from llama_jax.files import read_json, write_json
from llama_jax.params import Params
from llama_jax.weights import export, hub_models, name_table
from llama_jax.weights.adapters import Adapter, Stored
from llama_jax.weights.formats import safetensors
from llama_jax.weights.tensor import FLOATS, LazyTensor, of_array

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_ROOT = "base_model.model."  # what peft's wrapper puts before the names of the model within
_A, _B = ".lora_A.weight", ".lora_B.weight"
_WEIGHT = ".weight"
# What would change the model, and the only value (beside null, false and what is empty) that is implemented.
_ONLY: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "layers_pattern": "layers",
    **dict.fromkeys(
        (
            "alora_invocation_tokens",
            "arrow_config",
            "fan_in_fan_out",
            "kasa_config",
            "layer_replication",
            "lora_bias",
            "modules_to_save",
            "monteclora_config",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
            "use_dora",
            "use_qalora",
        )
    ),
}
# Of training, of other modules than Llama's, or of the place where the adapter was made.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",
}
_READ = {
    "alpha_pattern",
    "exclude_modules",
    "init_lora_weights",
    "layers_to_transform",
    "lora_alpha",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
}
# The ways to begin that leave the base as it was; others (pissa, olora, ...) move part of it into the adapter.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_MOST = 1 << 31  # of a rank or an alpha
_NAME = re.compile(r"\^?[A-Za-z0-9_.]+\$?")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    if not (folder / CONFIG).is_file() or (folder / "checkpoints").is_dir():
        return False
    return all(path.name.startswith("adapter_") for path in folder.glob("*.safetensors"))


def base_of(folder: Path) -> str:
    """The model that an adapter was made for, as its config names it."""
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    return base if isinstance(base, str) and base.isprintable() and 0 < len(base) < 200 else "another model"


def open_adapter(folder: str | os.PathLike[str], config: ModelConfig) -> Adapter:
    """The adapter in a folder, or of an id on the hub, for a model of this config: its config, and headers of weights.

    `target_modules`, where it lists names, must agree with the tensors that there are. A regular expression is not run
    (one in a file that is not trusted may take for ever): the tensors say what is adapted.

    Raises:
        ConfigError: no adapter, a setting that is not implemented, or an adapter of another model.
        ValueError: a damaged file, or tensors that are not those that the config speaks of.
    """
    on_hub = hub_models.is_hub_id(str(folder))
    folder = hub_models.download_adapter(str(folder), (CONFIG, WEIGHTS)) if on_hub else Path(folder).expanduser()
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        absent = CONFIG if not (folder / CONFIG).is_file() else WEIGHTS
        raise ConfigError(
            f"adapter {str(folder)!r} has no {absent}: give a folder as peft writes it, with {CONFIG} and {WEIGHTS}, "
            "or its id on the Hugging Face hub (owner/name)"
        )
    where = str(folder / CONFIG)
    raw = read_json(folder / CONFIG)
    _check_config(raw, where)
    modules = {w.name.removesuffix(_WEIGHT): w for w in name_table.weights(config, "huggingface") if len(w.shape) == 2}
    embed, unembed = (name.removesuffix(_WEIGHT) for name in name_table.tied_names("huggingface"))
    targets = _targets(raw, where, modules, unembed)
    if targets is not None and embed in targets:
        raise ConfigError(f"{where}: LoRA of the embedding ({embed}) is not implemented")
    entries = safetensors.open_file(folder / WEIGHTS)
    del modules[embed]
    pairs = _pairs(entries, modules, targets, str(folder / WEIGHTS))
    ranks = _patterns(raw, "rank_pattern", where)
    alphas = _patterns(raw, "alpha_pattern", where)
    found: dict[name_table.Path, Stored] = {}
    for module, (a, b) in pairs.items():
        rank, out, inner = _matching(ranks, module, raw["r"]), *modules[module].shape
        for entry, shape, end in ((a, (rank, inner), _A), (b, (out, rank), _B)):
            name = f"{folder / WEIGHTS}: {_ROOT}{module}{end}"
            if entry.shape != shape:
                raise ValueError(f"{name} has shape {entry.shape}, but {CONFIG} and the model need {shape}")
            if entry.dtype not in FLOATS:
                raise ValueError(f"{name} is {entry.dtype}; adapters must be {', '.join(map(str, FLOATS))}")
        alpha = _matching(alphas, module, raw["lora_alpha"])
        found[modules[module].path] = Stored(a, b, _number(alpha / (rank**0.5 if raw.get("use_rslora") else rank)))
    return found


def save_adapter(
    folder: str | os.PathLike[str], config: ModelConfig, params: Params, *, base_model: str | None = None
) -> Path:
    """Write the LoRA updates of params as peft loads them. Several processes call it together.

    Args:
        folder: to make, or one without an adapter in it.
        config: of the model.
        params: its weights with LoraTensors among them, stacked or unrolled. a and b are written in their own dtype.
        base_model: the name or path of the model that they belong to, for those who load the adapter.

    Returns:
        The folder.

    Raises:
        ConfigError: no LoraTensor among the weights, one in the embedding's place, or an adapter is there already.
    """
    adapter = export.adapter_of(config, params)
    if not adapter or ("embed",) in adapter:
        what = "LoRA of the embedding is not implemented" if adapter else "these weights hold no LoRA"
        raise ConfigError(f"{folder} is not written: {what}")
    return write_adapter(folder, config, adapter, base_model=base_model)


def write_adapter(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    adapter: Adapter,
    *,
    base_model: str | None,
    dropout: float = 0.0,
) -> Path:
    """The same of updates by themselves; `dropout` is what they were trained with, for those who train on."""
    folder = Path(folder).expanduser()
    taken = [name for name in (CONFIG, WEIGHTS) if (folder / name).exists()]
    if taken:
        raise ConfigError(f"{folder} has {taken[0]} already: name another place, or remove it")
    names = {w.path: w.name.removesuffix(_WEIGHT) for w in name_table.weights(config, "huggingface")}
    scales = {names[path]: float(stored.scale.read()) for path, stored in adapter.items()}
    if jax.process_index() > 0:  # the first process writes; the others give it their parts, in the same order
        for stored in adapter.values():
            for entry in stored[:2]:
                for _ in entry.blocks():
                    pass
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {names[path]: stored.a.shape[0] for path, stored in adapter.items()}
    alphas = {module: _near_whole(scale * ranks[module]) for module, scale in scales.items()}
    r, lora_alpha = (collections.Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    tensors: dict[str, LazyTensor] = {}
    for path, stored in adapter.items():
        tensors |= {_ROOT + names[path] + _A: stored.a, _ROOT + names[path] + _B: stored.b}
    safetensors.save_file(folder / WEIGHTS, tensors, {"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": dropout,
        "use_rslora": False,  # scales are given as they are, by alphas
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != r},
        "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != lora_alpha},
        "target_modules": _shortest(ranks, names.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    write_json(folder / CONFIG, settings)
    return folder


def _check_config(raw: dict[str, Any], where: str) -> None:
    """Refuse what is not implemented, and numbers that are none."""
    known = sorted({*_ONLY, *_IGNORED, *_READ})
    for key, value in raw.items():
        off = value is None or value is False or value in ("", [], {})
        only = _ONLY.get(key)
        if key in _ONLY and not off and value not in (only, [only]):
            raise ConfigError(f"{where}: {key}={brief(value)} is not implemented; only {only or 'null'} is")
        if key not in known and not off:
            raise ConfigError(f"{where}: {brief(key)}={brief(value)} is not known here{nearest(key[:80], known)}")
    if raw.get("peft_type") != "LORA":
        raise ConfigError(f"{where} lacks peft_type; only LORA is implemented")
    if not isinstance(raw.get("use_rslora", False), (bool, type(None))):
        raise ConfigError(f"{where}: use_rslora must be true or false, got {brief(raw['use_rslora'])}")
    if raw.get("init_lora_weights") not in _INITS:
        raise ConfigError(
            f"{where}: init_lora_weights={brief(raw['init_lora_weights'])} moves part of the base into the adapter; "
            "save it from peft with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    _check_rank(raw.get("r"), f"{where}: r")
    _check_alpha(raw.get("lora_alpha"), f"{where}: lora_alpha")


def _check_rank(value: Any, what: str) -> None:
    if type(value) is not int or not 0 < value < _MOST:
        raise ConfigError(f"{what} must be a whole number above 0, got {brief(value)}")


def _check_alpha(value: Any, what: str) -> None:
    if type(value) not in (int, float) or not abs(value) < _MOST:  # false for NaN
        raise ConfigError(f"{what} must be a finite number, got {brief(value)}")


def _strings(value: Any, what: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{what} must be a list of names of modules, got {brief(value)}")
    return value


def _targets(raw: dict[str, Any], where: str, modules: Iterable[str], unembed: str) -> set[str] | None:
    """The modules that the config says are adapted, by peft's rules; None where only a regular expression says so."""
    given, without = raw.get("target_modules"), raw.get("exclude_modules") or []
    if given is None or isinstance(without, str) or (isinstance(given, str) and given != "all-linear"):
        return None
    excluded = set(_strings(without, f"{where}: exclude_modules"))
    if given == "all-linear":
        embed = name_table.tied_names("huggingface")[0].removesuffix(_WEIGHT)
        found = {module for module in modules if module not in (embed, unembed)}
    else:
        names = set(_strings(given, f"{where}: target_modules"))
        found = {module for module in modules if not names.isdisjoint(_ends(module))}
    found = {module for module in found if excluded.isdisjoint(_ends(module))}
    layers = raw.get("layers_to_transform")
    if layers is None or layers == []:
        return found
    numbers = layers if isinstance(layers, list) else [layers]
    if not all(type(number) is int for number in numbers):
        raise ConfigError(f"{where}: layers_to_transform must be whole numbers, got {brief(layers)}")
    wanted = set(map(str, numbers))
    return {module for module in found if wanted & set(module.split("."))}


def _ends(module: str) -> list[str]:
    """The names that a module goes by: a.b.c, b.c and c."""
    words = module.split(".")
    return [".".join(words[i:]) for i in range(len(words))]


def _pairs(
    entries: Mapping[str, LazyTensor], modules: Mapping[str, name_table.Weight], targets: set[str] | None, where: str
) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    """lora_A and lora_B by module, in the order of the table; a tensor too few or too many is named."""
    known = {_ROOT + module + end for module in modules for end in (_A, _B)}
    for name in entries:
        if name not in known:
            if "lora_embedding_" in name or "lora_magnitude_vector" in name:
                raise ConfigError(f"{where}: {name[:200]!r} is of an embedding or of DoRA, which are not implemented")
            if name.endswith(".base_layer.weight"):
                raise ConfigError(
                    f"{where}: {name[:200]!r} is a whole weight of the base; save it from peft with "
                    "save_embedding_layers=False"
                )
            raise ValueError(f"{where}: {name[:200]!r} has no place in this model{nearest(name[:200], sorted(known))}")
    there = {module for module in modules for end in (_A, _B) if _ROOT + module + end in entries}
    for module in modules:
        if module in there and targets is not None and module not in targets:
            raise ValueError(f"{where}: {_ROOT}{module}{_A} is there, but target_modules of {CONFIG} leaves it out")
    wanted = [module for module in modules if module in there | (targets or set())]
    missing = [_ROOT + module + end for module in wanted for end in (_A, _B) if _ROOT + module + end not in entries]
    if missing:
        raise ValueError(f"{where}: missing {len(missing)} tensors, the first {missing[0]!r}")
    if not wanted:
        raise ConfigError(f"{where}: it adapts nothing that this model has")
    return {module: (entries[_ROOT + module + _A], entries[_ROOT + module + _B]) for module in wanted}


def _patterns(raw: dict[str, Any], key: str, where: str) -> dict[str, tuple[int, int | float]]:
    """rank_pattern or alpha_pattern: places in it and numbers, by names of modules. Expressions are not run."""
    given = raw.get(key) or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: {key} must be an object, got {brief(given)}")
    for name, value in given.items():
        if not _NAME.fullmatch(name.replace("\\.", ".")):
            raise ConfigError(
                f"{where}: {key} has {brief(name)}; expressions are not run here: write names, such as 'q_proj' or "
                "'model.layers.0.self_attn.q_proj'"
            )
        (_check_rank if key == "rank_pattern" else _check_alpha)(value, f"{where}: {key}[{brief(name)}]")
    return {name.replace("\\.", ".").removesuffix("$"): (i, value) for i, (name, value) in enumerate(given.items())}


def _matching(patterns: Mapping[str, tuple[int, int | float]], module: str, default: int | float) -> int | float:
    """The number of the first name that is this module or its end (whole with ^ before it), else the default."""
    found = [patterns[name] for name in (f"^{module}", *_ends(module)) if name in patterns]
    return min(found)[1] if found else default


def _shortest(adapted: Iterable[str], modules: Iterable[str]) -> list[str]:
    """target_modules: last words of names where every module of that word is adapted, else whole names."""
    adapted = list(adapted)
    words = {module.rpartition(".")[2] for module in adapted}
    partial = {m.rpartition(".")[2] for m in modules if m not in adapted}
    return sorted(words - partial) + [m for m in adapted if m.rpartition(".")[2] in partial]


def _number(value: float) -> LazyTensor:
    array = np.float32(value)
    return of_array(lambda: array, np.dtype(np.float32), ())


def _near_whole(value: float) -> int | float:
    """The whole number that a float32 product stands for, if it is one."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-6) else value
