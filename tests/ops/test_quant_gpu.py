"""The product with quantized weights on NVIDIA GPUs, interpreted on a CPU, against float32; and where it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.attention import described_h100
from helpers.numbers import gap
from llama_jax import parallel
from llama_jax.ops import linear, quant, quant_gpu


def draw(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 1, 256), (3, 384), (17, 128)], ids=str)
def test_the_product_is_that_of_the_dequantized_weight(bits, shape):
    x, w = draw(*shape), quant.quantize(draw(64, shape[-1]), bits)
    exact = np.asarray(x) @ np.asarray(quant.dequantize(w, jnp.float32)).T
    assert gap(jax.jit(quant_gpu.product)(x, w), exact) < 2e-6  # float32 sums in another order
    rounded = jax.jit(quant_gpu.product)(x.astype(jnp.bfloat16), w)
    assert rounded.dtype == jnp.float32
    assert gap(rounded, exact) < 1e-2  # bfloat16 has 8 bits, and the errors of a sum partly cancel


@pytest.mark.parametrize(
    ("rows", "out", "width", "dtype", "capability", "taken"),
    [
        (1, 64, 256, jnp.bfloat16, 90, True),
        (64, 64, 256, jnp.float16, 80, True),
        (65, 64, 256, jnp.bfloat16, 90, False),
        (1, 48, 256, jnp.bfloat16, 90, False),
        (1, 64, 96, jnp.bfloat16, 90, False),
        (1, 64, 256, jnp.float32, 90, False),
        (1, 64, 256, jnp.bfloat16, 75, False),
    ],
)
def test_few_rows_of_whole_blocks_run_the_kernel_on_a_gpu(rows, out, width, dtype, capability, taken, monkeypatch):
    monkeypatch.setattr(parallel, "device_platform", lambda: "cuda")
    monkeypatch.setattr(parallel, "compute_capability", lambda: capability)
    monkeypatch.setattr(linear.cpu, "ready", lambda: False)
    w = jax.eval_shape(lambda: quant.quantize(jnp.zeros((out, width)), 8))
    x = jax.ShapeDtypeStruct((rows, width), dtype)
    with described_h100():
        lowered = jax.jit(lambda x, w: linear.linear(x, w)).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert ("custom_call @__gpu$xla.gpu.triton" in lowered) == taken
