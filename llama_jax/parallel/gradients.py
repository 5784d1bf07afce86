"""Gradients of sharded weights by a ring: products and the messages that sum them take turns.

The TPU compiler all-reduces such a gradient and cuts it afterwards, while nothing is computed
(docs/measurements/tpu-compiler.md#gradients-on-tpus). Here each device computes its part of one block of the gradient,
adds it to the sum that arrived from its neighbor, and sends the sum on while it computes the next block (Wang et al.,
"Overlap Communication with Dependent Computation via Decomposition", ASPLOS 2023). Two rings of opposite direction
share the links.

Neighborhoods of devices exchange blocks of products. Then, in the same way, the devices of a neighborhood exchange
blocks of the sums.

Letters: B rows, T tokens of one device; n devices that share the embedding axis, in R neighborhoods of S devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax.parallel.rules import RULES, Axes, Layout, active, device_platform

_MAX_STEPS = 8  # more steps make narrow products, which read their other operand again
_MIN_WIDTH = 256  # columns of a block


def ring_takes(g: jax.Array, x: jax.Array, axes: Axes | None) -> bool:
    """True if `ring_gradient` runs for these arrays: on TPUs, for a weight whose embedding axis is sharded."""
    layout = active()
    if layout is None or axes is None or "embed" not in axes or x.ndim != 3 or device_platform() != "tpu":
        return False
    sizes = dict(zip((*("batch", "length"), *axes), (*x.shape[:2], g.shape[-1], x.shape[-1]), strict=True))
    return layout.parts("embed") > 1 and all(size % layout.parts(name or "norm") == 0 for name, size in sizes.items())


def ring_gradient(g: jax.Array, x: jax.Array, axes: Axes) -> jax.Array:
    """The product g^T x (out, in) in float32, summed over all devices and sharded by `axes`.

    Args:
        g: gradient of the outputs (B, T, out).
        x: inputs (B, T, in).
        axes: logical axes of the weight; one of them is "embed".
    """
    layout = active()
    assert layout is not None
    # The whole embedding axis of an operand is on each device, as the products of the layer need it too.
    specs = tuple(
        layout.spec(("batch", "length", None if name == "embed" else name), array.shape)
        for array, name in zip((g, x), axes, strict=True)
    )
    part = functools.partial(_part, layout=layout, scattered=axes.index("embed"))
    # check_vma must be off: the type of a ring's sum does not say that it is the same on all other axes.
    split = jax.shard_map(part, mesh=layout.mesh, in_specs=specs, out_specs=layout.spec(axes), check_vma=False)
    return split(g, x)


def _part(g: jax.Array, x: jax.Array, *, layout: Layout, scattered: int) -> jax.Array:
    """The shard of one device. `scattered` is the axis of the gradient that is sharded."""
    rules = RULES[layout.rules]
    ring = tuple(name for name in rules["embed"] if layout.mesh.shape[name] > 1)
    n, whole, other = layout.parts("embed"), (g, x)[scattered], (x, g)[scattered]
    R = _steps(n, whole.shape[-1])

    def product(half: jax.Array, i: jax.Array) -> jax.Array:
        block = _block(whole, i, R, axis=-1)
        operands = (block, half) if scattered == 0 else (half, block)
        contract = (tuple(range(g.ndim - 1)),) * 2
        return lax.dot_general(*operands, (contract, ((), ())), preferred_element_type=jnp.float32)

    halves = jnp.split(other, 2, axis=-1) if other.shape[-1] % 2 == 0 else [other]
    sums = _rings([functools.partial(product, half) for half in halves], ring, n, R, n // R)
    group = n // R
    while group > 1:  # within the groups, blocks of the sums take the place of products
        R = _steps(group, 0)
        blocks = [functools.partial(_block, total, R=R, axis=scattered) for total in sums]
        sums = _rings(blocks, ring, group, R, group // R)
        group //= R
    gradient = jnp.concatenate(sums, axis=1 - scattered)
    summed = (*rules["batch"], *rules["length"])
    others = tuple(name for name in summed if name not in ring and layout.mesh.shape[name] > 1)
    return lax.psum(gradient, others) if others else gradient


def _steps(n: int, width: int) -> int:
    """The steps of a ring over n devices, whose blocks should not be too narrow for a product (0: there is none)."""
    wide = max(1, width // _MIN_WIDTH) if width else n
    most = max(r for r in range(1, _MAX_STEPS + 1) if n % r == 0 and r <= wide)
    return most if most > 1 else next(r for r in range(2, n + 1) if n % r == 0)


def _block(a: jax.Array, i: jax.Array, R: int, axis: int) -> jax.Array:
    """Part i of R equal parts of an axis."""
    width = a.shape[axis] // R
    return lax.dynamic_slice_in_dim(a, i * width, width, axis=axis)


def _rings(
    blocks: Sequence[Callable[[jax.Array], jax.Array]], axes: tuple[str, ...], n: int, R: int, S: int
) -> list[jax.Array]:
    """The sums of block(i) over R neighborhoods, for the number i of the device's own. Rings alternate in direction.

    Args:
        blocks: for each ring a function that gives this device's part of the sum for neighborhood i.
        axes: mesh axes of the ring.
        n: devices of a group; groups are of neighboring devices, and do not communicate.
        R: neighborhoods of a group.
        S: devices of a neighborhood.
    """
    all_devices = lax.axis_size(axes)
    own = lax.axis_index(axes) % n // S
    sums: list[jax.Array] = []
    for step in range(R):
        for k, block in enumerate(blocks):
            way = 1 if k % 2 == 0 else -1
            part = block((own + way * (R - 1 - step)) % R)
            if step == 0:
                sums.append(part)
            else:
                to = [(i, i - i % n + (i % n + way * S) % n) for i in range(all_devices)]
                sums[k] = part + lax.ppermute(sums[k], axes, to)
    return sums
