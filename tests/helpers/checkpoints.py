"""A helper of the tests: small checkpoints whose every step has values of its own."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint import Checkpoints


def tree(step: int) -> dict:
    """The arguments of a save of this step, with values that no other step has."""
    w = jax.random.normal(jax.random.key(step), (64, 48))
    return {"params": {"w": w, "inner": {"b": w[0]}}, "rest": {"n": jnp.full((), step)}, "meta": {"n": step}}


def abstract(step: int) -> dict:
    """The shapes, dtypes and shardings that a restore of this step asks for."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    kept = {name: value for name, value in tree(step).items() if name != "meta"}
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), kept)


def save(folder: Path, *steps: int, losses=None, **options) -> None:
    """Save these steps into a run folder, with a loss for each step in `losses`."""
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, **tree(step), loss=(losses or {}).get(step))
    checkpoints.close()


def holds(folder: Path, step: int) -> bool:
    """True if the step can be restored with the values that it was saved with."""
    params, rest, meta = Checkpoints(folder, create=False).restore(step, **abstract(step))
    jax.tree.map(np.testing.assert_array_equal, (params, rest), (tree(step)["params"], tree(step)["rest"]))
    return meta == tree(step)["meta"]


def names(run: Path) -> set[str]:
    """The names in the checkpoints folder of a run."""
    return {path.name for path in (run / "checkpoints").iterdir()}
