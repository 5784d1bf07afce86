"""Between the two layer layouts: stacked (arrays with a leading layer axis, for training) and unrolled (a tuple of
layers, for decoding).

Both are free to trace within jit. Outside it, each array keeps its sharding: the layer axis is never split.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

Params = dict[str, Any]


def is_stacked(params: Params) -> bool:
    """Whether the layers are arrays with a leading layer axis, rather than a tuple of layers."""
    return isinstance(params["layers"], dict)


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
    """`stack` of an unrolled tree that is given up: each weight is let go of once it is stacked.

    So a model is never held twice. The layers' dicts are empty afterwards.
    """
    layers, stacked = params["layers"], {}
    for block in list(layers[0]):
        stacked[block] = {}
        for name in list(layers[0][block]):
            given = tuple({name: layer[block].pop(name)} for layer in layers)
            stacked[block] |= stack({"layers": given})["layers"]
            jax.block_until_ready(stacked[block][name])
    return {**params, "layers": stacked}


def _unstack(leaf: Any) -> tuple[Any, ...]:
    mesh_spec = _placed(leaf)
    if mesh_spec is None:
        return tuple(leaf[i] for i in range(leaf.shape[0]))
    mesh, spec = mesh_spec
    if spec and spec[0] is not None:
        raise ValueError(f"the layer axis of an array is split over {spec[0]!r}; it must be whole (parallel.RULES)")
    return _slices(leaf.shape[0], NamedSharding(mesh, PartitionSpec(*spec[1:])))(leaf)


def _stack(leaves: tuple[Any, ...]) -> Any:
    mesh_spec = _placed(leaves[0])
    if mesh_spec is None:
        return jnp.stack(leaves)
    mesh, spec = mesh_spec
    return _joined(NamedSharding(mesh, PartitionSpec(None, *spec)))(*leaves)


def _placed(leaf: Any) -> tuple[Any, PartitionSpec] | None:
    """The mesh and spec of an array that lies on several devices; None of any other, and while tracing."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return None
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding):
        return None
    return sharding.mesh, sharding.spec


# Compiled once for each sharding and shape, so that a model of many layers costs a handful of compilations.
@functools.lru_cache(maxsize=64)
def _slices(layers: int, sharding: NamedSharding) -> Any:
    return jax.jit(lambda a: tuple(a[i] for i in range(layers)), out_shardings=(sharding,) * layers)


@functools.lru_cache(maxsize=64)
def _joined(sharding: NamedSharding) -> Any:
    return jax.jit(lambda *leaves: jnp.stack(leaves), out_shardings=sharding)
