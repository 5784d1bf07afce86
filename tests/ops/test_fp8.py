"""Products of training with 8-bit operands: against numpy's rounding, on a mesh, and in training."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from helpers.numbers import gap
from helpers.runs import batches, make_run
from llama_jax import parallel
from llama_jax.errors import ConfigError
from llama_jax.ops import fp8, linear
from llama_jax.ops.lora import LoraTensor
from llama_jax.train import setup
from llama_jax.train.program import Program

ROUNDING = 2e-6  # float32 sums in another order, relative to the largest value


def rounded(x, dtype):
    """x with 8-bit mantissas and exponents, in float64: the rounding by ml_dtypes."""
    scale = np.abs(x).max() / float(ml_dtypes.finfo(dtype).max)
    return (np.asarray(x, np.float32) / np.float32(scale)).astype(dtype).astype(np.float64) * scale


@pytest.fixture
def operands():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 8, 512), (256, 512), (2, 8, 256))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def test_results_and_gradients_are_products_of_rounded_operands(operands):
    x, w, g = operands
    out, pullback = jax.vjp(lambda x, w: fp8.linear(x, w, None), x, w)
    x8, w8 = (rounded(np.asarray(a), ml_dtypes.float8_e4m3fn) for a in (x, w))
    g8 = rounded(np.asarray(g), ml_dtypes.float8_e5m2)
    dx, dw = pullback(g)
    assert gap(out, x8 @ w8.T) < ROUNDING
    assert gap(dx, g8 @ w8) < ROUNDING
    assert gap(dw, np.einsum("bto,bti->oi", g8, x8)) < ROUNDING
    assert 0.02 < float(jnp.linalg.norm(out - x @ w.T) / jnp.linalg.norm(out)) < 0.05  # 3 bits of mantissa: 2.6 % each


def test_the_results_on_a_mesh_are_those_of_one_device(operands):
    x, w, g = operands
    layout = parallel.Layout(parallel.make_mesh({"fsdp": 2, "context": 2, "tensor": 2}), "train")

    def both(x, w):
        with parallel.use(layout):
            out, pullback = jax.vjp(lambda x, w: fp8.linear(x, w, ("ffn", "embed")), x, w)
            return out, *pullback(g)

    out, pullback = jax.vjp(lambda x, w: fp8.linear(x, w, None), x, w)
    for found, wanted in zip(jax.jit(both)(x, w), (out, *pullback(g)), strict=True):
        assert gap(found, wanted) < ROUNDING


def test_numbers_that_are_not_finite_stay_so_and_zeros_stay_zero(operands):
    x, w, _ = operands
    assert not jnp.isfinite(fp8.linear(x.at[0, 0, 0].set(jnp.nan), w, None)).all()
    assert not jnp.isfinite(fp8.linear(x, w.at[0, 0].set(jnp.inf), None)).all()
    assert not fp8.linear(jnp.zeros_like(x), w, None).any()


def test_gradients_that_almost_vanish_are_no_nan(operands):
    x, w, g = operands
    for size in (1e-30, 1e-34, 1e-37):
        found = jax.vjp(lambda x, w: fp8.linear(x, w, None), x, w)[1](size * g.at[0, 0, 0].set(0))
        assert all(jnp.isfinite(a).all() for a in found)


def test_the_matrices_of_lora_are_not_rounded(operands):
    x, w, _ = operands
    rank = 256
    a, b = (jax.random.normal(jax.random.key(i), s) for i, s in ((5, (rank, 512)), (6, (256, rank))))
    updated = LoraTensor(jnp.zeros_like(w), a, b, jnp.ones(()))
    with fp8.products(True):
        assert gap(linear.linear(x, updated), x @ a.T @ b.T) < ROUNDING


def test_thin_and_unaligned_weights_are_not_rounded(operands):
    x, w, _ = operands
    with fp8.products(True):
        assert gap(linear.linear(x, w), fp8.linear(x, w, None)) == 0
        for other in (w[:64], w[:250]):
            assert gap(linear.linear(x, other), x @ other.T) < ROUNDING
    assert gap(linear.linear(x, w), x @ w.T) < ROUNDING


def test_training_rounds_and_evaluation_does_not(monkeypatch):
    monkeypatch.setattr(fp8, "_LEAST", 16)
    run = make_run(train__products="fp8", train__remat="full")
    plain = dataclasses.replace(run, train=dataclasses.replace(run.train, products="compute"))
    losses = {}
    for name, one in (("fp8", run), ("compute", plain)):
        program = Program.make(one, parallel.make_mesh({}, jax.devices()[:1]))
        state, losses[name] = setup.first_state(program), []
        for batch in batches(12):
            batch = jax.device_put(batch, program.batch_sharding)
            if not losses[name]:
                losses[f"{name} before"] = float(program.eval_step(state.params, None, batch)["loss"])
            state, metrics = program.train_step(state, None, batch)
            losses[name].append(float(metrics["loss"]))
        losses[f"{name} after"] = float(program.eval_step(state.params, None, batch)["loss"])
        with fp8.products(False):  # a traced step must not leave its rounding to a later one
            again = Program.make(plain, parallel.make_mesh({}, jax.devices()[:1])).eval_step(state.params, None, batch)
        assert losses[f"{name} after"] == float(again["loss"])
    assert losses["fp8 before"] == losses["compute before"]
    assert losses["fp8"][0] != losses["compute"][0]
    np.testing.assert_allclose(losses["fp8"], losses["compute"], rtol=0.02)
    assert losses["fp8"][-1] < losses["fp8"][0] - 0.5


@pytest.mark.parametrize(
    ("platform", "capability", "fits"), [("gpu", "9.0", True), ("gpu", "8.0", False), ("tpu", None, False)]
)
def test_devices_without_8_bit_products_are_refused(platform, capability, fits):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability, device_kind="the device")
    if capability is None:
        del device.compute_capability
    mesh = types.SimpleNamespace(devices=np.array([device]))
    if fits:
        parallel.check_fp8(mesh)
        return
    with pytest.raises(ConfigError, match="8.9 or above, and this is the device: set train.products=compute"):
        parallel.check_fp8(mesh)
