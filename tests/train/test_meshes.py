"""The loss and every gradient of a training step on many meshes, against the same step on one device.

The gradients are those of the compiled step: Adam's first moments after one step are a tenth of them.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.runs import make_run
from llama_jax import parallel
from llama_jax.config import SIZES
from llama_jax.params import init_params
from llama_jax.run_config import RunConfig
from llama_jax.train import trainable
from llama_jax.train.program import Program
from llama_jax.train.state import init_state, state_shardings

# Tolerance of the loss, and of the norm of each gradient's difference relative to the gradient's own norm. In float64
# nothing is left but the order of sums.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


@pytest.fixture(params=TOLERANCE)
def dtype(request, monkeypatch):
    """The dtype of all numbers of a step. For float64, what the code calls float32 is float64."""
    if request.param == "float32":
        yield request.param
        return
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    monkeypatch.setattr(np, "float32", np.float64)
    monkeypatch.setattr(parallel, "compute_dtype", lambda name, mesh: jnp.dtype("float64"))
    with jax.enable_x64(True):
        yield request.param


def packed(rows: int, length: int, seed: int) -> dict[str, np.ndarray]:
    """A batch of packed rows with two or four documents each and some padding, so that DPO finds pairs in it too."""
    rng = np.random.default_rng(seed)
    batch = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "targets", "positions", "segments")}
    batch["weights"] = np.zeros((rows, length), np.float32)
    for row in range(rows):
        documents = int(rng.choice([2, 4]))
        ends = 2 * np.sort(rng.choice(np.arange(1, length // 2), documents, replace=False))
        for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            text = rng.integers(0, 64, end - begin + 1)
            batch["tokens"][row, begin:end], batch["targets"][row, begin:end] = text[:-1], text[1:]
            batch["positions"][row, begin:end] = np.arange(end - begin)
            batch["segments"][row, begin:end] = number + 1
            batch["weights"][row, begin : end - 1] = 1.0
    return batch


def first_step(run: RunConfig, sizes: dict[str, int], batch: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """The metrics of one step on a mesh, and its gradients by path. The weights are random, all of LoRA's too."""
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    program = Program.make(run, parallel.make_mesh(sizes, devices))

    weights = lambda key: init_params(run.shape, jax.random.key(key))  # noqa: E731
    params = jax.jit(lambda: trainable.init_trained(run, jax.random.key(0)))()
    if run.lora.rank:  # half of its matrices begin as zeros, and the gradients of the others with them
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda a: rng.normal(scale=0.05, size=a.shape).astype(a.dtype), params)
    make = functools.partial(init_state, run, program.optimizer)
    state = jax.jit(make, out_shardings=state_shardings(program.state))(params=params)
    frozen = None
    if program.frozen is not None:
        frozen = jax.jit(weights, static_argnums=0, out_shardings=jax.tree.map(lambda a: a.sharding, program.frozen))(1)
    state, metrics = program.train_step(state, frozen, jax.device_put(batch, program.batch_sharding))
    moments = jax.tree.leaves_with_path(state.opt_state[1].mu)
    return jax.device_get(metrics), {jax.tree_util.keystr(path): np.float64(leaf) for path, leaf in moments}


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def assert_same(run: RunConfig, sizes: dict[str, int], batch: dict, expected: tuple, dtype: str) -> None:
    metrics, gradients = first_step(run, sizes, batch)
    plain, one = expected
    assert gradients.keys() == one.keys() and all(gradient.any() for gradient in one.values())
    gaps = {path: difference(gradient, one[path]) for path, gradient in gradients.items()}
    gaps["loss"] = abs(float(metrics["loss"]) / float(plain["loss"]) - 1)
    assert {str(metrics[name].dtype) for name in ("loss", "grad_norm")} == {dtype}
    assert max(gaps.values()) < TOLERANCE[dtype], gaps


# All ways to put two, four or eight devices along the five axes.
COMBINATIONS = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=5) if np.prod(sizes) in (2, 4, 8)]


@functools.cache
def of_one_device(run: RunConfig, dtype: str) -> tuple[dict, dict]:
    return first_step(run, {}, packed(run.data.batch_size, run.data.sequence_length, 0))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", COMBINATIONS, ids=lambda sizes: "x".join(map(str, sizes)))
def test_every_combination_of_axes_gives_the_loss_and_gradients_of_one_device(sizes, dtype):
    run = make_run(model__num_layers=8, train__remat="full")
    mesh = {axis: n for axis, n in zip(parallel.AXES, sizes, strict=True) if n > 1}
    assert_same(run, mesh, packed(run.data.batch_size, run.data.sequence_length, 0), of_one_device(run, dtype), dtype)


def random_case(seed: int) -> tuple[RunConfig, RunConfig, dict[str, int]]:
    """A run for a mesh of 3 to 8 devices with random sizes, the same run in the plainest way, and the sizes."""
    rng = np.random.default_rng(seed)
    n = int(rng.choice([3, 5, 6, 6, 7, 8]))
    sizes = dict.fromkeys(parallel.AXES, 1)
    for prime in {3: (3,), 5: (5,), 6: (2, 3), 7: (7,), 8: (2, 2, 2)}[n]:
        sizes[rng.choice(parallel.AXES)] *= prime
    accumulate, stages = int(rng.choice([1, 2, 3])), sizes["stage"]
    microbatches = stages * int(rng.choice([1, 2])) if stages > 1 else 0
    model = dataclasses.replace(
        SIZES["tiny"],
        num_layers=n,
        embed_dim=16 * n,
        num_heads=2 * n,
        num_kv_heads=int(rng.choice([1, n, 2 * n])),
        head_dim=8,
        ffn_dim=24 * n,
        vocab_size=64 * n,
    )
    kind = rng.choice(["all weights", "LoRA", "DPO", "DPO with LoRA"])
    changes = {
        "data__batch_size": sizes["data"] * sizes["fsdp"] * max(1, microbatches) * accumulate,
        "data__sequence_length": 8 * n,
        "lora__rank": 4 if "LoRA" in kind else 0,
        "train__objective": "dpo" if "DPO" in kind else "sft",
        "init_from": "" if kind == "all weights" else "x",
    }
    plain = dataclasses.replace(make_run(**changes), model=model)
    train = dataclasses.replace(
        plain.train,
        accumulate=accumulate,
        microbatches=microbatches,
        remat=str(rng.choice(["none", "dots", "attention", "full"])),
        vocab_chunk=int(rng.choice([0, 50])),
    )
    return dataclasses.replace(plain, train=train), plain, {axis: n for axis, n in sizes.items() if n > 1}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
@pytest.mark.parametrize("seed", range(40))
def test_random_runs_on_random_meshes_have_the_loss_and_gradients_of_one_device(seed, dtype):
    run, plain, sizes = random_case(seed)
    batch = packed(run.data.batch_size, run.data.sequence_length, seed)
    assert_same(run, sizes, batch, first_step(plain, {}, batch), dtype)
