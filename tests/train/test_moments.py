"""Moments in few bits: their codes against numpy, Adam with them against optax's, and what rounding must not do."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax import parallel
from llama_jax.train import moments
from llama_jax.train.moments import Moment, pack_first, pack_second, scale_by_adam, unpack, zeros

# The values of all codes in a block with scale 1, in float64.
FIRST = np.sign(np.arange(-127, 128)) * (np.arange(-127, 128) / 127) ** 2
SECOND = (np.arange(256) / 255) ** 4


def spread(shape, seed=0):
    """Positive values of many magnitudes, like second moments: three in four within a factor of 1,000 of another."""
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(scale=3.0, size=shape)).astype(np.float32) * 1e-8


def scales_of(x, block):
    return np.abs(x).reshape(*x.shape[:-1], -1, block).max(-1)


def uniform(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 2**32, shape, dtype=np.uint32))


@pytest.mark.parametrize(
    ("shape", "block"),
    [((4, 256), 128), ((2, 3, 64), 64), ((2, 96), 32), ((2, 48), None), ((256,), None), ((2, 8, 16), None)],
)
def test_blocks_cut_the_last_axis_and_what_none_divides_is_float32(shape, block):
    assert moments.block_size(shape) == block
    stored = zeros(shape, "int8", second=True)
    assert stored.shape == shape and not unpack(stored).any()
    if block is None:
        assert stored.dtype == jnp.float32 and not isinstance(stored, Moment)
    else:
        assert stored.values.dtype == jnp.uint8 and stored.scales.shape == (*shape[:-1], shape[-1] // block)


def test_every_code_stands_for_its_power():
    like = zeros((2, 128), "int8", second=False)
    codes = np.concatenate([np.arange(-127, 128), [0]]).reshape(2, 128)
    stored = Moment(jnp.asarray(codes, jnp.int8), jnp.full(like.scales.shape, 3.0))
    np.testing.assert_allclose(np.ravel(unpack(stored))[:255], 3 * FIRST, rtol=1e-6)
    stored = Moment(jnp.arange(256, dtype=jnp.uint8).reshape(2, 128), jnp.full(like.scales.shape, 3.0))
    np.testing.assert_allclose(np.ravel(unpack(stored)), 3 * SECOND, rtol=1e-6)


@pytest.mark.parametrize("block", [128, 32])
def test_a_first_moment_is_the_nearest_root(block):
    """Nearest among the roots: the error of a number is at most what half a code makes."""
    x = np.sqrt(spread((5, 3 * block))) * np.random.default_rng(1).choice([-1, 1], (5, 3 * block))
    stored = jax.jit(pack_first)(x, zeros(x.shape, "int8", second=False))
    scales = scales_of(x, block)
    np.testing.assert_array_equal(stored.scales, scales)
    parts = x.reshape(5, 3, block).astype(np.float64) / scales[..., None]
    roots = np.sign(parts) * np.sqrt(np.abs(parts)) * 127
    codes = np.asarray(stored.values, np.float64).reshape(roots.shape)
    assert np.abs(codes - roots).max() < 0.5 + 1e-4
    numbers = FIRST[codes.astype(int) + 127] * scales[..., None]
    np.testing.assert_allclose(unpack(stored).reshape(roots.shape), numbers, rtol=1e-6)


def test_a_second_moment_is_one_of_its_two_neighbours_by_the_chance_it_is_given():
    x, random = spread((6, 256)), uniform((6, 256))
    stored = jax.jit(pack_second)(x, zeros(x.shape, "int8", second=True), random)
    parts = x.reshape(6, 2, 128).astype(np.float64) / scales_of(x, 128)[..., None]
    high = np.clip(np.searchsorted(SECOND, parts), 2, 255)
    fraction = (parts - SECOND[high - 1]) / (SECOND[high] - SECOND[high - 1])
    chance = np.asarray(random, np.float64).reshape(parts.shape) / 2**32
    expected = np.where(chance < fraction, high, high - 1)
    codes = np.asarray(stored.values, int).reshape(parts.shape)
    clear = np.abs(chance - fraction) > 1e-3  # float32 decides the others otherwise than float64
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(codes[clear], expected[clear])
    assert np.abs(codes - expected).max() <= 1


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_the_mean_of_a_rounded_second_moment_is_exact(kind):
    x = spread((1, 128), seed=3)
    if kind == "int8":  # what is below the first code is raised to it
        x = np.maximum(x, x.max() * SECOND[1])
    n = 4096
    like = zeros((n, 128), kind, second=True)
    packed = jax.jit(pack_second)(jnp.broadcast_to(x, like.shape), like, uniform(like.shape))
    draws = np.asarray(unpack(packed), np.float64)
    assert (draws.std(0) > 0).sum() > 100  # rounding does happen
    error = np.abs(draws.mean(0) - x[0]) / np.maximum(draws.std(0) / np.sqrt(n), 1e-6 * x[0])
    assert error.max() < 4.5  # standard errors, of 128


def test_a_second_moment_that_is_not_zero_never_becomes_zero():
    x = np.zeros((3, 128), np.float32)
    x[0] = 10.0 ** -np.arange(38).repeat(4)[:128]
    x[1, 5] = 1e-30
    for seed in range(20):
        numbers = unpack(pack_second(jnp.asarray(x), zeros(x.shape, "int8", second=True), uniform(x.shape, seed)))
        np.testing.assert_array_equal(np.asarray(numbers) > 0, x > 0)


@pytest.mark.parametrize("second", [False, True])
def test_packing_again_changes_nothing(second):
    x = spread((4, 256)) if second else spread((4, 256)) - spread((4, 256), seed=1)
    pack = functools.partial(pack_second, random=uniform(x.shape)) if second else pack_first
    once = pack(jnp.asarray(x), zeros(x.shape, "int8", second=second))
    twice = pack(unpack(once), once)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_second_moments_decay_though_a_step_is_less_than_half_of_what_the_bits_resolve(kind):
    """With b2 = 0.999 and gradients that fell to nothing, v is 0.999^t of what it was; to the nearest it would stay."""
    adam = scale_by_adam(b1=0.9, b2=0.999, eps=1e-8, kind=lambda path: kind)
    first = np.full((8, 128), 1e-3, np.float32)
    first[:, ::2] = 0.2e-3
    first[:, 0] = 0  # of the block's largest, whose scale is exact, and which therefore decays anyhow, another
    first[:, 1] = 2e-3

    @jax.jit
    def run(state):
        return jax.lax.scan(lambda s, _: (adam.update({"w": jnp.zeros((8, 128))}, s)[1], None), state, length=700)[0]

    state = adam.update({"w": jnp.asarray(first)}, adam.init({"w": jnp.asarray(first)}))[1]
    v = np.asarray(unpack(run(state).nu["w"]), np.float64)
    expected = 1e-3 * first.astype(np.float64) ** 2 * 0.999**700
    np.testing.assert_allclose(v[:, 2::2].mean(), expected[0, 2], rtol=0.06)
    np.testing.assert_allclose(v[:, 3::2].mean(), expected[0, 3], rtol=0.03)
    if kind == "bfloat16":
        nearest = jnp.asarray(1e-9, jnp.bfloat16)
        assert (nearest.astype(jnp.float32) * 0.999).astype(jnp.bfloat16) == nearest


def gradients(shape, steps, seed=0):
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(size=shape))
    return [jnp.asarray(rng.normal(size=shape) * size, jnp.float32) for _ in range(steps)]


def run_adam(adam, grads):
    state, updates = adam.init(grads[0]), []
    update = jax.jit(adam.update)
    for g in grads:
        u, state = update(g, state)
        updates.append(u)
    return updates, state


def apart(ours, theirs):
    """At each step, the root mean square of the difference as a part of that of the update."""
    return [float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))) for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize(("kind", "bound"), [("float32", 1e-6), ("bfloat16", 0.008), ("int8", 0.1)])
@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_updates_follow_optax_adam(kind, bound, b2):
    """Gradients with zero mean, whose first moments are smallest relative to their rounding.

    The errors grow for 100 steps, to 0.5 and 0.7 % for bfloat16 and to 7 and 9 % for 8 bits; the first step is exact.
    """
    grads = gradients((16, 256), 100)
    ours, state = run_adam(scale_by_adam(b1=0.9, b2=b2, eps=1e-8, kind=lambda path: kind), grads)
    theirs, reference = run_adam(optax.scale_by_adam(b1=0.9, b2=b2, eps=1e-8), grads)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    assert max(apart(ours, theirs)) < bound
    assert int(state.count) == int(reference.count) == 100
    assert kind == "float32" or apart(ours, theirs)[-1] > 1e-3  # few bits were indeed used
    if kind == "int8":
        assert (state.mu.values.dtype, state.nu.values.dtype) == (jnp.int8, jnp.uint8)


def papers_table(signed):
    """Dettmers et al., section 1.3: a decimal exponent in unary, then equal steps; the middles of them."""
    numbers = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2 ** (i + (not signed)) + 1)
        numbers += list(10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2)
    return np.sort(numbers + [-n for n in numbers[2:]] if signed else numbers)


def through_table(x, table):
    blocks = x.reshape(-1, 128)
    largest = np.abs(blocks).max(1, keepdims=True)
    return (table[np.searchsorted((table[:-1] + table[1:]) / 2, blocks / largest)] * largest).reshape(x.shape)


def test_updates_are_closer_to_float32_than_by_the_papers_table():
    grads = gradients((16, 256), 60)
    exact, _ = run_adam(optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8), grads)
    ours, _ = run_adam(scale_by_adam(b1=0.9, b2=0.95, eps=1e-8, kind=lambda path: "int8"), grads)
    m, v, papers = np.zeros((16, 256)), np.zeros((16, 256)), []
    for t, g in enumerate(np.asarray(grads, np.float64), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        papers.append(m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8))
        m, v = through_table(m, papers_table(True)), through_table(v, papers_table(False))
    assert apart(papers, exact)[0] < 1e-5
    assert np.mean(apart(ours, exact)[10:]) < 0.95 * np.mean(apart(papers, exact)[10:])


def test_kinds_go_by_path():
    grads = {"w": jnp.ones((2, 128)), "norm": jnp.ones((2, 128))}
    adam = scale_by_adam(b1=0.9, b2=0.9, eps=1e-8, kind=lambda p: "float32" if p[-1].key == "norm" else "int8")
    state = adam.update(grads, adam.init(grads))[1]
    assert isinstance(state.mu["w"], Moment) and isinstance(state.nu["w"], Moment)
    assert state.mu["norm"].dtype == state.nu["norm"].dtype == jnp.float32


def test_stacked_layers_move_as_they_would_alone():
    """To rounding: which way a second moment is rounded differs from layer to layer."""
    stacked = gradients((3, 8, 256), 2)
    adam = scale_by_adam(b1=0.9, b2=0.999, eps=1e-8, kind=lambda path: "int8")
    (first, together), state = run_adam(adam, stacked)
    for i in range(3):
        (alone_first, alone), single = run_adam(adam, [g[i] for g in stacked])
        np.testing.assert_allclose(first[i], alone_first, rtol=1e-6)
        np.testing.assert_array_equal(state.mu.values[i], single.mu.values)
        assert np.abs(state.nu.values[i].astype(int) - single.nu.values.astype(int)).max() <= 2
        assert np.sqrt(np.mean((together[i] - alone) ** 2) / np.mean(alone**2)) < 0.03
    assert len({np.asarray(v).tobytes() for v in state.nu.values}) == 3


def test_stages_update_their_own_layers_without_gathering_those_of_others():
    layout = parallel.Layout(parallel.make_mesh({"fsdp": 2, "stage": 4}), "train")
    adam = scale_by_adam(b1=0.9, b2=0.95, eps=1e-8, kind=lambda path: "int8")
    grads = gradients((8, 16, 256), 3)
    (_, plain), expected = run_adam(adam, grads[:2])

    def update(grad, state):
        with parallel.use(layout):
            return adam.update(grad, state)

    sharding = layout.sharding(("layers", "heads", "embed"))
    state = adam.init(grads[0])
    shardings = jax.tree.map(lambda a: sharding if a.ndim else parallel.replicated(layout.mesh), state)
    step = jax.jit(update, in_shardings=(sharding, shardings), out_shardings=(sharding, shardings))
    assert not re.search(r"all-(gather|reduce|to-all)", step.lower(grads[0], state).compile().as_text())
    for grad in grads[:2]:
        found, state = step(grad, state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)  # the codes are equal
    np.testing.assert_allclose(found, plain, rtol=1e-5)


def test_random_numbers_are_even_and_others_for_each_seed():
    draws = [moments._random((64, 4, 256), jnp.uint32(seed)) for seed in (0, 1, 0x9E3779B9, 0xFFFFFFFF)]
    floats = [np.asarray(d, np.float64).ravel() / 2**32 for d in draws]
    for i, a in enumerate(floats):
        counts = np.histogram(a, 256, (0, 1))[0]
        assert ((counts - 256) ** 2 / 256).sum() < 256 + 5 * np.sqrt(2 * 256)  # chi squared
        assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.02
        for b in floats[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
