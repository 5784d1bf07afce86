"""A helper of the tests: checkpoint folders written by the formats' descriptions, and not by the code under test."""

import json
import struct

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64", "int8": "I8"}


def encode(tensors):
    """A safetensors file, written here by the format's description and not by the code under test."""
    header, data = {}, b""
    for name, array in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": _CODES[str(array.dtype)], "shape": array.shape, "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def old_config(config):
    scaling = config.rope_scaling
    values = {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tied_embeddings,
        "pretraining_tp": 1,
    }
    if scaling is not None:
        values["rope_scaling"] = {
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
            "rope_type": "llama3",
        }
    return values


def new_config(config):
    values = old_config(config)
    rope = values.pop("rope_scaling") or {"rope_type": "default"}
    return {**values, "rope_parameters": {**rope, "rope_theta": values.pop("rope_theta")}}


def make_folder(folder, config, tensors, *, shards=1):
    """A checkpoint folder; more than one shard makes an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(old_config(config)))
    names = list(tensors)
    if shards == 1:
        (folder / "model.safetensors").write_bytes(encode(tensors))
        return folder
    places = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for shard in set(places.values()):
        held = {name: tensors[name] for name in names if places[name] == shard}
        (folder / shard).write_bytes(encode(held))
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
