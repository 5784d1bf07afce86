"""Llamas in GGUF files: the config that metadata and tensors give, the vocabulary as plain data, and both written.

Keys are those of llama.cpp (gguf-py/gguf/constants.py); what its converter leaves out has the value that llama.cpp
assumes. What a file says and this code does not do is refused by name, since a model that runs with the wrong physics
looks like one that runs. No jax here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from llama_jax.config import SIZES, ModelConfig, RopeScaling
from llama_jax.errors import ConfigError, brief, nearest
from llama_jax.text.formats.gguf import Fields
from llama_jax.weights import name_table
from llama_jax.weights.formats import gguf_file
from llama_jax.weights.formats.gguf_blocks import BLOCKS
from llama_jax.weights.formats.gguf_file import GGUF, Value, shown
from llama_jax.weights.tensor import of_array

# What would change the model, and the values that leave it as it is.
_NEUTRAL: dict[str, tuple[Value, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.type": ("none", "linear"),
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
# What is read, and what changes nothing.
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
_EXACT = 1e-5  # how near, relatively, a scaling must come to the factors of a file
_WIDEST = 1 << 14  # heads for which a scaling is looked for
_STOPS = ("eos", "eot", "eom")
_UNUSED = 5  # a type of token (llama.h)
# What matrices may be saved as: their kind, and what general.file_type calls such a file (llama.h).
DTYPES = {
    "float32": ("F32", 0),
    "float16": ("F16", 1),
    "bfloat16": ("BF16", 32),
    "q8_0": ("Q8_0", 7),
    "q4_0": ("Q4_0", 2),
}


def read_config(gguf: GGUF) -> ModelConfig:
    """The ModelConfig of a file.

    Raises:
        ConfigError: something in it that is not implemented, or that is needed and absent.
        ValueError: damage found in the frequencies that it holds.
    """
    architecture = gguf.metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(f"{gguf.path}: general.architecture is {shown(architecture)}; only 'llama' is implemented")
    given = {key.removeprefix("llama."): v for key, v in gguf.metadata.items() if key.startswith("llama.")}
    for key, value in given.items():
        if key in _NEUTRAL:
            allowed = _NEUTRAL[key]
            if not isinstance(value, (str, bool, int, float)) or value not in allowed:
                only = " or ".join(map(repr, allowed))
                raise ConfigError(f"{gguf.path}: llama.{key}={shown(value)} is not implemented; only {only} is")
        elif key not in (*_READ, *_HARMLESS):
            near = nearest(key, (*_READ, *_NEUTRAL))
            raise ConfigError(
                f"{gguf.path}: llama.{brief(key)[1:-1]} may change the model and is not implemented{near}"
            )
    fields = _Fields(gguf.path, given)
    layers = fields.whole("block_count")
    if layers > len(gguf.entries):
        raise ConfigError(f"{gguf.path}: llama.block_count={layers}, but there are only {len(gguf.entries)} tensors")
    embed, heads = fields.whole("embedding_length"), fields.whole("attention.head_count", layers=layers)
    if "attention.key_length" in given:
        head_dim = fields.whole("attention.key_length")
    elif embed % heads:
        raise ConfigError(
            f"{gguf.path}: llama.embedding_length={embed} is not a multiple of llama.attention.head_count={heads}, so "
            "that llama.attention.key_length must be given"
        )
    else:
        head_dim = embed // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if key in given and fields.whole(key) != head_dim:
            raise ConfigError(
                f"{gguf.path}: llama.{key}={given[key]}, but heads are {head_dim} wide; others are not implemented"
            )
    kv_heads = fields.whole("attention.head_count_kv", layers=layers) if "attention.head_count_kv" in given else heads
    theta = fields.number("rope.freq_base") if "rope.freq_base" in given else 10_000.0
    context = fields.whole("context_length")
    try:
        return ModelConfig(
            vocab_size=fields.whole("vocab_size") if "vocab_size" in given else _rows(gguf, "token_embd.weight"),
            embed_dim=embed,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
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


def bos_token(gguf: GGUF) -> int | None:
    """The id that begins a text by the file's own account, or None."""
    return _id(gguf, "bos")


def stop_tokens(gguf: GGUF) -> tuple[int, ...]:
    """The ids that end a generation by the file's own account: end of text, of message and of turn."""
    ids = (_id(gguf, name) for name in ("eos", "eom", "eot"))
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def vocabulary(gguf: GGUF) -> Fields | None:
    """The tokenizer of a file, or None if it has none. Raises ValueError for one that is not of one piece."""
    model = _typed(gguf, "tokenizer.ggml.model", str)
    if model is None or model in ("no_vocab", "none"):
        return None
    tokens = _typed(gguf, "tokenizer.ggml.tokens", list)
    if not tokens:
        raise ValueError(f"{gguf.path}: tokenizer.ggml.model is {brief(model)}, but tokenizer.ggml.tokens is missing")
    types = _typed(gguf, "tokenizer.ggml.token_type", np.ndarray)
    if types is not None and (types.dtype.kind not in "iu" or len(types) != len(tokens)):
        raise ValueError(
            f"{gguf.path}: tokenizer.ggml.token_type must be {len(tokens):,} whole numbers, one a token, got "
            f"{len(types):,} of {types.dtype}"
        )
    return Fields(
        model=model,
        pre=_typed(gguf, "tokenizer.ggml.pre", str),
        tokens=tokens,
        token_types=types,
        merges=_typed(gguf, "tokenizer.ggml.merges", list) or [],
        bos=_id(gguf, "bos"),
        eos=_id(gguf, "eos"),
        add_bos=_typed(gguf, "tokenizer.ggml.add_bos_token", bool),
        chat_template=_typed(gguf, "tokenizer.chat_template", str),
    )


def rope_factors(scaling: RopeScaling, *, theta: float, head_dim: int) -> np.ndarray:
    """What each of the head_dim / 2 frequencies is divided by, float64: 1 / ((1 - s) / factor + s).

    s is Meta's `smooth`, held to 0..1: 0 for long wavelengths, 1 for short ones. llama.cpp's converter writes these.
    """
    smooth = (scaling.original_max_seq_len / _wavelengths(theta, head_dim) - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = np.clip(smooth, 0, 1)
    return 1 / ((1 - smooth) / scaling.factor + smooth)


def rope_scaling_of(factors: np.ndarray, *, theta: float, head_dim: int, context: int) -> RopeScaling | None:
    """The scaling of which these are the `rope_factors`; None where all are 1.

    They settle only ratios, and with few of them only bounds: Llama's own choice (low 1, high 4, original 8,192) comes
    first, then a power of two, then whatever reproduces every factor.

    Args:
        factors: (head_dim / 2,).
        theta: base of the frequencies.
        head_dim: width of a head.
        context: positions of the model; the original is rather not longer.

    Raises:
        ConfigError: they are of another scaling than Llama 3.1's.
    """
    with np.errstate(invalid="ignore"):  # a NaN of the signalling kind
        given = np.asarray(factors, np.float64)
    sound = given.shape == (head_dim // 2,) and np.isfinite(given).all() and given.min() >= 1 - _EXACT
    if not sound or (given[1:] < given[:-1] * (1 - _EXACT)).any():
        raise ConfigError(
            f"{_FREQUENCIES} must be {head_dim // 2} factors of at least 1 that never fall, got {brief(given.tolist())}"
        )
    largest = float(f"{given.max():.6g}")
    if largest < 1 + _EXACT:
        return None
    for known in (SIZES["llama3.1-8b"].rope_scaling, SIZES["llama3.2-1b"].rope_scaling):
        # First, since a short head has no frequency that is divided in full, which would give the factor away.
        if np.allclose(rope_factors(known, theta=theta, head_dim=head_dim), given, rtol=_EXACT, atol=0):
            return known
    with np.errstate(all="ignore"):  # a candidate that is no number is passed over
        for low, high, original in _candidates(given, _wavelengths(theta, head_dim), context):
            if not (0 < low < high < math.inf and 1 <= original < 1 << 31):
                continue
            found = RopeScaling(
                factor=largest,
                low_freq_factor=float(low),
                high_freq_factor=float(high),
                original_max_seq_len=int(original),
            )
            if np.allclose(rope_factors(found, theta=theta, head_dim=head_dim), given, rtol=_EXACT, atol=0):
                return found
    raise ConfigError(
        f"{_FREQUENCIES} are not the factors of a Llama 3.1 scaling (rope_type llama3); others are not read"
    )


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
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Write what llama.cpp (and this file) reads; some rows of one tensor at a time are in memory.

    Norms are always F32. In q4_0 the unembedding (the embedding, where they are tied) is Q8_0, since it is the most
    sensitive to rounding. A matrix whose rows are no multiple of 32 cannot be quantized and is F16, as in llama.cpp.

    Args:
        path: of the file.
        config: of the model.
        leaves: its tensors by path.
        dtype: of its matrices: float32, float16, bfloat16, q8_0 or q4_0. Those stored as such are copied exactly.
        vocabulary: its tokenizer; missing ids are filled with unused tokens, as llama.cpp's converter does.
        name: what general.name calls the model.
        stop_tokens: ids that end a generation; at most three.
        bos_token: the id that begins a text.
        progress: told how many more bytes were written.

    Raises:
        ConfigError: a dtype or something of the model that the format cannot hold.
        ValueError: a number that is not finite in the dtype.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}{nearest(dtype, list(DTYPES))}")
    kind, file_type = DTYPES[dtype]
    embed, unembed = name_table.tied_names("gguf")
    sensitive = embed if config.tied_embeddings else unembed
    tensors = {}
    for weight in name_table.weights(config, "gguf"):
        to = "Q8_0" if kind == "Q4_0" and weight.name == sensitive else kind
        if to in BLOCKS and weight.shape[-1] % BLOCKS[to][0]:
            to = "F16"
        tensors[weight.name] = (weight.theirs(leaves[weight.path]), to if len(weight.shape) > 1 else "F32")
    if config.rope_scaling is not None:
        factors = rope_factors(config.rope_scaling, theta=config.rope_theta, head_dim=config.head_dim)
        tensors[_FREQUENCIES] = (of_array(lambda: factors, factors.dtype, factors.shape), "F32")
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
    metadata |= _tokenizer(config, vocabulary, stop_tokens, bos_token)
    gguf_file.save_file(path, metadata, tensors, progress=progress)


class _Fields:
    """The numbers among a file's llama.* keys; ConfigError for one that is absent or no number."""

    def __init__(self, path: Path, given: Mapping[str, Value]):
        self._path, self._given = path, given

    def number(self, key: str) -> float:
        value = self._value(key)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ConfigError(f"{self._path}: llama.{key} must be a finite number above 0, got {shown(value)}")
        return float(value)

    def whole(self, key: str, *, layers: int = 0) -> int:
        """A whole number above 0; with `layers`, also an array of that many equal ones."""
        value = self._value(key)
        if layers and isinstance(value, np.ndarray) and len(value) == layers:
            if (value != value[0]).any():
                raise ConfigError(f"{self._path}: llama.{key} differs from layer to layer, which is not implemented")
            value = value[0].item()
        if type(value) is not int or value < 1:
            raise ConfigError(f"{self._path}: llama.{key} must be a whole number of at least 1, got {shown(value)}")
        return value

    def _value(self, key: str) -> Value:
        if key not in self._given:
            raise ConfigError(f"{self._path}: lacks llama.{key}{nearest(key, list(self._given))}")
        return self._given[key]


def _rows(gguf: GGUF, name: str) -> int:
    entry = gguf.entries.get(name)
    if entry is None or not entry.shape:
        raise ConfigError(f"{gguf.path}: lacks {name}, of which the rows are the vocabulary")
    return entry.shape[0]


def _scaling(gguf: GGUF, *, theta: float, head_dim: int, context: int) -> RopeScaling | None:
    entry = gguf.entries.get(_FREQUENCIES)
    if entry is None:
        return None
    if entry.shape != (head_dim / 2,) or head_dim > _WIDEST:
        raise ConfigError(
            f"{_FREQUENCIES} has shape {entry.shape}, but heads of {head_dim} (at most {_WIDEST:,}) need half as many"
        )
    return rope_scaling_of(entry.read(), theta=theta, head_dim=head_dim, context=context)


def _wavelengths(theta: float, head_dim: int) -> np.ndarray:
    """Positions to a turn of each pair, before scaling: float64 (head_dim / 2,)."""
    return 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)


def _candidates(given: np.ndarray, wavelengths: np.ndarray, context: int) -> Iterator[tuple[float, float, float]]:
    """(low, high, original) that may reproduce the factors `given`, the likeliest first."""
    inverse, least = 1 / given, 1 / given.max()
    smooth = (inverse - least) / (1 - least)
    powers = sorted((2**n for n in range(24)), key=lambda n: (n != 8192, n > context, -n))
    before = int((given <= 1 + 10 * _EXACT).sum()) - 1  # the last that is left alone
    after = int((given < given.max() * (1 - 10 * _EXACT)).sum())  # the first that is divided in full
    inner = range(before + 1, after)
    # With low 1 and high 4, 3 smooth + 1 = original / wavelength.
    yield from ((1.0, 4.0, n) for n in powers)
    if inner:
        middle = inner[len(inner) // 2]
        yield 1.0, 4.0, np.round(wavelengths[middle] * (3 * smooth[middle] + 1))
    if before >= 0:
        yield 1.0, 4.0, np.ceil(4 * wavelengths[before])
    # In general smooth = slope / wavelength - offset: slope = original / (high - low), offset = low / (high - low).
    turns = 1 / wavelengths
    if len(inner) > 1:
        first, last = inner[0], inner[-1]
        slope = (smooth[first] - smooth[last]) / (turns[first] - turns[last])
        offset = slope * turns[first] - smooth[first]
    elif len(inner):  # steep enough to reach 1 before it and 0 after it
        at = inner[0]
        rise = (1 - smooth[at]) / (turns[before] - turns[at]) if before >= 0 else 0
        slope = 1.5 * max(rise, smooth[at] / (turns[at] - turns[after]))
        offset = slope * turns[at] - smooth[at]
    elif before < 0:
        return
    else:
        slope = 2 / (turns[before] - turns[after])
        offset = slope * (turns[before] + turns[after]) / 2 - 0.5
    if not (slope > 0 and offset > 0):
        return
    yield 1.0, round(1 + 1 / offset, 3), np.round(slope / offset)
    yield from ((round(offset * n / slope, 3), round((offset + 1) * n / slope, 3), n) for n in powers)
    yield offset * 8192 / slope, (offset + 1) * 8192 / slope, 8192


def _tokenizer(
    config: ModelConfig, vocabulary: Fields | None, stop_tokens: tuple[int, ...], bos_token: int | None
) -> dict[str, Value]:
    """The tokenizer.* metadata of a model."""
    if len(stop_tokens) > len(_STOPS):
        _log.warning("warning: a GGUF file names %d stop tokens: of %s the last are left out", len(_STOPS), stop_tokens)
        stop_tokens = stop_tokens[: len(_STOPS)]
    tokens = vocabulary["tokens"] if vocabulary is not None else []
    if len(tokens) > config.vocab_size:
        raise ConfigError(f"the tokenizer has {len(tokens):,} ids, but the model {config.vocab_size:,}")
    ids = {} if bos_token is None else {"bos": bos_token}
    spelled = {"<|eot_id|>": "eot", "<|eom_id|>": "eom"}
    for token in stop_tokens:  # each where its spelling says, else in the first place that is free
        place = spelled.get(tokens[token]) if token < len(tokens) else None
        free = [stop for stop in _STOPS if stop not in ids]
        ids[place if place in free else free[0]] = token
    if stop_tokens:
        ids.setdefault("eos", stop_tokens[0])
    found: dict[str, Value] = {f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items()}
    if vocabulary is None:
        return {"tokenizer.ggml.model": "no_vocab", **found}
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
    found |= {f"tokenizer.ggml.{name}": value for name, value in named.items() if value is not None}
    if vocabulary["chat_template"] is not None:
        found["tokenizer.chat_template"] = vocabulary["chat_template"]
    return found


def _typed(gguf: GGUF, key: str, kind: type[T]) -> T | None:
    """A value of metadata that must be of this type; None if there is none."""
    value = gguf.metadata.get(key)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{gguf.path}: {key} must be of type {kind.__name__}, got {shown(value)}")
    return value


def _id(gguf: GGUF, name: str) -> int | None:
    """The id of a special token; None if there is none, or the -1 that llama.cpp means by that."""
    key = f"tokenizer.ggml.{name}_token_id"
    token = gguf.metadata.get(key)
    if token is not None and type(token) is not int:
        raise ValueError(f"{gguf.path}: {key} must be a whole number, got {shown(token)}")
    return token if token is not None and 0 <= token < 1 << 31 else None
