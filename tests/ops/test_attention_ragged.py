"""The TPU kernel for attention over a KV cache, interpreted on a CPU, against the plain attention."""

import jax
import jax.numpy as jnp
import pytest

from helpers.attention import filled
from helpers.numbers import gap
from llama_jax import parallel
from llama_jax.choices import KV_TYPES
from llama_jax.ops.attention import ragged, xla

# Tolerance for float32 sums in another order, relative to the largest value of the result; the largest seen is 4e-7.
ROUNDING = 2e-6


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize(("T", "N", "K"), [(1, 8, 2), (33, 3, 1)], ids=str)
def test_results_are_those_of_plain_attention_and_no_dead_block_is_read(kv, T, N, K, monkeypatch):
    monkeypatch.setattr(ragged, "_MAX_STEP", 128)
    monkeypatch.setattr(ragged, "_QUERIES", 16)
    call, spoiled = filled(kv, N, K, 128, T, S=256, block=128)
    assert gap(jax.jit(ragged.attend)(spoiled), xla.attend(call)) < ROUNDING


def test_in_bfloat16_the_kernel_differs_by_its_rounding_only():
    call, _ = filled("compute", 8, 2, 128, 1, jnp.bfloat16, S=256, block=128)
    q, k, v = (a.astype(jnp.float32) for a in call[:3])
    out = jax.jit(ragged.attend)(call)
    assert out.dtype == jnp.bfloat16
    assert gap(out, xla.attend(call._replace(q_BTNH=q, k=k, v=v))) < 2e-2  # bfloat16 has 8 bits: 4e-3 a rounding


def test_on_a_mesh_each_device_attends_for_its_own_rows_and_heads():
    call, _ = filled("int8", 4, 2, 128, 1, S=256, block=128)
    layout = parallel.Layout(parallel.make_mesh({"tensor": 2}, jax.devices()[:2]), "infer")

    def attend(call):
        with parallel.use(layout):
            return ragged.attend(call)

    assert gap(jax.jit(attend)(call), xla.attend(call)) < ROUNDING
