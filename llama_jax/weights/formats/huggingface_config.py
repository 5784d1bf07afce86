"""Conversion between Hugging Face's config.json and ModelConfig.

A setting that would change the model and is not implemented is an error that names it, because a model with wrong
settings still gives plausible outputs. A setting that changes nothing is accepted. Keys that are not listed here do not
change what transformers computes for model_type "llama", and are ignored.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import ModelConfig, RopeScaling
from llama_jax.errors import ConfigError, brief, nearest
from llama_jax.files import read_json
from llama_jax.weights.formats import compressed_tensors

# Fields of ModelConfig and their keys. Two more, num_key_value_heads and head_dim, may be absent.
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
# Settings that change a model, each with the values that do not. Null and absence never do. Most of them are keys of
# other architectures, which files of Llama's shape carry along with neutral values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "qkv_bias": (False,),
    "use_bias": (False,),
    "bias": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "clip_qkv": (False,),
    "alibi": (False,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "use_bidirectional_attention": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
_LLAMA3_VOCAB = 128_000
# Types of RoPE scaling that change nothing if their factor is 1, and the keys that then mean nothing either.
_UNSCALED = ("default", "linear", "dynamic", "yarn")
_UNSCALED_KEYS = ("factor", "beta_fast", "beta_slow")


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The ModelConfig of a folder's config.json, with `rope_theta` and `rope_scaling` or with `rope_parameters`.

    Raises:
        ConfigError: a setting is not implemented or missing.
        ValueError: the file does not exist or is not JSON.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    try:
        _check_effects(raw)
        return _config(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _config(raw: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json whose other settings have been checked."""
    missing = [key for key in _FIELDS.values() if raw.get(key) is None]
    if missing:
        raise ConfigError(f"lacks {', '.join(missing)}")
    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    kv_heads, head_dim = raw.get("num_key_value_heads"), raw.get("head_dim")
    if head_dim is None:
        if not _is_count(heads) or not _is_count(width) or width % heads:
            raise ConfigError(
                f"hidden_size={width!r} is not a multiple of num_attention_heads={heads!r}, so that head_dim must be "
                "given"
            )
        head_dim = width // heads
    tied = raw.get("tie_word_embeddings")
    theta, scaling = _rope(raw)
    return ModelConfig(
        **{field: raw[key] for field, key in _FIELDS.items()},
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=False if tied is None else tied,
    )


def _check_effects(raw: Mapping[str, Any]) -> None:
    """Raises ConfigError for a setting that changes the model and is not implemented."""
    if raw.get("model_type") is None:
        raise ConfigError("lacks model_type; only 'llama' is implemented")
    for key, neutral in _NEUTRAL.items():
        if raw.get(key) is not None and raw[key] not in neutral:
            allowed = " or ".join(map(json.dumps, neutral))
            raise ConfigError(f"{key}={_short(raw[key])} is not implemented; only {allowed} is")
    if _has_window(raw):
        raise ConfigError(
            f"sliding_window={_short(raw['sliding_window'])} is not implemented; only null, use_sliding_window=false "
            "or a window of at least max_position_embeddings is"
        )
    layers = raw.get("layer_types")
    kinds = ("full_attention", "sliding_attention")  # the second is full attention if its window is long enough
    if layers is not None and not (isinstance(layers, list) and all(layer in kinds for layer in layers)):
        raise ConfigError(f"layer_types={_short(layers)} is not implemented; only full_attention is")
    quantization = raw.get("quantization_config")
    if quantization is not None and compressed_tensors.is_mine(quantization):
        compressed_tensors.check(quantization)
    elif quantization and not _is_off(quantization):
        raise ConfigError(
            f"quantization_config={_short(quantization)} is not supported: use the model before quantization"
        )


def _has_window(raw: Mapping[str, Any]) -> bool:
    """True if attention is limited to a window that is shorter than the context."""
    window, positions = raw.get("sliding_window"), raw.get("max_position_embeddings")
    if window in (None, False, 0) or raw.get("use_sliding_window") is False:
        return False
    layers = raw.get("layer_types")
    if isinstance(layers, list) and layers and "sliding_attention" not in layers:
        return False
    return not (_is_count(window) and _is_count(positions) and window >= positions)


def _is_off(quantization: Any) -> bool:
    """True if a quantization_config quantizes nothing, like that of bitsandbytes when it is turned off."""
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "bitsandbytes":
        return False
    return not any(quantization.get(key) for key in ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"))


def export_config(config: ModelConfig) -> dict[str, Any]:
    """The entries of config.json for a model's shape, in the older form that every version of transformers reads."""
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


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_parameters` (newer files) or `rope_theta` and `rope_scaling`."""
    theta = raw.get("rope_theta")
    spellings: list[tuple[Any, RopeScaling | None]] = []
    for key in ("rope_parameters", "rope_scaling"):
        settings = raw.get(key)
        if settings is not None and not isinstance(settings, dict):
            raise ConfigError(f"{key} must be an object or null, got {_short(settings)}")
        if settings is not None:
            spellings.append((settings.get("rope_theta", theta), _scaling(settings, key)))
    spellings = spellings or [(theta, None)]
    if spellings[-1] != spellings[0] or (theta is not None and theta != spellings[0][0]):
        raise ConfigError("rope_parameters, rope_theta and rope_scaling contradict each other; keep one")
    theta, scaling = spellings[0]
    if theta is None and scaling is None and _is_count(raw["vocab_size"]) and raw["vocab_size"] < _LLAMA3_VOCAB:
        theta = 10_000.0  # configs of Llama 1 and 2 are older than the key
    if not isinstance(theta, (int, float)) or isinstance(theta, bool):
        raise ConfigError(f"rope_theta must be a number (500000.0 in Llama 3, 10000.0 in Llama 2), got {brief(theta)}")
    if not abs(theta) <= sys.float_info.max:
        raise ConfigError(f"rope_theta must be a finite number, got {brief(theta)}")
    return float(theta), scaling


def _scaling(settings: Mapping[str, Any], name: str) -> RopeScaling | None:
    """The scaling in `rope_scaling` or `rope_parameters`, which errors call `name`; None if nothing is scaled."""
    given = {key: value for key, value in settings.items() if value is not None and key != "rope_theta"}
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{name}: partial_rotary_factor other than 1.0 is not implemented")
    types = [given.pop(key) for key in ("rope_type", "type") if key in given] or ["default"]
    if types[0] in _UNSCALED and types[-1] == types[0] and given.get("factor", 1) == 1:
        given = {key: value for key, value in given.items() if key not in _UNSCALED_KEYS}
        types = ["default"]
    if types[0] not in ("default", "llama3") or types[-1] != types[0]:
        raise ConfigError(f"{name}: rope_type must be 'default' or 'llama3', got {json.dumps(types)[1:-1][:80]}")
    known = list(_SCALING.values()) if types[0] == "llama3" else []
    for key in given:
        if key not in known:
            raise ConfigError(f"{name}.{key} is not implemented for {types[0]!r}{nearest(key, known)}")
    missing = [key for key in known if key not in given]
    if missing:
        raise ConfigError(f"{name} lacks {', '.join(missing)}")
    return None if types[0] == "default" else _llama3_scaling(given, name)


def _llama3_scaling(given: Mapping[str, Any], name: str) -> RopeScaling:
    """Llama 3.1's scaling, from an object that has all its keys."""
    values = {field: given[key] for field, key in _SCALING.items()}
    original = values["original_max_seq_len"]
    if not isinstance(original, (int, float)) or isinstance(original, bool) or original < 1 or original % 1:
        raise ConfigError(f"{name}.original_max_position_embeddings must be a whole number, got {brief(original)}")
    factors = {
        k: float(v) if type(v) is int and abs(v) < 1 << 62 else v for k, v in values.items() if k.endswith("factor")
    }
    return RopeScaling(**factors, original_max_seq_len=int(original))


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _short(value: Any) -> str:
    """A value as JSON, cut to 80 characters."""
    return json.dumps(value)[:80]
