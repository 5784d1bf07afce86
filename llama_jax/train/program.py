"""A run on a mesh, before anything is computed: shapes, places and compiled steps. What runs it is `loop`.

    program = Program.make(run, parallel.make_mesh({"fsdp": 8}))
    state, frozen = start.first_state(program), start.frozen(program).params
    state, metrics = program.train_step(state, frozen, batch)

It needs no weights, so that the same steps can be compiled for devices that are not there:
`program.train_step.lower(program.state, program.frozen, program.batch).compile()`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llama_jax import parallel
from llama_jax.params import Params
from llama_jax.run_config import RunConfig
from llama_jax.train import trainable
from llama_jax.train.objectives import Batch
from llama_jax.train.optimizer import make_optimizer
from llama_jax.train.state import TrainState, abstract_state, state_shardings
from llama_jax.train.step import make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """What follows from a run and a mesh.

    Attributes:
        run: the run.
        layout: the mesh, under the rules of training.
        dtype: of activations and products.
        optimizer: optax's.
        state: the abstract TrainState: shapes, dtypes and shardings.
        frozen: the abstract params that are only read, or None (see `method`).
    """

    run: RunConfig
    layout: parallel.Layout
    dtype: jnp.dtype
    optimizer: optax.GradientTransformation
    state: TrainState
    frozen: Params | None

    @classmethod
    def make(cls, run: RunConfig, mesh: jax.sharding.Mesh) -> Program:
        """The program of a run on a mesh.

        Raises:
            ConfigError: a mesh that this model and batch cannot be split over, or a base that cannot be quantized.
        """
        run.check_mesh(dict(mesh.shape))
        layout = parallel.Layout(mesh, "train")
        dtype = parallel.compute_dtype(run.train.compute_dtype)
        optimizer = make_optimizer(run.optimizer, trainable.trained_axes(run), steps=run.train.steps)
        return cls(
            run=run,
            layout=layout,
            dtype=dtype,
            optimizer=optimizer,
            state=abstract_state(run, optimizer, layout),
            frozen=trainable.abstract_frozen(run, layout, dtype),
        )

    @property
    def batch_sharding(self) -> jax.sharding.NamedSharding:
        """Where each array (B, T) of a batch lies."""
        return self.layout.sharding(("batch", "length"))

    @property
    def batch(self) -> Batch:
        """A batch as ShapeDtypeStructs: tokens, targets, positions, segments int32, weights float32, all (B, T)."""
        shape = (self.run.data.batch_size, self.run.data.sequence_length)
        kinds = dict.fromkeys(("tokens", "targets", "positions", "segments"), np.int32) | {"weights": np.float32}
        return {k: jax.ShapeDtypeStruct(shape, kind, sharding=self.batch_sharding) for k, kind in kinds.items()}

    @functools.cached_property
    def rows_of_host(self) -> list[int]:
        """Which rows of a global batch this process's devices hold, in order."""
        shape = self.batch["tokens"].shape
        indices = self.batch_sharding.addressable_devices_indices_map(shape).values()
        return sorted({row for index in indices for row in range(*index[0].indices(shape[0]))})

    @functools.cached_property
    def train_step(self) -> Any:
        """The compiled step, (state, frozen, batch) -> (state, metrics): donates the state; metrics are replicated."""
        shardings = state_shardings(self.state)
        return jax.jit(
            make_train_step(self.run, self.optimizer, self.layout, self.dtype),
            in_shardings=(shardings, None, self.batch_sharding),  # what is frozen lies where it lies
            out_shardings=(shardings, parallel.replicated(self.layout.mesh)),
            donate_argnums=0,
        )

    @functools.cached_property
    def eval_step(self) -> Any:
        """The compiled evaluation, (trained, frozen, batch) -> sums, of which `count` divides the others."""
        return jax.jit(
            make_eval_step(self.run, self.layout, self.dtype),
            in_shardings=(state_shardings(self.state).params, None, self.batch_sharding),
            out_shardings=parallel.replicated(self.layout.mesh),
        )
