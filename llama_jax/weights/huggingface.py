"""Hugging Face model folders: config.json, safetensors and generation_config.json, read and written as they are.

Nothing is converted beforehand. What a config says and this code does not do is refused by name, since a model that
runs with the wrong physics looks like one that runs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ConfigError, ModelConfig, RopeScaling, nearest
from llama_jax.model import Params, check_params, logical_axes
from llama_jax.parallel import Layout
from llama_jax.weights import layout as table
from llama_jax.weights import safetensors
from llama_jax.weights.safetensors import TensorEntry
from llama_jax.weights.transform import is_stacked

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
    "quantization_config": None,
}
_FLOATS = (np.dtype(jnp.bfloat16), np.dtype(np.float16), np.dtype(np.float32))
_SHARD_BYTES = 5_000_000_000


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The ModelConfig of a folder's config.json, with `rope_theta` and `rope_scaling` or with `rope_parameters`.

    Raises:
        ConfigError: something in it that is not implemented, or that is needed and absent.
        ValueError: no such file, or not JSON.
    """
    path = Path(folder) / "config.json"
    raw = safetensors.read_json(path)
    if raw.get("model_type") is None:
        raise ConfigError(f"{path} lacks model_type; only 'llama' is implemented")
    for key, only in _ONLY.items():
        if raw.get(key) is not None and raw[key] != only:
            given = json.dumps(raw[key])[:80]
            raise ConfigError(f"{path}: {key}={given} is not implemented; only {json.dumps(only)} is")
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
    token = safetensors.read_json(Path(folder) / "config.json").get("bos_token_id")
    return token if type(token) is int else None


def stop_tokens(folder: str | os.PathLike[str]) -> tuple[int, ...]:
    """The ids that end a generation: `eos_token_id` of generation_config.json, else of config.json, else none.

    Llama 3.1's instruct models have three (128001, 128008, 128009), in generation_config.json.
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        ids = safetensors.read_json(path).get("eos_token_id") if path.is_file() else None
        if ids is None:
            continue
        listed = ids if isinstance(ids, list) else [ids]
        if not all(type(i) is int and i >= 0 for i in listed):
            raise ConfigError(f"{path}: eos_token_id must be an id or a list of ids, got {str(ids)[:80]}")
        return tuple(dict.fromkeys(listed))
    return ()


def tokenizer_path(folder: str | os.PathLike[str]) -> Path | None:
    """The folder's tokenizer.model (its own, or the one in Meta's original/), or None."""
    candidates = (Path(folder) / "tokenizer.model", Path(folder) / "original" / "tokenizer.model")
    return next((path for path in candidates if path.is_file()), None)


def load_params(
    folder: str | os.PathLike[str], config: ModelConfig, *, layout: Layout | None, dtype: jnp.dtype | None
) -> Params:
    """The weights of a folder in the unrolled layout, each read straight into its shards.

    Args:
        folder: holds model.safetensors or shards with their index.
        config: as `read_config` gave it.
        layout: where the shards go, or None for one device. A process reads only the parts its devices hold.
        dtype: to cast to, one tensor at a time; the file's own by default.

    Raises:
        ValueError: a tensor that is missing, unknown or of another shape or kind, before any is read.
    """
    entries = safetensors.open_folder(folder)
    return load_entries(entries, config, format="huggingface", source=str(folder), layout=layout, dtype=dtype)


def load_entries(
    entries: Mapping[str, TensorEntry],
    config: ModelConfig,
    *,
    format: str,
    source: str,
    layout: Layout | None,
    dtype: jnp.dtype | None,
) -> Params:
    """`load_params` of any format whose tensors are at hand as entries; `source` is what errors call them."""
    weights = table.weights(config, format)
    _check_entries(entries, weights, config, source, dtype)
    axes = logical_axes(config, stacked=False)

    def load(weight: table.Weight) -> jax.Array:
        entry = entries[weight.name]
        to = entry.dtype if dtype is None else np.dtype(dtype)
        if layout is None:
            place: jax.sharding.Sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        else:
            place = layout.sharding(table.get(axes, weight.path), weight.shape)
        parts: dict[str, np.ndarray] = {}  # devices that hold the same part share one read

        def part(index: tuple[slice, ...]) -> np.ndarray:
            if str(index) not in parts:
                rows = weight.rows(index[0])
                view = entry.read(index) if rows is None else entry.read((slice(None), *index[1:]))[rows]
                parts[str(index)] = _private(view, to)
            return parts[str(index)]

        return jax.make_array_from_callback(weight.shape, place, part)

    return table.build(config, ((weight.path, load(weight)) for weight in weights))


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
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    dtype: jnp.dtype,
    stop_tokens: tuple[int, ...] = (),
    bos_token: int | None = None,
    max_shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write a folder that transformers (and `load_params`) reads: weights, config.json and generation_config.json.

    One tensor at a time is on the host. config.json comes last, so that a folder without one is not whole.

    Args:
        folder: made if need be; must hold no safetensors files yet.
        config: of the params.
        params: stacked or unrolled, on this process's devices.
        dtype: of the files: bfloat16, float16 or float32.
        stop_tokens: ids that end a generation.
        bos_token: the id that begins a text.
        max_shard_bytes: start another file rather than exceed it.

    Raises:
        ConfigError: params that are not of this config, or a dtype that is not one of the three.
        ValueError: the folder has weights already.
    """
    folder, dtype = Path(folder), np.dtype(dtype)
    if dtype not in _FLOATS:
        raise ConfigError(f"dtype must be one of {', '.join(map(str, _FLOATS))}, got {dtype}")
    check_params(config, params)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has safetensors files already: name another folder, or remove them")
    shards: list[dict[str, TensorEntry]] = [{}]
    filled = 0
    for name, entry in _entries(config, params, dtype):
        size = math.prod(entry.shape) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        safetensors.save_file(folder / name, shard, {"format": "pt"})
    if len(shards) > 1:
        places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(math.prod(e.shape) for shard in shards for e in shard.values()) * dtype.itemsize
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": places},
        )
    ids = {"bos_token_id": bos_token, "eos_token_id": _one_or_all(stop_tokens)}
    _write_json(folder / "generation_config.json", ids)
    exported = export_config(config, stop_tokens=stop_tokens, bos_token=bos_token)
    _write_json(folder / "config.json", {**exported, "torch_dtype": str(dtype)})


def _entries(config: ModelConfig, params: Params, dtype: np.dtype) -> Iterator[tuple[str, TensorEntry]]:
    """Each weight under its published name; its array comes to the host only when it is asked for."""
    stacked = is_stacked(params)
    for weight in table.weights(config, "huggingface"):

        def array(path: table.Path = weight.path) -> np.ndarray:
            if stacked and path[0] == "layers":
                return np.asarray(table.get(params["layers"], path[2:])[path[1]]).astype(dtype)
            return np.asarray(table.get(params, path)).astype(dtype)

        yield weight.name, TensorEntry(dtype, weight.shape, array)


def _check_entries(
    entries: Mapping[str, TensorEntry],
    weights: tuple[table.Weight, ...],
    config: ModelConfig,
    source: str,
    dtype: jnp.dtype | None,
) -> None:
    known = {weight.name: weight for weight in weights}
    missing = [name for name in known if name not in entries]
    extra = [name for name in entries if name not in known and not name.endswith(table.BUFFERS)]
    unembed, embed = ("lm_head.weight", "model.embed_tokens.weight")
    if config.tied_embeddings and unembed in extra and embed in entries:
        if not _equal(entries[unembed], entries[embed]):
            raise ValueError(
                f"{source}: {unembed} differs from {embed}, but the config ties them (tie_word_embeddings=true)"
            )
        extra.remove(unembed)
    if missing:
        near = nearest(missing[0], extra)
        tie = " (is the model tied? its config says tie_word_embeddings=false)" if missing == [unembed] else ""
        raise ValueError(f"{source}: missing {len(missing)} tensors, the first {missing[0]!r}{tie}{near}")
    if extra:
        near = nearest(extra[0], list(known))
        raise ValueError(
            f"{source}: {len(extra)} tensors that this config has no place for, the first {extra[0]!r}{near}"
        )
    for name, weight in known.items():
        entry = entries[name]
        if entry.shape != weight.shape:
            raise ValueError(f"{source}: {name} has shape {entry.shape}, but the config needs {weight.shape}")
        if entry.dtype not in _FLOATS and not (entry.dtype == np.float64 and dtype is not None):
            allowed = ", ".join(map(str, _FLOATS))
            raise ValueError(f"{source}: {name} is {entry.dtype}; weights must be {allowed} (or float64 with a dtype)")


def _equal(a: TensorEntry, b: TensorEntry) -> bool:
    """Bitwise, a thousand rows at a time."""
    if a.shape != b.shape or a.dtype != b.dtype or not a.shape:
        return False
    x, y = a.read(), b.read()
    return all(x[i : i + 1024].tobytes() == y[i : i + 1024].tobytes() for i in range(0, a.shape[0], 1024))


def _private(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy in `dtype` of a part of a file, on the boundary that lets jax take it over on a CPU without another.

    Never the view itself: jax would keep an aligned one as its buffer, and the file could change under it.
    """
    size = view.size * dtype.itemsize
    pool = np.empty(size + 64, np.uint8)
    start = -pool.ctypes.data % 64
    copy = pool[start : start + size].view(dtype).reshape(view.shape)
    np.copyto(copy, view, casting="unsafe")
    return copy


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
    if not isinstance(theta, (int, float)) or isinstance(theta, bool):
        raise ConfigError(f"rope_theta must be a number (500000.0 in Llama 3, 10000.0 in Llama 2), got {theta!r}")
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
    if not _whole(values["original_max_seq_len"]):
        raise ConfigError(f"{where}.original_max_position_embeddings must be a whole number above 0")
    return RopeScaling(**{k: float(v) if type(v) is int and k.endswith("factor") else v for k, v in values.items()})


def _whole(value: Any) -> bool:
    return type(value) is int and value > 0


def _one_or_all(ids: tuple[int, ...]) -> int | list[int] | None:
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
