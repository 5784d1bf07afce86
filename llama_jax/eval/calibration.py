"""Calibration: weights are rounded to 4 bits so that products with the inputs that a text gives change little.

The layers are rounded one after the other (ops/gptq.py). Each sees the inputs that the rounded layers before it
compute, so that it makes up for their errors too, and only one layer's moments of inputs are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError
from llama_jax.eval.sliding_window import Sample, counted_ids
from llama_jax.model import Block, Positions
from llama_jax.ops import gptq, linear, rope
from llama_jax.ops.lora import LoraTensor
from llama_jax.ops.norm import rms_norm
from llama_jax.ops.quant import GROUP, QTensor
from llama_jax.progress import progress_bar
from llama_jax.text.tokenizer import require_tokenizer
from llama_jax.weights.quantize import bits_of, rounder

if TYPE_CHECKING:
    from llama_jax.infer.llama import Llama
    from llama_jax.params import Params

_LENGTH = 512
_TOKENS = 16_384
_Windows = list[tuple[jax.Array, Positions]]  # hidden states (1, T, D), and their positions


def quantized(llama: Llama, texts: Sequence[Sample], *, tokens: int = _TOKENS, progress: bool = True) -> Params:
    """The weights of a model in "int4", rounded by GPTQ for the inputs that the texts give.

    Matrices that int4 keeps in 8 bits, and an embedding, are rounded as without calibration.

    Args:
        llama: the model before quantization, on one device.
        texts: texts, dialogs and completions of the kind that the model will see.
        tokens: most tokens that are read, in windows of 512.
        progress: True shows a bar on standard error, if it takes some seconds.

    Raises:
        ConfigError: the model has no tokenizer, is on several devices or is quantized already, or the texts have no
            tokens.
    """
    leaves = jax.tree.leaves(llama.params, is_leaf=lambda a: isinstance(a, (QTensor, LoraTensor)))
    if llama.mesh is not None or any(isinstance(leaf, (QTensor, LoraTensor)) for leaf in leaves):
        raise ConfigError("calibration needs the plain weights on one device: load them with quantize='none'")
    require_tokenizer(llama.tokenizer, "calibration")
    config, params, windows = llama.config, llama.params, _windows(llama, texts, tokens)
    layers = []
    with progress_bar(config.num_layers, "calibrating", unit="layer", shown=progress) as bar:
        for layer in params["layers"]:
            layers.append(_rounded(layer, _moments(config, layer, windows)))
            windows = [(_compiled_block(config, layers[-1], x, pos), pos) for x, pos in windows]
            bar.update(1)
    result = {**params, "layers": tuple(layers)}
    bits = bits_of(config, "int4")
    if ("embed",) in bits:
        result["embed"] = rounder(bits["embed",])(params["embed"])
    if ("unembed",) in bits:
        norm, eps = params["norm"]["scale"], config.norm_eps
        moments = sum(_second_moments(rms_norm(x, norm, eps=eps)) for x, _ in windows)
        result["unembed"] = gptq.fit(params["unembed"], moments / _count(windows))
    return result


def _windows(llama: Llama, texts: Sequence[Sample], tokens: int) -> _Windows:
    """The embedded tokens of the texts, one after the other, in windows of one length but for the last."""
    length, dtype = min(_LENGTH, llama.config.max_seq_len), llama.engine.dtype
    ids: list[int] = []
    for sample in texts:
        ids += counted_ids(llama, sample)[0]
        if len(ids) >= tokens:
            break
    if not ids:
        raise ConfigError("the texts for calibration hold no token: give at least one of a few words")
    windows: _Windows = []
    for start in range(0, min(len(ids), tokens), length):
        window = jnp.asarray([ids[start : start + length]])
        positions = jnp.arange(window.shape[1])[None]
        pos = Positions(positions, None, None, *rope.rotations(llama.config, positions))
        windows.append((linear.embed(llama.params["embed"], window, dtype), pos))
    return windows


def _count(windows: _Windows) -> int:
    return sum(x.shape[1] for x, _ in windows)


def _block(config: ModelConfig, layer: Params, x: jax.Array, pos: Positions) -> jax.Array:
    return Block(config, layer)(x, pos, None)[0]


_compiled_block = jax.jit(_block, static_argnums=0)


def _moments(config: ModelConfig, layer: Params, windows: _Windows) -> dict[int, jax.Array]:
    """mean(x x^T) of the inputs x of each matrix of a layer, float32 (in, in) by the id of the matrix."""
    sums: dict[int, jax.Array] = {}
    latest: list[jax.Array] = []  # q, k and v have the same inputs, and so have gate and up

    def observe(x: jax.Array, w: linear.Weight) -> None:
        if not latest or latest[0] is not x:
            latest[:] = x, _second_moments(x)
        sums[id(w)] = sums[id(w)] + latest[1] if id(w) in sums else latest[1]

    with linear.observed(observe):
        for x, pos in windows:
            _block(config, layer, x, pos)
    return {weight: total / _count(windows) for weight, total in sums.items()}


@jax.jit
def _second_moments(x: jax.Array) -> jax.Array:
    """The sum of x x^T over all rows of x (..., in), in float32."""
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    return jnp.dot(rows.T, rows, precision=jax.lax.Precision.HIGHEST)


def _rounded(layer: Params, moments: dict[int, jax.Array]) -> Params:
    """A layer with its matrices in 4 bits. Those whose rows are no multiple of 32 values stay as they are."""

    def rounded(leaf: jax.Array) -> jax.Array | QTensor:
        return gptq.fit(leaf, moments[id(leaf)]) if id(leaf) in moments and leaf.shape[-1] % GROUP == 0 else leaf

    return jax.tree.map(rounded, layer)
