"""The trained arrays of a LoRA run: a plain tree of low-rank matrices, stacked over layers, and of token rows.

    {"layers": {"attention": {"q": {"a": (L, rank, in), "b": (L, out, rank)}}}, "unembed": {"a": ..., "b": ...},
     "tokens": {"embed": (n, D), "unembed": (n, D)}}

Optimizers, shardings and checkpoints treat this tree like params. `with_lora` applies it to a base. `lora_by_path` and
`token_rows` convert it to the form in which adapters are written and merged (weights/adapters.py). A row under "tokens"
is the difference from the token's row in the base, so that weight decay pulls the row towards that of the base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.ops import lora
from llama_jax.params import WEIGHTS, Params, abstract_params, logical_axes
from llama_jax.run_keys import LoraConfig
from llama_jax.weights import export, name_table
from llama_jax.weights.adapters import LazyRows
from llama_jax.weights.tensor import LazyTensor, of_array

Updates = dict[str, Any]
Path = tuple[str, ...]

# The path in stacked params of each matrix of the table of weights: LoRA can train these.
_PATHS: dict[str, Path] = {
    spec.path[-1]: ("layers", *spec.path) if spec.per_layer else spec.path for spec in WEIGHTS if len(spec.axes) == 2
}


def adapted_config(config: ModelConfig, settings: LoraConfig) -> ModelConfig:
    """The config of the model with LoRA. As in peft, LoRA on the embedding or unembedding unties a tied model."""
    untied = not {"embed", "unembed"}.isdisjoint(settings.targets)
    return dataclasses.replace(config, tied_embeddings=config.tied_embeddings and not untied)


def axes(config: ModelConfig, settings: LoraConfig) -> Updates:
    """The logical axes of each array. The axes of the rank and of the trained tokens are not sharded."""
    of_weights = logical_axes(adapted_config(config, settings), stacked=True)

    def pair(path: Path) -> dict[str, lora.Axes]:
        names = lora.part_axes(name_table.get(of_weights, path))
        return {"a": names.a, "b": names.b}

    return _tree(config, settings, pair, lambda path: (None, name_table.get(of_weights, path)[-1]))


def initial(config: ModelConfig, settings: LoraConfig, key: jax.Array) -> Updates:
    """The initial float32 updates, under which the model equals its base: b and the token rows are zero.

    As in peft, a is uniform within 1 / sqrt(in) (Kaiming initialization with a = sqrt 5), and for the embedding it is
    drawn from a standard normal distribution.
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
        updates: the trained arrays, a tree like that of `initial`.
        key: random key of the step, for dropout; None means no dropout.
    """
    params = {**base, "layers": {name: dict(block) for name, block in base["layers"].items()}}
    if "embed" in settings.targets or "unembed" in settings.targets:
        params.setdefault("unembed", base["embed"])  # a tied model
    for i, path in enumerate(_paths(settings)):
        pair = name_table.get(updates, path)
        lead = pair["a"].shape[:-2]
        scale = jnp.full(lead, _scale(settings), jnp.float32)
        dropout = None
        if key is not None and settings.dropout and path != ("embed",):  # as in peft, no dropout for the embedding
            keys = jax.random.fold_in(key, i)
            dropout = lora.Dropout(
                jax.random.key_data(jax.random.split(keys, lead) if lead else keys), settings.dropout
            )
        weight = name_table.get(params, path)
        _set(params, path, lora.LoraTensor(weight, pair["a"], pair["b"], scale, dropout))
    for name, rows in updates.get("tokens", {}).items():
        # Row i of b is one-hot and selects the row of a for token i, or is zero if the token is not trained.
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


def base_rows(settings: LoraConfig, leaves: name_table.Leaves) -> dict[name_table.Path, np.ndarray]:
    """The float32 rows of the trained tokens in the base, (n, D), by path.

    Args:
        settings: the trained tokens.
        leaves: the base's tensors by path.
    """
    if not settings.trained_tokens:
        return {}
    rows = [(slice(token, token + 1),) for token in settings.trained_tokens]
    paths = [path for path in (("embed",), ("unembed",)) if path in leaves]
    return {path: np.concatenate([leaves[path].read(row, np.dtype(np.float32)) for row in rows]) for path in paths}


def token_rows(
    settings: LoraConfig, updates: Updates, base: Mapping[name_table.Path, np.ndarray]
) -> dict[name_table.Path, LazyRows]:
    """The float32 rows of the trained tokens by path: base plus trained difference. Every process must call it.

    Args:
        settings: the trained tokens.
        updates: the trained arrays, a tree like that of `initial`.
        base: the rows of the base (`base_rows`).
    """
    found: dict[name_table.Path, LazyRows] = {}
    for name, change in updates.get("tokens", {}).items():
        rows = base[(name,)] + export.lazy_array(change).read()
        found[(name,)] = LazyRows(settings.trained_tokens, _in_memory(rows))
    return found


def _in_memory(array: np.ndarray) -> LazyTensor:
    return of_array(lambda: array, array.dtype, array.shape)


def _scale(settings: LoraConfig) -> float:
    return settings.alpha / (settings.rank**0.5 if settings.rslora else settings.rank)


def _paths(settings: LoraConfig) -> Iterator[Path]:
    """The path of each target, in an order that does not depend on the order of settings.targets."""
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
