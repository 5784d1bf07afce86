"""Schedules of the learning rate against closed formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.run_keys import OptimizerConfig
from llama_jax.train.optimizer import make_schedule

STEPS, WARMUP, PEAK = 100, 10, 2e-3


def rates(**changes) -> np.ndarray:
    config = OptimizerConfig(**({"learning_rate": PEAK, "warmup_steps": WARMUP} | changes))
    return np.asarray(jax.vmap(make_schedule(config, steps=STEPS))(jnp.arange(STEPS)), np.float64)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warmup_rises_in_equal_parts_from_one_part_to_the_peak(schedule):
    expected = PEAK * (np.arange(WARMUP) + 1) / WARMUP
    np.testing.assert_allclose(rates(schedule=schedule)[:WARMUP], expected, rtol=1e-6, atol=1e-9)
    assert rates(schedule=schedule)[0] > 0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
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


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_linear_falls_in_equal_parts_to_the_final_rate(final):
    t = np.arange(STEPS - WARMUP) / (STEPS - WARMUP)
    expected = PEAK * (1 - (1 - final) * t)
    np.testing.assert_allclose(rates(schedule="linear", final_fraction=final)[WARMUP:], expected, rtol=1e-5, atol=1e-9)


def test_constant_stays_at_the_peak():
    np.testing.assert_allclose(rates(schedule="constant")[WARMUP:], PEAK, rtol=1e-6)
