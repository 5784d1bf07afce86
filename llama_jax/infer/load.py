"""Loading a model from any source, ready for sampling. `llama_jax.load` is `load`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.choices import QUANTIZE
from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError, checked_keywords, nearest
from llama_jax.infer import inputs
from llama_jax.infer.llama import Llama, Place
from llama_jax.infer.program import layout_of
from llama_jax.params import Params
from llama_jax.text.chat_format import AUTO
from llama_jax.weights.formats import peft
from llama_jax.weights.open import open_source
from llama_jax.weights.source import Source, UnknownTokenizer

if TYPE_CHECKING:
    from llama_jax.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


@checked_keywords
def load(
    source: str | os.PathLike[str],
    *,
    dtype: str | jnp.dtype | None = None,
    quantize: str | None = None,
    mesh: Mesh | Mapping[str, int] | None = None,
    adapters: Place | Mapping[str, Place] | None = None,
    chat_format: str = AUTO,
    kv: str = "compute",
    draft: Place | None = None,
) -> Llama:
    """Loads a model of any supported file format, ready for sampling.

    Args:
        source: a run folder of train.py, a Hugging Face folder or hub id (owner/name), the folder of Meta's download, a
            .gguf file, an old Flax folder, or the name of a model in a Python package (smollm2).
        dtype: dtype of weights, activations and KV cache: "float32", "bfloat16" or "float16". The default is the
            checkpoint's dtype, with bfloat16 for float16, and with float16 for bfloat16 on a GPU without bfloat16. On a
            CPU without bfloat16 instructions the default is float32, which takes twice the memory of a bfloat16 file: 4
            bytes a parameter, 32 GB for 8B. Tensors of a GGUF file in Q8_0 and Q4_0 stay quantized and are multiplied
            in this dtype; its default for a quantized file is bfloat16, and float32 on a CPU without bfloat16
            instructions or without the kernels of ops/cpu.
        quantize: quantization of the weights. None keeps them as they are stored. "none" dequantizes them to `dtype`,
            which takes more memory. "int8" and "int4" quantize all matrices in groups of 32 (ops/quant.py)
            while they are read; a tied embedding has 8 bits in both. They take 0.53 and 0.28 of their memory in
            bfloat16.
        mesh: mesh of the weights: None for the first device, a Mesh, or axis sizes such as {"data": 2, "tensor": 4},
            which use the first devices. An axis of size -1 uses all remaining devices.
        adapters: one LoRA adapter (peft) as a folder or hub id, which is applied at once; or a dict of several by name,
            which `use` selects from.
        chat_format: "auto", "llama3" or the path of a Jinja template; see `Llama`.
        kv: type of the KV cache: "compute" (that of the activations) or "int8", which takes about half of bfloat16.
        draft: source of a small model of the same vocabulary, for speculate="draft".

    Raises:
        ConfigError: `source` is not a model (the message lists what is), or a setting is not possible.
        ValueError: a damaged file.
    """
    inputs.as_path(source, "the model")
    folders = inputs.as_folders(adapters)
    _check_quantize(quantize)
    wanted = None if dtype is None else inputs.as_dtype(dtype)
    found = open_source(source)
    wanted = wanted or inputs.default_dtype(found.dtype, quantized=found.quantized)
    mesh = inputs.as_mesh(mesh)
    layout = layout_of(found.config, mesh)  # before the weights are read, so that a bad mesh raises at once
    opened = {name: peft.open_adapter(folder, found.config) for name, folder in folders.items()}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # Meta's vocabulary takes as long as a small model
        opening = pool.submit(_tokenizer, found)
        params = found.load(layout, wanted, quantize)
        tokenizer = opening.result()
    guesser = None if draft is None else _draft(draft, found.config, tokenizer, mesh, wanted)
    metadata = found.metadata.with_tokenizer(tokenizer)
    if isinstance(adapters, (str, os.PathLike)):  # it was trained with its own template and tokenizer
        (adapter,) = opened.values()
        metadata = peft.adapted_metadata(metadata, adapter, found.config)
    llama = Llama(
        found.config,
        params,
        tokenizer,
        mesh,
        metadata.stop_tokens,
        dtype=wanted,
        sampling=metadata.sampling,
        chat_template=metadata.chat_template,
        chat_format=chat_format,
        kv=kv,
        draft=guesser,
    )
    template = metadata.chat_template if chat_format == AUTO else llama.metadata.chat_template
    llama.metadata = dataclasses.replace(metadata, chat_template=template)
    for name, found_adapter in opened.items():
        llama._add(name, found_adapter)
    return llama.use(*opened) if isinstance(adapters, (str, os.PathLike)) else llama


def _check_quantize(quantize: str | None) -> None:
    if quantize is not None and quantize not in QUANTIZE:
        near = nearest(str(quantize), QUANTIZE)
        raise ConfigError(f"quantize must be one of {', '.join(QUANTIZE)}, or be left out; got {quantize!r}{near}")


def _draft(
    place: Place, config: ModelConfig, tokenizer: Tokenizer | None, mesh: Mesh | None, dtype: jnp.dtype
) -> tuple[ModelConfig, Params]:
    """Config and weights of the draft model; ConfigError if its vocabulary is another one."""
    inputs.as_path(place, "the draft model")
    found = open_source(place)
    own = _tokenizer(found)
    same = tokenizer is None or own is None or own.fingerprint == tokenizer.fingerprint
    if found.config.vocab_size != config.vocab_size or not same:
        raise ConfigError(
            f"{place} has another vocabulary than the model ({found.config.vocab_size:,} ids, the model "
            f"{config.vocab_size:,}): a draft model must have the model's own tokenizer"
        )
    return found.config, found.load(layout_of(found.config, mesh), dtype, None)


def _tokenizer(source: Source) -> Tokenizer | None:
    try:
        return source.tokenizer()
    except UnknownTokenizer as error:
        _log.warning("warning: %s: continuing without a tokenizer, with token ids only", error)
        return None
