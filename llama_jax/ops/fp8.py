"""Matrix products of training with operands of 8 bits, for GPUs whose tensor cores multiply these twice as fast.

Activations and weights are rounded to float8_e4m3 and gradients, whose range is larger, to float8_e5m2, as Micikevicius
et al. propose (arXiv:2209.05433). Each operand has one float32 scale, which maps its largest value of this step to the
largest number of its format. Sums are float32, and results are multiplied by the scales. Nothing is kept between steps.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax import parallel

Axes = tuple[str | None, ...] | None

_FORWARD, _BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
_LEAST = 256  # inputs and outputs of a weight: smaller products gain nothing
_ALIGNED = 16  # cuBLAS multiplies 8-bit matrices whose sizes are multiples of this

_active: contextvars.ContextVar[bool] = contextvars.ContextVar("llama_jax_fp8", default=False)


@contextlib.contextmanager
def products(active: bool) -> Iterator[None]:
    """While a function is traced inside, `linear` rounds the operands of its products if `active`."""
    token = _active.set(active)
    try:
        yield
    finally:
        _active.reset(token)


def active() -> bool:
    """True inside of `products(True)`."""
    return _active.get()


def takes(w: jax.Array) -> bool:
    """True if products with a weight (out, in) are to be rounded."""
    return active() and w.ndim == 2 and min(w.shape) >= _LEAST and not any(n % _ALIGNED for n in w.shape)


def _rounded(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """x in 8 bits, and its scale: x is about the product of both."""
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    limit = jnp.finfo(dtype).max.astype(jnp.float32)
    # NaN and infinity stay, so that the step is skipped. Numbers whose scale would be subnormal become zero.
    scale = jnp.maximum(largest / limit, jnp.finfo(jnp.float32).tiny)
    return jnp.clip(x.astype(jnp.float32) / scale, -limit, limit).astype(dtype), scale


def _dot(a: jax.Array, b: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, w: jax.Array, axes: Axes) -> jax.Array:
    """The product x w^T of rounded operands, (..., out) in the dtype of x. Gradients are products of rounded ones, too.

    Args:
        x: activations (..., in).
        w: weight (out, in), in any float dtype. Its gradient has this dtype.
        axes: logical axes of w. A sharded weight is all-gathered in 8 bits, and its gradient reduce-scattered.
    """
    return _forward(x, w, axes)[0]


def _weight(w: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """The rounded weight, all-gathered over the mesh axes of `embed`, and its scale."""
    w8, scale = _rounded(w, _FORWARD)
    if axes is not None:
        w8 = parallel.constrain(w8, *axes)  # each device rounds its own shard
        w8 = parallel.constrain(w8, *(None if axis == "embed" else axis for axis in axes))
    return w8, scale


_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _forward(x: jax.Array, w: jax.Array, axes: Axes) -> tuple[jax.Array, _Residuals]:
    x8, x_scale = _rounded(x, _FORWARD)
    w8, w_scale = _weight(w, axes)
    out = _dot(x8, w8, ((x.ndim - 1,), (1,))) * (x_scale * w_scale)
    return out.astype(x.dtype), (x8, x_scale, w, jnp.zeros((), x.dtype))


def _backward(axes: Axes, residuals: _Residuals, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x8, x_scale, w, like = residuals
    g8, g_scale = _rounded(g, _BACKWARD)
    w8, w_scale = _weight(w, axes)
    leading = tuple(range(g.ndim - 1))
    dx = _dot(g8, w8, ((g.ndim - 1,), (0,))) * (g_scale * w_scale)
    dw = _dot(g8, x8, (leading, leading)) * (g_scale * x_scale)
    dw = dw if axes is None else parallel.constrain(dw, *axes)
    return dx.astype(like.dtype), dw.astype(w.dtype)


linear.defvjp(_forward, _backward)
