"""LoRA as a leaf: products, gradients, scans, meshes and samplers are those of the merged weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from golden.make_model import random_tokens
from helpers.numbers import gap
from helpers.quantized import CONFIG, quantized_params, random_quantized
from llama_jax import model, parallel
from llama_jax.infer.llama import Llama
from llama_jax.ops import linear
from llama_jax.ops.lora import LoraTensor, LoraWeights, dora_factor
from llama_jax.params import init_params, logical_axes, stack, unstack

ROUNDING = 1e-5
RANK = 3
MESH = {"tensor": 4, "data": 2}
TOKENS = random_tokens(CONFIG, rows=2, length=9)


def random_lora(base, seed=0, rank=RANK):
    """A LoraTensor around a base (..., out, in)."""
    rng = np.random.default_rng(seed)
    *lead, out, inner = base.shape
    a = rng.standard_normal((*lead, rank, inner)) / inner**0.5
    b = rng.standard_normal((*lead, out, rank))
    scale = rng.random(tuple(lead)) / 2 + 0.5
    return LoraTensor(base, *(jnp.asarray(part, jnp.float32) for part in (a, b, scale)))


def bases(shape):
    """One base of each kind with its dequantized values, by name."""
    dense = jnp.asarray(np.random.default_rng(5).standard_normal(shape), jnp.float32)
    return {"dense": (dense, dense)} | {f"q{bits}": random_quantized(shape, bits) for bits in (8, 4)}


def by_hand(w, numbers):
    update = np.asarray(w.b, np.float64) @ np.asarray(w.a, np.float64)
    return numbers + np.asarray(w.scale, np.float64)[..., None, None] * update


def with_lora(params, *, stacked):
    """Every matrix but the embedding with an update."""
    paths, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    leaves = []
    for seed, (path, leaf) in enumerate(paths):
        name = jax.tree_util.keystr(path)
        matrix = "scale" not in name and name != "['embed']"
        leaves.append(random_lora(leaf, seed) if matrix else leaf)
    return tree.unflatten(leaves)


def merged(params):
    is_lora = lambda leaf: isinstance(leaf, LoraTensor)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.merged(jnp.float32) if is_lora(leaf) else leaf, params, is_leaf=is_lora)


@pytest.mark.parametrize("kind", ["dense", "q8", "q4"])
def test_products_and_merged_weights_are_those_of_the_formula(kind):
    base, numbers = bases((512, 64))[kind]
    w = random_lora(base)
    assert (w.shape, w.dtype, w.rank) == ((512, 64), jnp.float32, RANK)
    exact = by_hand(w, np.asarray(numbers, np.float64))
    assert gap(w.merged(jnp.float32), exact) < ROUNDING
    for rows in (1, 20):
        x = np.random.default_rng(1).standard_normal((2, rows, 64)).astype(np.float32)
        for product in (linear.linear, linear.linear_f32):
            result = jax.jit(product)(x, w)
            assert result.dtype == jnp.float32 and gap(result, x @ exact.T) < ROUNDING
        half = jax.jit(linear.linear)(x.astype(jnp.bfloat16), w)
        assert half.dtype == jnp.bfloat16 and gap(half, x @ exact.T) < 2e-2


@pytest.mark.parametrize("kind", ["dense", "q8", "q4"])
def test_gradients_reach_a_and_b_and_the_activations_but_not_the_scale(kind):
    base, numbers = bases((512, 64))[kind]
    w = random_lora(base)
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)

    def loss(x, a, b, scale):
        return (linear.linear(x, LoraTensor(base, a, b, scale)) ** 2).sum()

    def dense_loss(x, a, b):
        return ((x @ (jnp.asarray(numbers, jnp.float32) + w.scale * b @ a).T) ** 2).sum()

    got = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(x, w.a, w.b, w.scale)
    for mine, dense in zip(got, jax.grad(dense_loss, argnums=(0, 1, 2))(x, w.a, w.b), strict=False):
        assert gap(mine, dense) < ROUNDING
    assert got[3] == 0


@pytest.mark.parametrize("kind", ["dense", "q8", "q4"])
def test_rows_looked_up_are_those_of_the_merged_weight(kind):
    base, numbers = bases((512, 64))[kind]
    w, ids = random_lora(base), jnp.array([[3, 511, 3]])
    exact = by_hand(w, np.asarray(numbers, np.float64))
    assert gap(jax.jit(linear.embed, static_argnums=2)(w, ids, jnp.float32), exact[np.asarray(ids)]) < ROUNDING
    assert np.isnan(linear.embed(w, jnp.array([512]), jnp.float32)).all()


@pytest.mark.parametrize("kind", ["dense", "q8"])
def test_doras_factors_make_the_norms_of_rows_or_columns_their_magnitudes(kind):
    base, numbers = bases((512, 64))[kind]
    w = random_lora(base)
    total = by_hand(w, np.asarray(numbers, np.float64))
    rng = np.random.default_rng(3)
    for shape, axis in (((512, 1), 1), ((1, 64), 0)):
        magnitude = rng.random(shape).astype(np.float32) + 0.5
        factor = dora_factor(base, LoraWeights(w.a, w.b, w.scale, jnp.asarray(magnitude)))
        exact = magnitude * total / np.linalg.norm(total, axis=axis, keepdims=True)
        dora = dataclasses.replace(w, factor=factor)
        assert gap(dora.merged(jnp.float32), exact) < ROUNDING
        assert dora.part_axes(("vocab", "embed"))["factor"] == (("vocab", None) if axis else (None, "embed"))
        if axis:
            x = rng.standard_normal((2, 3, 64)).astype(np.float32)
            for product in (linear.linear, linear.linear_f32):
                assert gap(jax.jit(product)(x, dora), x @ exact.T) < ROUNDING
        else:
            assert gap(linear.embed(dora, jnp.array([1, 9]), jnp.float32), exact[[1, 9]]) < ROUNDING


def test_a_scan_over_stacked_layers_gives_the_loss_and_gradients_of_the_merged_model():
    params = with_lora(init_params(CONFIG, jax.random.key(0)), stacked=True)
    assert params["layers"]["ffn"]["up"].a.shape == (CONFIG.num_layers, RANK, CONFIG.embed_dim)
    positions = np.broadcast_to(np.arange(9), TOKENS.shape)
    is_lora = lambda leaf: isinstance(leaf, LoraTensor)  # noqa: E731
    leaves, tree = jax.tree.flatten(params, is_leaf=is_lora)
    thin = [(leaf.a, leaf.b) if is_lora(leaf) else None for leaf in leaves]

    def loss(thin, merge):
        pairs = zip(leaves, thin, strict=True)
        adapted = [leaf if ab is None else LoraTensor(leaf.base, *ab, leaf.scale) for leaf, ab in pairs]
        adapted = tree.unflatten(adapted)
        adapted = merged(adapted) if merge else adapted
        hidden, _ = model.forward(CONFIG, adapted, TOKENS, positions, None, remat="full")
        return (model.unembed(CONFIG, adapted, hidden) ** 2).mean()

    (ours, slopes), (theirs, expected) = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(thin, m) for m in (0, 1))
    assert gap(ours, theirs) < ROUNDING
    jax.tree.map(lambda a, b: np.testing.assert_array_less(gap(a, b), 1e-4), slopes, expected)


@pytest.mark.parametrize("sizes, bits", [(None, 4), (MESH, None), (MESH, 8)], ids=str)
def test_a_model_with_lora_is_the_merged_model_on_any_mesh(sizes, bits):
    if bits is None:
        base = dense = unstack(init_params(CONFIG, jax.random.key(0)))
    else:
        base, dense = quantized_params(bits)
    params, plain = with_lora(base, stacked=False), merged(with_lora(dense, stacked=False))
    mesh = None if sizes is None else parallel.make_mesh(sizes)
    a, b = Llama(CONFIG, params, mesh=mesh, dtype="float32"), Llama(CONFIG, plain, dtype="float32")
    assert gap(a.logits(TOKENS), b.logits(TOKENS)) < 3 * ROUNDING
    prompts = [row[:5].tolist() for row in TOKENS]
    options = {"temperature": 0.0, "max_new_tokens": 6}
    assert [r.tokens for r in a.generate(prompts, **options)] == [r.tokens for r in b.generate(prompts, **options)]
    if mesh is not None:
        q, o = (a.params["layers"][0]["attention"][name] for name in ("q", "o"))
        axis = mesh.axis_names[-1]
        specs = [part.sharding.spec for part in (q.a, q.b, q.scale, o.a, o.b)]
        assert specs == [P(None, None), P(axis, None), P(), P(None, axis), P(None, None)]


def test_lora_weights_stack_and_unstack_and_stay_on_their_mesh():
    layout = parallel.Layout(parallel.make_mesh({"fsdp": 4, "tensor": 2}), "train")
    stacked = with_lora(init_params(CONFIG, jax.random.key(0)), stacked=True)
    places = parallel.shardings(layout, logical_axes(CONFIG, stacked=True), stacked)
    stacked = jax.device_put(stacked, places)
    up = stacked["layers"]["ffn"]["up"]
    specs = [part.sharding.spec for part in (up.a, up.b, up.scale)]
    assert specs == [P(None, None, "fsdp"), P(None, "tensor", None), P(None)]
    again = stack(unstack(stacked))
    jax.tree.map(np.testing.assert_array_equal, again, stacked)
    assert jax.tree.map(lambda a: a.sharding.spec, again) == jax.tree.map(lambda a: a.sharding.spec, stacked)
