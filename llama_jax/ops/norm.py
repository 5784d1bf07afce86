"""RMSNorm (Zhang and Sennrich, arXiv:1910.07467, equation 4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in the type of x.

    The statistics are float32, and the weight multiplies after the cast back, as in Meta's code.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean square.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight.astype(x.dtype)
