"""Sharding rules: logical axis names to mesh axes. Arrays name logical axes; only this file maps them to the mesh."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axes = tuple[str | None, ...]

# Each logical axis is sharded over the mesh axes named here. Weights are sharded twice: their `embed` axis over fsdp
# (all-gathered one layer at a time), the other over tensor. `layers` is not sharded, because a scan over a sharded axis
# all-gathers all of it. Activations between layers are sharded over tensor too (arXiv:2205.05198 shards the length over
# it): the residuals of a layer are held once, and each all-reduce becomes a reduce-scatter and an all-gather.
_TRAIN: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "norm": (),
    "act_embed": ("tensor",),
}
RULES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": _TRAIN,
    # Sampling all-gathers no weights, so `embed` is not sharded. The length of a decode step is 1.
    "infer": {**_TRAIN, "embed": (), "length": (), "act_embed": ()},
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the name of the sharding rules for it.

    Attributes:
        mesh: the devices.
        rules: a key of RULES, "train" or "infer".
    """

    mesh: Mesh
    rules: str

    def parts(self, axis: str) -> int:
        """Number of shards of a logical axis."""
        return math.prod(self.mesh.shape[name] for name in RULES[self.rules][axis])

    def spec(self, axes: Axes, shape: tuple[int, ...] | None = None) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes.

        If `shape` is given, mesh axes that do not divide a dimension are left out, the innermost first. A batch of one
        row on many devices is therefore replicated instead of refused.
        """
        rules = RULES[self.rules]
        parts: list[Any] = []
        for i, axis in enumerate(axes):
            names = () if axis is None else rules[axis]
            names = tuple(name for name in names if self.mesh.shape[name] > 1)
            while shape is not None and names and shape[i] % math.prod(self.mesh.shape[n] for n in names):
                names = names[:-1]
            parts.append(None if not names else names if len(names) > 1 else names[0])
        return PartitionSpec(*parts)

    def sharding(self, axes: Axes, shape: tuple[int, ...] | None = None) -> NamedSharding:
        """The NamedSharding of an array with these logical axes."""
        return NamedSharding(self.mesh, self.spec(axes, shape))


_active: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("llama_jax_layout", default=None)


@contextlib.contextmanager
def use(layout: Layout | None) -> Iterator[None]:
    """Makes `layout` active for `constrain`. Enter it inside the jitted function, while tracing."""
    token = _active.set(layout)
    try:
        yield
    finally:
        _active.reset(token)


def active() -> Layout | None:
    """The active layout, or None."""
    return _active.get()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of an intermediate array by its logical axes. Without a layout it is the identity."""
    layout = _active.get()
    if layout is None or layout.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(axes, x.shape))


def axis_size(axis: str) -> int:
    """Number of shards of a logical axis under the active layout; 1 without a layout."""
    layout = _active.get()
    return 1 if layout is None else layout.parts(axis)


def on_each_part(function: Callable[..., jax.Array], *arrays: tuple[jax.Array, Axes]) -> jax.Array:
    """Runs `function` on each device's own shards, for code that XLA cannot partition, such as Pallas kernels.

    Args:
        function: takes the shards and returns an array with the shape of the first. It must need no other device.
        *arrays: each array with its logical axes.

    Returns:
        An array with the shape and the axes of the first array.
    """
    layout = _active.get()
    values = [array for array, _ in arrays]
    if layout is None or layout.mesh.size == 1:
        return function(*values)
    specs = tuple(layout.spec(axes, array.shape) for array, axes in arrays)
    # check_vma must be off: kernels do not declare over which axes their results are replicated.
    split = jax.shard_map(function, mesh=layout.mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return split(*values)


def shardings(layout: Layout, axes: Any, shapes: Any) -> Any:
    """A tree of NamedShardings for a tree of logical axes (tuples) and the matching tree of shaped leaves.

    A leaf may consist of several arrays. They have the same axes, as in a quantized weight, or those that the leaf's
    `part_axes` method gives by field name, as in a LoRA weight.
    """

    def leaf_shardings(leaf: Any, names: Axes) -> Any:
        if hasattr(leaf, "part_axes"):
            parts = leaf.part_axes(names).items()
            return dataclasses.replace(leaf, **{part: leaf_shardings(getattr(leaf, part), own) for part, own in parts})
        return jax.tree.map(lambda array: layout.sharding(names, array.shape), leaf)

    return jax.tree.map(leaf_shardings, shapes, axes, is_leaf=lambda x: hasattr(x, "shape"))


def abstract(shapes: Any, shardings: Any) -> Any:
    """A tree of ShapeDtypeStructs with the shapes and dtypes of one tree and the shardings of another."""
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes, shardings
    )


def spread(mesh: Mesh) -> NamedSharding:
    """Sharding of a vector with one element on each device."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of a value that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())
