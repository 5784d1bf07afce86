"""GPTQ (Frantar et al., arXiv:2210.17323): a matrix is rounded column by column, and later columns make up for errors.

For a weight w (out, in) and inputs x, the error of a row of products is e^T H e, with e the errors of the row and
H = mean(x x^T). When a column is rounded, the columns after it are moved to where this error is smallest. Columns are
taken in the order of falling mean squares of their inputs, and scales are fixed before the first is rounded.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama_jax.ops import quant
from llama_jax.ops.quant import GROUP, QTensor

_DAMPING = (0.01, 0.1, 1.0)  # of the mean of H's diagonal; the first with which H has a Cholesky factor
_AT_ONCE = 1 << 26  # values of a matrix that are rounded at a time
_BLOCKS = (128, 64, 32)  # columns between two updates of all later ones


def fit(w: jax.Array, moments: jax.Array) -> QTensor:
    """Rounds a weight (out, in) to 4 bits, so that the error of products with the given inputs is small.

    Args:
        w: weight of any float dtype; `in` must be a multiple of 32.
        moments: H, mean(x x^T) of the inputs x, float32 (in, in).
    """
    diagonal = jnp.diagonal(moments)
    order = jnp.argsort(-diagonal)
    for damping in _DAMPING:
        factor = _factor(moments, order, damping)
        if jnp.isfinite(factor).all():
            break
    else:
        return quant.fit(w, 4, diagonal)
    rows = max(1, _AT_ONCE // w.shape[1])
    parts = [_rounded(w[low : low + rows], factor, order, diagonal) for low in range(0, w.shape[0], rows)]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


@jax.jit
def _factor(moments: jax.Array, order: jax.Array, damping: float) -> jax.Array:
    """The upper triangular U with U^T U = H^-1, for H with its rows and columns in `order`."""
    size = moments.shape[0]
    mean = jnp.mean(jnp.diagonal(moments))
    unseen = jnp.where(jnp.diagonal(moments) > 0, 0.0, jnp.where(mean > 0, mean, 1.0))  # inputs that are always 0
    damped = moments + jnp.diag(unseen + damping * mean)
    # With J the reversal of an order, J H J = L L^T for a lower L, and U = J L^-1 J.
    reverse = order[::-1]
    lower = jnp.linalg.cholesky(damped[reverse][:, reverse])
    inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(size), lower=True)
    return inverse[::-1, ::-1]


@jax.jit
def _rounded(w: jax.Array, factor: jax.Array, order: jax.Array, importance: jax.Array) -> QTensor:
    """Rounds rows of a weight. `factor` is for the columns in `order`."""
    out, size = w.shape
    scales = quant.fit(w, 4, importance).scales
    block = next(n for n in _BLOCKS if size % n == 0)

    def of_block(b: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        moved, integers = state
        start = b * block
        columns = jax.lax.dynamic_slice(order, (start,), (block,))
        own_scales = jnp.take(scales, columns // GROUP, axis=1).astype(jnp.float32)
        factors = jax.lax.dynamic_slice(factor, (start, 0), (block, size))
        own = jax.lax.dynamic_slice(factors, (0, start), (block, block))

        def of_column(
            i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            values, rounded, errors = state
            value, scale = values[:, i], own_scales[:, i]
            integer = jnp.clip(jnp.round(jnp.where(scale == 0, 0, value / scale)), -8, 7)
            error = (value - integer * scale) / own[i, i]
            values = values - error[:, None] * own[i]  # own[i] is 0 before column i
            return values, rounded.at[:, i].set(integer), errors.at[:, i].set(error)

        values = jax.lax.dynamic_slice(moved, (0, start), (out, block))
        zeros = jnp.zeros_like(values)
        _, rounded, errors = jax.lax.fori_loop(0, block, of_column, (values, zeros, zeros))
        later = jnp.where(jnp.arange(size) >= start + block, factors, 0)
        moved = moved - jnp.dot(errors, later, precision=jax.lax.Precision.HIGHEST)
        return moved, jax.lax.dynamic_update_slice(integers, rounded, (0, start))

    moved = jnp.take(w.astype(jnp.float32), order, axis=1)
    _, integers = jax.lax.fori_loop(0, size // block, of_block, (moved, jnp.zeros_like(moved)))
    integers = jnp.zeros_like(integers).at[:, order].set(integers)
    return quant.packed(integers, scales)
