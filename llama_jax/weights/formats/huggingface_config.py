"""Hugging Face's config.json as a ModelConfig, read and written.

A setting that would change the model and is not implemented is refused by name: a model that runs with the wrong
settings looks like one that runs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from llama_jax.config import ModelConfig, RopeScaling
from llama_jax.errors import ConfigError, brief, nearest
from llama_jax.files import read_json

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
_LLAMA3_VOCAB = 128_000


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


def export_config(config: ModelConfig) -> dict[str, Any]:
    """The shape of a model as config.json has it, in the older spelling that every version of transformers reads."""
    scaling = config.rope_scaling
    named = None if scaling is None else {key: getattr(scaling, field) for field, key in _SCALING.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, field) for field, key in _FIELDS.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if named is None else {"rope_type": "llama3", **named},
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


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
