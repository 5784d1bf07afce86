"""Four optimizers built on optax, with parameter groups and a schedule, and the shardings of their states.

Every optimizer is a chain of five links: clipping by global norm; the optimizer itself, with rate 1; decoupled weight
decay, on matrices only; the multipliers of groups; the schedule. The schedule's state is last, so that
`opt_state[-1].count` is its step. An update of rate 1 has elements of about 1 with AdamW, Adafactor and Lion (whose
authors recommend a third to a tenth of AdamW's rate), and of 0.2 with Muon.
"""

from __future__ import annotations

import dataclasses
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

# Root mean square of Muon's updates. It is that of AdamW's updates, so that one learning rate and one weight decay work
# for both (Liu et al., arXiv:2502.16982, section 2.2).
_MUON_RMS = 0.2


def make_schedule(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step: a linear warmup from 0, then the named schedule until `steps`."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    rest = steps - config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(rest, 1), alpha=config.final_fraction)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, final, max(rest, 1))
    elif config.schedule == "wsd":  # warm-up, stable, decay (Hu et al., arXiv:2404.06395)
        decay = min(round(config.decay_fraction * steps), rest)
        fall = optax.linear_schedule(peak, final, max(decay, 1))
        after = optax.join_schedules([optax.constant_schedule(peak), fall], [rest - decay])
    else:
        after = optax.constant_schedule(peak)
    if config.warmup_steps == 0:
        return after
    # The first step has one part of the warmup, not zero: a step with rate 0 would be wasted.
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
    spec = spec_of(names[names.index("tokens") + 1 :] if "tokens" in names else names)  # rows of trained tokens
    if spec is None:
        raise ValueError(f"{'/'.join(names)} is in none of the groups {', '.join(GROUPS)}")
    return spec.group


def group_norms(tree: Any) -> dict[str, jax.Array]:
    """The float32 norm of each group in a tree of weights or gradients, as scalars.

    The norm of the whole tree is the root of the sum of their squares.
    """
    squares: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        group = group_of(path)
        squares[group] = squares.get(group, 0.0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return {group: jnp.sqrt(squares[group]) for group in GROUPS if group in squares}


def decay_mask(axes: Any) -> Any:
    """The mask of weight decay: True for matrices, False for the weights of norms."""
    return _by_path(lambda path: group_of(path) != "norm", axes)


def make_optimizer(config: OptimizerConfig, axes: Any, *, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run, with moments in the dtype of config.moments.

    Args:
        config: The section optimizer of the run.
        axes: The tree of the trained weights' logical axes: `logical_axes(config, stacked=True)`, or the axes of
            LoRA's a and b.
        steps: Steps of the whole run, for the schedule.

    Returns:
        A transformation whose update takes `finite` too: moments in the host's memory do not change unless it is True.
    """
    rates = config.group_rates
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _MAKERS[config.name](config, axes),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(axes)),
        # After the decay, so that a group with multiplier 0 does not change at all.
        _scale_each(_by_path(lambda path: rates.get(group_of(path), 1.0), axes)),
        optax.scale_by_learning_rate(make_schedule(config, steps=steps)),
    )
    return optax.with_extra_args_support(chain)


def _adamw(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """Adam without weight decay, which is a link of its own. With int8 moments, the weights of norms keep float32."""

    def kind(path: Any) -> str:
        return "float32" if config.moments == "int8" and group_of(path) == "norm" else config.moments

    if config.moments == "float32" and not config.offload:
        return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    return scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, kind=kind)


def _adafactor(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """Adafactor: a second moment factored into rows and columns, and a limit of 1 on an update's root mean square.

    It has no first moment, so that its state is small, and its updates are not relative to the size of the weights, so
    that its learning rates are those of AdamW. It does not use b1, b2 and eps: the decay is 1 - t^-0.8 (section 7.2),
    and 1e-30 is added to squares. Matrices with a side under 128 are not factored.
    """
    return _each_layer(optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)), axes)


def _lion(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """Lion: the update is the sign of an average of gradient and momentum."""
    return optax.scale_by_lion(b1=config.b1, b2=config.b2, mu_dtype=jnp.dtype(config.moments))


def _muon(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) with momentum b1, on the matrices of each layer.

    Adam updates the embedding, the unembedding and norms, as Muon's author recommends. Updates of all shapes are scaled
    to the same root mean square (_MUON_RMS).
    """

    def sides(tree: Any) -> Any:  # the trees have blanks from optax.partition for Adam's weights
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2), tree)

    def same_size(updates: Any, _: Any) -> Any:  # orthogonal rows of length 1 have elements of 1 / sqrt(max(sides))
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


def opt_shardings(opt_state: Any, params: Any, axes: Any, layout: parallel.Layout, *, host: bool = False) -> Any:
    """The NamedShardings of an optimizer's state: a moment with the shape of its weight has the weight's sharding.

    All other arrays are replicated: counters, and Adafactor's rows and columns (10 MB for 8B, 0.16 GB for 405B). The
    weight of a moment is the one whose path ends the moment's path. For example, `[1].mu["layers"]["q"]` ends in the
    path of the weight `["layers"]["q"]`, whatever optax wraps around the tree of weights.

    Args:
        opt_state: Shapes of the state, from jax.eval_shape of the optimizer's init.
        params: Shapes of the weights.
        axes: Logical axes of the weights, as in `make_optimizer`.
        layout: The mesh and its sharding rules.
        host: True puts the moments of stacked matrices into the host's memory (optimizer.offload).
    """
    axes_of = dict(jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_axes))
    shape_of = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def sharding(path: Any, leaf: Any) -> Any:
        weight = next((path[i:] for i in range(len(path)) if path[i:] in shape_of), None)
        if weight is None or leaf.shape != shape_of[weight]:
            return jax.tree.map(lambda _: parallel.replicated(layout.mesh), leaf)
        names = axes_of[weight]
        memory = parallel.HOST if host and names[0] == "layers" and len(names) > 2 else layout.memory
        return parallel.shardings(dataclasses.replace(layout, memory=memory), names, leaf)

    return jax.tree_util.tree_map_with_path(sharding, opt_state, is_leaf=lambda leaf: hasattr(leaf, "shape"))


def _each_layer(transform: optax.GradientTransformation, axes: Any) -> optax.GradientTransformation:
    """Applies `transform` to the weights of each layer separately, as if they were not stacked."""

    def init(params: Any) -> Any:
        return jax.vmap(transform.init)(params)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return jax.vmap(transform.update)(grads, state, params)

    labels = jax.tree.map(lambda names: "stacked" if names[0] == "layers" else "single", axes, is_leaf=_is_axes)
    each = {"stacked": optax.GradientTransformation(init, update), "single": transform}
    return optax.partition({label: each[label] for label in sorted(set(jax.tree.leaves(labels)))}, labels)


def _scale_each(factors: Any) -> optax.GradientTransformation:
    """A transformation that multiplies each update by the number at its path in `factors`."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, factor: factor * u, updates, factors))


def _by_path(value: Callable[[Any], Any], axes: Any) -> Any:
    """A tree with `value(path)` for the path of each weight."""
    return jax.tree_util.tree_map_with_path(lambda path, _: value(path), axes, is_leaf=_is_axes)


def _is_axes(leaf: Any) -> bool:
    return isinstance(leaf, tuple)
