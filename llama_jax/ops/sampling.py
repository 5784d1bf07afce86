"""Sampling of one token a row: repetition penalty, temperature, top-k, top-p and min-p, then Gumbel noise.

The rules and their order are those of Hugging Face's logits processors, so that the same settings mean the same
distribution. Every setting is an array with one value a row. A batch may mix settings, and new values need no new
compilation. Work that no row asks for is skipped on the device.

The thresholds of top-k and top-p are found by bisection on the bits of the logits, without sorting the vocabulary. One
pass counts (or weighs) the logits above a candidate, and 32 passes find the exact threshold. Every pass is a sum, which
shards over the vocabulary. Logits equal to the threshold are all kept; Hugging Face's top-p keeps an arbitrary few.

Letters: B batch, V vocab.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llama_jax.sampling_params import SamplingParams

_SEEDS = 1 << 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Controls:
    """Sampling settings of a batch on the device, one value a row.

    Attributes:
        temperature_B: float32 divisor of the logits; 0 is greedy.
        top_k_B: int32 number of tokens to keep; 0 keeps all.
        top_p_B: float32 probability mass to keep; 1 keeps all.
        min_p_B: float32 smallest probability to keep, relative to the largest; 0 keeps all.
        penalty_B: float32 repetition penalty; 1 is off.
        seed_B: uint32 seed of the row's noise.
    """

    temperature_B: jax.Array | np.ndarray
    top_k_B: jax.Array | np.ndarray
    top_p_B: jax.Array | np.ndarray
    min_p_B: jax.Array | np.ndarray
    penalty_B: jax.Array | np.ndarray
    seed_B: jax.Array | np.ndarray


def controls(params: Sequence[SamplingParams], seeds: Sequence[int]) -> Controls:
    """The settings of each row as numpy arrays. Seeds are taken modulo 2^32."""

    def column(name: str) -> np.ndarray:
        return np.array([getattr(p, name) for p in params], np.float32)

    return Controls(
        temperature_B=column("temperature"),
        top_k_B=np.array([p.top_k for p in params], np.int32),
        top_p_B=column("top_p"),
        min_p_B=column("min_p"),
        penalty_B=column("repetition_penalty"),
        seed_B=np.array([seed % _SEEDS for seed in seeds], np.uint32),
    )


def sample(
    logits_BV: jax.Array, *, seen_BV: jax.Array, controls: Controls, positions_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Samples one token a row.

    Args:
        logits_BV: the model's float32 logits.
        seen_BV: bool, True for the tokens of each row's prompt and text so far.
        controls: the settings of each row.
        positions_B: position of the new token. The noise is a function of the row's seed and this position, so that a
            row's text does not depend on its neighbors or on the number of steps of a dispatch.

    Returns:
        tokens_B int32, and logprobs_B float32: the log-probability of each token under the model's own distribution,
        which is the log-softmax of the logits before any setting changed them.
    """
    with jax.named_scope("sample"):
        repeated = controls.penalty_B != 1
        penalized_BV = lax.cond(
            jnp.any(repeated),
            lambda: penalize(logits_BV, seen_BV, controls.penalty_B),
            lambda: logits_BV,
        )
        tokens_B = lax.cond(
            jnp.any(controls.temperature_B > 0),
            lambda: _draw(penalized_BV, controls, positions_B),
            lambda: jnp.argmax(penalized_BV, axis=-1).astype(jnp.int32),
        )
        chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
        return tokens_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Logits with the repetition penalty: those of seen tokens are divided if positive, and multiplied if negative."""
    penalty = penalty_B[:, None]
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def _draw(logits_BV: jax.Array, controls: Controls, positions_B: jax.Array) -> jax.Array:
    """The likeliest token for greedy rows, and for others a draw from the kept tokens by the Gumbel-max trick."""
    greedy_B = controls.temperature_B == 0
    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    kept_BV = cut(
        scale(logits_BV, jnp.where(greedy_B, 1, controls.temperature_B)),
        top_k_B=jnp.where(greedy_B, 0, controls.top_k_B),
        top_p_B=jnp.where(greedy_B, 1, controls.top_p_B),
        min_p_B=jnp.where(greedy_B, 0, controls.min_p_B),
    )

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits_BV.shape[1:], jnp.float32)

    drawn_B = jnp.argmax(kept_BV + jax.vmap(noise)(controls.seed_B, positions_B), axis=-1)
    return jnp.where(greedy_B, best_B, drawn_B.astype(jnp.int32))


def scale(logits_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """(logits - max) / temperature. Subtracting the maximum avoids overflow at tiny temperatures."""
    return (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature_B[:, None]


def cut(scaled_BV: jax.Array, *, top_k_B: jax.Array, top_p_B: jax.Array, min_p_B: jax.Array) -> jax.Array:
    """The scaled logits with -inf for tokens that top-k, then top-p, then min-p drop.

    Each filter applies to the distribution that the one before it leaves. The likeliest token is always kept.

    Args:
        scaled_BV: float32 logits with a maximum of 0 in each row (see `scale`).
        top_k_B: int32 number of tokens to keep; 0 keeps all.
        top_p_B: float32 probability mass to keep; 1 keeps all.
        min_p_B: float32 smallest relative probability to keep; 0 keeps all.
    """
    V = scaled_BV.shape[-1]
    image_BV = _ordered(scaled_BV)
    weights_BV = jnp.exp(scaled_BV)
    everything_B = jnp.zeros(scaled_BV.shape[0], jnp.uint32)

    def kth() -> jax.Array:
        k_B = jnp.where(top_k_B == 0, V, jnp.minimum(top_k_B, V))
        return _largest(lambda t: jnp.sum(image_BV >= t[:, None], axis=-1) >= k_B, like=everything_B)

    lowest_B = lax.cond(jnp.any((top_k_B > 0) & (top_k_B < V)), kth, lambda: everything_B)

    def nucleus() -> jax.Array:
        left_BV = jnp.where(image_BV >= lowest_B[:, None], weights_BV, 0)

        def mass(t: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(image_BV >= t[:, None], left_BV, 0), axis=-1)

        goal_B = top_p_B * mass(everything_B)
        crossing_B = _largest(lambda t: mass(t) >= goal_B, like=everything_B)
        return jnp.where(top_p_B < 1, crossing_B, lowest_B)

    lowest_B = lax.cond(jnp.any(top_p_B < 1), nucleus, lambda: lowest_B)
    keep_BV = (image_BV >= lowest_B[:, None]) & (weights_BV >= min_p_B[:, None])
    return jnp.where(keep_BV, scaled_BV, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 values in the order of the float32 values: negative floats have all bits flipped, others the sign bit."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0, x).astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(holds: Callable[[jax.Array], jax.Array], *, like: jax.Array) -> jax.Array:
    """The largest uint32 of each row for which `holds` is true: it is true at 0 and false above the result."""

    def set_bit(i: jax.Array, t: jax.Array) -> jax.Array:
        candidate = t | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, t)

    return lax.fori_loop(0, 32, set_bit, like)
