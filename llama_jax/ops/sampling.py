"""Sampling of one token a row: constraints, penalties, temperature, top-k, top-p, min-p, typical-p, then Gumbel noise.

The rules and their order are those of Hugging Face's logits processors, so that the same settings mean the same
distribution. Every setting is an array with one value a row. A batch may mix settings, and new values need no new
compilation. Work that no row asks for is skipped on the device.

The thresholds of top-k, top-p and typical-p are found by bisection on the bits of the logits, without sorting the
vocabulary. One pass counts (or weighs) the logits above a candidate, and 32 passes find the exact threshold. Every pass
is a sum, which shards over the vocabulary. Logits equal to the threshold are all kept; Hugging Face's top-p keeps an
arbitrary few.

Letters: B batch, V vocab, N stop tokens, W 32-bit words of a mask over the vocabulary (V / 32, rounded up).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llama_jax.sampling_params import SamplingParams

_SEEDS = 1 << 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Controls:
    """Sampling settings of a batch on the device, one value a row (see SamplingParams).

    Attributes:
        temperature_B: float32 divisor of the logits; 0 is greedy.
        top_k_B: int32 number of tokens to keep; 0 keeps all.
        top_p_B: float32 probability mass to keep; 1 keeps all.
        min_p_B: float32 smallest probability to keep, relative to the largest; 0 keeps all.
        typical_p_B: float32 probability mass of the most typical tokens to keep; 1 keeps all.
        repetition_B: float32 repetition penalty; 1 is off.
        presence_B: float32 presence penalty; 0 is off.
        frequency_B: float32 frequency penalty; 0 is off.
        required_B: int32 number of tokens that must still come before a stop token may.
        biased_B: bool, True for rows whose bias_BV is not zero.
        masked_B: bool, True for rows whose allowed_BW applies.
        seed_B: uint32 seed of the row's noise.
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    typical_p_B: jax.Array
    repetition_B: jax.Array
    presence_B: jax.Array
    frequency_B: jax.Array
    required_B: jax.Array
    biased_B: jax.Array
    masked_B: jax.Array
    seed_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """Everything that the next token of each row depends on, apart from the logits.

    Attributes:
        controls: the settings of each row.
        seen_BV: bool, True for the tokens of the row's prompt and text so far, for the repetition penalty.
        counts_BV: int32 count of each token in the row's text so far, for the presence and frequency penalties.
        bias_BV: float32 added to the logits; minus infinity for tokens that are never sampled.
        allowed_BW: uint32 words whose bits are the tokens that a grammar allows next: token t is bit t % 32 of word t
            // 32.
        stops_BN: int32 ids that end the row, padded with -1.
    """

    controls: Controls
    seen_BV: jax.Array
    counts_BV: jax.Array
    bias_BV: jax.Array
    allowed_BW: jax.Array
    stops_BN: jax.Array


def controls(params: Sequence[SamplingParams], seeds: Sequence[int], *, masked: Sequence[bool] = ()) -> Controls:
    """The settings of each row as numpy arrays; seeds are taken modulo 2^32. `masked` flags rows with a grammar."""

    def rows(values: Sequence[Any], dtype: type) -> Any:  # arrays of the host, until they are used on the device
        return np.array(values, dtype)

    def column(name: str, dtype: type = np.float32) -> Any:
        return rows([getattr(p, name) for p in params], dtype)

    return Controls(
        temperature_B=column("temperature"),
        top_k_B=column("top_k", np.int32),
        top_p_B=column("top_p"),
        min_p_B=column("min_p"),
        typical_p_B=column("typical_p"),
        repetition_B=column("repetition_penalty"),
        presence_B=column("presence_penalty"),
        frequency_B=column("frequency_penalty"),
        required_B=column("min_tokens", np.int32),
        biased_B=rows([has_bias(p) for p in params], bool),
        masked_B=rows(masked or [False] * len(params), bool),
        seed_B=rows([seed % _SEEDS for seed in seeds], np.uint32),
    )


def has_bias(params: SamplingParams) -> bool:
    """True if the settings change the logits of single tokens."""
    return bool(params.logit_bias or params.banned_tokens or params.allowed_tokens is not None)


def bias(params: SamplingParams, vocab_size: int) -> np.ndarray:
    """The bias float32 (V,) that logit_bias, allowed_tokens and banned_tokens add to the logits."""
    allowed = params.allowed_tokens
    row_V = np.full(vocab_size, 0 if allowed is None else -np.inf, np.float32)
    if allowed is not None:
        row_V[list(allowed)] = 0
    for token, value in params.logit_bias.items():
        row_V[token] += value
    row_V[list(params.banned_tokens)] = -np.inf
    return row_V


def sample(logits_BV: jax.Array, state: SamplingState, positions_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Samples one token a row.

    Args:
        logits_BV: the model's float32 logits.
        state: the settings and the text so far of each row.
        positions_B: position of the new token. The noise is a function of the row's seed and this position, so that a
            row's text does not depend on its neighbors or on the number of steps of a dispatch.

    Returns:
        tokens_B int32, and logprobs_B float32: the log-probability of each token under the model's own distribution,
        which is the log-softmax of the logits before any setting changed them.
    """
    with jax.named_scope("sample"):
        adjusted_BV = penalize(constrain(logits_BV, state), state)
        tokens_B = lax.cond(
            jnp.any(state.controls.temperature_B > 0),
            lambda: _draw(adjusted_BV, state.controls, positions_B),
            lambda: _argmax(adjusted_BV),
        )
        chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
        return tokens_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def _argmax(logits_BV: jax.Array) -> jax.Array:
    """The first token of the largest logit, int32 (B,). A row with NaN gives token 0.

    A reduction to the largest value and one to its first place are each vectorized by XLA on a CPU. `jnp.argmax`, one
    reduction of pairs, is not, and takes several times as long.
    """
    V = logits_BV.shape[-1]
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    first_B = jnp.min(jnp.where(logits_BV == largest_B1, jnp.arange(V, dtype=jnp.int32), V), axis=-1)
    return jnp.where(first_B < V, first_B, 0)


def record(state: SamplingState, tokens_B: jax.Array, live_B: jax.Array) -> SamplingState:
    """The state after each live row has sampled a token."""
    rows = jnp.arange(tokens_B.shape[0])
    ids_B = jnp.where(live_B, tokens_B, state.seen_BV.shape[1])  # beyond the vocabulary: dropped
    required_B = jnp.maximum(state.controls.required_B - live_B, 0)
    return dataclasses.replace(
        state,
        controls=dataclasses.replace(state.controls, required_B=required_B),
        seen_BV=state.seen_BV.at[rows, ids_B].set(True, mode="drop"),
        counts_BV=state.counts_BV.at[rows, ids_B].add(1, mode="drop"),
    )


def constrain(logits_BV: jax.Array, state: SamplingState) -> jax.Array:
    """Logits with the bias, and minus infinity for tokens that a grammar or min_tokens forbids."""
    B, V = logits_BV.shape
    controls = state.controls

    def without_stops(logits_BV: jax.Array) -> jax.Array:
        ids_BN = jnp.where((controls.required_B > 0)[:, None] & (state.stops_BN >= 0), state.stops_BN, V)
        return logits_BV.at[jnp.arange(B)[:, None], ids_BN].set(-jnp.inf, mode="drop")

    def within_grammar(logits_BV: jax.Array) -> jax.Array:
        bits = (state.allowed_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        allowed_BV = bits.reshape(B, -1)[:, :V] != 0
        return jnp.where(allowed_BV | ~controls.masked_B[:, None], logits_BV, -jnp.inf)

    steps: list[tuple[jax.Array, Callable[[jax.Array], jax.Array]]] = [
        # The bias of a row may be that of an earlier request, whose row this was.
        (controls.biased_B, lambda logits_BV: logits_BV + jnp.where(controls.biased_B[:, None], state.bias_BV, 0)),
        (controls.required_B > 0, without_stops),
        (controls.masked_B, within_grammar),
    ]
    for asked_B, step in steps:
        logits_BV = lax.cond(jnp.any(asked_B), step, lambda a: a, logits_BV)
    return logits_BV


def penalize(logits_BV: jax.Array, state: SamplingState) -> jax.Array:
    """Logits with the repetition penalty, then the frequency and the presence penalty (see SamplingParams)."""
    controls = state.controls

    def repetition(logits_BV: jax.Array) -> jax.Array:
        factor = controls.repetition_B[:, None]
        repeated_BV = jnp.where(logits_BV > 0, logits_BV / factor, logits_BV * factor)
        return jnp.where(state.seen_BV, repeated_BV, logits_BV)

    def counted(logits_BV: jax.Array) -> jax.Array:
        frequency_BV = controls.frequency_B[:, None] * state.counts_BV
        return logits_BV - frequency_BV - jnp.where(state.counts_BV > 0, controls.presence_B[:, None], 0)

    logits_BV = lax.cond(jnp.any(controls.repetition_B != 1), repetition, lambda a: a, logits_BV)
    asked_B = (controls.frequency_B != 0) | (controls.presence_B != 0)
    return lax.cond(jnp.any(asked_B), counted, lambda a: a, logits_BV)


def likeliest(logits_BV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` likeliest tokens under the model's own distribution: ids int32 and log-probabilities float32."""
    values, ids = lax.top_k(logits_BV, count)
    return ids.astype(jnp.int32), values - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)


def _draw(logits_BV: jax.Array, controls: Controls, positions_B: jax.Array) -> jax.Array:
    """The likeliest token for greedy rows, and for others a draw from the kept tokens by the Gumbel-max trick."""
    greedy_B = controls.temperature_B == 0
    best_B = _argmax(logits_BV)
    kept_BV = cut(
        scale(logits_BV, jnp.where(greedy_B, 1, controls.temperature_B)),
        top_k_B=jnp.where(greedy_B, 0, controls.top_k_B),
        top_p_B=jnp.where(greedy_B, 1, controls.top_p_B),
        min_p_B=jnp.where(greedy_B, 0, controls.min_p_B),
        typical_p_B=jnp.where(greedy_B, 1, controls.typical_p_B),
    )

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits_BV.shape[1:], jnp.float32)

    drawn_B = _argmax(kept_BV + jax.vmap(noise)(controls.seed_B, positions_B))
    return jnp.where(greedy_B, best_B, drawn_B.astype(jnp.int32))


def scale(logits_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """The scaled logits (logits - max) / temperature. Subtracting the maximum avoids overflow at tiny temperatures."""
    return (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature_B[:, None]


def cut(
    scaled_BV: jax.Array, *, top_k_B: jax.Array, top_p_B: jax.Array, min_p_B: jax.Array, typical_p_B: jax.Array
) -> jax.Array:
    """The scaled logits with -inf for tokens that top-k, then top-p, then min-p, then typical-p drop.

    Each filter applies to the distribution that the one before it leaves. The likeliest token is always kept.

    Args:
        scaled_BV: float32 logits with a maximum of 0 in each row (see `scale`).
        top_k_B: int32 number of tokens to keep; 0 keeps all.
        top_p_B: float32 probability mass to keep; 1 keeps all.
        min_p_B: float32 smallest relative probability to keep; 0 keeps all.
        typical_p_B: float32 mass of the most typical tokens to keep; 1 keeps all.
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
    kept_BV = jnp.where(keep_BV, scaled_BV, -jnp.inf)
    return lax.cond(jnp.any(typical_p_B < 1), lambda: _typical(kept_BV, typical_p_B), lambda: kept_BV)


def _typical(kept_BV: jax.Array, typical_p_B: jax.Array) -> jax.Array:
    """Locally typical sampling (Meister et al., arXiv:2202.00666): drops tokens of surprise far from the entropy."""
    logprobs_BV = jax.nn.log_softmax(kept_BV, axis=-1)
    probs_BV = jnp.exp(logprobs_BV)
    entropy_B = -jnp.sum(jnp.where(probs_BV > 0, logprobs_BV * probs_BV, 0), axis=-1)
    typical_BV = -jnp.abs(logprobs_BV + entropy_B[:, None])  # 0 is the most typical; minus infinity for dropped tokens
    image_BV = _ordered(typical_BV)

    def mass(t: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(image_BV >= t[:, None], probs_BV, 0), axis=-1)

    crossing_B = _largest(lambda t: mass(t) >= typical_p_B, like=jnp.zeros(kept_BV.shape[0], jnp.uint32))
    keep_BV = (image_BV >= crossing_B[:, None]) | (typical_p_B >= 1)[:, None]
    return jnp.where(keep_BV, kept_BV, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """Maps float32 to uint32 in the same order: negative floats have all bits flipped, others the sign bit."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0, x).astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(holds: Callable[[jax.Array], jax.Array], *, like: jax.Array) -> jax.Array:
    """The largest uint32 of each row for which `holds` is true: it is true at 0 and false above the result."""

    def set_bit(i: jax.Array, t: jax.Array) -> jax.Array:
        candidate = t | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, t)

    return lax.fori_loop(0, 32, set_bit, like)
