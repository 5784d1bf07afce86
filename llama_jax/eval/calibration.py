"""Calibration: measures the mean square of each input of every weight matrix, which weights the errors of quantization.

An error in a weight changes the output in proportion to the input that it multiplies. The squared error of a row,
weighted by the mean squares of its inputs, is the expected squared error of the product if the inputs are uncorrelated.
llama.cpp calls these mean squares an importance matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import model
from llama_jax.errors import ConfigError
from llama_jax.eval.sliding_window import Sample, counted_ids
from llama_jax.ops import linear
from llama_jax.ops.lora import LoraTensor
from llama_jax.ops.quant import QTensor
from llama_jax.text.tokenizer import require_tokenizer
from llama_jax.weights import name_table
from llama_jax.weights.quantize import bits_of, rounder

if TYPE_CHECKING:
    from llama_jax.infer.llama import Llama
    from llama_jax.params import Params

Importance = dict[name_table.Path, np.ndarray]
_LENGTH = 512
_TOKENS = 16_384


def importance(llama: Llama, texts: Sequence[Sample], *, tokens: int = _TOKENS) -> Importance:
    """The mean square of each input of every matrix, as float32 (in,) by path. An untied embedding has none.

    Args:
        llama: the model before quantization, on one device.
        texts: texts, dialogs and completions of the kind that the model will see.
        tokens: most tokens that are read, in windows of at most 512.

    Raises:
        ConfigError: the model has no tokenizer, is on several devices or is quantized already, or the texts have no
            tokens.
    """
    leaves = jax.tree.leaves(llama.params, is_leaf=lambda a: isinstance(a, (QTensor, LoraTensor)))
    if llama.mesh is not None or any(isinstance(leaf, (QTensor, LoraTensor)) for leaf in leaves):
        raise ConfigError("calibration needs the plain weights on one device: load them with quantize='none'")
    require_tokenizer(llama.tokenizer, "calibration")
    paths = {
        id(name_table.get(llama.params, weight.path)): weight.path
        for weight in name_table.weights(llama.config, "huggingface")
    }
    sums: dict[name_table.Path, jax.Array] = {}

    def observe(x: jax.Array, w: linear.Weight) -> None:
        path = paths[id(w)]
        sums[path] = sums.get(path, 0) + jnp.sum(jnp.square(x.astype(jnp.float32)).reshape(-1, x.shape[-1]), axis=0)

    count = 0
    for ids in _windows(llama, texts, min(_LENGTH, llama.config.max_seq_len)):
        with linear.observed(observe):
            positions = jnp.arange(len(ids))[None]
            hidden, _ = model.forward(
                llama.config, llama.params, jnp.asarray([ids]), positions, None, dtype=llama.engine.dtype
            )
            observe(hidden, model.unembedding(llama.config, llama.params))
        count += len(ids)
        if count >= tokens:
            break
    if not count:
        raise ConfigError("the texts for calibration hold no token: give at least one of a few words")
    return {path: np.asarray(total) / count for path, total in sums.items()}


def _windows(llama: Llama, texts: Sequence[Sample], length: int) -> Iterator[list[int]]:
    for sample in texts:
        ids, _ = counted_ids(llama, sample)
        for start in range(0, len(ids), length):
            yield ids[start : start + length]


def rounded(llama: Llama, quantize: str, by: Mapping[name_table.Path, np.ndarray]) -> Params:
    """The weights of a model quantized to "int8" or "int4", with the rounding errors weighted by `importance`."""
    bits = bits_of(llama.config, quantize)

    def leaf(path: name_table.Path) -> jax.Array | QTensor:
        weight = name_table.get(llama.params, path)
        return rounder(bits[path])(weight, by.get(path)) if path in bits else weight

    weights = name_table.weights(llama.config, "huggingface")
    return name_table.build(llama.config, ((weight.path, leaf(weight.path)) for weight in weights))
