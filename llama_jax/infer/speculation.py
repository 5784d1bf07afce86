"""Guesses for speculative decoding: pure functions of the state, inside the compiled loop.

Verification is one forward pass over the guesses, and a guess is accepted if it equals the token that is sampled at its
position (`decoding._accept`). The source of guesses (the drafter) therefore changes the speed and never the text.

Letters: B rows, S positions of a row, G guesses.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama_jax import model
from llama_jax.cache import KVCache
from llama_jax.infer.state import ProgramSpec, State
from llama_jax.ops import sampling
from llama_jax.params import Params

_LONGEST = 3  # tokens that must be found again; two and one are tried after it


def guess(
    program: ProgramSpec,
    drafter: str,
    params: Params | None,
    state: State,
    live_B: jax.Array,
    drafts_B: jax.Array,
    *,
    guesses: int,
    bound: int,
) -> tuple[jax.Array, KVCache | None]:
    """The guessed tokens (B, G) after each row's next input token, and the cache of the draft model.

    `drafter` is "lookup", or "draft" where the draft model guesses for the rows of `drafts_B`, and look-up for others.
    """
    if guesses == 0:
        return jnp.zeros((live_B.shape[0], 0), jnp.int32), state.draft
    with jax.named_scope("guess"):
        found_BG = look_up(state.ids_BS, state.positions_B, guesses)
        if drafter == "lookup":
            return found_BG, state.draft
        drafted_BG, cache = _draft(program, params, state, live_B, guesses=guesses, bound=bound)
        return jnp.where(drafts_B[:, None], drafted_BG, found_BG), cache


def look_up(ids_BS: jax.Array, positions_B: jax.Array, guesses: int) -> jax.Array:
    """Prompt look-up: guesses (B, G) the tokens that followed an earlier occurrence of the row's last tokens.

    It takes the latest earlier occurrence of the last three tokens, or else of the last two, or else of the last one. A
    row without one gets token 0 as its guesses.

    Args:
        ids_BS: token at each position of the row.
        positions_B: position of the last token.
        guesses: number of tokens to guess.
    """
    B, S = ids_BS.shape
    places_S = jnp.arange(S)
    found_B = jnp.full(B, -1)
    matches_BS = jnp.ones((B, S), bool)
    for back in range(_LONGEST):  # longer matches are found later and replace shorter ones
        last_B = jnp.take_along_axis(ids_BS, jnp.maximum(positions_B - back, 0)[:, None], axis=1)
        shifted_BS = jnp.roll(ids_BS, back, axis=1)  # the token `back` places before each place
        matches_BS &= (shifted_BS == last_B) & (places_S >= back) & (places_S < positions_B[:, None])
        matches_BS &= (positions_B >= back)[:, None]
        latest_B = jnp.max(jnp.where(matches_BS, places_S, -1), axis=1)
        found_B = jnp.where(latest_B >= 0, latest_B, found_B)
    # What followed may reach the end of the row. A text that repeats itself goes on with the same period.
    period_B1 = jnp.maximum(positions_B - found_B, 1)[:, None]
    wanted_BG = (found_B + 1)[:, None] + jnp.arange(guesses) % period_B1
    guessed_BG = jnp.take_along_axis(ids_BS, jnp.clip(wanted_BG, 0, S - 1), axis=1)
    return jnp.where((found_B >= 0)[:, None], guessed_BG, 0)


def _draft(
    program: ProgramSpec, params: Params | None, state: State, live_B: jax.Array, *, guesses: int, bound: int
) -> tuple[jax.Array, KVCache | None]:
    """Samples the guesses one after the other from the draft model, with the settings and the noise of each row.

    The first step feeds the last two tokens. If all guesses of the last round were correct, the last of them is not in
    the draft's cache yet. Otherwise its slot is written again with the same values.
    """
    config, at_B = program.draft, state.positions_B
    assert config is not None and params is not None and state.draft is not None
    Carry = tuple[KVCache, sampling.SamplingState, jax.Array]

    def feed(carry: Carry, tokens_BT: jax.Array, positions_BT: jax.Array) -> Carry:
        """Feeds tokens and samples the one after them. The carry is the cache, the settings and that token."""
        cache, settings, _ = carry
        real_BT = live_B[:, None] & (positions_BT >= 0) & (positions_BT < cache.capacity)
        hidden_BTD, fed = model.forward(
            config,
            params,
            tokens_BT,
            jnp.maximum(positions_BT, 0),
            real_BT.astype(jnp.int32),
            cache,
            bound=bound,
            dtype=program.dtype,
        )
        assert fed is not None
        logits_BV = model.unembed(config, params, hidden_BTD[:, -1])
        token_B, _ = sampling.sample(logits_BV, settings, positions_BT[:, -1] + 1)
        return fed, sampling.record(settings, token_B, live_B), token_B

    def step(carry: Carry, position_B: jax.Array) -> tuple[Carry, jax.Array]:
        carry = feed(carry, carry[2][:, None], position_B[:, None])
        return carry, carry[2]

    before_B = jnp.take_along_axis(state.ids_BS, jnp.maximum(at_B - 1, 0)[:, None], axis=1)[:, 0]
    carry = (state.draft, state.sampling, state.tokens_B)
    carry = feed(carry, jnp.stack([before_B, state.tokens_B], axis=1), jnp.stack([at_B - 1, at_B], axis=1))
    # A scan, so that the draft model is compiled twice and not once for each guess.
    (cache, _, _), rest_GB = jax.lax.scan(step, carry, at_B + jnp.arange(1, guesses)[:, None])
    return jnp.concatenate([carry[2][:, None], rest_GB.T], axis=1), cache
