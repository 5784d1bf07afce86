"""The traced functions for whole texts: logits, hidden states and scores, by the forward pass without a cache.

Letters: B rows, T length, D embedding, V vocab, C scored positions, K candidate ids at each of them, n positions whose
logits are in memory at a time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax import model, parallel
from llama_jax.infer.state import ProgramSpec, replicate
from llama_jax.ops import sampling

_LOGITS = 1 << 26  # most float32 logits in memory at a time while scoring (256 MiB)


def logits(program: ProgramSpec, params: Any, tokens_BT: jax.Array) -> jax.Array:
    """The traced function behind `Program.logits`."""
    with parallel.use(program.layout):
        return model.unembed(program.config, program.split(params)[0], _whole(program, params, tokens_BT))


def hidden(program: ProgramSpec, params: Any, tokens_BT: jax.Array) -> jax.Array:
    """The traced function behind `Program.hidden`."""
    with parallel.use(program.layout):
        return replicate(_whole(program, params, tokens_BT))


def _whole(program: ProgramSpec, params: Any, tokens_BT: jax.Array) -> jax.Array:
    """Hidden states of whole rows, by the forward pass without a cache."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    target = program.split(params)[0]
    return model.forward(program.config, target, tokens_BT, positions_BT, None, dtype=program.dtype)[0]


def score(
    program: ProgramSpec, params: Any, tokens_BT: jax.Array, starts_B: jax.Array, candidates_BCK: jax.Array, *, top: int
) -> dict[str, jax.Array]:
    """The traced function behind `Program.score`; `Engine.score` documents it."""
    with parallel.use(program.layout):
        B, T = tokens_BT.shape
        C = candidates_BCK.shape[1]
        places_BC = jnp.minimum(starts_B[:, None] + jnp.arange(C), T - 1)
        hidden_BCD = jnp.take_along_axis(_whole(program, params, tokens_BT), places_BC[..., None], axis=1)

        def piece(given: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
            hidden_BnD, ids_BnK = given
            logits_BnV = model.unembed(program.config, program.split(params)[0], hidden_BnD)
            chosen_BnK = jnp.take_along_axis(logits_BnV, ids_BnK, axis=-1)
            total_Bn1 = jax.nn.logsumexp(logits_BnV, axis=-1, keepdims=True)
            found = {
                "logprobs": chosen_BnK - total_Bn1,
                "best": ids_BnK == jnp.argmax(logits_BnV, axis=-1, keepdims=True),
            }
            if top:
                found["top_ids"], found["top_logprobs"] = sampling.likeliest(logits_BnV, top)
            return found

        n = min(C, max(1, _LOGITS // (B * program.config.vocab_size)))
        pieces = -(-C // n)

        def cut(a: jax.Array) -> jax.Array:
            return jnp.pad(a, ((0, 0), (0, pieces * n - C), (0, 0))).reshape(B, pieces, n, -1).swapaxes(0, 1)

        def joined(a: jax.Array) -> jax.Array:
            return a.swapaxes(0, 1).reshape(B, pieces * n, -1)[:, :C]

        return replicate(jax.tree.map(joined, lax.map(piece, (cut(hidden_BCD), cut(candidates_BCK)))))
