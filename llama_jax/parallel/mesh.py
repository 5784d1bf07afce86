"""Device meshes with five named axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from llama_jax.errors import ConfigError

# In the order of the devices: the leftmost axes communicate least (gradients once a step), the rightmost most.
AXES = ("data", "fsdp", "stage", "context", "tensor")


def resolve(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """The mesh sizes with a single -1 replaced by the remaining factor of `num_devices`.

    Raises:
        ConfigError: there is more than one -1, a size below 1, or a product other than `num_devices`.
    """
    sizes = {axis: sizes.get(axis, 1) for axis in AXES}
    free = [axis for axis, n in sizes.items() if n == -1]
    bad = {axis: n for axis, n in sizes.items() if n < 1 and n != -1}
    if bad or len(free) > 1:
        raise ConfigError(
            f"mesh {sizes}: every axis must be at least 1, and one of them may be -1 (the rest of the "
            f"{num_devices} devices)"
        )
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if free and num_devices % fixed == 0:
        sizes[free[0]] = num_devices // fixed
    if math.prod(sizes.values()) != num_devices:
        shape = " x ".join(f"{axis}={n}" for axis, n in sizes.items() if n != 1) or "1"
        if not free:
            raise ConfigError(
                f"mesh {shape} has {fixed} devices, but there are {num_devices}: set one axis to -1 to take the rest"
            )
        divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
        raise ConfigError(
            f"mesh {shape} needs a multiple of {fixed} devices, but there are {num_devices}: the fixed axes must "
            f"multiply to one of {divisors}"
        )
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A Mesh with the axes data, fsdp, stage, context and tensor, in that order.

    Several TPU slices, which a slow network connects, are put along the first of data and stage that their number
    divides.

    Args:
        sizes: devices along each axis; an absent axis is 1, and one may be -1 (the rest).
        devices: the devices of the mesh; all devices of all processes by default.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, or do not fit a TPU's grid of chips or slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    resolved = resolve(sizes, len(devices))
    shape = tuple(resolved.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices > 1:
        return _across_slices(resolved, slices, devices)
    try:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    except NotImplementedError:  # the chips of a TPU form a grid, and this shape splits one of its axes
        return _on_split_axes(shape, devices)


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of devices that need not exist, for shapes and shardings alone. An absent axis is 1."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _on_split_axes(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> Mesh:
    """A Mesh in which several mesh axes share one axis of the grid of chips, and therefore its links."""
    try:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except TypeError:  # jax's search ends without a result for some grids, such as 16 x 20 x 28 for data=35, fsdp=32
        grid = by_factors(shape, devices)
    except (NotImplementedError, ValueError):  # jax found no assignment of mesh axes to the grid's
        named = " x ".join(f"{axis}={n}" for axis, n in zip(AXES, shape, strict=True) if n > 1)
        raise ConfigError(
            f"mesh {named} does not fit the grid of these {len(devices)} chips: use sizes of the grid's own axes, or "
            "products of them (for 4 x 4 chips fsdp=4, tensor=4 or fsdp=16)"
        ) from None
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def by_factors(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices of a grid of chips in the shape of a mesh. Each mesh axis consists of prime factors of grid axes.

    The last mesh axes, which communicate most, choose first. An axis takes factors of as few grid axes as it can.
    """
    places = [(*device.coords, device.core_on_chip) for device in devices]
    sizes = [1 + max(place[axis] for place in places) for axis in range(len(places[0]))]
    grid = np.empty(sizes, dtype=object)
    for place, device in zip(places, devices, strict=True):
        grid[place] = device
    factors = [(axis, prime) for axis, size in enumerate(sizes) for prime in _primes(size)]
    left = list(range(len(factors)))
    order: list[int] = []
    for size in reversed(shape):
        taken: list[int] = []
        for prime in _primes(size):
            fitting = [i for i in left if factors[i][1] == prime]
            used = {factors[i][0] for i in taken}
            taken.append(
                max(fitting, key=lambda i: (factors[i][0] in used, sum(factors[j] == factors[i] for j in left)))
            )
            left.remove(taken[-1])
        order = [*sorted(taken), *order]
    return grid.reshape([prime for _, prime in factors]).transpose(order).reshape(shape)


def _primes(n: int) -> list[int]:
    """The prime factors of a number in ascending order."""
    prime = next((p for p in range(2, math.isqrt(n) + 1) if n % p == 0), n)
    return [] if n == 1 else [prime, *_primes(n // prime)]


def _across_slices(sizes: Mapping[str, int], slices: int, devices: Sequence[jax.Device]) -> Mesh:
    """A Mesh whose data or stage axis crosses slices."""
    crossing = next((axis for axis in ("data", "stage") if sizes[axis] % slices == 0), None)
    if crossing is None:
        raise ConfigError(
            f"mesh data={sizes['data']} x stage={sizes['stage']} cannot be split over {slices} slices, whose network "
            f"is slow: set mesh.data to a multiple of {slices}"
        )
    outer = tuple(slices if axis == crossing else 1 for axis in AXES)
    inner = tuple(n // m for n, m in zip(sizes.values(), outer, strict=True))
    try:
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices)
    except NotImplementedError:  # an axis of this size needs a part of a physical axis
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def single_device_mesh() -> Mesh:
    """A mesh of this process's first device, the default for sampling."""
    return make_mesh({}, jax.local_devices()[:1])
