"""Decoding, traced: one `while_loop` that advances all live rows of a batch, or one step in two halves.

Letters: B rows of the batch, T tokens of a step (the next one and the guesses), G guesses, O width of the output
buffer, K likeliest tokens, V vocab, D embedding, S cache slots.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax import model, parallel
from llama_jax.infer import speculation
from llama_jax.infer.request import DISPATCH
from llama_jax.infer.state import ProgramSpec, State, pin_shardings, replicate
from llama_jax.ops import sampling


def decode(
    program: ProgramSpec,
    params: Any,
    state: State,
    steer: dict[str, Any],
    *,
    bound: int,
    top: int,
    guesses: int,
    drafter: str,
) -> tuple[State, dict[str, jax.Array]]:
    """The traced function behind `Program.decode`, which documents its arguments."""
    with parallel.use(program.layout):
        state = _steered(state, steer)
        out = _nothing(state, width=DISPATCH * (guesses + 1), top=top)
        advance = functools.partial(
            _advance, program, params, steer["drafts_B"], bound=bound, guesses=guesses, drafter=drafter
        )

        def goes_on(carry: tuple) -> jax.Array:
            step, state, _ = carry
            live = jnp.sum(state.remaining_B > 0)
            return (step < steer["limit"]) & (live > 0) & (live >= steer["least"])

        def body(carry: tuple) -> tuple:
            step, state, out = carry
            state, out = advance(state, out)
            return step + 1, pin_shardings(state), replicate(out)

        _, state, out = lax.while_loop(goes_on, body, (jnp.int32(0), pin_shardings(state), replicate(out)))
        return state, {**out, "remaining_B": state.remaining_B}


def look(
    program: ProgramSpec, params: Any, state: State, steer: dict[str, Any], *, bound: int
) -> tuple[State, jax.Array]:
    """The traced function behind `Program.look`, which documents its arguments."""
    with parallel.use(program.layout):
        state = _steered(state, steer)  # a row that has ended may belong to a prompt that is being read

        def logits_after(state: State) -> tuple[State, jax.Array]:
            live_B = state.remaining_B > 0
            hidden_BTD, state = _fed(
                program, params, state, state.tokens_B[:, None], state.positions_B[:, None], live_B, bound=bound
            )
            logits_BV = model.unembed(program.config, program.split(params)[0], hidden_BTD[:, 0])
            return pin_shardings(state), parallel.constrain(logits_BV, "batch", "vocab")

        def body(carry: tuple) -> tuple:
            return True, *logits_after(carry[1])

        # A loop of one step, or of none if no row is live. Unlike a conditional, it updates the cache in place.
        blank_BV = jnp.zeros((state.cache.rows, program.config.vocab_size), jnp.float32)
        carry = (False, pin_shardings(state), parallel.constrain(blank_BV, "batch", "vocab"))
        _, state, logits_BV = lax.while_loop(lambda carry: ~carry[0] & jnp.any(carry[1].remaining_B > 0), body, carry)
        return state, logits_BV


def pick(
    program: ProgramSpec, state: State, logits_BV: jax.Array, steer: dict[str, Any], *, top: int
) -> tuple[State, dict[str, jax.Array]]:
    """The traced function behind `Program.pick`, which documents its arguments."""
    with parallel.use(program.layout):
        state = _steered(state, steer)
        out = _nothing(state, width=1, top=top)
        live_B = state.remaining_B > 0
        _, state, out = _accept((live_B, state, {**out, "steps_B": out["steps_B"] + live_B}), logits_BV, None)
        return pin_shardings(state), replicate({**out, "remaining_B": state.remaining_B})


def _steered(state: State, steer: dict[str, Any]) -> State:
    """The state without the rows that end now, and with new masks, if there are any."""
    settings = state.sampling
    if "allowed_BW" in steer:
        settings = dataclasses.replace(settings, allowed_BW=steer["allowed_BW"])
    return dataclasses.replace(state, sampling=settings, remaining_B=jnp.where(steer["alive_B"], state.remaining_B, 0))


def _nothing(state: State, *, width: int, top: int) -> dict[str, jax.Array]:
    """The outputs of a dispatch before its first step."""
    B = state.tokens_B.shape[0]
    return {
        "tokens_BO": jnp.full((B, width), -1, jnp.int32),
        "logprobs_BO": jnp.zeros((B, width), jnp.float32),
        "top_ids_BOK": jnp.zeros((B, width, top), jnp.int32),
        "top_logprobs_BOK": jnp.zeros((B, width, top), jnp.float32),
        "steps_B": jnp.zeros(B, jnp.int32),
        "count_B": jnp.zeros(B, jnp.int32),
    }


def _fed(
    program: ProgramSpec,
    params: Any,
    state: State,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    live_B: jax.Array,
    *,
    bound: int,
) -> tuple[jax.Array, State]:
    """Hidden states (B, T, D) of tokens of the live rows, and the state with these tokens in the cache."""
    positions_BT = jnp.where(live_B[:, None], positions_BT, 0)  # what a row held that has ended is not read
    real_BT = live_B[:, None] & (positions_BT < state.cache.capacity)
    hidden_BTD, cache = model.forward(
        program.config,
        program.split(params)[0],
        tokens_BT,
        positions_BT,
        real_BT.astype(jnp.int32),
        state.cache,
        bound=bound,
        dtype=program.dtype,
    )
    assert cache is not None
    return hidden_BTD, dataclasses.replace(state, cache=cache)


def _advance(
    program: ProgramSpec,
    params: Any,
    drafts_B: jax.Array,
    state: State,
    out: dict[str, jax.Array],
    *,
    bound: int,
    guesses: int,
    drafter: str,
) -> tuple[State, dict[str, jax.Array]]:
    """One forward pass for all live rows. Each row gets one token, and one more for every correct guess.

    A guess is correct if it equals the token that is sampled at its position. Noise is a function of seed and position,
    so the text is the same with and without guesses.
    """
    target, draft_params = program.split(params)
    live_B = state.remaining_B > 0
    guessed_BG, draft_cache = speculation.guess(
        program, drafter, draft_params, state, live_B, drafts_B, guesses=guesses, bound=bound
    )
    tokens_BT = jnp.concatenate([state.tokens_B[:, None], guessed_BG], axis=1)
    positions_BT = state.positions_B[:, None] + jnp.arange(guesses + 1)
    hidden_BTD, state = _fed(program, params, state, tokens_BT, positions_BT, live_B, bound=bound)
    state = dataclasses.replace(state, draft=draft_cache)
    out = {**out, "steps_B": out["steps_B"] + live_B}
    if guesses == 0:
        logits_BV = model.unembed(program.config, target, hidden_BTD[:, 0])
        _, state, out = _accept((live_B, state, out), logits_BV, None)
        return state, out
    logits_TBV = model.unembed(program.config, target, hidden_BTD).swapaxes(0, 1)
    nothing_B1 = jnp.full((live_B.shape[0], 1), -1, jnp.int32)
    next_TB = jnp.concatenate([guessed_BG, nothing_B1], axis=1).T

    def accept(carry: tuple, given: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
        return _accept(carry, *given), None

    (_, state, out), _ = lax.scan(accept, (live_B, state, out), (logits_TBV, next_TB))
    return state, out


def _accept(carry: tuple, logits_BV: jax.Array, guess_B: jax.Array | None) -> tuple:
    """Samples the next token of the active rows. Rows whose guess was that token stay active.

    `carry` is (active_B, state, outputs).
    """
    active_B, state, out = carry
    B, V = logits_BV.shape
    rows = jnp.arange(B)
    sampled_B, logprob_B = sampling.sample(logits_BV, state.sampling, state.positions_B + 1)
    stopped_B = jnp.any(sampled_B[:, None] == state.sampling.stops_BN, axis=1)
    at_B = jnp.where(active_B, out["count_B"], out["tokens_BO"].shape[1])  # beyond the buffer: dropped
    written = {
        "tokens_BO": out["tokens_BO"].at[rows, at_B].set(sampled_B, mode="drop"),
        "logprobs_BO": out["logprobs_BO"].at[rows, at_B].set(logprob_B, mode="drop"),
        "count_B": out["count_B"] + active_B,
    }
    if top := out["top_ids_BOK"].shape[2]:
        ids_BK, logprobs_BK = sampling.likeliest(logits_BV, top)
        written["top_ids_BOK"] = out["top_ids_BOK"].at[rows, at_B].set(ids_BK, mode="drop")
        written["top_logprobs_BOK"] = out["top_logprobs_BOK"].at[rows, at_B].set(logprobs_BK, mode="drop")
    positions_B = state.positions_B + active_B
    slots_B = jnp.where(active_B, positions_B, state.ids_BS.shape[1])
    left_B = jnp.where(stopped_B, 0, jnp.maximum(state.remaining_B - 1, 0))
    state = dataclasses.replace(
        state,
        ids_BS=state.ids_BS.at[rows, slots_B].set(sampled_B, mode="drop"),
        tokens_B=jnp.where(active_B, sampled_B, state.tokens_B),
        positions_B=positions_B,
        remaining_B=jnp.where(active_B, left_B, state.remaining_B),
        sampling=sampling.record(state.sampling, sampled_B, active_B),
    )
    if guess_B is not None:
        active_B &= (sampled_B == guess_B) & (state.remaining_B > 0)
    return active_B, state, {**out, **written}
