"""The one function that multiplies by a weight.

Weights are stored output-major, (out, in), as Hugging Face's and Meta's files are. Products accumulate in float32
whatever the type of their operands, and the result has the type of the activations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax import parallel

# A bfloat16 product of one row runs in a scalar loop on a CPU until it is padded (docs/design.md, "Measured").
_CPU_BF16_ROWS = 8
_BF16_NAN = 0x7FC0


def _dot(a: jax.Array, b: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    exact = a.dtype == jnp.float32
    return lax.dot_general(
        a,
        b,
        (contract, ((), ())),
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def _rows_times(x: jax.Array, w: jax.Array) -> jax.Array:
    return _dot(x, w, ((x.ndim - 1,), (1,)))


def _rows_times_cpu(x: jax.Array, w: jax.Array) -> jax.Array:
    flat = x.reshape(-1, x.shape[-1])
    padded = jnp.pad(flat, ((0, _CPU_BF16_ROWS - flat.shape[0]), (0, 0)))
    return _rows_times(padded, w)[: flat.shape[0]].reshape(*x.shape[:-1], w.shape[0])


@jax.custom_vjp
def linear(x: jax.Array, w: jax.Array) -> jax.Array:
    """x (..., in) times w (out, in) transposed: (..., out) in the type of x, accumulated in float32.

    The weight is cast to the type of x for the product, and its gradient comes back in the weight's own type, so
    that float32 master weights get float32 gradients from bfloat16 products.
    """
    return _forward(x, w)[0]


def linear_f32(x: jax.Array, w: jax.Array) -> jax.Array:
    """The same product with its float32 sums kept: what logits are made of. Not differentiable by design."""
    w = w.astype(x.dtype)
    rows = x.size // x.shape[-1]
    if x.dtype == jnp.bfloat16 and rows < _CPU_BF16_ROWS:
        return lax.platform_dependent(x, w, cpu=_rows_times_cpu, default=_rows_times)
    return _rows_times(x, w)


def _forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return linear_f32(x, w).astype(x.dtype), (x, w)


def _backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    g = g.astype(x.dtype)
    leading = tuple(range(x.ndim - 1))
    dx = _dot(g, w.astype(x.dtype), ((g.ndim - 1,), (0,))).astype(x.dtype)
    # XLA on a CPU transposes the first operand of such a product in memory: let that be the narrower one. (In
    # bfloat16 it knows no product of a transposed first operand for some of these shapes.)
    narrow = x.dtype == jnp.float32 and x.shape[-1] <= g.shape[-1]
    dw = _dot(x, g, (leading, leading)).T if narrow else _dot(g, x, (leading, leading))
    return dx, dw.astype(w.dtype)


linear.defvjp(_forward, _backward)


def embed(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of table (V, D) for ids (...): (..., D) in dtype. Ids outside 0..V-1 give NaN rather than a neighbour.

    The gradient of the table is summed in float32 and rounded once to dtype.
    """
    # Gather the table's columns, not the batch: rows looked up in a table split along `embed` would first be made for
    # the whole batch on every device.
    table = parallel.constrain(table.astype(dtype), "vocab", None)
    return _bf16_rows(table, ids) if table.dtype == jnp.bfloat16 else _rows_of(table, ids)


def _rows_of(table: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)


def _rows_of_cpu(table: jax.Array, ids: jax.Array) -> jax.Array:
    """The rows as 16-bit integers: XLA on a CPU would first make a float32 copy of a whole bfloat16 table."""
    bits = lax.bitcast_convert_type(table, jnp.uint16)
    rows = jnp.take(bits, ids, axis=0, mode="fill", fill_value=_BF16_NAN)
    return lax.bitcast_convert_type(rows, jnp.bfloat16)


@jax.custom_vjp
def _bf16_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    return lax.platform_dependent(table, ids, cpu=_rows_of_cpu, default=_rows_of)


def _bf16_rows_forward(table: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _bf16_rows(table, ids), (table, ids)


def _bf16_rows_backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    table, ids = residuals
    sums = jnp.zeros(table.shape, jnp.float32).at[ids].add(g.astype(jnp.float32), mode="drop")
    return sums.astype(table.dtype), None


_bf16_rows.defvjp(_bf16_rows_forward, _bf16_rows_backward)
