"""Which weights a run trains, and which it only reads: all of them, or LoRA's thin matrices beside a frozen base.

What is trained is a plain dict of float32 arrays, stacked: the params themselves, or LoRA's updates
(weights/lora_params.py). What is frozen is params in the dtype of the computation, or quantized: LoRA's base, and the
reference of DPO, which are what `init_from` holds. Optimizers and checkpoints see the first alone; the second is never
donated and never saved.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import model, parallel
from llama_jax.config import ModelConfig
from llama_jax.ops import quant
from llama_jax.run_config import RunConfig
from llama_jax.weights import lora_params
from llama_jax.weights.load import group_bits

Trained = dict[str, Any]


def trained_axes(run: RunConfig) -> Trained:
    """The logical axes of what is trained."""
    return lora_params.axes(run.model, run.lora) if run.lora.rank else model.logical_axes(run.model, stacked=True)


def init_trained(run: RunConfig, key: jax.Array) -> Trained:
    """What is trained as it begins: random weights, or updates that change nothing."""
    return lora_params.initial(run.model, run.lora, key) if run.lora.rank else model.init_params(run.model, key)


def policy(run: RunConfig, trained: Trained, frozen: model.Params | None, key: jax.Array | None = None) -> model.Params:
    """The params that a run trains, as the model takes them; `key` is of this step, for LoRA's dropout."""
    return lora_params.with_lora(run.lora, frozen, trained, key) if run.lora.rank else trained


def policy_config(run: RunConfig) -> ModelConfig:
    """The config of the params that `policy` gives: that of the run, untied where LoRA unties the embeddings."""
    return lora_params.adapted_config(run.model, run.lora) if run.lora.rank else run.model


def frozen_dtype(run: RunConfig, dtype: jnp.dtype) -> jnp.dtype:
    """Of the frozen arrays, where the computation has `dtype`."""
    named = run.lora.rank and run.lora.base in ("float32", "bfloat16")
    return jnp.dtype(run.lora.base) if named else jnp.dtype(dtype)


def frozen_quantize(run: RunConfig) -> str:
    """How the frozen matrices are loaded (weights/load.py): "int8" and "int4" for QLoRA, else "none"."""
    return run.lora.base if run.lora.rank and run.lora.base.startswith("int") else "none"


def abstract_frozen(run: RunConfig, layout: parallel.Layout, dtype: jnp.dtype) -> model.Params | None:
    """What is frozen as ShapeDtypeStructs with their shardings, stacked; None where nothing is.

    Raises:
        ConfigError: the model cannot be quantized.
    """
    if not run.lora.rank and run.train.objective != "dpo":
        return None
    shapes = model.abstract_params(run.model, stacked=True, dtype=frozen_dtype(run, dtype))
    bits = group_bits(run.model, frozen_quantize(run))
    if bits:
        rounded = lambda a: quant.quantize(a, bits) if a.ndim == 3 else a  # noqa: E731  (norms stay)
        shapes["layers"] = jax.eval_shape(lambda layers: jax.tree.map(rounded, layers), shapes["layers"])
    return parallel.abstract(shapes, parallel.shardings(layout, model.logical_axes(run.model, stacked=True), shapes))


def forwards(run: RunConfig) -> int:
    """What a step costs in forward passes: of a backward pass LoRA needs only the half that goes to activations."""
    return (2 if run.lora.rank else 3) + (run.train.objective == "dpo")
