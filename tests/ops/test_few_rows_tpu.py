"""The TPU kernel of quantized products, interpreted on a CPU, against XLA's products with dequantized weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.numbers import gap
from llama_jax import parallel
from llama_jax.ops import few_rows_tpu, linear, quant

# Sums of the same bfloat16 products in another order, relative to the largest value; the largest seen is 1.2e-6.
ROUNDING = 4e-6


def operands(rows, outputs, width, bits):
    keys = jax.random.split(jax.random.key(rows), 3)
    sizes = jnp.exp(2 * jax.random.normal(keys[0], (outputs, width // quant.GROUP)) - 6).repeat(quant.GROUP, axis=1)
    w = quant.quantize(sizes * jax.random.normal(keys[1], (outputs, width)), bits)
    return jax.random.normal(keys[2], (rows, width), jnp.bfloat16), w


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("rows", "outputs", "width"), [(3, 300, 832), (17, 40, 256), (1, 256, 4352)], ids=["parts", "small", "long"]
)
def test_products_are_those_of_dequantized_weights(rows, outputs, width, bits):
    x, w = operands(rows, outputs, width, bits)
    assert few_rows_tpu.takes(x, w, None)
    assert gap(few_rows_tpu.product(x, w, None), linear._dequantized_product(x, w)) < ROUNDING


@pytest.mark.parametrize("axes", [("heads", "embed"), ("embed", "heads")], ids=["outputs", "inputs"])
def test_on_a_mesh_each_device_multiplies_its_own_part(axes):
    x, w = operands(4, 512, 1024, 4)
    x = x[:, None]  # (B, T, K)
    layout = parallel.Layout(parallel.make_mesh({"data": 2, "tensor": 4}), "infer")

    def product(x, w):
        with parallel.use(layout):
            return few_rows_tpu.product(x, w, axes)

    assert gap(jax.jit(product)(x, w), linear._dequantized_product(x, w)) < ROUNDING


def test_other_products_are_left_to_xla():
    x, w = operands(2, 64, 512, 8)
    assert few_rows_tpu.takes(x, w, None)
    assert not few_rows_tpu.takes(x.astype(jnp.float32), w, None)
    assert not few_rows_tpu.takes(jnp.zeros((few_rows_tpu.MAX_ROWS + 1, 512), jnp.bfloat16), w, None)
    layout = parallel.Layout(parallel.make_mesh({"tensor": 8}), "infer")
    with parallel.use(layout):  # 64 inputs of each device are two groups of 32; 48 would be one and a half
        assert few_rows_tpu.takes(x, w, ("embed", "heads"))
        assert not few_rows_tpu.takes(*operands(2, 64, 384, 8), ("embed", "heads"))


@pytest.mark.parametrize(
    ("rows", "width", "bits", "outputs"),
    [
        (8, 14336, 8, 256),
        (128, 14336, 8, 256),
        (16, 28672, 8, 128),
        (128, 28672, 8, 0),
        (128, 28672, 4, 128),
        (128, 16384, 8, 128),
    ],
)
def test_blocks_fit_in_the_vector_memory(rows, width, bits, outputs):
    """Of 70B's widest matrix on one chip, the compiler refuses blocks of 256 outputs in 8 bits."""
    assert few_rows_tpu._block_outputs(rows, width, bits) == outputs


def test_every_finite_float16_has_its_value():
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16)
    found = np.asarray(quant.float16_of_bits(jnp.asarray(bits.view(np.int16))))
    finite = np.isfinite(values)
    assert np.array_equal(found[finite], values[finite].astype(np.float32))
