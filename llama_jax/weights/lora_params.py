"""LoRA as a run trains it: a plain tree of thin matrices, stacked over layers, and of rows of trained tokens.

    {"layers": {"attention": {"q": {"a": (L, rank, in), "b": (L, out, rank)}}}, "unembed": {"a": ..., "b": ...},
     "tokens": {"embed": (n, D), "unembed": (n, D)}}

Optimizers, meshes and checkpoints take this tree as they take params. `with_lora` puts it on a base, and `lora_by_path`
and `token_rows` give it as adapters are written and merged (weights/adapters.py). What is trained of a token is the
difference from its row in the base, so that weight decay draws it to the base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.ops import lora
from llama_jax.params import Params, abstract_params, logical_axes
from llama_jax.run_keys import LoraConfig
from llama_jax.weights import export, name_table
from llama_jax.weights.adapters import LazyRows
from llama_jax.weights.tensor import of_array

Updates = dict[str, Any]
Path = tuple[str, ...]

# The path of each target in stacked params: the one list of places where LoRA may go in training.
_PATHS: dict[str, Path] = {
    **{name: ("layers", "attention", name) for name in ("q", "k", "v", "o")},
    **{name: ("layers", "ffn", name) for name in ("gate", "up", "down")},
    "embed": ("embed",),
    "unembed": ("unembed",),
}


def adapted_config(config: ModelConfig, settings: LoraConfig) -> ModelConfig:
    """The model's config with LoRA: a tied model is untied where LoRA is on one of the two matrices, as in peft."""
    untied = not {"embed", "unembed"}.isdisjoint(settings.targets)
    return dataclasses.replace(config, tied_embeddings=config.tied_embeddings and not untied)


def axes(config: ModelConfig, settings: LoraConfig) -> Updates:
    """The logical axes of each array; no device splits the rank, or the trained tokens."""
    of_weights = logical_axes(adapted_config(config, settings), stacked=True)

    def pair(path: Path) -> dict[str, lora.Axes]:
        names = lora.part_axes(name_table.get(of_weights, path))
        return {"a": names.a, "b": names.b}

    return _tree(config, settings, pair, lambda path: (None, name_table.get(of_weights, path)[-1]))


def initial(config: ModelConfig, settings: LoraConfig, key: jax.Array) -> Updates:
    """Float32 updates that change nothing yet: b and rows are zero, a is uniform within 1 / sqrt(in).

    That is how peft begins (Kaiming's rule with a = sqrt 5). For the embedding it draws a from a standard normal.
    """
    shapes = abstract_params(adapted_config(config, settings), stacked=True)
    keys = {path: jax.random.fold_in(key, i) for i, path in enumerate(_paths(settings))}

    def pair(path: Path) -> dict[str, jax.Array]:
        *layers, out, inner = name_table.get(shapes, path).shape
        shape = (*layers, settings.rank, inner)
        if path == ("embed",):
            a = jax.random.normal(keys[path], shape, jnp.float32)
        else:
            a = jax.random.uniform(keys[path], shape, jnp.float32, -1.0, 1.0) / inner**0.5
        return {"a": a, "b": jnp.zeros((*layers, out, settings.rank), jnp.float32)}

    tokens = len(settings.trained_tokens)
    return _tree(config, settings, pair, lambda path: jnp.zeros((tokens, config.embed_dim), jnp.float32))


def with_lora(settings: LoraConfig, base: Params, updates: Updates, key: jax.Array | None = None) -> Params:
    """Stacked params with these updates, as LoraTensors around the base's own leaves.

    Args:
        settings: rank, alpha, dropout, targets and trained tokens.
        base: stacked params, as arrays or quantized.
        updates: the tree that `initial` makes, in any state of training.
        key: the key of this step, for dropout; None means no dropout.
    """
    params = {**base, "layers": {name: dict(block) for name, block in base["layers"].items()}}
    if "embed" in settings.targets or "unembed" in settings.targets:
        params.setdefault("unembed", base["embed"])  # a tied model
    for i, path in enumerate(_paths(settings)):
        pair = name_table.get(updates, path)
        lead = pair["a"].shape[:-2]
        scale = jnp.full(lead, _scale(settings), jnp.float32)
        dropout = None
        if key is not None and settings.dropout and path != ("embed",):  # peft drops nothing of an embedding
            keys = jax.random.fold_in(key, i)
            dropout = lora.Dropout(
                jax.random.key_data(jax.random.split(keys, lead) if lead else keys), settings.dropout
            )
        weight = name_table.get(params, path)
        _set(params, path, lora.LoraTensor(weight, pair["a"], pair["b"], scale, dropout))
    for name, rows in updates.get("tokens", {}).items():
        # Row i of b is all zero, or chooses the row of a that belongs to token i.
        chosen = jnp.arange(params[name].shape[0])[:, None] == jnp.array(settings.trained_tokens)
        params[name] = lora.LoraTensor(params[name], rows, chosen.astype(rows.dtype), jnp.ones((), jnp.float32))
    return params


def lora_by_path(settings: LoraConfig, updates: Updates) -> dict[name_table.Path, lora.LoraWeights]:
    """LoRA's arrays by the path of their weight in unrolled params."""
    found: dict[name_table.Path, lora.LoraWeights] = {}
    scale = jnp.float32(_scale(settings))
    for path in _paths(settings):
        a, b = (name_table.get(updates, path)[part] for part in ("a", "b"))
        if path[0] == "layers":
            for layer in range(a.shape[0]):
                found["layers", layer, *path[1:]] = lora.LoraWeights(a[layer], b[layer], scale)
        else:
            found[path] = lora.LoraWeights(a, b, scale)
    return found


def token_rows(settings: LoraConfig, updates: Updates, leaves: name_table.Leaves) -> dict[name_table.Path, LazyRows]:
    """The trained tokens' rows in float32, by path. Several processes call it together.

    Args:
        settings: the trained tokens.
        updates: the tree that `initial` makes, in any state of training.
        leaves: the base's tensors by path.
    """
    found: dict[name_table.Path, LazyRows] = {}
    for name, change in updates.get("tokens", {}).items():
        base = [leaves[(name,)].read((slice(i, i + 1),), np.dtype(np.float32)) for i in settings.trained_tokens]
        rows = np.concatenate(base) + export.lazy_array(change).read()
        found[(name,)] = LazyRows(settings.trained_tokens, of_array(lambda rows=rows: rows, rows.dtype, rows.shape))
    return found


def _scale(settings: LoraConfig) -> float:
    return settings.alpha / (settings.rank**0.5 if settings.rslora else settings.rank)


def _paths(settings: LoraConfig) -> Iterator[Path]:
    """The path of each target, in an order that does not depend on how they are listed."""
    return (_PATHS[name] for name in sorted(set(settings.targets)))


def _tree(
    config: ModelConfig, settings: LoraConfig, pair: Callable[[Path], Any], rows: Callable[[Path], Any]
) -> Updates:
    tree: dict[str, Any] = {}
    for path in _paths(settings):
        _set(tree, path, pair(path))
    if settings.trained_tokens:
        names = ("embed",) if config.tied_embeddings else ("embed", "unembed")
        tree["tokens"] = {name: rows((name,)) for name in names}
    return tree


def _set(tree: dict[str, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
