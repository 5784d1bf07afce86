"""LoRA's updates as a run trains them: a plain tree of thin matrices, stacked over layers, and nothing else.

    {"layers": {"attention": {"q": {"a": (L, rank, in), "b": (L, out, rank)}}}}

Optimizers, meshes and checkpoints take it as they take params. `applied` puts it beside a base, `by_path` has it as
adapters are written and merged (weights/adapters.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import model
from llama_jax.config import ModelConfig
from llama_jax.ops import lora
from llama_jax.run_keys import LoraConfig
from llama_jax.weights import name_table

Updates = dict[str, Any]
_ATTENTION = ("q", "k", "v", "o")


def axes(config: ModelConfig, settings: LoraConfig) -> Updates:
    """The logical axes of each matrix; no device splits the rank."""
    of_weights = model.logical_axes(config, stacked=True)["layers"]

    def pair(block: str, name: str) -> dict[str, lora.Axes]:
        names = lora.part_axes(of_weights[block][name])
        return {"a": names.a, "b": names.b}

    return _tree(settings, pair)


def initial(config: ModelConfig, settings: LoraConfig, key: jax.Array) -> Updates:
    """Updates that change nothing yet, float32: a uniform within 1 / sqrt(in), b zero.

    That is how peft begins (Kaiming's rule with a = sqrt 5).
    """
    shapes = model.abstract_params(config, stacked=True)["layers"]
    keys = {place: jax.random.fold_in(key, i) for i, place in enumerate(_places(settings))}

    def pair(block: str, name: str) -> dict[str, jax.Array]:
        layers, out, inner = shapes[block][name].shape
        a = jax.random.uniform(keys[block, name], (layers, settings.rank, inner), jnp.float32, -1.0, 1.0)
        return {"a": a / inner**0.5, "b": jnp.zeros((layers, out, settings.rank), jnp.float32)}

    return _tree(settings, pair)


def applied(settings: LoraConfig, base: model.Params, updates: Updates, key: jax.Array | None = None) -> model.Params:
    """Stacked params under these updates, as LoraTensors around the base's own leaves.

    Args:
        settings: rank, alpha, dropout and targets.
        base: stacked params, in arrays or quantized.
        updates: as `initial` makes them, or what has become of them.
        key: of this step, for dropout; None drops nothing.
    """
    layers = dict(base["layers"])
    for i, (block, name) in enumerate(_places(settings)):
        a, b = (updates["layers"][block][name][part] for part in ("a", "b"))
        scale = jnp.full(a.shape[0], _scale(settings), jnp.float32)
        dropout = None
        if key is not None and settings.dropout:
            keys = jax.random.split(jax.random.fold_in(key, i), a.shape[0])
            dropout = lora.Dropout(jax.random.key_data(keys), settings.dropout)
        layers[block] = {**layers[block], name: lora.LoraTensor(layers[block][name], a, b, scale, dropout)}
    return {**base, "layers": layers}


def by_path(settings: LoraConfig, updates: Updates) -> dict[name_table.Path, lora.LoraWeights]:
    """Each update by the path of its weight in unrolled params."""
    found = {}
    for block, name in _places(settings):
        a, b = (updates["layers"][block][name][part] for part in ("a", "b"))
        for layer in range(a.shape[0]):
            found["layers", layer, block, name] = lora.LoraWeights(a[layer], b[layer], jnp.float32(_scale(settings)))
    return found


def _scale(settings: LoraConfig) -> float:
    return settings.alpha / (settings.rank**0.5 if settings.rslora else settings.rank)


def _places(settings: LoraConfig) -> Iterator[tuple[str, str]]:
    """Block and name of each target, in an order that does not depend on how they are listed."""
    return (("attention" if name in _ATTENTION else "ffn", name) for name in sorted(set(settings.targets)))


def _tree(settings: LoraConfig, leaf: Callable[[str, str], Any]) -> Updates:
    layers: dict[str, Any] = {}
    for block, name in _places(settings):
        layers.setdefault(block, {})[name] = leaf(block, name)
    return {"layers": layers}
