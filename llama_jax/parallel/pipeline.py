"""Pipeline stages: each group of devices runs its own layers, and micro-batches follow one another through the groups.

The schedule is GPipe's (Huang et al., arXiv:1811.06965). All stages run one tick at a time, as one batched computation
whose first axis is sharded over stages; between ticks the activations move to the next stage. S stages and M
micro-batches take M + S - 1 ticks, in which a stage idles S - 1 times. The backward pass is the transpose of the loop.

Letters: S stages, M micro-batches, B rows, b = B / M.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.parallel.rules import active, axis_size, constrain, constrain_first

Layers = Callable[[Any, jax.Array, Any], jax.Array]


def pipeline(run: Layers, layers: Any, x: jax.Array, extras: Any) -> jax.Array:
    """Computes run(layers, x, extras), in pipeline stages if the active layout has them.

    Args:
        run: function (stacked layers, x, extras) that applies the layers one after the other and returns an array like
            x.
        layers: a tree of weights with a leading layer axis, which the number of stages divides.
        x: activations (B, T, D). The number of micro-batches divides B.
        extras: a tree of arrays (B, T, ...) that every layer reads.
    """
    S, layout = axis_size("layers"), active()
    if S == 1 or layout is None:
        return run(layers, x, extras)
    M = layout.microbatches
    stages = jax.tree.map(lambda a: constrain_first(a.reshape(S, -1, *a.shape[1:]), "layers"), layers)
    inputs, extras = _split(x, M), jax.tree.map(lambda a: _split(a, M), extras)
    # In a batched function, constraints and shard_map keep the batched axis sharded over the axis of that name.
    every_stage = jax.vmap(run, spmd_axis_name=layout.stage_axis)

    def tick(state: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        entering = jax.lax.dynamic_index_in_dim(inputs, jnp.minimum(t, M - 1), keepdims=False)
        state = jnp.roll(state, 1, axis=0).at[0].set(entering)
        numbers_S = jnp.clip(t - jnp.arange(S), 0, M - 1)  # the micro-batch of each stage; idle stages repeat one
        state = every_stage(stages, state, jax.tree.map(lambda a: a[numbers_S], extras))
        state = constrain_first(state, "layers")
        return state, state

    empty = constrain_first(jnp.zeros((S, *inputs.shape[1:]), x.dtype), "layers")
    states = jax.lax.scan(tick, empty, jnp.arange(M + S - 1))[1]
    done = states[S - 1 :, -1].swapaxes(0, 1).reshape(x.shape)
    return constrain(done, "batch", "length", "act_embed")


def _split(a: jax.Array, M: int) -> jax.Array:
    """Splits rows (B, ...) into parts (M, B / M, ...) of every M-th row, so that each device splits its own rows."""
    parts = a.reshape(-1, M, *a.shape[1:]).swapaxes(0, 1)
    return constrain(parts, None, "batch", "length", *(None,) * (parts.ndim - 3))
