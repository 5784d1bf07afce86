"""SwiGLU (Shazeer, arXiv:2002.05202): the inputs of the last product of a feed-forward network, silu(gate) * up."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama_jax import parallel


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """The product silu(gate) * up of two arrays (..., F) in the same dtype, which the result has too."""
    return _rounded_once(gate, up) if parallel.device_platform() == "cpu" else jax.nn.silu(gate) * up


@jax.custom_vjp
def _rounded_once(gate: jax.Array, up: jax.Array) -> jax.Array:
    """The product in float32, rounded once. XLA on a CPU takes longer to round each step to bfloat16 than to compute
    it, and the backward pass reads gate and up only.
    """
    gate32, up32 = gate.astype(jnp.float32), up.astype(jnp.float32)
    return (jax.nn.silu(gate32) * up32).astype(gate.dtype)


def _forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rounded_once(gate, up), (gate, up)


def _backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up, g32 = (a.astype(jnp.float32) for a in (*residuals, g))
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = g32 * up * sigmoid * (1 + gate * (1 - sigmoid))
    return d_gate.astype(g.dtype), (g32 * gate * sigmoid).astype(g.dtype)


_rounded_once.defvjp(_forward, _backward)
