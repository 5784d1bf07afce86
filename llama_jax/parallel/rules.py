"""Logical axis names to mesh axes. Arrays name what an axis *is*; only this file says where it goes."""

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

# Each logical axis goes to the mesh axes named here. Weights are split twice: their `embed` side over fsdp (gathered
# a layer at a time), the other over tensor. `layers` goes to no axis: a scan over a split axis gathers it whole.
# Between layers activations are split over tensor too (as arXiv:2205.05198 splits the length over it): what a layer
# keeps for its backward pass is held once, and each all-reduce becomes a reduce-scatter and an all-gather.
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
    # Sampling gathers no weights: `embed` stays whole, and a token's length axis is one long. It keeps no activations.
    "infer": {**_TRAIN, "embed": (), "length": (), "act_embed": ()},
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the name of the rules that place logical axes on it."""

    mesh: Mesh
    rules: str

    def parts(self, axis: str) -> int:
        """How many parts a logical axis is split into."""
        return math.prod(self.mesh.shape[name] for name in RULES[self.rules][axis])

    def spec(self, axes: Axes, shape: tuple[int, ...] | None = None) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes.

        Where `shape` is given, mesh axes that do not divide a dimension are left out of it, the innermost first, so
        that a batch of one row on many devices is replicated instead of refused.
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
    """Make `constrain` place arrays by `layout`. Enter it inside the function that is jitted, so that it is traced."""
    token = _active.set(layout)
    try:
        yield
    finally:
        _active.reset(token)


def active() -> Layout | None:
    """The layout that `use` made active."""
    return _active.get()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin the sharding of an intermediate array by the logical names of its axes; the identity without a layout."""
    layout = _active.get()
    if layout is None or layout.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(axes, x.shape))


def axis_size(axis: str) -> int:
    """Devices over which the active layout splits a logical axis; 1 without a layout."""
    layout = _active.get()
    return 1 if layout is None else layout.parts(axis)


def on_each_part(function: Callable[..., jax.Array], *arrays: tuple[jax.Array, Axes]) -> jax.Array:
    """`function` of each device's own part of some arrays, given with their logical axes; it must not look further.

    The result has the shape and the axes of the first array. For what XLA cannot split by itself, as Pallas kernels.
    """
    layout = _active.get()
    values = [array for array, _ in arrays]
    if layout is None or layout.mesh.size == 1:
        return function(*values)
    specs = tuple(layout.spec(axes, array.shape) for array, axes in arrays)
    # Which values are equal on which devices is not checked: kernels do not say it of their results.
    split = jax.shard_map(function, mesh=layout.mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return split(*values)


def shardings(layout: Layout, axes: Any, shapes: Any) -> Any:
    """A tree of NamedShardings for a tree of logical axes (tuples) and the matching tree of shaped leaves.

    A leaf may be made of several arrays: with the same axes, as a quantized weight is, or with those that its
    `part_axes` gives by the name of each field, as a LoRA weight is.
    """

    def places(leaf: Any, names: Axes) -> Any:
        if hasattr(leaf, "part_axes"):
            parts = leaf.part_axes(names).items()
            return dataclasses.replace(leaf, **{part: places(getattr(leaf, part), its) for part, its in parts})
        return jax.tree.map(lambda array: layout.sharding(names, array.shape), leaf)

    return jax.tree.map(places, shapes, axes, is_leaf=lambda x: hasattr(x, "shape"))


def abstract(shapes: Any, places: Any) -> Any:
    """A tree of ShapeDtypeStructs: the shapes and dtypes of one tree, the shardings of another."""
    return jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes, places)


def spread(mesh: Mesh) -> NamedSharding:
    """The sharding of a vector that has one element on each device."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
