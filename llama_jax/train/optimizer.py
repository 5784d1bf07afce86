"""AdamW on optax: schedule, clipping, and decay on matrices only."""

from __future__ import annotations

from typing import Any

import jax
import optax

from llama_jax import parallel
from llama_jax.run_keys import OptimizerConfig


def make_schedule(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step: a linear warm-up from 0, then the named course to `steps`."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    rest = steps - config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(rest, 1), alpha=config.final_fraction)
    elif config.schedule == "wsd":  # warm-up, stable, decay (Hu et al., arXiv:2404.06395)
        decay = min(round(config.decay_fraction * steps), rest)
        fall = optax.linear_schedule(peak, final, max(decay, 1))
        after = optax.join_schedules([optax.constant_schedule(peak), fall], [rest - decay])
    else:
        after = optax.constant_schedule(peak)
    if config.warmup_steps == 0:
        return after
    # The first step takes one part of the warm-up, not zero: a step with rate 0 would be wasted.
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def decay_mask(axes: Any) -> Any:
    """True for matrices, False for the scales of norms: the tree that weight decay is limited by."""
    return jax.tree.map(lambda names: "norm" not in names, axes, is_leaf=lambda x: isinstance(x, tuple))


def make_optimizer(config: OptimizerConfig, axes: Any, *, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW with float32 moments.

    optax's own pieces in optax.adamw's order, so that the mask and the clipping are seen in one place.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(axes)),
        optax.scale_by_learning_rate(make_schedule(config, steps=steps)),
    )


def opt_shardings(optimizer: Any, opt_state: Any, params: Any, axes: Any, layout: parallel.Layout) -> Any:
    """Where the moments lie."""
    places = parallel.shardings(layout, axes, params)
    whole = parallel.replicated(layout.mesh)
    return optax.tree_map_params(
        optimizer, lambda _, place: place, opt_state, places, transform_non_params=lambda _: whole
    )


def group_norms(tree: Any) -> dict[str, jax.Array]:
    """Of gradients."""
    return {"all": optax.global_norm(tree)}
