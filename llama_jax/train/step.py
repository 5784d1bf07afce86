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

from llama_jax import model, parallel
from llama_jax.config import ModelConfig
from llama_jax.ops.loss import cross_entropy
from llama_jax.run_config import RunConfig
from llama_jax.train.optimizer import make_schedule
from llama_jax.train.state import TrainState

Batch = dict[str, jax.Array]  # tokens, targets, positions, segments: (B, T) int32; weights: (B, T) float32
Metrics = dict[str, jax.Array]


def loss_sums(
    config: ModelConfig, params: model.Params, batch: Batch, *, dtype: Any, remat: str, vocab_chunk: int, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum over tokens of the loss with its z-term, and of the cross-entropy alone, float32 scalars.

    Sums, not means: whoever adds up several parts divides once, by the weight of all their tokens.
    """
    hidden_BTD, _ = model.forward(
        config, params, batch["tokens"], batch["positions"], batch["segments"], dtype=dtype, remat=remat
    )
    with jax.named_scope("loss"):
        nll_BT, lse_BT = cross_entropy(
            hidden_BTD, model.unembedding(config, params), batch["targets"], vocab_chunk=vocab_chunk
        )
        nll = jnp.sum(batch["weights"] * nll_BT)
        return nll + z_loss * jnp.sum(batch["weights"] * jnp.square(lse_BT)), nll


def make_train_step(
    run: RunConfig, optimizer: optax.GradientTransformation, layout: parallel.Layout, dtype: Any
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step as a function of state and batch; jit it with the state donated (`jit_train_step`)."""
    A = run.train.accumulate
    schedule = make_schedule(run.optimizer, steps=run.train.steps)

    def gradients(params: model.Params, batch: Batch) -> tuple[tuple[jax.Array, jax.Array], model.Params]:
        return jax.value_and_grad(
            lambda params: loss_sums(
                run.model,
                params,
                batch,
                dtype=dtype,
                remat=run.train.remat,
                vocab_chunk=run.train.vocab_chunk,
                z_loss=run.train.z_loss,
            ),
            has_aux=True,
        )(params)

    def accumulated(params: model.Params, batch: Batch) -> tuple[tuple[jax.Array, jax.Array], model.Params]:
        # Every A-th row goes into the same part, so that each device cuts its own rows and none travels.
        parts = jax.tree.map(lambda a: a.reshape(-1, A, *a.shape[1:]).swapaxes(0, 1), batch)
        parts = {name: parallel.constrain(a, None, "batch", "length") for name, a in parts.items()}

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradients(params, part)), None

        zero = jax.tree.map(jnp.zeros_like, ((jnp.zeros(()), jnp.zeros(())), params))
        return jax.lax.scan(add, zero, parts)[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with parallel.use(layout):
            tokens = jnp.sum(batch["weights"])
            (loss, nll), grads = (gradients if A == 1 else accumulated)(state.params, batch)
            scale = 1.0 / jnp.maximum(tokens, 1.0)
            grads = jax.tree.map(lambda g: g * scale, grads)
            grad_norm = optax.global_norm(grads)
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            learning_rate = schedule(state.opt_state[-1].count)  # of the chain's last link, the one that scales
            with jax.named_scope("optimizer"):
                updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
                params = optax.apply_updates(state.params, updates)
            # A non-finite loss or gradient changes nothing but the count of such steps.
            keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
            state = TrainState(
                step=state.step + 1,
                params=keep(params, state.params),
                opt_state=keep(opt_state, state.opt_state),
                key=state.key,
                skipped=jnp.where(finite, 0, state.skipped + 1),
            )
        return state, {
            "loss": nll * scale,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens": tokens,
            "skipped": state.skipped,
        }

    return train_step


def jit_train_step(
    run: RunConfig,
    optimizer: optax.GradientTransformation,
    layout: parallel.Layout,
    dtype: Any,
    shardings: TrainState,
) -> Any:
    """The compiled step: donates the state; batches lie as `batch_sharding` says, metrics are replicated scalars."""
    return jax.jit(
        make_train_step(run, optimizer, layout, dtype),
        in_shardings=(shardings, batch_sharding(layout)),
        out_shardings=(shardings, parallel.replicated(layout.mesh)),
        donate_argnums=0,
    )


def jit_eval_step(run: RunConfig, layout: parallel.Layout, dtype: Any, shardings: TrainState) -> Any:
    """A compiled function of (params, batch): the summed cross-entropy and the number of tokens it is over."""

    def eval_step(params: model.Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        with parallel.use(layout):
            chunk = run.train.vocab_chunk
            _, nll = loss_sums(run.model, params, batch, dtype=dtype, remat="none", vocab_chunk=chunk, z_loss=0.0)
            return nll, jnp.sum(batch["weights"])

    return jax.jit(
        eval_step,
        in_shardings=(shardings.params, batch_sharding(layout)),
        out_shardings=parallel.replicated(layout.mesh),
    )


def batch_sharding(layout: parallel.Layout) -> jax.sharding.NamedSharding:
    """Where each array (B, T) of a batch lies."""
    return layout.sharding(("batch", "length"))
