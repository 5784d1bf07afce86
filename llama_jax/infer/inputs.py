"""Checks of the arguments of `llama`: prompts, ids, seeds, settings, dtypes, folders and meshes."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax import parallel
from llama_jax.config import ModelConfig
from llama_jax.errors import DTYPE_ALIASES, ConfigError, brief, nearest
from llama_jax.ops.cpu import ready
from llama_jax.params import Params, check_params
from llama_jax.sampling_params import SamplingParams
from llama_jax.text import control_tokens
from llama_jax.text.tokenizer import Tokenizer

_DTYPES = ("float32", "bfloat16", "float16")
_log = logging.getLogger(__name__)


def as_list(prompts: Any) -> tuple[bool, list[Any]]:
    """A pair: True if the argument is a single prompt, and the list of prompts."""
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if isinstance(prompts, str):
        return True, [prompts]
    if not isinstance(prompts, Sequence):
        kind = type(prompts).__name__
        raise ConfigError(f"prompts must be a text, a list of token ids, or a list of either, got {kind}")
    if not prompts:
        raise ConfigError("prompts is empty: give a text, a list of token ids, or a list of either")
    single = not isinstance(prompts[0], str) and not hasattr(prompts[0], "__len__")
    return single, [prompts] if single else list(prompts)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """A context that puts a prompt's name in front of a ConfigError that does not begin with it."""
    try:
        yield
    except ConfigError as error:
        if str(error).startswith(name):
            raise
        raise ConfigError(f"{name}: {error}") from None


def encoded(
    tokenizer: Tokenizer | None, prompts: Sequence[Any], names: Sequence[str], parse_special: bool | None
) -> list[list[int]]:
    """The token ids of each prompt.

    Args:
        tokenizer: the tokenizer, or None if the model has none.
        prompts: texts and lists of token ids.
        names: the name of each prompt, for messages.
        parse_special: as in `Llama.generate`. None logs a warning at the first text with a control token's name.

    Raises:
        ConfigError: a prompt is a text and there is no tokenizer, or it is neither a text nor a list of ids.
    """
    if parse_special not in (None, True, False):
        raise ConfigError(f"parse_special must be True, False or None, got {brief(parse_special)}")
    warned = parse_special is not None
    ids = []
    for prompt, name in zip(prompts, names, strict=True):
        if not isinstance(prompt, str):
            ids.append(as_ids(prompt, name))
            continue
        if tokenizer is None:
            raise ConfigError(
                f"{name} is text, but this model has no tokenizer: give token ids, or put tokenizer.model "
                "or tokenizer.json in the model's folder"
            )
        if not warned and (control := control_tokens.first_name(tokenizer, prompt)):
            _log.warning(
                "warning: %s holds %r, the name of a control token, which is read as plain text: parse_special=True "
                "(--parse_special) reads it as the token, and False keeps it as text without this warning",
                name,
                control,
            )
            warned = True
        ids.append(control_tokens.encode_text(tokenizer, prompt, parse_special=bool(parse_special)))
    return ids


def as_ids(prompt: Any, name: str) -> list[int]:
    """Token ids as a flat list of ints."""
    values = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    flat = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
    if not flat or any(isinstance(i, bool) or not isinstance(i, (int, np.integer)) for i in values):
        dialog = ": chat() takes the messages of a dialog" if isinstance(prompt, Mapping) else ""
        raise ConfigError(f"{name} must be a text or a flat list of token ids, got {str(prompt)[:60]!r}{dialog}")
    return [int(i) for i in values]


def as_path(path: Any, name: str = "path") -> Path:
    """The argument as a Path. An empty string, or a value that is not a path, raises a ConfigError."""
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ConfigError(f"{name} must be the name of a folder, a file or a hub id, got {brief(path)}")
    return Path(path)


def as_whole(value: Any, name: str) -> int:
    """The argument as an int. It must be a whole number from 1 to 2^63 - 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {brief(value)}")
    if value >= 1 << 63:
        raise ConfigError(f"{name} must be a whole number below 2 to the 63rd, got {brief(value)}")
    return int(value)


def as_seeds(seed: int | Sequence[int], count: int, *, step: int = 1) -> list[int]:
    """The seed of each of `count` prompts: seed + i * step for a number, or item i of a list."""
    seeds = list(seed) if isinstance(seed, Sequence) else [seed]
    if any(isinstance(s, bool) or not isinstance(s, (int, np.integer)) for s in seeds):
        raise ConfigError(f"seed must be a whole number, or a list of one for each prompt, got {brief(seed)}")
    if not isinstance(seed, Sequence):
        return [int(seed) + i * step for i in range(count)]
    if len(seeds) != count:
        raise ConfigError(f"{len(seeds)} seeds for {count} prompts: give one number, or one for each prompt")
    return [int(s) for s in seeds]


def as_sampling(options: Mapping[str, Any], default: SamplingParams) -> SamplingParams:
    """`default`, with each option that is not None in place of its default. An unknown option raises a ConfigError."""
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}{nearest(name, known) or '.'} Allowed: {', '.join(known)}")
    return dataclasses.replace(default, **{name: value for name, value in options.items() if value is not None})


def as_defaults(sampling: Any) -> SamplingParams:
    """Default sampling settings. A ConfigError for anything but a SamplingParams."""
    if not isinstance(sampling, SamplingParams):
        raise ConfigError(f"sampling must be a SamplingParams, as SamplingParams(temperature=0), got {brief(sampling)}")
    return sampling


def as_stops(stop_tokens: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Stop token ids without repetitions, all within the vocabulary."""
    if isinstance(stop_tokens, str):
        raise ConfigError(f"stop_tokens must be a list of token ids, got {brief(stop_tokens)}")
    stops = tuple(dict.fromkeys(as_ids(stop_tokens, "stop_tokens")))
    bad = [i for i in stops if not 0 <= i < vocab_size]
    if bad:
        raise ConfigError(f"stop token {bad[0]} is not in the vocabulary: 0 to {vocab_size - 1}")
    return stops


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """A tokenizer. A ConfigError for anything else, such as a path."""
    if not hasattr(tokenizer, "for_model"):
        raise ConfigError(f"tokenizer must be a llama_jax.Tokenizer, as Tokenizer(PATH), got {brief(tokenizer)}")
    return tokenizer


def as_draft(draft: Any) -> tuple[ModelConfig, Params]:
    """The config and the weights of a draft model."""
    pair = isinstance(draft, Sequence) and len(draft) == 2
    if not pair or not isinstance(draft[0], ModelConfig) or not isinstance(draft[1], dict):
        raise ConfigError(f"draft must be a ModelConfig and its weights; load(..., draft=SOURCE), got {brief(draft)}")
    check_params(*draft)
    return draft[0], draft[1]


def as_dtype(dtype: str | jnp.dtype) -> jnp.dtype:
    """The compute dtype that an argument names, either as a string or as a dtype of numpy or jax."""
    try:
        name = jnp.dtype(dtype).name
    except (TypeError, ValueError):
        name = DTYPE_ALIASES.get(dtype.lower(), dtype) if isinstance(dtype, str) else brief(dtype)
    if name not in _DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}, got {brief(name)}{nearest(name, _DTYPES)}")
    return jnp.dtype(name)


def default_dtype(stored: np.dtype, *, quantized: bool) -> jnp.dtype:
    """The default compute dtype.

    It is the stored dtype, with bfloat16 for float16, and the other way around on GPUs that have no bfloat16. A CPU
    without bfloat16 instructions would emulate them, so its default is float32
    (docs/measurements/cpu-kernels.md#both-in-one-run). For quantized weights the default is
    bfloat16, and float32 on a CPU that has no such instructions or none of the kernels of ops/cpu.

    Args:
        stored: dtype of the stored weights.
        quantized: True if the stored weights are quantized.
    """
    device = jax.local_devices()[0]
    able = parallel.has_bfloat16(device)
    if device.platform == "cpu" and (not able or (quantized and not ready())):
        return jnp.dtype(jnp.float32)
    half = jnp.dtype(jnp.bfloat16 if able else jnp.float16)
    return half if quantized or stored in (np.float16, jnp.bfloat16) else jnp.dtype(stored)


def as_folders(adapters: Any) -> dict[str, str | os.PathLike[str]]:
    """LoRA adapters as a dict from name to folder or hub id. A single adapter is named after its folder."""
    if isinstance(adapters, (str, os.PathLike)):
        adapters = {Path(adapters).name: adapters}
    elif adapters is None:
        adapters = {}
    if not isinstance(adapters, Mapping) or not all(
        isinstance(name, str) and isinstance(folder, (str, os.PathLike)) and os.fspath(folder)
        for name, folder in adapters.items()
    ):
        raise ConfigError(
            f'adapters must be one folder or hub id, or several by name such as {{"mine": "runs/sft/adapter"}}, got '
            f"{brief(adapters)}"
        )
    return dict(adapters)


def as_mesh(mesh: Mesh | Mapping[str, int] | None) -> Mesh | None:
    """The mesh with these axis sizes. It uses the first devices if there are more than it needs."""
    if mesh is None or isinstance(mesh, Mesh):
        return mesh
    if not isinstance(mesh, Mapping):
        raise ConfigError(f'mesh must be a jax Mesh or sizes by axis such as {{"tensor": 2}}, got {brief(mesh)}')
    for axis, size in mesh.items():
        if axis not in parallel.AXES:
            raise ConfigError(
                f"unknown mesh axis {axis!r}{nearest(axis, parallel.AXES) or '.'} Allowed: {', '.join(parallel.AXES)}"
            )
        if isinstance(size, bool) or not isinstance(size, int):
            raise ConfigError(f"mesh axis {axis} must be a whole number of devices, got {size!r}")
    devices = jax.devices()
    need = math.prod(mesh.values())
    return parallel.make_mesh(mesh, devices[:need] if 0 < need < len(devices) else devices)
