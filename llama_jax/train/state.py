"""What a step changes and a checkpoint keeps: weights, moments, the step and a random key, as one pytree."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama_jax import model, parallel
from llama_jax.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The whole of a run's mutable state.

    Attributes:
        step: batches consumed (int32); a skipped one counts, so that it is also the data position.
        params: float32 master weights, stacked.
        opt_state: optax's.
        key: raw uint32 key data of the run's random stream.
        skipped: non-finite steps in a row (int32).
    """

    step: jax.Array
    params: model.Params
    opt_state: Any
    key: jax.Array
    skipped: jax.Array


def init_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, seed: int, *, params: model.Params | None = None
) -> TrainState:
    """A fresh state, of random weights unless `params` are given.

    Trace it in a jit with `state_shardings` as out_shardings, so that no device holds it whole.
    """
    key, init_key = jax.random.split(jax.random.key(seed))
    params = model.init_params(config, init_key) if params is None else params
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(key),
        skipped=jnp.zeros((), jnp.int32),
    )


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation, layout: parallel.Layout) -> TrainState:
    """The state as ShapeDtypeStructs with their shardings: moments lie where their weights lie."""
    state = jax.eval_shape(lambda: init_state(config, optimizer, 0))
    places = parallel.shardings(layout, model.logical_axes(config, stacked=True), state.params)
    whole = parallel.replicated(layout.mesh)
    opt_places = optax.tree_map_params(
        optimizer, lambda _, place: place, state.opt_state, places, transform_non_params=lambda _: whole
    )
    placed = TrainState(step=whole, params=places, opt_state=opt_places, key=whole, skipped=whole)
    return parallel.abstract(state, placed)


def state_shardings(abstract: TrainState) -> TrainState:
    """The shardings of an abstract state, for jit."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
