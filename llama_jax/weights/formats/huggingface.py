"""Hugging Face model folders: config.json, safetensors and generation_config.json, read and written as they are.

Nothing is converted beforehand. What a config says and this code does not do is refused by name, since a model that
runs with the wrong physics looks like one that runs.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_jax.config import ModelConfig, RopeScaling
from llama_jax.errors import ConfigError, brief, nearest
from llama_jax.files import MAX_BYTES, read_json, read_small, write_json
from llama_jax.sampling_params import GREEDY, SamplingParams
from llama_jax.weights import name_table
from llama_jax.weights.formats import safetensors
from llama_jax.weights.load import main_dtype
from llama_jax.weights.tensor import LazyTensor

# Ours to theirs. `num_key_value_heads` and `head_dim` may be absent; theirs say how they then follow.
_FIELDS = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
}
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}
# What would change the model, and the only value (beside null or absence) that is implemented.
_ONLY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
}
_log = logging.getLogger(__name__)
_LLAMA3_VOCAB = 128_000
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_TOKENIZER_BYTES = 32_000_000  # of each of them
# What generation_config.json may say of sampling, by the same names here.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The ModelConfig of a folder's config.json, with `rope_theta` and `rope_scaling` or with `rope_parameters`.

    Raises:
        ConfigError: something in it that is not implemented, or that is needed and absent.
        ValueError: no such file, or not JSON.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    if raw.get("model_type") is None:
        raise ConfigError(f"{path} lacks model_type; only 'llama' is implemented")
    for key, only in _ONLY.items():
        if raw.get(key) is not None and raw[key] != only:
            given = json.dumps(raw[key])[:80]
            raise ConfigError(f"{path}: {key}={given} is not implemented; only {json.dumps(only)} is")
    if raw.get("quantization_config"):
        given = json.dumps(raw["quantization_config"])[:80]
        raise ConfigError(f"{path}: quantization_config={given} is not implemented: take the model it was made from")
    missing = [theirs for theirs in _FIELDS.values() if raw.get(theirs) is None]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}")
    heads = raw["num_attention_heads"]
    kv_heads, head_dim = raw.get("num_key_value_heads"), raw.get("head_dim")
    if head_dim is None:
        if not _whole(heads) or not _whole(raw["hidden_size"]) or raw["hidden_size"] % heads:
            raise ConfigError(
                f"{path}: hidden_size={raw['hidden_size']!r} is not a multiple of num_attention_heads={heads!r}, "
                "so that head_dim must be given"
            )
        head_dim = raw["hidden_size"] // heads
    tied = raw.get("tie_word_embeddings")
    try:
        theta, scaling = _rope(raw)
        return ModelConfig(
            **{ours: raw[theirs] for ours, theirs in _FIELDS.items()},
            num_kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=False if tied is None else tied,
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def bos_token(folder: str | os.PathLike[str]) -> int | None:
    """`bos_token_id` of config.json, or None where it says none."""
    token = read_json(Path(folder) / "config.json").get("bos_token_id")
    return token if type(token) is int and 0 <= token < 1 << 31 else None


def stop_tokens(folder: str | os.PathLike[str]) -> tuple[int, ...]:
    """The ids that end a generation: `eos_token_id` of generation_config.json, else of config.json, else none.

    Llama 3.1's instruct models have three (128001, 128008, 128009), in generation_config.json.
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        ids = read_json(path).get("eos_token_id") if path.is_file() else None
        if ids is None:
            continue
        listed = ids if isinstance(ids, list) else [ids]
        if not all(type(i) is int and i >= 0 for i in listed):
            raise ConfigError(f"{path}: eos_token_id must be an id or a list of ids, got {str(ids)[:80]}")
        return tuple(dict.fromkeys(listed))
    return ()


def sampling_defaults(folder: str | os.PathLike[str]) -> SamplingParams | None:
    """How generation_config.json would have the model sampled (`do_sample`), or None where it does not say.

    What it leaves out is off. (transformers would also keep only the 50 likeliest tokens, which Meta does not.)
    """
    path = Path(folder) / "generation_config.json"
    raw = read_json(path) if path.is_file() else {}
    if raw.get("do_sample") is False:
        return GREEDY
    if not raw.get("do_sample"):
        return None
    found = {name: raw[name] for name in _SAMPLING if raw.get(name) is not None}
    try:
        return SamplingParams(**{"temperature": 1.0, "top_p": 1.0, **found})
    except ConfigError as error:  # the model is sound without them
        _log.warning("warning: %s: %s: its settings are passed over", path, error)
        return None


def tokenizer_files(folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """What transformers reads of a folder's tokenizer, whatever its kind.

    A link may lead to another file of the folder, or of a hub cache's blobs; what leads elsewhere is no part of it.
    """
    folder = Path(folder).resolve()
    homes = {folder, folder.parent.parent / "blobs"}
    paths = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    return tuple(p for p in paths if p.resolve().parent in homes and p.stat().st_size <= _TOKENIZER_BYTES)


def chat_template(folder: str | os.PathLike[str]) -> str | None:
    """The model's own chat template (Jinja), or None: chat_template.jinja, else what tokenizer_config.json has."""
    path = Path(folder) / "chat_template.jinja"
    if path.is_file() and path.stat().st_size <= MAX_BYTES:
        return read_small(path).decode("utf-8", errors="replace")
    path = Path(folder) / "tokenizer_config.json"
    found = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(found, list):  # several by name, as older files have them
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def export_config(
    config: ModelConfig, *, stop_tokens: tuple[int, ...] = (), bos_token: int | None = None
) -> dict[str, Any]:
    """The config.json of a model, in the older spelling, which every version of transformers reads."""
    scaling = config.rope_scaling
    named = None if scaling is None else {t: getattr(scaling, ours) for ours, t in _SCALING.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if named is None else {"rope_type": "llama3", **named},
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": bos_token,
        "eos_token_id": _one_or_all(stop_tokens),
    }


def save_folder(
    folder: Path,
    config: ModelConfig,
    leaves: name_table.Leaves,
    *,
    stop_tokens: tuple[int, ...],
    bos_token: int | None,
    sampling: SamplingParams | None,
    shard_bytes: int,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Write what transformers (and this file) reads: weights, config.json and generation_config.json.

    A block of one tensor at a time is in memory. config.json comes last, so that a folder without one is not whole.

    Args:
        folder: there already, without safetensors files.
        config: of the model.
        leaves: its tensors by path, in the dtypes that they are to have.
        stop_tokens: ids that end a generation.
        bos_token: the id that begins a text.
        sampling: settings that the model suggests.
        shard_bytes: start another file rather than exceed it.
        progress: told how many more bytes were written.
    """
    shards: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for weight in name_table.weights(config, "huggingface"):
        leaf = leaves[weight.path]
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][weight.name] = weight.theirs(leaf)
        filled += size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        safetensors.save_file(folder / name, shard, {"format": "pt"}, progress=progress)
    if len(shards) > 1:
        places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(math.prod(e.shape) * e.dtype.itemsize for shard in shards for e in shard.values())
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    generation: dict[str, Any] = {"bos_token_id": bos_token, "eos_token_id": _one_or_all(stop_tokens)}
    if sampling is not None:
        drawn = sampling.temperature > 0
        generation |= {"do_sample": drawn, **({name: getattr(sampling, name) for name in _SAMPLING} if drawn else {})}
    write_json(folder / "generation_config.json", generation)
    exported = export_config(config, stop_tokens=stop_tokens, bos_token=bos_token)
    write_json(folder / "config.json", {**exported, "torch_dtype": str(main_dtype(leaves))})


def _rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from `rope_parameters` (newer) or `rope_theta` and `rope_scaling`."""
    theta, found = raw.get("rope_theta"), []
    for key in ("rope_parameters", "rope_scaling"):
        given = raw.get(key)
        if given is not None and not isinstance(given, dict):
            raise ConfigError(f"{key} must be an object or null, got {json.dumps(given)[:80]}")
        if given is not None:
            found.append((given.get("rope_theta", theta), _scaling(given, key)))
    found = found or [(theta, None)]
    if found[-1] != found[0] or (theta is not None and theta != found[0][0]):
        raise ConfigError("rope_parameters, rope_theta and rope_scaling contradict each other; keep one")
    theta, scaling = found[0]
    if theta is None and scaling is None and _whole(raw["vocab_size"]) and raw["vocab_size"] < _LLAMA3_VOCAB:
        theta = 10_000.0  # configs of Llama 1 and 2 are older than the key
    if not isinstance(theta, (int, float)) or isinstance(theta, bool):
        raise ConfigError(f"rope_theta must be a number (500000.0 in Llama 3, 10000.0 in Llama 2), got {brief(theta)}")
    if not abs(theta) <= sys.float_info.max:
        raise ConfigError(f"rope_theta must be a finite number, got {brief(theta)}")
    return float(theta), scaling


def _scaling(given: dict[str, Any], where: str) -> RopeScaling | None:
    given = {key: value for key, value in given.items() if value is not None and key != "rope_theta"}
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{where}: partial_rotary_factor other than 1.0 is not implemented")
    kinds = [given.pop(key) for key in ("rope_type", "type") if key in given] or ["default"]
    if kinds[0] not in ("default", "llama3") or kinds[-1] != kinds[0]:
        raise ConfigError(f"{where}: rope_type must be 'default' or 'llama3', got {json.dumps(kinds)[1:-1][:80]}")
    known = list(_SCALING.values()) if kinds[0] == "llama3" else []
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}.{key} is not implemented for {kinds[0]!r}{nearest(key, known)}")
    missing = [key for key in known if key not in given]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")
    if kinds[0] == "default":
        return None
    values = {ours: given[theirs] for ours, theirs in _SCALING.items()}
    original = values["original_max_seq_len"]
    if not isinstance(original, (int, float)) or isinstance(original, bool) or original < 1 or original % 1:
        raise ConfigError(f"{where}.original_max_position_embeddings must be a whole number, got {brief(original)}")
    factors = {
        k: float(v) if type(v) is int and abs(v) < 1 << 62 else v for k, v in values.items() if k.endswith("factor")
    }
    return RopeScaling(**factors, original_max_seq_len=int(original))


def _whole(value: Any) -> bool:
    return type(value) is int and value > 0


def _one_or_all(ids: tuple[int, ...]) -> int | list[int] | None:
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)
