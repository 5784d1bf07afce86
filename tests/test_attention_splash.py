"""The splash kernel, interpreted on a CPU, against the plain attention; and where it is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import parallel
from llama_jax.ops.attention import splash, xla

# Of float32 sums in another order, beside the largest number of the result; the most seen is 1e-6.
ROUNDING = 5e-6
T, K, H = 384, 2, 64  # three blocks of 128 each way


def gap(a, b):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def packed(*rows):
    """Segments and positions of rows with documents of these lengths, and padding after them."""
    segments, positions = np.zeros((2, len(rows), T), np.int32)
    for row, lengths in enumerate(rows):
        at = 0
        for number, length in enumerate(lengths, start=1):
            segments[row, at : at + length] = number
            positions[row, at : at + length] = np.arange(length)
            at += length
    return jnp.asarray(segments), jnp.asarray(positions)


ROWS = {
    "one document": ([T], [T]),
    "packed": ([100, 28, 1, T - 129], [T - 5, 5]),
    "padded": ([130, 2, 60], [300]),
}


def plain(q, k, v, segments, positions):
    return xla.attention(
        q,
        k,
        v,
        q_positions_BT=positions,
        k_positions_BS=positions,
        q_segments_BT=segments,
        k_segments_BS=segments,
        aligned=True,
    )


def with_gradients(attend, q, k, v, cotangent):
    """The result and the gradients of q, k and v."""

    @jax.jit
    def run(q, k, v):
        out, back = jax.vjp(attend, q, k, v)
        return (out, *back(cotangent.astype(out.dtype)))

    return run(q, k, v)


def check(rows, N, *, tolerance=ROUNDING, dtype=jnp.float32):
    """Forward and backward of both; what padding sees is nobody's concern, and nothing comes back from it."""
    segments, positions = packed(*rows)
    B = len(rows)
    real = (segments > 0)[:, :, None, None]
    q, k, v, g = draw(1, B, T, N, H), draw(2, B, K, T, H), draw(3, B, K, T, H), draw(4, B, T, N, H) * real
    reference = functools.partial(plain, segments=segments, positions=positions)
    expected, *gradients = with_gradients(reference, q, k, v, g)
    kernel = functools.partial(splash.attention, segments_BT=segments, interpret=True)
    out, *ours = with_gradients(kernel, *(a.astype(dtype) for a in (q, k, v)), g)
    assert out.dtype == dtype and out.shape == q.shape
    assert gap(out * real, expected * real) < tolerance
    for name, a, b in zip("qkv", ours, gradients, strict=True):
        assert gap(a, b) < tolerance, name


@pytest.mark.parametrize("fused", [True, False], ids=["one backward kernel", "two"])
@pytest.mark.parametrize("rows", ROWS)
def test_the_kernel_equals_plain_attention(rows, fused, monkeypatch):
    monkeypatch.setattr(splash, "_MAX_FUSED", T if fused else 0)
    check(ROWS[rows], N=2 * K)


@pytest.mark.parametrize("N", [K, 4 * K])
def test_the_kernel_equals_plain_attention_for_any_group_of_heads(N):
    check(ROWS["padded"], N)


def test_in_bfloat16_the_kernel_differs_by_its_rounding_only():
    check(ROWS["packed"], 2 * K, tolerance=2e-2, dtype=jnp.bfloat16)  # bfloat16 has 8 bits: 4e-3 a rounding


def test_without_segments_a_row_is_one_document():
    q, k, v = draw(1, 1, T, 2 * K, H), draw(2, 1, K, T, H), draw(3, 1, K, T, H)
    segments, positions = packed([T])
    out = jax.jit(functools.partial(splash.attention, segments_BT=None, interpret=True))(q, k, v)
    assert gap(out, plain(q, k, v, segments, positions)) < ROUNDING


@pytest.mark.parametrize("sizes", [{"data": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}], ids=str)
def test_on_a_mesh_each_device_runs_the_kernel_on_its_rows_and_heads(sizes):
    layout = parallel.Layout(parallel.make_mesh(sizes), "train")
    with parallel.use(layout):
        check(4 * ROWS["padded"], N=2 * K)
