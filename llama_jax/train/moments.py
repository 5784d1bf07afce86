"""Adam's two moments in fewer bits: bfloat16, or 8 bits in blocks (Dettmers et al., arXiv:2110.02861).

A moment in 8 bits is a typed leaf in the place of the float32 array, like a quantized weight. The last axis is split
into blocks of at most 128 numbers. Each block has its largest magnitude as a float32 scale, and a number is stored as a
root of its fraction of the scale:

    first moment    scale * sign(q) (|q| / 127)^2     int8
    second moment   scale * (q / 255)^4               uint8

The power law takes the place of the paper's table because a table look-up is slow on a TPU, where roots and products
cost nothing compared with reading memory. It is also more accurate on the moments of a small model in blocks of 128:
the root mean square error of Adam's update is 1.1 %, with the paper's table 1.6 %, and with an even scale for the first
moment 3.2 %. Both have the same range: gradients of 1/64,000 of the largest in their block still have a first and a
second moment. On stationary noise the table is more accurate at b2 = 0.99 (8.2 to 9.2 %), but not at 0.95 or 0.999.

First moments are rounded to nearest. Second moments are rounded stochastically, so that their mean is exact: with
b2 = 0.999 they decay by 0.1 % a step, and rounding to nearest in few bits would never change them. The price is noise.
On gradients of pure noise, updates of a long run with b2 = 0.95 have an error of 5.6 % (rounding to nearest 4.7 %, the
paper's table with rounding to nearest 7.2 %); with b2 = 0.999 the errors are 11.0, 8.6 and 11.7 %.

Letters: G blocks of a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from llama_jax.parallel import axis_size, constrain_first, on_device, on_host

BLOCKS = (128, 64, 32)  # sizes; the largest that divides the last axis is used. A TPU's registers have 128 lanes
_FIRST, _SECOND = 127, 255  # largest codes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moment:
    """A moment in 8 bits. Both arrays have the axes of the weight that the moment belongs to.

    Attributes:
        values: Codes (..., in): int8 for a first moment, uint8 for a second moment.
        scales: Scales of the blocks, float32 (..., G), not negative.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight: (..., in)."""
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the moment in computations: float32."""
        return jnp.dtype(jnp.float32)


Stored = jax.Array | Moment


def block_size(shape: tuple[int, ...]) -> int | None:
    """The number of values on a weight's last axis that share a scale; None for a vector, or if none divides it."""
    return next((block for block in BLOCKS if len(shape) > 1 and shape[-1] % block == 0), None)


def zeros(shape: tuple[int, ...], kind: str, *, second: bool) -> Stored:
    """A moment of zeros. `kind` is float32, bfloat16 or int8; int8 becomes float32 if there is no `block_size`."""
    block = block_size(shape)
    if kind != "int8" or block is None:
        return jnp.zeros(shape, jnp.float32 if kind == "int8" else kind)
    values = jnp.zeros(shape, jnp.uint8 if second else jnp.int8)
    return Moment(values, jnp.zeros((*shape[:-1], shape[-1] // block), jnp.float32))


def unpack(stored: Stored) -> jax.Array:
    """The moment (...) in float32."""
    if not isinstance(stored, Moment):
        return stored.astype(jnp.float32)
    numbers = _second_of(stored.values) if stored.values.dtype == jnp.uint8 else _first_of(stored.values)
    return _along(stored.scales, stored) * numbers


def pack_first(x: jax.Array, like: Stored) -> Stored:
    """A first moment (...) float32 in the form of `like`, rounded to nearest."""
    if not isinstance(like, Moment):
        return x.astype(like.dtype)
    parts, scales = _parts(x, like)
    codes = jnp.round(_FIRST * jnp.sqrt(jnp.abs(parts)))
    return Moment((jnp.sign(parts) * codes).astype(jnp.int8), scales)


def pack_second(x: jax.Array, like: Stored, random: jax.Array) -> Stored:
    """A second moment (...) float32, not negative, in the form of `like`. In 8 bits, only 0 is rounded to 0.

    Args:
        x: The moment.
        like: A moment in the form to return.
        random: Random bits, uint32 (...), that choose between the two nearest numbers.
    """
    if not isinstance(like, Moment):
        if like.dtype != jnp.bfloat16:
            return x
        # A bfloat16 is the upper half of a float32: whether the lower half carries is the chance that it should.
        bits = lax.bitcast_convert_type(x, jnp.uint32) + (random >> 16)
        return lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    parts, scales = _parts(x, like)
    below = jnp.clip(jnp.floor(_SECOND * jnp.sqrt(jnp.sqrt(parts))), 1, _SECOND - 1)
    low, high = _second_of(below), _second_of(below + 1)
    chance = (random >> 8).astype(jnp.float32) * 2.0**-24
    codes = jnp.where(parts > 0, below + (chance < (parts - low) / (high - low)), 0)
    return Moment(codes.astype(jnp.uint8), scales)


def scale_by_adam(*, b1: float, b2: float, eps: float, kind: Callable[[Any], str]) -> optax.GradientTransformation:
    """optax.scale_by_adam with moments in few bits. The update is computed in float32 from the moments before rounding.

    Args:
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Number added to the root of the second moment.
        kind: Function from a weight's path of keys to the form of its moments: float32, bfloat16 or int8 (`zeros`).

    Returns:
        A transformation with optax's own ScaleByAdamState, whose mu and nu have arrays and Moments as leaves.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        def moments(second: bool) -> Any:
            return jax.tree_util.tree_map_with_path(lambda path, p: zeros(p.shape, kind(path), second=second), params)

        return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=moments(False), nu=moments(True))

    def one(count: jax.Array, grad: jax.Array, mu: Stored, nu: Stored, seed: jax.Array) -> tuple[Any, Stored, Stored]:
        m = b1 * unpack(mu) + (1 - b1) * grad
        v = b2 * unpack(nu) + (1 - b2) * jnp.square(grad)
        step = (m / (1 - b1**count)) / (jnp.sqrt(v / (1 - b2**count)) + eps)
        return step, pack_first(m, mu), pack_second(v, nu, _random(grad.shape, seed))

    def update(
        grads: Any, state: optax.ScaleByAdamState, params: Any = None, *, finite: jax.Array | bool = True, **_: Any
    ) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        tree: Any
        leaves, tree = jax.tree.flatten(grads)
        new = []
        stored = zip(leaves, tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu), strict=True)
        for leaf, (grad, mu, nu) in enumerate(stored):
            seed = count.astype(jnp.uint32) * jnp.uint32(0x9E3779B9) ^ jnp.uint32(leaf * 0x85EBCA77 & 0xFFFFFFFF)
            grad = grad.astype(jnp.float32)
            if (isinstance(mu, Moment) and grad.ndim > 2) or any(map(on_host, jax.tree.leaves(mu))):
                new.append(_layer_by_layer(functools.partial(one, count), (grad, mu, nu), seed, finite))
            else:
                new.append(one(count, grad, mu, nu, seed))
        updates, mus, nus = (tree.unflatten(parts) for parts in zip(*new, strict=True)) if new else (grads,) * 3
        return updates, optax.ScaleByAdamState(count, mus, nus)

    return optax.GradientTransformationExtraArgs(init, update)


def _layer_by_layer(
    one: Callable[..., tuple[Any, Stored, Stored]], stacks: tuple[Any, Stored, Stored], seed: jax.Array, finite: Any
) -> Any:
    """Applies `one`, the update of a weight from its gradient, moments and seed, to stacked matrices in place.

    One layer has its moments in float32 at a time. On all layers at once, the TPU compiler's temporaries take 17 bytes
    a weight; bfloat16 moments need none. Moments in the host's memory are copied to the devices and back. They stay as
    they are unless `finite`. Each pipeline stage updates one of its own layers at a time: an index into the layers of
    all stages would gather them.
    """
    L, S = stacks[0].shape[0], axis_size("layers")
    axis = 0 if S == 1 else 1

    def stored(new: jax.Array, old: jax.Array, stack: jax.Array) -> jax.Array:
        return jax.device_put(jnp.where(finite, new, old), jax.memory.Space.Host) if on_host(stack) else new

    def numbered(grad: jax.Array, mu: Stored, nu: Stored, i: jax.Array) -> tuple[Any, Stored, Stored]:
        return one(grad, mu, nu, seed + i.astype(jnp.uint32) * jnp.uint32(0xC2B2AE3D))

    def layer(i: jax.Array, stacked: Any) -> Any:
        old = on_device(jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, axis, keepdims=False), stacked))
        of_stages: Callable[..., Any] = numbered if S == 1 else jax.vmap(numbered)
        new = of_stages(*old, i if S == 1 else i + jnp.arange(0, L, L // S))
        new = jax.tree.map(stored, new, old, stacked)
        return jax.tree.map(lambda a, part: lax.dynamic_update_index_in_dim(a, part, i, axis), stacked, new)

    if S == 1:
        return lax.fori_loop(0, L, layer, stacks)
    by_stage = jax.tree.map(lambda a: constrain_first(a.reshape(S, L // S, *a.shape[1:]), "layers"), stacks)
    return jax.tree.map(lambda a: a.reshape(L, *a.shape[2:]), lax.fori_loop(0, L // S, layer, by_stage))


def _first_of(codes: jax.Array) -> jax.Array:
    roots = codes.astype(jnp.float32) * (1 / _FIRST)
    return roots * jnp.abs(roots)


def _second_of(codes: jax.Array) -> jax.Array:
    return jnp.square(jnp.square(codes.astype(jnp.float32) * (1 / _SECOND)))


def _along(scales: jax.Array, like: Moment) -> jax.Array:
    """Repeats each block's scale (..., G) for all of its values (..., in)."""
    return jnp.repeat(scales, like.shape[-1] // scales.shape[-1], axis=-1)


def _parts(x: jax.Array, like: Moment) -> tuple[jax.Array, jax.Array]:
    """Splits values into fractions of their block's largest magnitude (..., in), and these magnitudes (..., G)."""
    # A maximum over a reshape to (..., G, n) would change the layout on a TPU, and takes 3 times as long on a CPU.
    block = (1,) * (x.ndim - 1) + (x.shape[-1] // like.scales.shape[-1],)
    scales = lax.reduce_window(jnp.abs(x), 0.0, lax.max, block, block, "valid")
    return x / _along(jnp.where(scales > 0, scales, 1), like), scales


def _random(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """Uniform random uint32, computed from the index within the array and a seed, so that they are equal on any mesh.

    The index goes through the last mixing step of murmur3 (Appleby, public domain). It takes a tenth of the operations
    of jax's own generator, which would take longer than the update itself.
    """
    x = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        x = x * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    x = x + seed
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
