"""Schedules against closed formulas, and AdamW against its restatement in numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax import model
from llama_jax.config import SIZES
from llama_jax.run_keys import OptimizerConfig
from llama_jax.train.optimizer import decay_mask, make_optimizer, make_schedule

TINY = SIZES["tiny"]
AXES = model.logical_axes(TINY, stacked=True)
STEPS, WARMUP, PEAK = 100, 10, 2e-3


@functools.cache
def tiny_params():
    return jax.jit(model.init_params, static_argnums=0)(TINY, jax.random.key(0))


def rates(**changes) -> np.ndarray:
    config = OptimizerConfig(**({"learning_rate": PEAK, "warmup_steps": WARMUP} | changes))
    return np.asarray(jax.vmap(make_schedule(config, steps=STEPS))(jnp.arange(STEPS)), np.float64)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warmup_rises_in_equal_parts_from_one_part_to_the_peak(schedule):
    expected = PEAK * (np.arange(WARMUP) + 1) / WARMUP
    np.testing.assert_allclose(rates(schedule=schedule)[:WARMUP], expected, rtol=1e-6, atol=1e-9)
    assert rates(schedule=schedule)[0] > 0


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_without_warmup_the_first_step_has_the_peak(schedule, warmup):
    assert math.isclose(rates(schedule=schedule, warmup_steps=warmup)[0], PEAK, rel_tol=1e-6)


def test_a_warmup_of_all_steps_is_allowed():
    np.testing.assert_allclose(rates(warmup_steps=STEPS), PEAK * (np.arange(STEPS) + 1) / STEPS, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine_is_its_formula(final):
    t = np.arange(STEPS - WARMUP) / (STEPS - WARMUP)
    expected = PEAK * (final + (1 - final) * 0.5 * (1 + np.cos(np.pi * t)))
    np.testing.assert_allclose(rates(final_fraction=final)[WARMUP:], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize(("fraction", "decay"), [(0.2, 20), (0.5, 50), (1.0, 90), (0.0, 0)])
def test_wsd_holds_the_peak_and_falls_over_the_last_part_of_all_steps(fraction, decay, final):
    """A decay that would reach into the warm-up takes what is left after it: 90 of 100."""
    course = rates(schedule="wsd", decay_fraction=fraction, final_fraction=final)
    stable = STEPS - decay
    np.testing.assert_allclose(course[WARMUP:stable], PEAK, rtol=1e-6)
    down = PEAK * (1 - (1 - final) * np.arange(decay) / max(decay, 1))
    np.testing.assert_allclose(course[stable:], down, rtol=1e-5, atol=1e-9)


def test_constant_stays_at_the_peak():
    np.testing.assert_allclose(rates(schedule="constant")[WARMUP:], PEAK, rtol=1e-6)


def test_only_matrices_decay():
    params = tiny_params()
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.5, weight_decay=0.1, warmup_steps=0), AXES, steps=10)

    @jax.jit
    def step_without_gradient(params):
        zero = jax.tree.map(jnp.zeros_like, params)
        return optax.apply_updates(params, optimizer.update(zero, optimizer.init(params), params)[0])

    moved = jax.device_get(step_without_gradient(params))
    decayed = {}
    for (path, new), old in zip(jax.tree.leaves_with_path(moved), jax.tree.leaves(params), strict=True):
        decayed[jax.tree_util.keystr(path)] = factor = float(np.max(np.abs(new / np.asarray(old) - 1)))
        assert factor < 1e-7 or abs(factor - 0.05) < 1e-6
    kept = {name for name, factor in decayed.items() if factor < 1e-7}
    assert kept == {name for name in decayed if "norm" in name}
    assert len(kept) == 3 and len(decayed) == 12


def test_the_mask_is_of_ranks_apart_from_the_layer_axis():
    shapes = model.abstract_params(TINY, stacked=True)
    ranks = jax.tree.map(lambda leaf: leaf.ndim, shapes)
    ranks["layers"] = jax.tree.map(lambda n: n - 1, ranks["layers"])
    assert decay_mask(AXES) == jax.tree.map(lambda n: n == 2, ranks)


def numpy_adamw(params, gradients, config, mask):
    """Loshchilov and Hutter, algorithm 2, with clipping by global norm, in float64."""
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(p) for k, p in params.items()}
    for t, grads in enumerate(gradients, start=1):
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        clip = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        for k, g in grads.items():
            m[k] = config.b1 * m[k] + (1 - config.b1) * clip * g
            v[k] = config.b2 * v[k] + (1 - config.b2) * (clip * g) ** 2
            m_hat, v_hat = m[k] / (1 - config.b1**t), v[k] / (1 - config.b2**t)
            decay = config.weight_decay * params[k] if mask[k] else 0.0
            params[k] = params[k] - config.learning_rate * (m_hat / (np.sqrt(v_hat) + config.eps) + decay)
    return params


@pytest.mark.parametrize("clip", [0.0, 1.0, 1e6])
def test_five_steps_equal_adamw_in_numpy(clip):
    config = OptimizerConfig(
        learning_rate=0.01, warmup_steps=0, schedule="constant", eps=1e-3, weight_decay=0.3, clip_norm=clip
    )
    optimizer = make_optimizer(config, AXES, steps=5)
    params = tiny_params()
    leaves, tree = jax.tree.flatten(params)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    rng = np.random.default_rng(0)
    gradients = [[rng.normal(size=leaf.shape) * 10.0**-i for leaf in leaves] for i in range(5)]
    expected = numpy_adamw(
        {n: np.asarray(leaf, np.float64) for n, leaf in zip(names, leaves, strict=True)},
        [dict(zip(names, g, strict=True)) for g in gradients],
        config,
        dict(zip(names, jax.tree.leaves(decay_mask(AXES)), strict=True)),
    )

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for g in gradients:
        params, state = update(params, state, jax.tree.unflatten(tree, [jnp.asarray(a, jnp.float32) for a in g]))
    for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, expected[name], atol=2e-6)


def test_clipping_keeps_the_direction_and_bounds_the_norm():
    """Seen through the first moment, which is linear in the clipped gradient."""
    optimizer = make_optimizer(OptimizerConfig(clip_norm=0.5, b1=0.0), AXES, steps=5)
    params = tiny_params()
    grads = jax.tree.map(lambda a: jnp.ones_like(a), params)
    _, state = jax.jit(lambda params: optimizer.update(grads, optimizer.init(params), params))(params)
    moment = jax.device_get(state[1].mu)
    assert math.isclose(float(optax.global_norm(moment)), 0.5, rel_tol=1e-4)
    values = {float(v) for leaf in jax.tree.leaves(moment) for v in (leaf.min(), leaf.max())}
    assert max(values) - min(values) < 1e-9
