"""Rotary position embedding (Su et al., arXiv:2104.09864) with Llama 3.1's frequency scaling.

Dimensions i and i + H/2 of a head rotate together, as in Hugging Face's files. Meta's files pair 2i with 2i + 1.

Letters: B batch, T length, N heads, H head dim, R rotary pairs (H / 2).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.ops import cpu


def frequencies(config: ModelConfig) -> np.ndarray:
    """Frequency of each rotary pair in radians per position, float32 (H / 2,).

    The frequency of pair i is theta^(-2i/H). If `rope_scaling` is set, Meta's `apply_scaling` follows: frequencies with
    wavelengths above original / low_freq_factor are divided by factor, those with wavelengths below
    original / high_freq_factor are kept, and between the two the frequency is interpolated linearly in
    original / wavelength.

    Every step is rounded to float32, as in Meta's and Hugging Face's code, so that the frequencies equal theirs to the
    bit. More exact rounding would be further from them: the last bit of a frequency is a hundredth of a radian at
    position 131,000, and changes logits by 0.35 % of the largest.
    """
    f32 = np.float32
    exponents = np.arange(0, config.head_dim, 2, dtype=f32) / f32(config.head_dim)
    freq = 1 / (config.rope_theta ** exponents.astype(np.float64)).astype(f32)
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    wavelengths = f32(2 * math.pi) / freq
    span = f32(scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = (f32(scaling.original_max_seq_len) / wavelengths - f32(scaling.low_freq_factor)) / span
    smooth = np.clip(smooth, f32(0), f32(1))
    return (1 - smooth) * freq / f32(scaling.factor) + smooth * freq


def rotations(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every angle, each float32 (B, T, R). In bfloat16 position 257 would be rounded to 256."""
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(frequencies(config))
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Rotates each pair (i, i + H/2) of x by its angle. Computed in float32 and returned in the dtype of x.

    On a CPU it has no gradient for the angles, which do not depend on weights.
    """
    if x_BTNH.dtype in (jnp.float32, jnp.bfloat16) and cpu.ready():
        return _native(x_BTNH, cos_BTR, sin_BTR)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTR[:, :, None, :], sin_BTR[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


@jax.custom_vjp
def _native(x_BTNH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """XLA on a CPU would compute the cosines and sines again for every head of every layer, which took a ninth of a
    prompt's time (docs/measurements/cpu-kernels.md#prompts-of-small-models).
    """
    return cpu.rotate(x_BTNH, cos_BTR, sin_BTR)


def _forward(
    x_BTNH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return cpu.rotate(x_BTNH, cos_BTR, sin_BTR), (cos_BTR, sin_BTR)


def _backward(angles: tuple[jax.Array, jax.Array], g_BTNH: jax.Array) -> tuple[jax.Array, None, None]:
    cos_BTR, sin_BTR = angles
    return _native(g_BTNH, cos_BTR, -sin_BTR), None, None


_native.defvjp(_forward, _backward)
