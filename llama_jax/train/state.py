"""What a step changes and a checkpoint keeps: weights, moments, the step and a random key, as one pytree."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama_jax import parallel
from llama_jax.run_config import RunConfig
from llama_jax.train import trainable
from llama_jax.train.optimizer import opt_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The whole of a run's mutable state.

    Attributes:
        step: batches consumed (int32); a skipped one counts, so that it is also the data position.
        params: float32 master weights of what is trained, stacked (see `method`).
        opt_state: optax's.
        key: raw uint32 key data of the run's random stream.
        skipped: non-finite steps in a row (int32).
        ema: a running average of params, or None.
    """

    step: jax.Array
    params: trainable.Trained
    opt_state: Any
    key: jax.Array
    skipped: jax.Array
    ema: trainable.Trained | None

    @property
    def best(self) -> trainable.Trained:
        """What the run has to show: the average where it keeps one, else the weights."""
        return self.params if self.ema is None else self.ema


def init_state(
    run: RunConfig, optimizer: optax.GradientTransformation, *, params: trainable.Trained | None = None
) -> TrainState:
    """A fresh state, as `method.init_trained` begins unless `params` are given.

    Trace it in a jit with `state_shardings` as out_shardings, so that no device holds it whole.
    """
    key, init_key = jax.random.split(jax.random.key(run.seed))
    params = trainable.init_trained(run, init_key) if params is None else params
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(key),
        skipped=jnp.zeros((), jnp.int32),
        ema=jax.tree.map(jnp.copy, params) if run.optimizer.ema_decay else None,
    )


def abstract_state(run: RunConfig, optimizer: optax.GradientTransformation, layout: parallel.Layout) -> TrainState:
    """The state as ShapeDtypeStructs with their shardings: moments lie where their weights lie."""
    state = jax.eval_shape(lambda: init_state(run, optimizer))
    axes = trainable.trained_axes(run)
    places = parallel.shardings(layout, axes, state.params)
    whole = parallel.replicated(layout.mesh)
    placed = TrainState(
        step=whole,
        params=places,
        opt_state=opt_shardings(state.opt_state, state.params, axes, layout),
        key=whole,
        skipped=whole,
        ema=None if state.ema is None else places,
    )
    return parallel.abstract(state, placed)


def state_shardings(abstract: TrainState) -> TrainState:
    """The shardings of an abstract state, for jit."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
