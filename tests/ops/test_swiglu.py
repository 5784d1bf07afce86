"""SwiGLU against the formula in float32, in values and gradients."""

import jax
import jax.numpy as jnp
import pytest

from helpers.attention import draw
from helpers.numbers import gap
from llama_jax.ops.swiglu import swiglu


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_values_and_gradients_are_those_of_the_formula_rounded_once(dtype, tolerance):
    gate, up, g = (3 * draw(seed, 5, 64, dtype=dtype) for seed in range(3))
    wide = [a.astype(jnp.float32) for a in (gate, up, g)]
    ours, back = jax.vjp(jax.jit(swiglu), gate, up)
    theirs, derived = jax.vjp(lambda gate, up: gate / (1 + jnp.exp(-gate)) * up, *wide[:2])
    for a, b in zip((ours, *back(g)), (theirs, *derived(wide[2])), strict=True):
        assert a.dtype == dtype
        assert gap(a, b) < tolerance
