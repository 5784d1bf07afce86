"""Llamas in GGUF files: reads the config and the vocabulary's data from the metadata, and writes whole files.

Keys are those of llama.cpp (gguf-py/gguf/constants.py). Keys that its converter leaves out have the values that
llama.cpp assumes. A setting that this code does not implement is an error that names it, because a model with a wrong
setting would still run. Imports no jax.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from llama_jax.config import ModelConfig, RopeScaling
from llama_jax.errors import ConfigError, brief, nearest
from llama_jax.text.chat_template import DEFAULT, ChatTemplate
from llama_jax.text.formats import gguf as gguf_vocabulary
from llama_jax.text.formats.gguf import Fields, fields_of, more_metadata
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.weights import name_table
from llama_jax.weights.formats import gguf_file
from llama_jax.weights.formats.gguf_blocks import BLOCKS
from llama_jax.weights.formats.gguf_file import GGUF, Value, shown
from llama_jax.weights.formats.gguf_rope import WIDEST, rope_factors, rope_scaling_of
from llama_jax.weights.model_files import Metadata, ModelFiles
from llama_jax.weights.tensor import LazyTensor, of_array

# Settings that change a model, each with the values that do not.
_NEUTRAL: dict[str, tuple[Value, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.type": ("none", "linear"),  # the next key has linear's factor
    "rope.scaling.factor": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scale_linear": (0, 1),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "pooling_type": (0,),
    "use_parallel_residual": (False,),
}
# Settings that are read, and settings that change nothing.
_READ = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
)
_HARMLESS = (
    "attention.layer_norm_epsilon",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
)
_FREQUENCIES = "rope_freqs.weight"
_log = logging.getLogger(__name__)
T = TypeVar("T")
_STOPS = ("eos", "eot", "eom")
_UNUSED = 5  # the type of an unused token (llama.h)
_TEMPLATE = "tokenizer.chat_template"
# Variables of chat templates, and the special tokens that they spell.
_TEMPLATE_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# The dtypes of saved matrices: their type in the file, and the value of general.file_type (llama.h).
DTYPES = {
    "float32": ("F32", 0),
    "float16": ("F16", 1),
    "bfloat16": ("BF16", 32),
    "q8_0": ("Q8_0", 7),
    "q4_0": ("Q4_0", 2),
}


def recognizes(path: Path) -> bool:
    """True for a GGUF file (by its first bytes or its name), and for a folder with one model in GGUF."""
    if path.is_file():
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF" or path.suffix == ".gguf"
    return _only_model(path) is not None


def read(path: Path) -> ModelFiles:
    """Reads the header of a GGUF file, or of the one in a folder.

    Raises:
        ConfigError: a setting is not implemented.
        ValueError: the file is damaged.
    """
    path = path if path.is_file() else _only_model(path) or path
    gguf = gguf_file.open_file(path)
    config, fields = read_config(gguf), vocabulary(gguf)
    metadata = Metadata(
        bos_token=bos_token(gguf),
        stop_tokens=stop_tokens(gguf),
        chat_template=chat_template(gguf),
    )
    description = f"GGUF version {gguf.version}"
    return ModelFiles(
        path,
        description,
        "gguf",
        config,
        gguf.entries,
        metadata,
        lambda: None if fields is None else Tokenizer.from_vocabulary(gguf_vocabulary.vocabulary(fields)),
    )


def _only_model(folder: Path) -> Path | None:
    """The GGUF file of a folder that has one, or the first of its parts; None if there are none or several."""
    files = sorted(folder.glob("*.gguf"))
    stems = {re.sub(r"-[0-9]{5}-of-[0-9]{5}$", "", file.stem) for file in files}
    return files[0] if len(stems) == 1 else None


def read_config(gguf: GGUF) -> ModelConfig:
    """The ModelConfig of a file.

    Raises:
        ConfigError: a setting that is not implemented, or one that is missing.
        ValueError: damaged RoPE frequencies.
    """
    architecture = gguf.metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(f"{gguf.path}: general.architecture is {shown(architecture)}; only 'llama' is implemented")
    given = {key.removeprefix("llama."): v for key, v in gguf.metadata.items() if key.startswith("llama.")}
    fields = _Fields(gguf.path, given)
    layers = fields.whole("block_count")
    if layers > len(gguf.entries):
        raise ConfigError(f"{gguf.path}: llama.block_count={layers}, but there are only {len(gguf.entries)} tensors")
    embed, heads = fields.whole("embedding_length"), fields.whole("attention.head_count", layers=layers)
    head_dim = _head_dim(fields, embed, heads)
    context = fields.whole("context_length")
    _check_effects(gguf.path, given, head_dim, context)
    theta = fields.number("rope.freq_base") if "rope.freq_base" in given else 10_000.0
    try:
        return ModelConfig(
            vocab_size=fields.whole("vocab_size") if "vocab_size" in given else _rows(gguf, "token_embd.weight"),
            embed_dim=embed,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=fields.whole("attention.head_count_kv", layers=layers, default=heads),
            head_dim=head_dim,
            ffn_dim=fields.whole("feed_forward_length", layers=layers),
            norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
            rope_theta=theta,
            rope_scaling=_scaling(gguf, theta=theta, head_dim=head_dim, context=context),
            max_seq_len=context,
            tied_embeddings="output.weight" not in gguf.entries,
        )
    except ConfigError as error:
        prefix = f"{gguf.path}: "
        raise ConfigError(prefix + str(error).removeprefix(prefix)) from None


def _head_dim(fields: _Fields, embed: int, heads: int) -> int:
    """The width of a head, which must be that of keys, of values and of the rotary dimensions."""
    path = fields.path
    head_dim = fields.whole("attention.key_length", default=embed // heads)
    if "attention.key_length" not in fields.given and embed % heads:
        raise ConfigError(
            f"{path}: llama.embedding_length={embed} is not a multiple of llama.attention.head_count={heads}, so "
            "that llama.attention.key_length must be given"
        )
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.whole(key, default=head_dim) != head_dim:
            raise ConfigError(
                f"{path}: llama.{key}={fields.given[key]}, but heads are {head_dim} wide; others are not implemented"
            )
    return head_dim


def _check_effects(path: Path, given: Mapping[str, Value], head_dim: int, context: int) -> None:
    """Raises ConfigError for a setting that changes the model and is not implemented.

    A key that is not known here is accepted if its value turns it off: zero, false, or an empty text or array.
    """
    for key, value in given.items():
        if key in _NEUTRAL:
            if not _is_neutral(key, value, head_dim, context):
                only = " or ".join(map(repr, _NEUTRAL[key]))
                raise ConfigError(f"{path}: llama.{key}={shown(value)} is not implemented; only {only} is")
        elif key not in (*_READ, *_HARMLESS) and np.any(value if isinstance(value, np.ndarray) else bool(value)):
            near = nearest(key, (*_READ, *_NEUTRAL))
            raise ConfigError(f"{path}: llama.{brief(key)[1:-1]} may change the model and is not implemented{near}")


def _is_neutral(key: str, value: Value, head_dim: int, context: int) -> bool:
    """True if a setting that can change the model changes nothing with this value."""
    if isinstance(value, np.ndarray):  # one value a layer
        return len(value) > 0 and all(_is_neutral(key, one, head_dim, context) for one in set(value.tolist()))
    if not isinstance(value, (str, bool, int, float)):
        return False
    if key == "attention.scale" and isinstance(value, float) and math.isclose(value, head_dim**-0.5, rel_tol=1e-6):
        return True  # llama.cpp's own default
    if key == "attention.sliding_window" and type(value) is int and value >= context:
        return True
    return value in _NEUTRAL[key]


def bos_token(gguf: GGUF) -> int | None:
    """The id that begins a text according to the file, or None."""
    return _id(gguf, "bos")


def stop_tokens(gguf: GGUF) -> tuple[int, ...]:
    """The ids that end a generation according to the file: end of text, of message and of turn."""
    ids = (_id(gguf, name) for name in ("eos", "eom", "eot"))
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def vocabulary(gguf: GGUF) -> Fields | None:
    """The fields of the tokenizer in a file, or None if it has none. Raises ValueError if they do not agree."""
    return fields_of(gguf.metadata, str(gguf.path))


def chat_template(gguf: GGUF) -> ChatTemplate | None:
    """The chat templates in a file's metadata, with the spelling of the tokens that they name, or None."""
    sources = {}
    for key in gguf.metadata:
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}."):
            sources[key.removeprefix(_TEMPLATE).removeprefix(".") or DEFAULT] = _typed(gguf, key, str) or ""
    if not sources:
        return None
    tokens = _typed(gguf, "tokenizer.ggml.tokens", list) or []
    ids = {name: _id(gguf, key) for name, key in _TEMPLATE_TOKENS.items()}
    return ChatTemplate(sources, {name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)})


def save_file(
    path: Path,
    config: ModelConfig,
    leaves: name_table.Leaves,
    *,
    dtype: str,
    vocabulary: Fields | None,
    name: str,
    stop_tokens: tuple[int, ...],
    bos_token: int | None,
    chat_template: ChatTemplate | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes a file that llama.cpp (and this module) reads. Some rows of one tensor at a time are in memory.

    Norms are always F32. In q4_0 a tied embedding is Q8_0, since rounding affects the unembedding most. A matrix whose
    rows are not a multiple of 32 cannot be quantized and is F16, as in llama.cpp.

    Args:
        path: path of the file.
        config: the model's shape.
        leaves: the tensors by path.
        dtype: dtype of the matrices: float32, float16, bfloat16, q8_0 or q4_0. Quantized tensors that are stored in
            this type are copied exactly.
        vocabulary: the tokenizer. Missing ids are filled with unused tokens, as llama.cpp's converter does.
        name: the model's name in the metadata (general.name).
        stop_tokens: ids that end a generation, at most three.
        bos_token: id that begins a text.
        chat_template: the model's own chat templates, or None.
        progress: called with the number of bytes that were written since the last call.

    Raises:
        ConfigError: the dtype or a property of the model cannot be stored in the format.
        ValueError: a number is not finite in the dtype.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}{nearest(dtype, list(DTYPES))}")
    eos_token = _eos_of(chat_template, vocabulary, stop_tokens)
    metadata = _metadata(config, dtype, name)
    metadata |= _tokenizer(config, vocabulary, stop_tokens, bos_token, eos_token)
    metadata |= _templates(chat_template)
    gguf_file.save_file(path, metadata, _tensors(config, leaves, dtype), progress=progress)


def _tensors(config: ModelConfig, leaves: name_table.Leaves, dtype: str) -> dict[str, tuple[LazyTensor, str]]:
    """The tensors of a file by name, each with the type to write."""
    kind, _ = DTYPES[dtype]
    shared = name_table.tied_names("gguf")[0] if config.tied_embeddings else None
    tensors: dict[str, tuple[LazyTensor, str]] = {}
    for weight in name_table.weights(config, "gguf"):
        to = "Q8_0" if kind == "Q4_0" and weight.name == shared else kind
        if to in BLOCKS and weight.shape[-1] % BLOCKS[to][0]:
            to = "F16"
        tensors[weight.name] = (weight.to_disk(leaves[weight.path]), to if len(weight.shape) > 1 else "F32")
    if config.rope_scaling is not None:
        factors = rope_factors(config.rope_scaling, theta=config.rope_theta, head_dim=config.head_dim)
        tensors[_FREQUENCIES] = (of_array(lambda: factors, factors.dtype, factors.shape), "F32")
    return tensors


def _metadata(config: ModelConfig, dtype: str, name: str) -> dict[str, Value]:
    """The general.* and llama.* metadata of a model."""
    kind, file_type = DTYPES[dtype]
    metadata: dict[str, Value] = {
        "general.architecture": "llama",
        "general.name": name,
        "general.file_type": file_type,
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_seq_len,
        "llama.embedding_length": config.embed_dim,
        "llama.block_count": config.num_layers,
        "llama.feed_forward_length": config.ffn_dim,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_theta),
    }
    if kind in BLOCKS:
        metadata["general.quantization_version"] = 2
    return metadata


class _Fields:
    """The numeric values of a file's llama.* keys. ConfigError for one that is absent or is not a number.

    Attributes:
        path: the file, for error messages.
        given: the values by key, without "llama.".
    """

    def __init__(self, path: Path, given: Mapping[str, Value]):
        self.path, self.given = path, given

    def number(self, key: str) -> float:
        """Reads a llama.* key whose value must be a finite number above 0."""
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ConfigError(f"{self.path}: llama.{key} must be a finite number above 0, got {shown(value)}")
        return float(value)

    def whole(self, key: str, *, layers: int = 0, default: int | None = None) -> int:
        """Reads a llama.* key whose value must be a whole number above 0.

        Args:
            key: the key.
            layers: if not 0, also accept an array of that many equal numbers, one for each layer.
            default: the value of an absent key; None requires the key.
        """
        if default is not None and key not in self.given:
            return default
        value = self._value(key)
        if layers and isinstance(value, np.ndarray) and len(value) == layers:
            if (value != value[0]).any():
                raise ConfigError(f"{self.path}: llama.{key} differs from layer to layer, which is not implemented")
            value = value[0].item()
        if type(value) is not int or value < 1:
            raise ConfigError(f"{self.path}: llama.{key} must be a whole number of at least 1, got {shown(value)}")
        return value

    def _value(self, key: str) -> Value:
        if key not in self.given:
            raise ConfigError(f"{self.path}: lacks llama.{key}{nearest(key, list(self.given))}")
        return self.given[key]


def _rows(gguf: GGUF, name: str) -> int:
    entry = gguf.entries.get(name)
    if entry is None or not entry.shape:
        raise ConfigError(f"{gguf.path}: the tensor {name}, whose rows are the vocabulary, is missing")
    return entry.shape[0]


def _scaling(gguf: GGUF, *, theta: float, head_dim: int, context: int) -> RopeScaling | None:
    entry = gguf.entries.get(_FREQUENCIES)
    if entry is None:
        return None
    if entry.shape != (head_dim / 2,) or head_dim > WIDEST:
        raise ConfigError(
            f"{_FREQUENCIES} has shape {entry.shape}, but heads of {head_dim} (at most {WIDEST:,}) need half as many"
        )
    return rope_scaling_of(entry.read(), theta=theta, head_dim=head_dim, context=context)


def _tokenizer(
    config: ModelConfig,
    vocabulary: Fields | None,
    stop_tokens: tuple[int, ...],
    bos_token: int | None,
    eos_token: int | None,
) -> dict[str, Value]:
    """The tokenizer.* metadata of a model."""
    if len(stop_tokens) > len(_STOPS):
        _log.warning("warning: a GGUF file names %d stop tokens: of %s the last are left out", len(_STOPS), stop_tokens)
    stop_tokens = tuple(token for token in stop_tokens if token != eos_token)
    stop_tokens = stop_tokens[: len(_STOPS) - (eos_token is not None)]  # eos has one of the three keys
    tokens = vocabulary["tokens"] if vocabulary is not None else []
    if len(tokens) > config.vocab_size:
        raise ConfigError(f"the tokenizer has {len(tokens):,} ids, but the model {config.vocab_size:,}")
    ids = {name: token for name, token in (("bos", bos_token), ("eos", eos_token)) if token is not None}
    spelled = {"<|eot_id|>": "eot", "<|eom_id|>": "eom"}
    for token in stop_tokens:  # each under the key of its spelling, else under the first free key
        key = spelled.get(tokens[token]) if token < len(tokens) else None
        free = [stop for stop in _STOPS if stop not in ids]
        ids[key if key in free else free[0]] = token
    if stop_tokens:
        ids.setdefault("eos", stop_tokens[0])
    metadata: dict[str, Value] = {f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items()}
    if vocabulary is None:
        return {"tokenizer.ggml.model": "no_vocab", **metadata}
    padding = config.vocab_size - len(tokens)
    types = np.asarray(vocabulary["token_types"], np.int32)
    named = {
        "model": vocabulary["model"],
        "pre": vocabulary["pre"],
        "tokens": tokens + [f"[PAD{i}]" for i in range(len(tokens), config.vocab_size)],
        "token_type": np.pad(types, (0, padding), constant_values=_UNUSED),
        "merges": vocabulary["merges"] or None,
        "add_bos_token": vocabulary["add_bos"],
    }
    metadata |= {f"tokenizer.ggml.{name}": value for name, value in named.items() if value is not None}
    metadata |= more_metadata(vocabulary, padding)
    return metadata


def _eos_of(template: ChatTemplate | None, vocabulary: Fields | None, stop_tokens: tuple[int, ...]) -> int | None:
    """The stop token that the chat template writes as `eos_token`, or None if the template does not use it.

    The file's end-of-text id must be this token, because llama.cpp renders `eos_token` with it.
    """
    if vocabulary is None or template is None or not any("eos_token" in source for source in template.sources.values()):
        return None
    name, tokens = template.tokens.get("eos_token"), vocabulary["tokens"]
    return next((i for i in stop_tokens if i < len(tokens) and tokens[i] == name), None)


def _templates(template: ChatTemplate | None) -> dict[str, Value]:
    """The metadata of chat templates, as llama.cpp's converter writes it."""
    if template is None:
        return {}
    named = [name for name in template.sources if name != DEFAULT]
    metadata: dict[str, Value] = {
        _TEMPLATE if name == DEFAULT else f"{_TEMPLATE}.{name}": source for name, source in template.sources.items()
    }
    return metadata | ({"tokenizer.chat_templates": named} if named else {})


def _typed(gguf: GGUF, key: str, kind: type[T]) -> T | None:
    """A metadata value that must be of this type; None if the key is absent."""
    value = gguf.metadata.get(key)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{gguf.path}: {key} must be of type {kind.__name__}, got {shown(value)}")
    return value


def _id(gguf: GGUF, name: str) -> int | None:
    """The id of a special token; None if the key is absent or has -1, llama.cpp's value for no token."""
    key = f"tokenizer.ggml.{name}_token_id"
    token = gguf.metadata.get(key)
    if token is not None and type(token) is not int:
        raise ValueError(f"{gguf.path}: {key} must be a whole number, got {shown(token)}")
    return token if token is not None and 0 <= token < 1 << 31 else None
