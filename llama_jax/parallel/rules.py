"""Sharding rules: logical axis names to mesh axes. Arrays name logical axes; only this file maps them to the mesh."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axes = tuple[str | None, ...]
HOST = "pinned_host"  # jax's name of the host's memory that devices read

# Each logical axis is sharded over the mesh axes named here. Weights are sharded twice: their `embed` axis over fsdp
# and context (all-gathered one layer at a time), the other over tensor. `layers` is sharded over stages (pipeline.py):
# a scan over a sharded axis all-gathers all of it. The vocabulary is sharded over stages too, so that they share
# the work of the loss. Activations between layers are sharded over tensor (arXiv:2205.05198 shards the length over it):
# the residuals of a layer are held once, and each all-reduce becomes a reduce-scatter and an all-gather.
_TRAIN: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "gathered_batch": ("data",),  # rows where fsdp and context shard the columns instead, as in embedding look-ups
    "length": ("context",),
    "layers": ("stage",),
    "embed": ("fsdp", "context"),
    "vocab": ("tensor", "stage"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "norm": (),
    "act_embed": ("tensor",),
    "slots": (),
}
RULES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": _TRAIN,
    # Sampling all-gathers no weights, so `embed` is not sharded. The length of a decode step is 1. The slots of a KV
    # cache are sharded over context, for prompts whose cache no single device holds.
    "infer": {
        **_TRAIN,
        "gathered_batch": ("data", "fsdp"),
        "layers": (),
        "embed": (),
        "vocab": ("tensor",),
        "length": (),
        "act_embed": (),
        "slots": ("context",),
    },
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the name of the sharding rules for it.

    Attributes:
        mesh: the devices.
        rules: a key of RULES, "train" or "infer".
        microbatches: parts of a batch that follow one another through pipeline stages.
        balanced: True while rows are in the order of `length_order`.
        memory: kind of memory of the arrays, such as HOST; None is that of the devices.
    """

    mesh: Mesh
    rules: str
    microbatches: int = 1
    balanced: bool = False
    memory: str | None = None

    @property
    def stage_axis(self) -> str:
        """The mesh axis of pipeline stages."""
        return RULES["train"]["layers"][0]

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
        return NamedSharding(self.mesh, self.spec(axes, shape), memory_kind=self.memory)


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


def device() -> jax.Device:
    """The first device of this process in the active layout, or the default device without a layout."""
    layout = _active.get()
    if layout is not None and isinstance(layout.mesh, Mesh):  # an abstract mesh has no devices
        devices = list(layout.mesh.devices.flat)
        return next((one for one in devices if one.process_index == jax.process_index()), devices[0])
    default = getattr(jax.config, "jax_default_device", None)  # None, a device, or the name of a platform
    return default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]


def device_platform() -> str:
    """The platform of `device`: "cpu", "cuda", "rocm" or "tpu"."""
    platform = device().platform
    if platform != "gpu":
        return platform
    return "rocm" if "rocm" in device().client.platform_version.lower() else "cuda"


def compute_capability() -> int:
    """The compute capability of an NVIDIA GPU times ten, 90 for an H100; 0 on other platforms."""
    if device_platform() != "cuda":
        return 0
    return round(10 * float(getattr(device(), "compute_capability", 0)))


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


def constrain_first(x: jax.Array, axis: str) -> jax.Array:
    """Constrains the sharding of the first dimension alone by its logical axis."""
    layout = _active.get()
    if layout is None or layout.mesh.size == 1:
        return x
    first = layout.spec((axis,), x.shape[:1])[0]
    spec = PartitionSpec(first, *(PartitionSpec.UNCONSTRAINED for _ in x.shape[1:]))
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))


def length_order(T: int) -> tuple[int, ...]:
    """The order of 2 n equal chunks of a row that balances causal attention over n devices; (0,) for one device.

    Device i holds the chunks i and 2 n - 1 - i, so that all devices attend to equally many keys (Dubey et al.,
    arXiv:2407.21783, section 3.3.2).

    Args:
        T: length of a row. A length that 2 n does not divide stays in order.
    """
    n = axis_size("length")
    if n == 1 or T % (2 * n):
        return (0,)
    return tuple(chunk for i in range(n) for chunk in (i, 2 * n - 1 - i))


def reordered(x: jax.Array, order: tuple[int, ...], *, axis: int = 1, back: bool = False) -> jax.Array:
    """Reorders the chunks of one axis; `back` restores the order of the row."""
    n = len(order)
    if n == 1:
        return x
    indices = sorted(range(n), key=order.__getitem__) if back else order
    shape = x.shape
    chunks = x.reshape(*shape[:axis], n, shape[axis] // n, *shape[axis + 1 :])
    return chunks.take(np.asarray(indices), axis=axis).reshape(shape)


@contextlib.contextmanager
def use_balanced(order: tuple[int, ...]) -> Iterator[None]:
    """Marks rows as being in the order of `length_order` for the attention kernels, while tracing."""
    layout = _active.get()
    with use(layout if layout is None or len(order) == 1 else dataclasses.replace(layout, balanced=True)):
        yield


def all_gathered(x: jax.Array, axis: str, dimension: int) -> jax.Array:
    """The shards of all devices along a logical axis, joined; inside a function of `on_each_part` only."""
    layout = _active.get()
    names = None if layout is None else layout.spec((axis,))[0]
    return x if names is None else jax.lax.all_gather(x, names, axis=dimension, tiled=True)


def summed(x: jax.Array, axis: str | None, size: int) -> jax.Array:
    """The sum of partial results over the devices that share a dimension; inside a function of `on_each_part` only.

    Args:
        x: the partial result of this device.
        axis: logical axis of the dimension that was summed over.
        size: size of this dimension on all devices together.
    """
    layout = _active.get()
    names = None if layout is None else layout.spec((axis,), (size,))[0]
    return x if names is None else jax.lax.psum(x, names)


def on_each_part(
    function: Callable[..., jax.Array],
    *arrays: tuple[jax.Array, Axes],
    whole: tuple[Any, Any] | None = None,
    out: tuple[tuple[int, ...], Axes] | None = None,
) -> jax.Array:
    """Runs `function` on each device's own shards, for code that XLA cannot partition, such as Pallas kernels.

    Args:
        function: takes the shards and returns a shard of the result. Values of other devices come from `all_gathered`.
        *arrays: each array with its logical axes.
        whole: a tree and the tree of its PartitionSpecs, the last argument of `function`.
        out: shape and logical axes of the result; those of the first array by default.

    Returns:
        The array whose shards `function` returned.
    """
    layout = _active.get()
    values = [array for array, _ in arrays] + ([] if whole is None else [whole[0]])
    if layout is None or layout.mesh.size == 1:
        return function(*values)
    specs = tuple(layout.spec(axes, array.shape) for array, axes in arrays) + (() if whole is None else (whole[1],))
    # check_vma must be off: kernels do not declare over which axes their results are replicated.
    result = specs[0] if out is None else layout.spec(out[1], out[0])
    split = jax.shard_map(function, mesh=layout.mesh, in_specs=specs, out_specs=result, check_vma=False)
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


def on_device(tree: Any) -> Any:
    """A tree whose arrays in the host's memory are copied to the devices, while a function is traced."""
    space = jax.memory.Space
    return jax.tree.map(lambda a: jax.device_put(a, space.Device) if on_host(a) else a, tree)


def has_host_memory(mesh: Mesh) -> bool:
    """True if the devices of a mesh have HOST memory. jax compiles for absent GPUs as if they had none."""
    devices = list(mesh.devices.flat)
    own = next((one for one in devices if one.process_index == jax.process_index()), devices[0])
    try:
        return any(memory.kind == HOST for memory in own.addressable_memories())
    except jax.errors.JaxRuntimeError:
        return False


def on_host(a: jax.Array) -> bool:
    """True for an array that is in the host's memory, while a function is traced."""
    return jax.typeof(a).memory_space == jax.memory.Space.Host


def abstract(shapes: Any, shardings: Any) -> Any:
    """A tree of ShapeDtypeStructs with the shapes and dtypes of one tree and the shardings of another."""
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes, shardings
    )


def stages(mesh: Mesh) -> int:
    """Number of pipeline stages of a mesh."""
    return Layout(mesh, "train").parts("layers")


def spread(mesh: Mesh) -> NamedSharding:
    """Sharding of a vector with one element on each device."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of a value that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())
