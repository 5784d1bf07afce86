"""The chunked cross-entropy against log_softmax of the whole logits, on one device and with a split vocabulary.

Differences are the largest one, relative to the largest number compared.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.numbers import gap
from llama_jax import parallel
from llama_jax.ops.loss import cross_entropy

B, T, D = 4, 6, 16
ROUNDING = 2e-6  # of float32 sums in another order; measured below 5e-7
BFLOAT16 = 2e-2  # two roundings of 2^-8: of the operands (equal in both) and of the logits' gradient


def inputs(V, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(V), 4)
    hidden = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
    table = jax.random.normal(keys[1], (V, D))
    targets = jax.random.randint(keys[2], (B, T), 0, V).at[0, 0].set(0).at[0, 1].set(V - 1)
    weights = (jax.random.uniform(keys[3], (B, T)) > 0.3).astype(jnp.float32)
    return hidden, table, targets, weights


def reference(hidden, table, targets):
    logits = jnp.einsum("btd,vd->btv", hidden, table.astype(hidden.dtype), precision="highest").astype(jnp.float32)
    if hidden.dtype == jnp.bfloat16:  # summed in float32, as the doc says
        logits = jnp.einsum("btd,vd->btv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return nll, jax.nn.logsumexp(logits, axis=-1)


def objective(function, hidden, table, targets, weights, z_loss):
    """A loss in which both results take part, and its gradients."""
    nll, lse = function(hidden, table, targets)
    return jnp.sum(weights * (nll + z_loss * lse**2)), (nll, lse)


@functools.partial(jax.jit, static_argnums=(0,))
def both(function, hidden, table, targets, weights, z_loss):
    run = functools.partial(objective, function)
    (_, values), grads = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(hidden, table, targets, weights, z_loss)
    return (*values, *grads)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(("V", "chunk"), [(37, 0), (37, 1), (37, 5), (37, 36), (37, 37), (37, 100), (64, 16), (10, 6)])
def test_any_chunk_gives_the_values_and_gradients_of_log_softmax(V, chunk, z_loss):
    given = inputs(V)
    ours = both(functools.partial(cross_entropy, vocab_chunk=chunk), *given, z_loss)
    for a, b in zip(ours, both(reference, *given, z_loss), strict=True):
        assert a.dtype == b.dtype
        assert gap(a, b) < ROUNDING


@pytest.mark.parametrize("chunk", [0, 5])
def test_bfloat16_hidden_states_keep_float32_losses_and_table_gradients(chunk):
    given = inputs(37, jnp.bfloat16)
    nll, lse, d_hidden, d_table = both(functools.partial(cross_entropy, vocab_chunk=chunk), *given, 1e-2)
    assert (nll.dtype, lse.dtype, d_hidden.dtype, d_table.dtype) == (
        jnp.float32,
        jnp.float32,
        jnp.bfloat16,
        jnp.float32,
    )
    expected = both(reference, *given, 1e-2)
    assert gap(nll, expected[0]) < ROUNDING and gap(lse, expected[1]) < ROUNDING
    assert gap(d_hidden, expected[2]) < BFLOAT16 and gap(d_table, expected[3]) < BFLOAT16


def test_logits_far_apart_neither_overflow_nor_vanish():
    hidden, table, targets, weights = inputs(37)
    given = (300.0 * hidden, table, targets, weights)
    ours = both(functools.partial(cross_entropy, vocab_chunk=4), *given, 0.0)
    # Logits of up to 5,000 are rounded to 2^-11 in float32, and their exponentials carry that.
    for a, b in zip(ours, both(reference, *given, 0.0), strict=True):
        assert gap(a, b) < 2e-4


def test_gradients_agree_with_finite_differences():
    """Another source than autodiff: the directional derivative, by central differences in float64 of numpy."""
    hidden, table, targets, weights = (np.asarray(a, np.float64) for a in inputs(11))
    targets = targets.astype(int)

    def loss(hidden, table):
        logits = hidden @ table.T
        lse = np.log(np.exp(logits).sum(-1))
        nll = lse - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return (weights * (nll + 0.01 * lse**2)).sum()

    rng = np.random.default_rng(0)
    dx, dw = rng.normal(size=hidden.shape), rng.normal(size=table.shape)
    slope = (loss(hidden + 1e-5 * dx, table + 1e-5 * dw) - loss(hidden - 1e-5 * dx, table - 1e-5 * dw)) / 2e-5
    *_, gx, gw = both(functools.partial(cross_entropy, vocab_chunk=3), *inputs(11), 0.01)
    assert abs((gx * dx).sum() + (gw * dw).sum() - slope) < 1e-5 * abs(slope)


@pytest.mark.parametrize("mesh", [{"tensor": 8}, {"tensor": 4, "fsdp": 2}, {"fsdp": 4, "context": 2}])
@pytest.mark.parametrize(("V", "chunk"), [(64, 0), (64, 3), (36, 2), (37, 4)])
def test_a_split_vocabulary_gives_the_same_numbers(mesh, V, chunk):
    """37 rows are divisible by no mesh axis, and are then replicated."""
    layout = parallel.Layout(parallel.make_mesh(mesh), "train")

    def ours(hidden, table, targets):
        with parallel.use(layout):
            return cross_entropy(hidden, table, targets, vocab_chunk=chunk)

    hidden, table, targets, weights = inputs(V)
    put = lambda a, *axes: jax.device_put(a, layout.sharding(axes, a.shape))  # noqa: E731
    placed = (
        put(hidden, "batch", "length", "act_embed"),
        put(table, "vocab", "embed"),
        put(targets, "batch", "length"),
        put(weights, "batch", "length"),
    )
    expected = both(reference, hidden, table, targets, weights, 1e-2)
    for a, b in zip(both(ours, *placed, 1e-2), expected, strict=True):
        assert gap(a, b) < ROUNDING


def scratch(V, chunk, mesh=None):
    """Bytes of scratch memory that a device needs for the loss and its gradients."""
    rows, length, width = 8, 64, 32
    layout = parallel.Layout(parallel.make_mesh(mesh or {}, jax.devices()[: 8 if mesh else 1]), "train")

    def loss(hidden, table, targets):
        with parallel.use(layout):
            nll, lse = cross_entropy(hidden, table, targets, vocab_chunk=chunk)
            return nll.sum() + 1e-4 * (lse**2).sum()

    axes = (("batch", "length", "act_embed"), ("vocab", "embed"), ("batch", "length"))
    shapes = ((rows, length, width), (V, width), (rows, length))
    places = [layout.sharding(a, s) for a, s in zip(axes, shapes, strict=True)]
    dtypes = (jnp.float32, jnp.float32, jnp.int32)
    given = [jax.ShapeDtypeStruct(s, d, sharding=p) for s, d, p in zip(shapes, dtypes, places, strict=True)]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=tuple(places[:2])).lower(*given).compile()
    return compiled.memory_analysis().temp_size_in_bytes, rows * length * V * 4


def test_the_full_logits_never_exist_where_they_are_chunked():
    whole, logits = scratch(8192, 0)
    chunked, _ = scratch(8192, 512)
    assert whole >= logits  # 16 MiB, which shows that the measure sees them
    # The table and its gradient are 1 MiB each; a piece of logits is 1 MiB.
    assert chunked < logits / 2, f"{chunked / logits:.2f} of the logits"


def test_no_device_holds_the_logits_of_its_rows_where_the_vocabulary_is_split_and_chunked():
    mesh = {"tensor": 4, "data": 2}
    whole, logits = scratch(8192, 0, mesh)
    chunked, _ = scratch(8192, 128, mesh)
    assert whole >= logits / 8  # a device's part of rows and vocabulary
    assert chunked < logits / 16, f"{chunked / logits:.3f} of the logits"
