"""One optimizer step, and one step of evaluation, as pure functions to be jitted once.

Letters: B rows, T tokens, A accumulated parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama_jax import parallel
from llama_jax.params import Params
from llama_jax.run_config import RunConfig
from llama_jax.train import trainable
from llama_jax.train.objectives import Batch, Sums, objective
from llama_jax.train.optimizer import group_norms, make_schedule
from llama_jax.train.state import TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    run: RunConfig, optimizer: optax.GradientTransformation, layout: parallel.Layout, dtype: jnp.dtype
) -> Callable[[TrainState, Params | None, Batch], tuple[TrainState, Metrics]]:
    """The step as a function of state, what is frozen, and a batch; `Program` jits it with the state donated."""
    A = run.train.accumulate
    schedule = make_schedule(run.optimizer, steps=run.train.steps)

    def gradients(
        trained: trainable.Trained, frozen: Params | None, batch: Batch, key: jax.Array
    ) -> tuple[tuple[jax.Array, Sums], trainable.Trained]:
        def loss(trained: trainable.Trained) -> tuple[jax.Array, Sums]:
            return objective(run, trainable.policy(run, trained, frozen, key), frozen, batch, dtype=dtype)

        return jax.value_and_grad(loss, has_aux=True)(trained)

    def accumulated(
        trained: trainable.Trained, frozen: Params | None, batch: Batch, key: jax.Array
    ) -> tuple[tuple[jax.Array, Sums], trainable.Trained]:
        def one(part: Batch, number: jax.Array) -> tuple[tuple[jax.Array, Sums], trainable.Trained]:
            return gradients(trained, frozen, part, jax.random.fold_in(key, number))

        return _summed(one, batch, A)

    def train_step(state: TrainState, frozen: Params | None, batch: Batch) -> tuple[TrainState, Metrics]:
        with parallel.use(layout):
            key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
            (loss, sums), grads = (gradients if A == 1 else accumulated)(state.params, frozen, batch, key)
            count = sums.pop("count")
            scale = 1.0 / jnp.maximum(count, 1.0)
            grads = jax.tree.map(lambda g: g * scale, grads)
            norms = group_norms(grads)
            grad_norm = jnp.sqrt(sum(jnp.square(norm) for norm in norms.values()))
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            learning_rate = schedule(state.opt_state[-1].count)  # of the chain's last link, the one that scales
            with jax.named_scope("optimizer"):
                updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
                params = optax.apply_updates(state.params, updates)
                ema = None if state.ema is None else _averaged(run.optimizer.ema_decay, state.step, state.ema, params)
            # A non-finite loss or gradient changes nothing but the count of such steps.
            keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
            state = TrainState(
                step=state.step + 1,
                params=keep(params, state.params),
                opt_state=keep(opt_state, state.opt_state),
                key=state.key,
                skipped=jnp.where(finite, 0, state.skipped + 1),
                ema=keep(ema, state.ema),
            )
        return state, {
            **{name: value * scale for name, value in sums.items()},
            "grad_norm": grad_norm,
            **{f"grad_norm/{group}": norm for group, norm in norms.items()},
            "learning_rate": learning_rate,
            "tokens": jnp.sum(batch["weights"]),
            "skipped": state.skipped,
        }

    return train_step


def make_eval_step(
    run: RunConfig, layout: parallel.Layout, dtype: jnp.dtype
) -> Callable[[trainable.Trained, Params | None, Batch], Sums]:
    """A function of what is trained, what is frozen, and a batch, to the objective's sums with their count.

    It takes as many rows at a time as the training step, so that it fits where that does.
    """

    def eval_step(trained: trainable.Trained, frozen: Params | None, batch: Batch) -> Sums:
        def one(part: Batch, _: jax.Array) -> Sums:
            return objective(run, trainable.policy(run, trained, frozen), frozen, part, dtype=dtype)[1]

        with parallel.use(layout):
            return _summed(one, batch, run.train.accumulate)

    return eval_step


def _summed(function: Callable[[Batch, jax.Array], Any], batch: Batch, A: int) -> Any:
    """The sum of function(part, its number) over A parts of a batch, which are computed one after the other."""
    if A == 1:
        return function(batch, jnp.zeros((), jnp.int32))
    # Every A-th row goes into the same part, so that each device cuts its own rows and none travels.
    parts = jax.tree.map(lambda a: a.reshape(-1, A, *a.shape[1:]).swapaxes(0, 1), batch)
    parts = {name: parallel.constrain(a, None, "batch", "length") for name, a in parts.items()}

    def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*part)), None

    numbered = (parts, jnp.arange(A))
    shapes = jax.eval_shape(function, *jax.tree.map(lambda a: a[0], numbered))
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return jax.lax.scan(add, zero, numbered)[0]


def _averaged(decay: float, step: jax.Array, ema: trainable.Trained, params: trainable.Trained) -> trainable.Trained:
    """The running average one step on; in the first steps it forgets faster, as there is less to remember."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), ema, params)
