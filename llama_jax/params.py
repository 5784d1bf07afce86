"""The weights of a Llama: the table that defines them, the trees that follow from it, and their two layouts.

Parameters are a plain dict of arrays (or of typed leaves, see `ops.quant` and `ops.lora`) in one of two layouts.
Stacked: `params["layers"]` is a dict of arrays with a leading layer axis, which training scans over. Unrolled:
`params["layers"]` is a tuple with one dict a layer, which decoding unrolls so that a donated cache is updated in place.

Letters: L layers, and the axes of `_sizes`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError
from llama_jax.parallel import on_device

Params = dict[str, Any]
Axes = tuple[str, ...]

_INIT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """One row of the table of weights.

    Attributes:
        path: keys that lead to the weight; within the tree of one layer if `per_layer`.
        axes: logical names of its axes, output axis first. They give its shape and, through `parallel.RULES`, its
            sharding.
        init: "normal" (standard deviation 0.02), "residual" (the same over sqrt(2 L), for matrices that write to the
            residual stream, as in GPT-2, Radford et al. 2019, section 2.3) or "ones". Normal draws are truncated at
            three standard deviations.
        group: the parameter group that learning rates and logged norms refer to (`run_keys.GROUPS`).
        per_layer: True if every layer has such a weight.
        rotary: True if the output rows are heads whose pairs are rotated, so that their order differs between file
            formats.
    """

    path: tuple[str, ...]
    axes: Axes
    init: str
    group: str
    per_layer: bool = True
    rotary: bool = False

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of the weight, of one layer if `per_layer`."""
        sizes = _sizes(config)
        return tuple(sizes[axis] for axis in self.axes)


WEIGHTS: tuple[WeightSpec, ...] = (
    WeightSpec(("embed",), ("vocab", "embed"), "normal", "embed", per_layer=False),
    WeightSpec(("attention_norm", "scale"), ("norm",), "ones", "norm"),
    WeightSpec(("attention", "q"), ("heads", "embed"), "normal", "attention", rotary=True),
    WeightSpec(("attention", "k"), ("kv_heads", "embed"), "normal", "attention", rotary=True),
    WeightSpec(("attention", "v"), ("kv_heads", "embed"), "normal", "attention"),
    WeightSpec(("attention", "o"), ("embed", "heads"), "residual", "attention"),
    WeightSpec(("ffn_norm", "scale"), ("norm",), "ones", "norm"),
    WeightSpec(("ffn", "gate"), ("ffn", "embed"), "normal", "ffn"),
    WeightSpec(("ffn", "up"), ("ffn", "embed"), "normal", "ffn"),
    WeightSpec(("ffn", "down"), ("embed", "ffn"), "residual", "ffn"),
    WeightSpec(("norm", "scale"), ("norm",), "ones", "norm", per_layer=False),
    WeightSpec(("unembed",), ("vocab", "embed"), "normal", "unembed", per_layer=False),
)
BY_PATH: dict[tuple[str, ...], WeightSpec] = {spec.path: spec for spec in WEIGHTS}


def _sizes(config: ModelConfig) -> dict[str, int]:
    """Length of each logical axis of a weight."""
    return {
        "vocab": config.vocab_size,
        "embed": config.embed_dim,
        "norm": config.embed_dim,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "ffn": config.ffn_dim,
    }


def weight_specs(config: ModelConfig) -> tuple[WeightSpec, ...]:
    """The rows of the table that a model has: a tied model has no unembedding of its own."""
    return tuple(spec for spec in WEIGHTS if spec.path != ("unembed",) or not config.tied_embeddings)


def spec_of(path: tuple[Any, ...]) -> WeightSpec | None:
    """The row of the table for a path into a stacked or unrolled tree, or None for an unknown path."""
    keys = tuple(key for key in path if isinstance(key, str) and key != "layers" and not key.isdigit())
    return BY_PATH.get(keys)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 weights in the stacked layout, drawn as `WeightSpec.init` says."""
    draws = iter(range(len(WEIGHTS)))

    def draw(spec: WeightSpec, shape: tuple[int, ...]) -> jax.Array:
        if spec.init == "ones":
            return jnp.ones(shape, jnp.float32)
        std = _INIT_STD / (2 * config.num_layers) ** 0.5 if spec.init == "residual" else _INIT_STD
        own_key = jax.random.fold_in(key, next(draws))
        return std * jax.random.truncated_normal(own_key, -3.0, 3.0, shape, jnp.float32)

    return _stacked_tree(config, lambda spec: draw(spec, _stacked_shape(config, spec)))


def abstract_params(config: ModelConfig, *, stacked: bool, dtype: jnp.dtype = jnp.float32) -> Params:
    """The tree of weights as ShapeDtypeStructs, for loading, sharding and compiling ahead of time."""
    if stacked:
        return _stacked_tree(config, lambda spec: jax.ShapeDtypeStruct(_stacked_shape(config, spec), dtype))
    return _unrolled_tree(config, lambda spec: jax.ShapeDtypeStruct(spec.shape(config), dtype))


def logical_axes(config: ModelConfig, *, stacked: bool) -> Params:
    """The tree of weights as tuples of logical axis names, for example ("layers", "heads", "embed")."""
    if stacked:
        return _stacked_tree(config, lambda spec: ("layers", *spec.axes) if spec.per_layer else spec.axes)
    return _unrolled_tree(config, lambda spec: spec.axes)


def check_params(config: ModelConfig, params: Params) -> None:
    """Raise ConfigError for weights that do not belong to this config.

    The message names the first weight that is missing, unknown or of another shape.
    """
    expected = _by_keystr(abstract_params(config, stacked=is_stacked(params)))
    actual = _by_keystr(params)
    for path in sorted(expected.keys() | actual.keys()):
        if path not in actual or path not in expected:
            word = "missing" if path not in actual else "unknown"
            raise ConfigError(f"{word} weight {path}: the weights are not those of this config")
        if actual[path].shape != expected[path].shape:
            raise ConfigError(
                f"weight {path} has shape {actual[path].shape}, but this config needs {expected[path].shape}"
            )


def _by_keystr(tree: Params) -> dict[str, Any]:
    """Leaves with a shape (arrays and typed leaves) by their path, written as Python indexing."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _stacked_shape(config: ModelConfig, spec: WeightSpec) -> tuple[int, ...]:
    return (config.num_layers, *spec.shape(config)) if spec.per_layer else spec.shape(config)


def _stacked_tree(config: ModelConfig, leaf: Callable[[WeightSpec], Any]) -> Params:
    """A stacked tree with `leaf(spec)` for every weight, called in the order of the table."""
    params: Params = {"layers": {}}
    for spec in weight_specs(config):
        node = params["layers"] if spec.per_layer else params
        for name in spec.path[:-1]:
            node = node.setdefault(name, {})
        node[spec.path[-1]] = leaf(spec)
    return params


def _unrolled_tree(config: ModelConfig, leaf: Callable[[WeightSpec], Any]) -> Params:
    """An unrolled tree with `leaf(spec)` for every weight; all layers share one leaf of each row."""
    params = _stacked_tree(config, leaf)
    copies = (jax.tree.map(lambda x: x, params["layers"], is_leaf=_is_leaf) for _ in range(config.num_layers))
    return {**params, "layers": tuple(copies)}


def _is_leaf(value: Any) -> bool:
    return not isinstance(value, dict)


def is_stacked(params: Params) -> bool:
    """True for the stacked layout, False for the unrolled one."""
    return isinstance(params.get("layers"), dict)


def unstack(params: Params) -> Params:
    """The unrolled tree of a stacked one; an unrolled tree is returned as it is."""
    if not is_stacked(params):
        return params
    leaves, tree = jax.tree.flatten(params["layers"])
    parts = [_unstack(leaf) for leaf in leaves]
    layers = tuple(jax.tree.unflatten(tree, layer) for layer in zip(*parts, strict=True))
    return {**params, "layers": layers}


def stack(params: Params) -> Params:
    """The stacked tree of an unrolled one; a stacked tree is returned as it is."""
    if is_stacked(params):
        return params
    return {**params, "layers": jax.tree.map(lambda *leaves: _stack(leaves), *params["layers"])}


def restack(params: Params) -> Params:
    """The stacked tree of an unrolled one, whose arrays are released one after the other.

    The model is never in memory twice, but for weights below 4 MiB that were read into blocks of memory
    (weights/huge_pages.py), which go with their last array. Afterwards the layers' dicts of the argument are empty.
    """
    layers = params["layers"]
    stacked: dict[str, Params] = {}
    for block in list(layers[0]):
        stacked[block] = {}
        for name in list(layers[0][block]):
            one_weight = tuple({name: layer[block].pop(name)} for layer in layers)
            stacked[block] |= stack({"layers": one_weight})["layers"]
            jax.block_until_ready(stacked[block][name])
    return {**params, "layers": stacked}


def _unstack(leaf: Any) -> tuple[Any, ...]:
    placement = _placement(leaf)
    if placement is None:
        return tuple(leaf[i] for i in range(leaf.shape[0]))
    mesh, spec = placement.mesh, placement.spec  # layers that pipeline stages share come together
    return _split_layers(leaf.shape[0], NamedSharding(mesh, PartitionSpec(*spec[1:])))(leaf)


def _stack(leaves: tuple[Any, ...]) -> Any:
    placement = _placement(leaves[0])
    if placement is None:
        return jnp.stack(leaves)
    spec = PartitionSpec(None, *placement.spec)
    return _join_layers(NamedSharding(placement.mesh, spec, memory_kind=placement.memory_kind))(*leaves)


def _placement(leaf: Any) -> NamedSharding | None:
    """The sharding of an array with a NamedSharding; None for any other array and while tracing."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return None
    return leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None


# Both are compiled once for each sharding and shape, so that a model of many layers costs a handful of compilations.
@functools.lru_cache(maxsize=64)
def _split_layers(layers: int, sharding: NamedSharding) -> Any:
    return jax.jit(lambda a: on_device(tuple(a[i] for i in range(layers))), out_shardings=(sharding,) * layers)


@functools.lru_cache(maxsize=64)
def _join_layers(sharding: NamedSharding) -> Any:
    return jax.jit(lambda *leaves: jnp.stack(on_device(leaves)), out_shardings=sharding)
