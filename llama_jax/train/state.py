"""The training state as one pytree, which checkpoints save: weights, moments, the step and a random key."""

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
    """The whole mutable state of a run.

    Attributes:
        step: Number of batches consumed (int32). A skipped step counts.
        params: Float32 master weights of the trained params, stacked (see `trainable`).
        opt_state: State of the optax transformation.
        key: Raw uint32 key data of the run's random stream.
        skipped: Number of non-finite steps in a row (int32).
        ema: Exponential moving average of params, or None.
    """

    step: jax.Array
    params: trainable.Trained
    opt_state: Any
    key: jax.Array
    skipped: jax.Array
    ema: trainable.Trained | None

    @property
    def best(self) -> trainable.Trained:
        """The params that are evaluated, sampled and saved as the model: the average, if there is one."""
        return self.params if self.ema is None else self.ema


def init_state(
    run: RunConfig, optimizer: optax.GradientTransformation, *, params: trainable.Trained | None = None
) -> TrainState:
    """The state before the first step, with `params`, or by default the weights of `trainable.init_trained`.

    Trace it in a jit with `state_shardings` as out_shardings, so that no device holds the whole state.
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
    """The state as ShapeDtypeStructs with their shardings; moments have the shardings of their weights."""
    state = jax.eval_shape(lambda: init_state(run, optimizer))
    axes = trainable.trained_axes(run)
    sharded = parallel.shardings(layout, axes, state.params)
    replicated: Any = parallel.replicated(layout.mesh)  # stands for an array
    shardings = TrainState(
        step=replicated,
        params=sharded,
        opt_state=opt_shardings(state.opt_state, state.params, axes, layout, host=run.optimizer.offload),
        key=replicated,
        skipped=replicated,
        ema=None if state.ema is None else sharded,
    )
    return parallel.abstract(state, shardings)


def state_shardings(abstract: TrainState) -> TrainState:
    """The shardings of an abstract state, for jit."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
