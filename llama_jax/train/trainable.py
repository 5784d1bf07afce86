"""The trained and the frozen weights of a run: all weights are trained, or LoRA's low-rank matrices on a frozen base.

The trained weights are a plain dict of stacked float32 arrays: the params themselves, or LoRA's matrices
(weights/lora_params.py). The frozen weights are the model of `init_from` in the compute dtype, or quantized: LoRA's
base and the reference of DPO. Optimizers and checkpoints see the trained weights only; the frozen weights are never
donated and never saved.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import parallel
from llama_jax.config import ModelConfig
from llama_jax.ops import quant
from llama_jax.params import Params, abstract_params, init_params, logical_axes
from llama_jax.run_config import RunConfig
from llama_jax.weights import lora_params
from llama_jax.weights.quantize import BITS, check

Trained = dict[str, Any]


def trained_axes(run: RunConfig) -> Trained:
    """The logical axes of the trained weights."""
    return lora_params.axes(run.shape, run.lora) if run.lora.rank else logical_axes(run.shape, stacked=True)


def init_trained(run: RunConfig, key: jax.Array) -> Trained:
    """The trained weights before the first step: random weights, or LoRA matrices whose product is zero."""
    return lora_params.initial(run.shape, run.lora, key) if run.lora.rank else init_params(run.shape, key)


def policy(run: RunConfig, trained: Trained, frozen: Params | None, key: jax.Array | None = None) -> Params:
    """The params of the model that is trained; `key` is the random key of this step, for LoRA's dropout."""
    if not run.lora.rank:
        return trained
    assert frozen is not None  # LoRA's base, which `setup.frozen` loads
    return lora_params.with_lora(run.lora, frozen, trained, key)


def policy_config(run: RunConfig) -> ModelConfig:
    """The config of the params of `policy`: that of the run, untied if LoRA unties the embeddings."""
    return lora_params.adapted_config(run.shape, run.lora) if run.lora.rank else run.shape


def frozen_dtype(run: RunConfig, dtype: jnp.dtype) -> jnp.dtype:
    """Dtype of the frozen weights; `dtype` is the compute dtype of the run."""
    named = run.lora.rank and run.lora.base in ("float32", "bfloat16")
    return jnp.dtype(run.lora.base) if named else jnp.dtype(dtype)


def frozen_quantize(run: RunConfig) -> str:
    """Quantization of the frozen matrices (weights/load.py): "int8" or "int4" for QLoRA, else "none"."""
    return run.lora.base if run.lora.rank and run.lora.base.startswith("int") else "none"


def abstract_frozen(run: RunConfig, layout: parallel.Layout, dtype: jnp.dtype) -> Params | None:
    """The frozen params as stacked ShapeDtypeStructs with their shardings; None if nothing is frozen.

    Raises:
        ConfigError: the model cannot be quantized.
    """
    if not run.lora.rank and run.train.objective != "dpo":
        return None
    shapes = abstract_params(run.shape, stacked=True, dtype=frozen_dtype(run, dtype))
    quantize = frozen_quantize(run)
    check(run.shape, quantize)
    if quantize in BITS:
        bits = BITS[quantize]
        rounded = lambda a: quant.quantize(a, bits) if a.ndim == 3 else a  # noqa: E731  (norms stay)
        shapes["layers"] = jax.eval_shape(lambda layers: jax.tree.map(rounded, layers), shapes["layers"])
    shardings = parallel.shardings(layout, logical_axes(run.shape, stacked=True), shapes)
    if run.lora.offload:
        shardings["layers"] = jax.tree.map(lambda one: one.with_memory_kind(parallel.HOST), shardings["layers"])
    return parallel.abstract(shapes, shardings)


def forward_equivalents(run: RunConfig) -> int:
    """The cost of one step in forward passes. A full backward pass costs two; LoRA skips its weight-gradient half."""
    return (2 if run.lora.rank else 3) + (run.train.objective == "dpo")
