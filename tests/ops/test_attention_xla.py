"""Plain attention: its own backward pass against the gradient that jax derives from a softmax in float32."""

import jax
import jax.numpy as jnp
import pytest

from helpers.attention import draw, packed, plain, with_gradients
from helpers.numbers import gap

TOLERANCES = {"float32": 2e-6, "bfloat16": 1.5e-2}  # measured below 9e-7 and 9e-3


def derived(q, k, v, segments, positions):
    """Attention in float32 as a softmax over all keys."""
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[1], axis=1) for a in (k, v))
    scores = jnp.einsum("btnh,bnsh->bnts", q, k, precision="highest") * q.shape[-1] ** -0.5
    mask = positions[:, None] <= positions[:, :, None]
    mask &= segments[:, None] == segments[:, :, None]
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30))
    return jnp.einsum("bnts,bnsh->btnh", weights, v, precision="highest")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("lengths", "N", "K", "H"),
    [((130, 70), 6, 2, 32), ((1, 40, 23), 4, 4, 16), ((200,), 4, 1, 8), ((129,), 1, 1, 32), ((5,), 2, 2, 64)],
)
def test_results_and_gradients_are_those_of_a_softmax_in_float32(lengths, N, K, H, dtype):
    T = sum(lengths)
    segments, positions = packed([lengths, (T,)], T)
    q, cotangent = (draw(seed, 2, T, N, H, dtype=dtype) for seed in (1, 2))
    k, v = (draw(seed, 2, T, K, H, dtype=dtype) for seed in (3, 4))  # as projections give them

    def of(attend):
        def run(q, k, v):
            return attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), segments, positions)

        return with_gradients(run, q, k, v, cotangent)

    for ours, theirs in zip(of(plain), of(derived), strict=True):
        assert gap(ours, theirs) < TOLERANCES[dtype]
