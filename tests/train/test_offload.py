"""Moments in the host's memory. test_finetune.py has LoRA's base, and runs that are resumed there."""

import jax
import numpy as np
import pytest

from helpers.runs import batches, make_run
from llama_jax import parallel
from llama_jax.errors import ConfigError
from llama_jax.train import setup
from llama_jax.train.program import Program


def trained(run, given):
    """The state and the losses after a step on each of the batches, on four devices."""
    program = Program.make(run, parallel.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4]))
    state, losses = setup.first_state(program), []
    for batch in given:
        state, metrics = program.train_step(state, None, jax.device_put(batch, program.batch_sharding))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_moments_in_the_hosts_memory_change_no_number_and_stay_there(moments):
    good = batches(3)
    bad = {**good[1], "weights": np.full_like(good[1]["weights"], np.nan)}
    given = [good[0], bad, *good[1:]]
    plain, expected = trained(make_run(optimizer__moments=moments), given)
    state, losses = trained(make_run(optimizer__moments=moments, optimizer__offload=True), given)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    # Adam divides by the root of the second moment: a gradient near zero turns rounding into up to a whole step.
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(plain), strict=True):
        assert np.abs(np.float64(a) - np.float64(b)).mean() < (1e-6 if np.issubdtype(a.dtype, np.floating) else 1e-3)
    for path, leaf in jax.tree.leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        host = "opt_state" in name and "layers" in name and "norm" not in name
        assert leaf.sharding.memory_kind == ("pinned_host" if host else "device"), name


@pytest.mark.parametrize(
    ("changes", "sizes", "words"),
    [
        ({"optimizer__name": "lion"}, {}, "not available for optimizer.name='lion': set it to adamw"),
        ({}, {"stage": 2}, "optimizer.offload needs a mesh without stages, but mesh.stage=2"),
    ],
    ids=["lion", "stages"],
)
def test_what_cannot_be_in_the_hosts_memory_is_refused(changes, sizes, words):
    with pytest.raises(ConfigError, match=words):
        make_run(optimizer__offload=True, **changes).check_mesh(dict.fromkeys(parallel.AXES, 1) | sizes)
