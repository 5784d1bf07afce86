"""Products of few rows on NVIDIA GPUs, interpreted on a CPU, against float32; and which products they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.attention import described_h100
from helpers.numbers import gap
from llama_jax import parallel
from llama_jax.ops import few_rows_gpu, linear, quant
from llama_jax.ops.norm import rms_norm

EPS = 1e-5


def draw(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def weights(bits, *shapes):
    """Weights of one kind, bfloat16 for 16 bits, and the same in float32."""
    if bits == 16:
        ours = [draw(*shape).astype(jnp.bfloat16) for shape in shapes]
        return ours, [w.astype(jnp.float32) for w in ours]
    ours = [quant.quantize(draw(*shape), bits) for shape in shapes]
    return ours, [quant.dequantize(w, jnp.float32) for w in ours]


@pytest.mark.parametrize(
    ("bits", "rows"), [(16, 1), (8, 1), (8, 2), (8, 17), (4, 1), (4, 2), (4, 5)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("width", [256, 384], ids=["whole blocks", "part of a block"])
def test_products_are_those_of_float32(bits, rows, width):
    x = draw(rows, width)
    ours, exact = weights(bits, (64, width), (64, width), (128, width))
    together = jax.jit(lambda x: few_rows_gpu.linears(x, ours, dtype=jnp.float32))(x)
    for product, w in zip(together, exact, strict=True):
        # Float32 sums in another order; 4 bits subtract 136 times the sum of the inputs.
        assert gap(product, np.asarray(x) @ np.asarray(w).T) < 2e-5
    (alone,) = jax.jit(lambda x: few_rows_gpu.linears(x, ours[1:2], dtype=jnp.float32))(x)
    np.testing.assert_array_equal(alone, together[1])


@pytest.mark.parametrize(("bits", "rows"), [(16, 1), (8, 2), (4, 1), (8, 20)])
def test_the_norm_swiglu_and_the_residual_are_those_of_xla(bits, rows):
    x, scale, up, plus = draw(rows, 256), draw(256), draw(rows, 256) / 2, draw(rows, 64)
    (w,), (exact,) = weights(bits, (64, 256))
    (after_norm,) = few_rows_gpu.linears(x, [w], dtype=jnp.float32, norm=(scale, EPS), plus=plus)
    assert gap(after_norm, rms_norm(x, scale, eps=EPS) @ exact.T + plus) < 2e-5
    (after_swiglu,) = few_rows_gpu.linears(x, [w], dtype=jnp.float32, up=up)
    assert gap(after_swiglu, (jax.nn.silu(x) * up) @ exact.T) < 2e-5


@pytest.mark.parametrize(
    ("bits", "rows", "out", "width", "dtype", "capability", "taken"),
    [
        (16, 1, 64, 256, jnp.bfloat16, 90, True),
        (16, 1, 64, 96, jnp.float16, 80, True),
        (16, 2, 64, 256, jnp.bfloat16, 90, False),
        (8, 1, 64, 96, jnp.bfloat16, 90, True),
        (8, 64, 64, 256, jnp.float16, 80, True),
        (8, 65, 64, 256, jnp.bfloat16, 90, False),
        (8, 5, 48, 256, jnp.bfloat16, 90, False),
        (8, 5, 64, 96, jnp.bfloat16, 90, False),
        (4, 1, 44, 256, jnp.bfloat16, 90, False),
        (4, 1, 64, 256, jnp.float32, 90, False),
        (4, 1, 64, 256, jnp.bfloat16, 75, False),
    ],
)
def test_few_rows_run_the_kernels_on_a_gpu(bits, rows, out, width, dtype, capability, taken, monkeypatch):
    monkeypatch.setattr(parallel, "device_platform", lambda: "cuda")
    monkeypatch.setattr(parallel, "compute_capability", lambda: capability)
    w = jnp.zeros((out, width), dtype) if bits == 16 else quant.quantize(jnp.zeros((out, width)), bits)
    x = jax.ShapeDtypeStruct((rows, width), dtype)
    w = jax.eval_shape(lambda: w)
    with described_h100():
        lowered = jax.jit(lambda x, w: linear.linear(x, w)).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert ("custom_call @__gpu$xla.gpu.triton" in lowered) == taken
