"""One optimizer step, and one step of evaluation, as pure functions to be jitted once.

Letters: B rows, T tokens, A accumulated parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from llama_jax import parallel
from llama_jax.ops import fp8
from llama_jax.params import Params
from llama_jax.run_config import RunConfig
from llama_jax.train import trainable
from llama_jax.train.objectives import Batch, Objective, Sums, objective
from llama_jax.train.optimizer import group_norms
from llama_jax.train.state import TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    run: RunConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    layout: parallel.Layout,
    dtype: jnp.dtype,
    loss: Objective = objective,
) -> Callable[[TrainState, Params | None, Batch], tuple[TrainState, Metrics]]:
    """Makes the step: a function of the state, the frozen params and a batch, which `Program` compiles."""
    accumulated = _make_gradients(run, dtype, loss)

    def train_step(state: TrainState, frozen: Params | None, batch: Batch) -> tuple[TrainState, Metrics]:
        with parallel.use(layout):
            key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
            (loss, sums), grads = accumulated(state.params, frozen, batch, key)
            scale = 1.0 / jnp.maximum(sums.pop("count"), 1.0)
            grads = jax.tree.map(lambda g: g * scale, grads)
            norms = group_norms(grads)
            grad_norm = jnp.sqrt(sum(jnp.square(norm) for norm in norms.values()))
            learning_rate = schedule(state.opt_state[-1].count)  # the count of the last link of the chain, the schedule
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            state = _updated(run, optimizer, state, grads, finite)
        return state, {
            **{name: value * scale for name, value in sums.items()},
            "grad_norm": grad_norm,
            **{f"grad_norm/{group}": norm for group, norm in norms.items()},
            "learning_rate": learning_rate,
            "tokens": jnp.sum(batch["weights"]),
            "skipped": state.skipped,
        }

    return train_step


def _make_gradients(
    run: RunConfig, dtype: jnp.dtype, loss_sums: Objective
) -> Callable[..., tuple[tuple[jax.Array, Sums], trainable.Trained]]:
    """Makes a function of (trained, frozen, batch, key) that returns ((loss, sums), gradients) of a batch."""
    A = run.train.accumulate

    def gradients(
        trained: trainable.Trained, frozen: Params | None, batch: Batch, key: jax.Array
    ) -> tuple[tuple[jax.Array, Sums], trainable.Trained]:
        def loss(trained: trainable.Trained) -> tuple[jax.Array, Sums]:
            with fp8.products(run.train.products == "fp8"):
                return loss_sums(run, trainable.policy(run, trained, frozen, key), frozen, batch, dtype=dtype)

        return jax.value_and_grad(loss, has_aux=True)(trained)

    def accumulated(
        trained: trainable.Trained, frozen: Params | None, batch: Batch, key: jax.Array
    ) -> tuple[tuple[jax.Array, Sums], trainable.Trained]:
        def part(rows: Batch, number: jax.Array) -> tuple[tuple[jax.Array, Sums], trainable.Trained]:
            return gradients(trained, frozen, rows, jax.random.fold_in(key, number))

        return _summed(part, batch, A)

    return gradients if A == 1 else accumulated


def _updated(
    run: RunConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: trainable.Trained,
    finite: jax.Array,
) -> TrainState:
    """The state after one optimizer step. If not `finite`, only the counts of steps and of skipped steps change."""
    with jax.named_scope("optimizer"):
        updates, opt_state = cast(optax.GradientTransformationExtraArgs, optimizer).update(
            grads, state.opt_state, state.params, finite=finite
        )
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else _averaged(run.optimizer.ema_decay, state.step, state.ema, params)

    def keep(new: Any, old: Any) -> Any:  # the optimizer itself keeps what is in the host's memory
        return jax.tree.map(lambda a, b: a if parallel.on_host(a) else jnp.where(finite, a, b), new, old)

    return TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        key=state.key,
        skipped=jnp.where(finite, 0, state.skipped + 1),
        ema=keep(ema, state.ema),
    )


def make_eval_step(
    run: RunConfig, layout: parallel.Layout, dtype: jnp.dtype, loss: Objective = objective
) -> Callable[[trainable.Trained, Params | None, Batch], Sums]:
    """Makes the evaluation, a function of the trained params, the frozen params and a batch that returns the
    objective's sums.

    It computes as many rows at a time as the training step, so that it fits in the same memory.
    """

    def eval_step(trained: trainable.Trained, frozen: Params | None, batch: Batch) -> Sums:
        def one(part: Batch, _: jax.Array) -> Sums:
            return loss(run, trainable.policy(run, trained, frozen), frozen, part, dtype=dtype)[1]

        with parallel.use(layout):
            return _summed(one, batch, run.train.accumulate)

    return eval_step


def _summed(function: Callable[[Batch, jax.Array], Any], batch: Batch, A: int) -> Any:
    """The sum of function(part, index of the part) over A parts of a batch, computed one after the other."""
    if A == 1:
        return function(batch, jnp.zeros((), jnp.int32))
    # Every A-th row goes into the same part, so that each device splits its own rows without communication.
    parts = jax.tree.map(lambda a: a.reshape(-1, A, *a.shape[1:]).swapaxes(0, 1), batch)
    parts = {name: parallel.constrain(a, None, "batch", "length") for name, a in parts.items()}

    def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*part)), None

    numbered = (parts, jnp.arange(A))
    shapes = jax.eval_shape(function, *jax.tree.map(lambda a: a[0], numbered))
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return jax.lax.scan(add, zero, numbered)[0]


def _averaged(decay: float, step: jax.Array, ema: trainable.Trained, params: trainable.Trained) -> trainable.Trained:
    """One update of the exponential moving average. Its decay warms up as (1 + step) / (10 + step)."""
    warmed = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old + (1.0 - warmed) * (new - old), ema, params)
