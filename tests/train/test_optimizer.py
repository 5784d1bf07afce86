"""Each optimizer against its restatement in numpy, groups, and where states lie."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from llama_jax import model, parallel
from llama_jax.config import SIZES
from llama_jax.errors import ConfigError
from llama_jax.params import abstract_params, init_params, logical_axes
from llama_jax.run_keys import GROUPS, OptimizerConfig
from llama_jax.train.moments import Moment
from llama_jax.train.optimizer import (
    decay_mask,
    group_norms,
    group_of,
    make_optimizer,
    opt_shardings,
)

TINY = SIZES["tiny"]
TINY_AXES = logical_axes(TINY, stacked=True)
CHOICES = [
    ("adamw", "float32"),
    ("adamw", "bfloat16"),
    ("adamw", "int8"),
    ("adafactor", "float32"),
    ("lion", "float32"),
    ("lion", "bfloat16"),
    ("muon", "float32"),
    ("muon", "bfloat16"),
]

# A tree of weights of every kind, with sides that int8 cuts into blocks and Adafactor factors; `q` is square.
AXES = {
    "embed": ("vocab", "embed"),
    "layers": {
        "attention": {"q": ("layers", "heads", "embed"), "k": ("layers", "kv_heads", "embed")},
        "ffn": {"down": ("layers", "embed", "ffn")},
        "ffn_norm": {"scale": ("layers", "norm")},
    },
    "norm": {"scale": ("norm",)},
    "unembed": ("vocab", "embed"),
}
SHAPES = {
    "embed": (144, 128),
    "layers": {
        "attention": {"q": (3, 128, 128), "k": (3, 64, 128)},
        "ffn": {"down": (3, 128, 256)},
        "ffn_norm": {"scale": (3, 128)},
    },
    "norm": {"scale": (128,)},
    "unembed": (144, 128),
}
LORA_AXES = {
    "layers": {
        "attention": {"q": {"a": ("layers", None, "embed"), "b": ("layers", "heads", None)}},
        "ffn": {"down": {"a": ("layers", None, "ffn"), "b": ("layers", "embed", None)}},
    }
}


@functools.cache
def tiny_params():
    return jax.jit(init_params, static_argnums=0)(TINY, jax.random.key(0))


def test_only_matrices_decay():
    params = tiny_params()
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=0.5, weight_decay=0.1, warmup_steps=0), TINY_AXES, steps=10
    )

    @jax.jit
    def step_without_gradient(params):
        zero = jax.tree.map(jnp.zeros_like, params)
        return optax.apply_updates(params, optimizer.update(zero, optimizer.init(params), params)[0])

    moved = jax.device_get(step_without_gradient(params))
    decayed = {}
    for (path, new), old in zip(jax.tree.leaves_with_path(moved), jax.tree.leaves(params), strict=True):
        decayed[jax.tree_util.keystr(path)] = factor = float(np.max(np.abs(new / np.asarray(old) - 1)))
        assert factor < 1e-7 or abs(factor - 0.05) < 1e-6
    kept = {name for name, factor in decayed.items() if factor < 1e-7}
    assert kept == {name for name in decayed if "norm" in name}
    assert len(kept) == 3 and len(decayed) == 12


def test_the_mask_is_of_ranks_apart_from_the_layer_axis():
    shapes = abstract_params(TINY, stacked=True)
    ranks = jax.tree.map(lambda leaf: leaf.ndim, shapes)
    ranks["layers"] = jax.tree.map(lambda n: n - 1, ranks["layers"])
    assert decay_mask(TINY_AXES) == jax.tree.map(lambda n: n == 2, ranks)


def numpy_adamw(params, gradients, config, mask):
    """Loshchilov and Hutter, algorithm 2, with clipping by global norm, in float64."""
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(p) for k, p in params.items()}
    for t, grads in enumerate(gradients, start=1):
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        clip = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        for k, g in grads.items():
            m[k] = config.b1 * m[k] + (1 - config.b1) * clip * g
            v[k] = config.b2 * v[k] + (1 - config.b2) * (clip * g) ** 2
            m_hat, v_hat = m[k] / (1 - config.b1**t), v[k] / (1 - config.b2**t)
            decay = config.weight_decay * params[k] if mask[k] else 0.0
            params[k] = params[k] - config.learning_rate * (m_hat / (np.sqrt(v_hat) + config.eps) + decay)
    return params


@pytest.mark.parametrize("clip", [0.0, 1.0, 1e6])
def test_five_steps_equal_adamw_in_numpy(clip):
    config = OptimizerConfig(
        learning_rate=0.01, warmup_steps=0, schedule="constant", eps=1e-3, weight_decay=0.3, clip_norm=clip
    )
    optimizer = make_optimizer(config, TINY_AXES, steps=5)
    params = tiny_params()
    leaves, tree = jax.tree.flatten(params)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    rng = np.random.default_rng(0)
    gradients = [[rng.normal(size=leaf.shape) * 10.0**-i for leaf in leaves] for i in range(5)]
    expected = numpy_adamw(
        {n: np.asarray(leaf, np.float64) for n, leaf in zip(names, leaves, strict=True)},
        [dict(zip(names, g, strict=True)) for g in gradients],
        config,
        dict(zip(names, jax.tree.leaves(decay_mask(TINY_AXES)), strict=True)),
    )

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for g in gradients:
        params, state = update(params, state, jax.tree.unflatten(tree, [jnp.asarray(a, jnp.float32) for a in g]))
    for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, expected[name], atol=2e-6)


def test_clipping_keeps_the_direction_and_bounds_the_norm():
    """Seen through the first moment, which is linear in the clipped gradient."""
    optimizer = make_optimizer(OptimizerConfig(clip_norm=0.5, b1=0.0), TINY_AXES, steps=5)
    params = tiny_params()
    grads = jax.tree.map(lambda a: jnp.ones_like(a), params)
    _, state = jax.jit(lambda params: optimizer.update(grads, optimizer.init(params), params))(params)
    moment = jax.device_get(state[1].mu)
    assert math.isclose(float(optax.global_norm(moment)), 0.5, rel_tol=1e-4)
    values = {float(v) for leaf in jax.tree.leaves(moment) for v in (leaf.min(), leaf.max())}
    assert max(values) - min(values) < 1e-9


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def plain(**changes):
    """A config whose update is the optimizer's own: no clipping, no decay, a rate of 1."""
    given = {"learning_rate": 1.0, "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.0, "clip_norm": 0.0}
    return OptimizerConfig(**(given | changes))


@functools.cache
def jitted(config, lora):
    optimizer = make_optimizer(config, LORA_AXES if lora else AXES, steps=10)
    return jax.jit(optimizer.init), jax.jit(optimizer.update)


def updates_of(config, params, gradients, axes=AXES):
    """The updates of each step in turn, and the state after them; params stay."""
    init, update = jitted(config, axes is LORA_AXES)
    state, found = init(params), []
    for grads in gradients:
        updates, state = update(grads, state, params)
        found.append(jax.device_get(updates))
    return found, state


def test_three_steps_equal_lion_in_numpy():
    """Chen et al., arXiv:2302.06675, algorithm 2: the sign of a mixture, then the momentum by another."""
    params, gradients = random_tree(0), [random_tree(i, 0.1**i) for i in (1, 2, 3)]
    config = plain(name="lion", b1=0.9, b2=0.99, weight_decay=0.3, learning_rate=0.5)
    found, _ = updates_of(config, params, gradients)
    moments = [np.zeros(p.shape) for p in jax.tree.leaves(params)]
    mask = jax.tree.leaves(decay_mask(AXES))
    for updates, grads in zip(found, gradients, strict=True):
        for i, (u, g, p) in enumerate(zip(*map(jax.tree.leaves, (updates, grads, params)), strict=True)):
            mixed = 0.9 * moments[i] + 0.1 * np.asarray(g, np.float64)
            moments[i] = 0.99 * moments[i] + 0.01 * np.asarray(g, np.float64)
            np.testing.assert_allclose(u, -0.5 * (np.sign(mixed) + 0.3 * mask[i] * p), atol=1e-6)


def numpy_adafactor(gradients):
    """Shazeer and Stern, arXiv:1804.04235: algorithm 4 (5 for vectors) with section 7.2's decay, without alpha."""
    rows = columns = whole = 0.0
    for t, g in enumerate(gradients, start=1):
        beta = 1 - t**-0.8
        squares = g**2 + 1e-30
        if g.ndim == 2 and min(g.shape) >= 128:
            rows = beta * rows + (1 - beta) * squares.mean(1)
            columns = beta * columns + (1 - beta) * squares.mean(0)
            v = np.outer(rows, columns) / rows.mean()
        else:
            v = whole = beta * whole + (1 - beta) * squares
        u = g / np.sqrt(v)
        yield -u / max(1.0, np.sqrt((u**2).mean()))


def test_three_steps_equal_adafactor_in_numpy_layer_by_layer():
    """Gradients that grow, so that the limit on an update's size is met, and by layers of other sizes."""
    gradients = [random_tree(i, 3.0**i) for i in (1, 2, 3)]
    for grads in gradients:
        grads["layers"] = jax.tree.map(lambda g: g.at[1].multiply(1e-3).at[2].multiply(jnp.sign(g[0])), grads["layers"])
    found, _ = updates_of(plain(name="adafactor"), random_tree(0), gradients)
    for path, _ in jax.tree.leaves_with_path(AXES, is_leaf=lambda x: isinstance(x, tuple)):
        at = lambda tree, path=path: functools.reduce(lambda t, k: t[k.key], path, tree)  # noqa: E731
        layers = range(3) if path[0].key == "layers" else [...]
        for layer in layers:
            expected = numpy_adafactor([np.asarray(at(g)[layer], np.float64) for g in gradients])
            for updates, e in zip(found, expected, strict=True):
                np.testing.assert_allclose(at(updates)[layer], e, rtol=2e-4, atol=1e-5)


def newton_schulz(x):
    """Jordan's five steps of a quintic, in float64 (kellerjordan.github.io/posts/muon)."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


MATRICES = [("attention", "q"), ("attention", "k"), ("ffn", "down")]


def test_muon_is_five_steps_of_newton_schulz_on_each_layers_momentum():
    gradients = [random_tree(i, 0.1**i) for i in (1, 2)]
    found, _ = updates_of(plain(name="muon"), random_tree(0), gradients)
    for part, name in MATRICES:
        for layer in range(3):
            g1, g2 = (np.asarray(g["layers"][part][name][layer], np.float64) for g in gradients)
            m2 = 0.9 * 0.1 * g1 + 0.1 * g2
            looked_ahead = 0.9 * m2 / (1 - 0.9**3) + 0.1 * g2 / (1 - 0.9**2)
            for updates, momentum in ((found[0], g1), (found[1], looked_ahead)):
                expected = -0.2 * math.sqrt(max(momentum.shape)) * newton_schulz(momentum)
                np.testing.assert_allclose(updates["layers"][part][name][layer], expected, atol=2e-4)


def test_muons_updates_are_nearly_the_orthogonal_factor():
    """U V^T of the singular value decomposition, but that its ones are what the quintic makes of them: 0.68 to 1.21."""
    gradients = [random_tree(1)]
    [updates], _ = updates_of(plain(name="muon"), random_tree(0), gradients)
    for part, name in MATRICES:
        for layer in range(3):
            g = np.asarray(gradients[0]["layers"][part][name][layer], np.float64)
            u, s, vt = np.linalg.svd(g, full_matrices=False)
            middle = u.T @ (-updates["layers"][part][name][layer] / (0.2 * math.sqrt(max(g.shape)))) @ vt.T
            sure = s / np.linalg.norm(s) > 0.01  # smaller ones would need more steps
            assert sure.mean() > 0.85
            ones = np.diag(middle)[sure]
            assert 0.68 < ones.min() and ones.max() < 1.21
            assert np.abs(middle - np.diag(np.diag(middle))).max() < 1e-4


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_a_layers_update_depends_on_no_other_layer(name):
    gradients = [random_tree(1), random_tree(2)]
    changed = jax.tree.map(jnp.copy, gradients)
    for grads in changed:
        grads["layers"] = jax.tree.map(lambda g: g.at[1].multiply(jnp.flip(g[0]) * 100), grads["layers"])
    config = plain(name=name)
    (*_, one), _ = updates_of(config, random_tree(0), gradients)
    (*_, other), _ = updates_of(config, random_tree(0), changed)
    for a, b in zip(jax.tree.leaves(one["layers"]), jax.tree.leaves(other["layers"]), strict=True):
        np.testing.assert_allclose(a[[0, 2]], b[[0, 2]], rtol=1e-6, atol=1e-7)
        assert np.abs(a[1] - b[1]).max() > 1e-3


def test_what_is_no_layers_matrix_goes_to_adam_under_muon():
    gradients = [random_tree(1), random_tree(2)]
    muon, _ = updates_of(plain(name="muon"), random_tree(0), gradients)
    adam, _ = updates_of(plain(name="adamw"), random_tree(0), gradients)
    for a, b in zip(muon, adam, strict=True):
        for path, leaf in jax.tree.leaves_with_path(a):
            other = functools.reduce(lambda t, k: t[k.key], path, b)
            same = np.allclose(leaf, other, rtol=1e-6)
            assert same == (group_of(path) in ("embed", "unembed", "norm"))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_a_groups_rate_scales_its_updates_and_no_others(name):
    rates = {"embed": 0.0, "norm": 3.0, "attention": 0.25, "ffn": 0.0}
    params, gradients = random_tree(0), [random_tree(1), random_tree(2)]
    config = {"name": name, "weight_decay": 0.1, "clip_norm": 1.0, "learning_rate": 0.01}
    even, _ = updates_of(plain(**config), params, gradients)
    uneven, _ = updates_of(plain(**config, rates=tuple(f"{k}={v}" for k, v in rates.items())), params, gradients)
    for a, b in zip(even, uneven, strict=True):
        for (path, u), w in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(w, rates.get(group_of(path), 1.0) * u, rtol=1e-6)
            assert np.abs(u).max() > 0


def test_groups_of_all_weights():
    groups = {group_of(path) for path, _ in jax.tree.leaves_with_path(tiny_params())}
    groups |= {group_of(path) for path, _ in jax.tree.leaves_with_path(LORA_AXES, is_leaf=lambda x: type(x) is tuple)}
    assert groups == set(GROUPS)
    with pytest.raises(ValueError, match="layers/bias is in none of the groups embed"):
        group_norms({"layers": {"bias": jnp.ones(3)}})


def test_norms_of_groups_are_numpys_and_add_up_to_the_whole():
    grads = random_tree(5)
    layers = grads["layers"]
    members = {
        "embed": [grads["embed"]],
        "unembed": [grads["unembed"]],
        "norm": [grads["norm"]["scale"], layers["ffn_norm"]["scale"]],
        "attention": [layers["attention"]["q"], layers["attention"]["k"]],
        "ffn": [layers["ffn"]["down"]],
    }
    norms = jax.jit(group_norms)(jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads))
    assert all(n.dtype == jnp.float32 and n.shape == () for n in norms.values())
    norms = jax.device_get(jax.jit(group_norms)(grads))
    assert norms.keys() == members.keys()
    for group, leaves in members.items():
        expected = np.linalg.norm(np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves]))
        assert math.isclose(norms[group], expected, rel_tol=1e-6)
    whole = math.sqrt(sum(float(n) ** 2 for n in norms.values()))
    assert math.isclose(whole, float(optax.global_norm(grads)), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("name", "moments", "allowed"),
    [
        ("adafactor", "bfloat16", "float32"),
        ("adafactor", "int8", "float32"),
        ("lion", "int8", "float32 or bfloat16"),
        ("muon", "int8", "float32 or bfloat16"),
    ],
)
def test_moments_that_an_optimizer_has_not_are_refused(name, moments, allowed):
    with pytest.raises(ConfigError, match=f"'{moments}' is not available for optimizer.name='{name}': set {allowed}$"):
        OptimizerConfig(name=name, moments=moments)


@functools.cache
def compiled(name, moments, devices):
    """The jitted init and step (state donated) of an optimizer that clips, decays and has rates, and their places."""
    config = OptimizerConfig(
        name=name, moments=moments, learning_rate=0.01, warmup_steps=2, clip_norm=1.0, rates=("embed=0.5", "norm=0")
    )
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2} if devices == 8 else {}, jax.devices()[:devices])
    layout = parallel.Layout(mesh, "train")
    optimizer = make_optimizer(config, AXES, steps=10)
    shapes = jax.eval_shape(lambda: random_tree(0))
    at = (
        parallel.shardings(layout, AXES, shapes),
        opt_shardings(jax.eval_shape(optimizer.init, shapes), shapes, AXES, layout),
    )

    def step(params, state, grads):
        updates, new = optimizer.update(grads, state, params)
        finite = jnp.isfinite(optax.global_norm(grads))
        keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        return keep(optax.apply_updates(params, updates), params), keep(new, state)

    init = jax.jit(optimizer.init, in_shardings=(at[0],), out_shardings=at[1])
    step = jax.jit(step, in_shardings=(*at, at[0]), out_shardings=at, donate_argnums=(0, 1))
    return init, step, at[0]


def placed(name, moments, devices):
    """A step, and fresh weights and state for it to take."""
    init, step, at = compiled(name, moments, devices)
    params = jax.device_put(random_tree(0), at)
    return step, params, init(params)


@pytest.mark.parametrize(("name", "moments"), CHOICES)
def test_eight_devices_give_the_numbers_of_one(name, moments):
    results = {}
    for devices in (1, 8):
        step, params, state = placed(name, moments, devices)
        for i in range(3):
            params, state = step(params, state, random_tree(i + 1, 0.1))
        assert int(state[-1].count) == 3
        results[devices] = jax.device_get((params, state))
    for one, eight in zip(*map(jax.tree.leaves, results.values()), strict=True):
        if one.dtype in (np.int8, np.uint8):  # the norm that clips is summed in another order: one code, seldom
            apart = np.abs(one.astype(int) - eight.astype(int))
            assert apart.max() <= 1 and np.mean(apart > 0) < 1e-4
        else:
            coarse = {"rtol": 2**-7, "atol": 0} if one.dtype == jnp.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
            np.testing.assert_allclose(one.astype(np.float32), eight.astype(np.float32), **coarse)
    assert np.abs(results[1][0]["embed"] - random_tree(0)["embed"]).max() > 1e-3


@pytest.mark.parametrize(("name", "moments"), CHOICES)
def test_a_step_that_is_not_finite_leaves_the_state_as_it_was(name, moments):
    step, params, state = placed(name, moments, 8)
    params, state = step(params, state, random_tree(1))
    before = jax.device_get((params, state))
    bad = random_tree(2)
    bad["layers"]["ffn"]["down"] = bad["layers"]["ffn"]["down"].at[1, 2, 3].set(jnp.nan)
    after = jax.device_get(step(params, state, bad))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(a.astype(np.float32)).all()


@pytest.mark.parametrize(("name", "moments"), CHOICES)
def test_orbax_keeps_the_state_and_brings_it_back_to_its_place(name, moments, tmp_path):
    step, params, state = placed(name, moments, 8)
    params, state = step(params, state, random_tree(1))
    wanted = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "state", wanted)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        assert a.sharding == b.sharding and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("name", "moments"), CHOICES)
def test_moments_lie_where_their_weights_lie(name, moments):
    _, params, state = placed(name, moments, 8)
    place = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    assert len({place[3, 128, 256].spec, place[3, 128, 128].spec, place[144, 128].spec}) == 3
    large = [leaf for leaf in jax.tree.leaves(state) if leaf.shape in place and leaf.shape != (3, 128)]
    # All of two moments of five matrices; Adafactor factors all but k; Muon has one moment of three, Adam two of two.
    assert len(large) == {"adamw": 10, "adafactor": 1, "lion": 5, "muon": 7}[name]
    for leaf in large:
        assert leaf.sharding == place[leaf.shape]
        assert leaf.addressable_shards[0].data.size * 8 == leaf.size
    if moments == "int8":
        down, q = state[1].nu["layers"]["ffn"]["down"], state[1].nu["layers"]["attention"]["q"]
        assert down.scales.shape == (3, 128, 2) and down.scales.sharding == down.values.sharding
        assert q.scales.shape == (3, 128, 1) and tuple(q.scales.sharding.spec) == (None, "tensor", None)
        assert not isinstance(state[1].mu["norm"]["scale"], Moment)
    else:
        small = [leaf for leaf in jax.tree.leaves(state) if leaf.shape not in place]
        assert small and all(leaf.is_fully_replicated for leaf in small)


@pytest.mark.parametrize(("name", "moments"), [c for c in CHOICES if c[1] != "bfloat16"])
def test_adapters_alone_are_trained_by_each(name, moments):
    """With rank 32 both matrices have blocks on both sides. They are distinguished by their names."""
    shape = {"a": (2, 32, 128), "b": (2, 256, 32)}
    params = jax.tree.map(
        lambda axes: jnp.full(shape["a" if axes[1] is None else "b"], 0.1),
        LORA_AXES,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    rng = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params) for _ in range(2)]
    (_, found), state = updates_of(plain(name=name, moments=moments, rates=("lora_b=0",)), params, gradients, LORA_AXES)
    for pair in (found["layers"]["attention"]["q"], found["layers"]["ffn"]["down"]):
        assert not pair["b"].any()
        assert 0.1 < np.sqrt(np.mean(pair["a"] ** 2)) < 1.5
    optimizer = make_optimizer(plain(name=name, moments=moments), LORA_AXES, steps=2)
    layout = parallel.Layout(parallel.make_mesh({"fsdp": 4, "tensor": 2}), "train")
    shapes = jax.eval_shape(lambda: params)
    at = opt_shardings(jax.eval_shape(optimizer.init, shapes), shapes, LORA_AXES, layout)
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(at), strict=True):
        if leaf.shape == shape["a"]:
            assert tuple(place.spec) in ((None, None, "fsdp"), (None, None, "tensor"))


def text_bytes():
    """The bytes of 4,000 words in a random order; numpy's RandomState draws the same ones everywhere."""
    words = (
        "the model reads a token and writes its key and value to the cache of each layer then attention looks back "
        "over every position that came before while gradients flow from the loss to all weights in small steps"
    ).split()
    return np.frombuffer(" ".join(np.random.RandomState(0).choice(words, 4000)).encode(), np.uint8)


@functools.cache
def trained(name, moments, rate, b2):
    """The first loss, and the mean of the last ten, of 40 steps of a small model on a fixed text."""
    config = type(TINY)(**{**TINY.to_dict(), "rope_scaling": TINY.rope_scaling, "embed_dim": 64})
    text = text_bytes()
    starts = np.random.default_rng(0).integers(0, len(text) - 65, (40, 8))
    tokens = np.stack([[text[s : s + 65] for s in row] for row in starts]).astype(np.int32)
    positions = np.broadcast_to(np.arange(64), (8, 64))
    optimizer = make_optimizer(
        OptimizerConfig(name=name, moments=moments, learning_rate=rate, b2=b2, warmup_steps=5),
        logical_axes(config, stacked=True),
        steps=40,
    )

    def loss_of(params, batch):
        hidden, _ = model.forward(config, params, batch[:, :-1], positions, None)
        logits = model.unembed(config, params, hidden)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    def step(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    def run():
        params = init_params(config, jax.random.key(0))
        return jax.lax.scan(step, (params, optimizer.init(params)), tokens)[1]

    losses = np.asarray(jax.jit(run)())
    return losses[0], losses[-10:].mean()


@pytest.mark.parametrize("moments", [pytest.param("bfloat16", marks=pytest.mark.slow), "int8"])
def test_training_with_few_bits_ends_at_the_loss_of_float32(moments):
    """With b2 = 0.999, where rounding to the nearest would do most harm."""
    first, float32 = trained("adamw", "float32", 3e-3, 0.999)
    _, fewer = trained("adamw", moments, 3e-3, 0.999)
    assert float32 < first - 2.0
    assert abs(fewer - float32) < 0.02


@pytest.mark.parametrize(
    ("name", "moments", "rate"), [("adafactor", "float32", 3e-3), ("lion", "bfloat16", 1e-3), ("muon", "float32", 1e-2)]
)
def test_the_others_learn_too(name, moments, rate):
    first, last = trained(name, moments, rate, 0.95)
    assert last < first - 2.0
