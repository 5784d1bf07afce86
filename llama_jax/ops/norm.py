"""RMSNorm (Zhang and Sennrich, arXiv:1910.07467, equation 4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float) -> jax.Array:
    """RMSNorm over the last axis: x / sqrt(mean(x^2) + eps) * weight, in the dtype of x.

    The mean square is computed in float32. The weight is multiplied after the cast back to the dtype of x, as in Meta's
    code.

    Args:
        x: activations (..., D).
        weight: learned scale (D,).
        eps: constant added to the mean square.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight.astype(x.dtype)
