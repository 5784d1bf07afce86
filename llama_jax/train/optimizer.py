"""What turns gradients into updates: four optimizers on optax, groups of weights, a schedule; and where states lie.

A chain of five links, the same for all: clipping by global norm; the optimizer proper, of rate 1; decoupled weight
decay, on matrices only; the rates of groups; the schedule, whose state is last, so that `opt_state[-1].count` is the
step it stands at. An update of rate 1 has elements of about 1 under AdamW, Adafactor and Lion (which takes a third to a
tenth of AdamW's rate, by its authors), and of 0.2 under Muon.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from llama_jax import parallel
from llama_jax.params import spec_of
from llama_jax.run_keys import GROUPS, OptimizerConfig
from llama_jax.train.moments import scale_by_adam

# Of Muon's updates, the root mean square that AdamW's have been found to have: one rate and one weight decay then do
# for both (Liu et al., arXiv:2502.16982, section 2.2).
_MUON_RMS = 0.2


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


def group_of(path: Any) -> str:
    """The parameter group (one of run_keys.GROUPS) of a trained weight.

    Args:
        path: keys that lead to the weight, as jax.tree_util gives them; a LoRA matrix is called "a" or "b".
    """
    names = tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))
    if names[-1] in ("a", "b"):
        return f"lora_{names[-1]}"
    spec = spec_of(names)
    if spec is None:
        raise ValueError(f"{'/'.join(names)} is in none of the groups {', '.join(GROUPS)}")
    return spec.group


def group_norms(tree: Any) -> dict[str, jax.Array]:
    """The float32 norm of each group that a tree of weights, or of their gradients, has: scalars.

    The root of the sum of their squares is the norm of the whole tree.
    """
    squares: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        group = group_of(path)
        squares[group] = squares.get(group, 0.0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return {group: jnp.sqrt(squares[group]) for group in GROUPS if group in squares}


def decay_mask(axes: Any) -> Any:
    """True for matrices, False for the scales of norms: the tree that weight decay is limited by."""
    return _by_path(lambda path: group_of(path) != "norm", axes)


def make_optimizer(config: OptimizerConfig, axes: Any, *, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run; its moments are as config.moments says.

    Args:
        config: the run's.
        axes: the tree of the trained weights' logical axes: `logical_axes(config, stacked=True)`, or that of
            LoRA's a and b.
        steps: of the whole run, for the schedule.
    """
    rates = config.group_rates
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _MAKERS[config.name](config, axes),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(axes)),
        # After the decay: a group of rate 0 stays as it is.
        _scale_each(_by_path(lambda path: rates.get(group_of(path), 1.0), axes)),
        optax.scale_by_learning_rate(make_schedule(config, steps=steps)),
    )


def _adamw(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """Adam; the decay is the chain's. In 8 bits the scales of norms, which are few, keep float32 moments."""

    def kind(path: Any) -> str:
        return "float32" if config.moments == "int8" and group_of(path) == "norm" else config.moments

    if config.moments == "float32":
        return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    return scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, kind=kind)


def _adafactor(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """Adafactor's second moment in rows and columns, and its limit of 1 on an update's root mean square.

    Without a first moment, so that its state is small, and without steps relative to the weights' size, so that rates
    are as AdamW's. b1, b2 and eps are not read: the decay is 1 - t^-0.8 (section 7.2), and 1e-30 is added to squares.
    Matrices with a side under 128 are not factored.
    """
    return _each_layer(optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)), axes)


def _lion(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """The sign of a mixture of gradient and momentum."""
    return optax.scale_by_lion(b1=config.b1, b2=config.b2, mu_dtype=jnp.dtype(config.moments))


def _muon(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) with b1 as its momentum, on each layer's matrices.

    The embedding, the unembedding and norms go to Adam, as its author has it. Updates are scaled to the same root mean
    square for all shapes (see _MUON_RMS).
    """

    def sides(tree: Any) -> Any:  # of trees where optax.partition has left blanks for what is Adam's
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2), tree)

    def same_size(updates: Any, _: Any) -> Any:  # orthogonal rows, of length 1, have elements of 1 / sqrt(max(sides))
        return jax.tree.map(lambda u: _MUON_RMS * max(u.shape[-2:]) ** 0.5 * u, updates)

    moments = jnp.dtype(config.moments)
    muon = contrib.scale_by_muon(beta=config.b1, mu_dtype=moments, weight_dimension_numbers=sides)
    labels = _by_path(lambda path: "adam" if group_of(path) in ("embed", "unembed", "norm") else "muon", axes)
    return optax.partition(
        {"muon": optax.chain(muon, optax.stateless(same_size)), "adam": _adamw(config, axes)}, labels
    )


_MAKERS: dict[str, Callable[[OptimizerConfig, Any], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}


def opt_shardings(opt_state: Any, params: Any, axes: Any, layout: parallel.Layout) -> Any:
    """A tree of NamedShardings for an optimizer's state: what has the shape of its weight lies where the weight lies.

    The rest is on every device whole: counters, and Adafactor's rows and columns (10 MB for 8B, 0.16 GB for 405B).

    Args:
        opt_state: its shapes, from jax.eval_shape of its init.
        params: the weights' shapes.
        axes: their logical axes, as `make_optimizer` has them.
        layout: the mesh and its rules.
    """
    axes_of = dict(jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_axes))
    shape_of = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def place(path: Any, leaf: Any) -> Any:
        # Whatever optax wraps the weights' tree into, a weight's own path is the end of its moment's.
        weight = next((path[i:] for i in range(len(path)) if path[i:] in shape_of), None)
        if weight is None or leaf.shape != shape_of[weight]:
            return jax.tree.map(lambda _: parallel.replicated(layout.mesh), leaf)
        return parallel.shardings(layout, axes_of[weight], leaf)

    return jax.tree_util.tree_map_with_path(place, opt_state, is_leaf=lambda leaf: hasattr(leaf, "shape"))


def _each_layer(transform: optax.GradientTransformation, axes: Any) -> optax.GradientTransformation:
    """`transform`, given the weights of one layer at a time, as if they were not stacked."""

    def init(params: Any) -> Any:
        return jax.vmap(transform.init)(params)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return jax.vmap(transform.update)(grads, state, params)

    labels = jax.tree.map(lambda names: "stacked" if names[0] == "layers" else "single", axes, is_leaf=_is_axes)
    each = {"stacked": optax.GradientTransformation(init, update), "single": transform}
    return optax.partition({label: each[label] for label in sorted(set(jax.tree.leaves(labels)))}, labels)


def _scale_each(factors: Any) -> optax.GradientTransformation:
    """Multiply each update by the number at its place in a tree."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, factor: factor * u, updates, factors))


def _by_path(value: Callable[[Any], Any], axes: Any) -> Any:
    """The tree of what `value` says of each weight's path."""
    return jax.tree_util.tree_map_with_path(lambda path, _: value(path), axes, is_leaf=_is_axes)


def _is_axes(leaf: Any) -> bool:
    return isinstance(leaf, tuple)
