"""One optimizer step: its sums, its masks, and equal results on every mesh.

Differences are the largest one, relative to the largest number compared.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.numbers import gap
from helpers.runs import T, batches, make_run, text_run
from llama_jax import model, parallel
from llama_jax.parallel import gradients
from llama_jax.params import init_params
from llama_jax.run_config import RunConfig
from llama_jax.train import run as loop
from llama_jax.train import setup
from llama_jax.train.program import Program

ROUNDING = 2e-5  # of losses after ten steps, between orders of the same float32 sums; measured below 1e-6


@dataclasses.dataclass
class Trained:
    losses: np.ndarray
    norms: np.ndarray
    state: object
    metrics: list
    gradients: list | None  # of the first step, times a tenth: Adam's first moments after it


@functools.cache
def prepared(run: RunConfig, sizes: tuple[tuple[str, int], ...]):
    """The compiled steps: once for each run and mesh."""
    mesh = parallel.make_mesh(dict(sizes), jax.devices()[: int(np.prod([n for _, n in sizes]))])
    return Program.make(run, mesh)


def train(run: RunConfig, steps: int, *, mesh=None, given=None) -> Trained:
    program = prepared(run, tuple((mesh or {}).items()))
    state = setup.first_state(program)
    metrics, gradients = [], None
    for batch in given or batches(steps):
        state, numbers = program.train_step(state, None, jax.device_put(batch, program.batch_sharding))
        metrics.append(jax.device_get(numbers))
        gradients = gradients or jax.device_get(jax.tree.leaves(state.opt_state[1].mu))
    pick = lambda name: np.array([m[name] for m in metrics])  # noqa: E731
    return Trained(pick("loss"), pick("grad_norm"), state, metrics, gradients)


@functools.cache
def reference() -> Trained:
    """Ten steps on one device, in the plainest way."""
    return train(make_run(), 10)


def same(trained: Trained, expected: Trained | None = None, tolerance: float = ROUNDING) -> None:
    expected = expected or reference()
    assert gap(trained.losses, expected.losses) < tolerance
    assert gap(trained.norms, expected.norms) < tolerance
    for a, b in zip(trained.gradients, expected.gradients, strict=True):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)  # on meshes, test_meshes measures below 1e-6
    # Adam divides by the root of the second moment: gradients near zero turn rounding into up to whole steps.
    for a, b in zip(jax.tree.leaves(trained.state.params), jax.tree.leaves(expected.state.params), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).mean() < 2e-6


def test_the_loss_falls_and_is_a_mean_over_the_tokens_that_count():
    trained = reference()
    assert trained.losses[-1] < trained.losses[0] - 0.3
    run, batch = make_run(), batches(1)[0]

    @jax.jit
    def log_probabilities():
        params = init_params(run.model, jax.random.split(jax.random.key(0))[1])
        hidden, _ = model.forward(run.model, params, batch["tokens"], batch["positions"], batch["segments"])
        return jax.nn.log_softmax(model.unembed(run.model, params, hidden))

    nll = -log_probabilities()
    nll = np.take_along_axis(np.asarray(nll), batch["targets"][..., None], axis=-1)[..., 0]
    assert gap(trained.losses[0], nll[batch["weights"] > 0].mean()) < ROUNDING
    assert trained.metrics[0]["tokens"] == batch["weights"].sum()


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_equal_the_whole_batch(parts):
    """The parts' token counts differ by eight times and more: a mean of means would be far off."""
    weights = batches(1)[0]["weights"].reshape(-1, parts, T).sum(axis=(0, 2))
    assert weights.max() > 8 * weights.min()
    same(train(make_run(train__accumulate=parts), 10))


@pytest.mark.parametrize(
    "changes",
    [
        {"train__remat": "dots"},
        {"train__remat": "full"},
        {"train__vocab_chunk": 100},
        {"train__vocab_chunk": 7, "train__remat": "full", "train__accumulate": 2},
    ],
    ids=str,
)
def test_what_saves_memory_changes_no_number(changes):
    same(train(make_run(**changes), 10))


def test_bfloat16_products_come_close_and_keep_float32_masters():
    trained = train(make_run(train__compute_dtype="bfloat16"), 10)
    assert gap(trained.losses, reference().losses) < 5e-3  # 2^-8 a rounding; measured 4e-4
    assert not np.array_equal(trained.losses, reference().losses)
    floats = [leaf for leaf in jax.tree.leaves(trained.state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype(jnp.float32)}


def test_z_loss_adds_its_gradient_and_not_its_value():
    weight = 1.0
    trained = train(make_run(train__z_loss=weight), 3)
    plain = reference()
    assert gap(trained.losses[0], plain.losses[0]) < 1e-7  # the loss that is shown is the cross-entropy
    run, batch = make_run(), batches(1)[0]

    def loss(params):
        hidden, _ = model.forward(run.model, params, batch["tokens"], batch["positions"], batch["segments"])
        logits = model.unembed(run.model, params, hidden)
        lse = jax.nn.logsumexp(logits, axis=-1)
        nll = lse - jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        return jnp.sum(batch["weights"] * (nll + weight * lse**2)) / batch["weights"].sum()

    params = jax.jit(lambda: init_params(run.model, jax.random.split(jax.random.key(0))[1]))()
    grads = jax.device_get(jax.jit(jax.grad(loss))(params))
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in jax.tree.leaves(grads)))
    assert gap(trained.norms[0], norm) < ROUNDING and abs(norm - plain.norms[0]) > 1e-3 * norm


def test_seeds_change_the_first_weights_and_nothing_else_does():
    states = [setup.first_state(prepared(make_run(seed=s), ())) for s in (0, 0, 1)]
    one, again, other = (np.asarray(state.params["embed"]) for state in states)
    assert (one == again).all() and (one != other).mean() > 0.99


# A step whose numbers are not finite


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_non_finite_step_changes_no_weight_and_no_moment(poison):
    good = batches(4)
    bad = {**good[1], "weights": good[1]["weights"].copy()}
    bad["weights"][0, 0] = poison
    trained = train(make_run(), 0, given=[good[0], bad, bad, good[2]])
    clean = train(make_run(), 0, given=[good[0], good[2]])
    assert [m["skipped"] for m in trained.metrics] == [0, 1, 2, 0]
    assert trained.state.step == 4 and clean.state.step == 2
    for name in ("params", "opt_state"):  # the schedule too counts only steps that were taken
        for a, b in zip(
            jax.tree.leaves(getattr(trained.state, name)), jax.tree.leaves(getattr(clean.state, name)), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def poisoned(monkeypatch):
    """Let every run start from an embedding that is not finite."""
    first_state = setup.first_state

    def nan_state(*given):
        state = first_state(*given)
        return dataclasses.replace(state, params={**state.params, "embed": state.params["embed"] * jnp.nan})

    monkeypatch.setattr(setup, "first_state", nan_state)


def test_the_run_stops_after_max_skipped_and_saves_nothing(tmp_path, monkeypatch):
    poisoned(monkeypatch)
    with pytest.raises(loop.TrainingError, match="not finite 3 times in a row.*lower optimizer.learning_rate"):
        loop.train(text_run(tmp_path, train__max_skipped=3))
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"], line["skipped"]) for line in lines] == [(1, None, 1), (2, None, 2)]


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    poisoned(monkeypatch)
    with pytest.raises(loop.TrainingError, match="step 1: weights are not finite, so this step is not saved"):
        loop.train(text_run(tmp_path, checkpoint__every=1))
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


# Meshes


@pytest.mark.parametrize("parts", [1, 4])
def test_evaluation_sums_the_same_cross_entropy(parts):
    run, batch = make_run(train__vocab_chunk=100, train__accumulate=parts), batches(1)[0]
    program = prepared(run, (("fsdp", 2), ("tensor", 4)))
    state = setup.first_state(program)
    sums = program.eval_step(state.params, None, jax.device_put(batch, program.batch_sharding))
    assert gap(sums["loss"] / sums["count"], reference().losses[0]) < ROUNDING


QUICK = [
    {"fsdp": 4},
    {"fsdp": 2, "tensor": 4},
    {"data": 2, "context": 2, "tensor": 2},
    {"fsdp": 2, "stage": 2, "tensor": 2},
    {"tensor": 8},
]
SLOW = [{"data": 2}, {"fsdp": 8}, {"context": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"stage": 2, "context": 2}]


@pytest.mark.parametrize("mesh", [*QUICK, *(pytest.param(m, marks=pytest.mark.slow) for m in SLOW)], ids=str)
def test_every_mesh_trains_to_the_same_numbers(mesh):
    same(train(make_run(), 10, mesh=mesh))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 2, "tensor": 4}, {"data": 2, "context": 4}], ids=str)
def test_every_mesh_accumulates_and_chunks_to_the_same_numbers(mesh):
    run = make_run(train__accumulate=4, train__vocab_chunk=50, train__remat="full")
    same(train(run, 10, mesh=mesh))


def on_a_ring(monkeypatch, steps):
    """Sums gradients as on TPUs, with at most so many steps of the ring."""
    monkeypatch.setattr(gradients, "device_platform", lambda: "tpu")
    monkeypatch.setattr(gradients, "_MIN_WIDTH", 2)
    monkeypatch.setattr(gradients, "_MAX_STEPS", steps)


@pytest.mark.parametrize("axes", [("heads", "embed"), ("embed", "ffn")], ids=str)
@pytest.mark.parametrize("steps", [2, 8])
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 2, "context": 2, "tensor": 2}], ids=str)
def test_a_gradient_from_the_ring_is_the_product_over_all_tokens(monkeypatch, mesh, steps, axes):
    on_a_ring(monkeypatch, steps)
    layout = parallel.Layout(parallel.make_mesh(mesh), "train")
    g, x = (jax.random.normal(jax.random.key(i), (8, 6, 32 if axes[i] == "embed" else 20)) for i in (0, 1))

    @jax.jit
    def gradient():
        with parallel.use(layout):
            assert parallel.ring_takes(g, x, axes) and not parallel.ring_takes(g[:1], x[:1], axes)
            return parallel.ring_gradient(g, x, axes)

    found = gradient()
    assert gap(found, np.einsum("bto,bti->oi", np.float64(g), np.float64(x))) < 1e-6
    assert found.sharding.is_equivalent_to(layout.sharding(axes), 2)


def test_a_ring_in_pipeline_stages_trains_to_the_same_numbers(monkeypatch):
    on_a_ring(monkeypatch, 2)
    plain = train(make_run(), 3)
    prepared.cache_clear()
    mesh = {"fsdp": 4, "stage": 2}
    assert "collective_permute" in lowered_text(make_run(), mesh)
    same(train(make_run(), 3, mesh=mesh), plain)
    prepared.cache_clear()


def lowered_text(run, mesh):
    program = prepared(run, tuple(mesh.items()))
    return program.train_step.lower(program.state, program.frozen, program.batch).as_text()


def test_weights_and_moments_lie_in_shards():
    run = make_run()
    trained = train(run, 1, mesh={"fsdp": 2, "tensor": 4})
    moments = trained.state.opt_state[1]
    for tree in (trained.state.params, moments.mu, moments.nu):
        for path, leaf in jax.tree.leaves_with_path(tree):
            shard = leaf.addressable_shards[0].data
            parts = 1 if "norm" in jax.tree_util.keystr(path) else 8
            assert shard.size * parts == leaf.size, jax.tree_util.keystr(path)
            assert len({str(s.index) for s in leaf.addressable_shards}) == parts
