"""The program of a run on a mesh: shapes, shardings and compiled steps. `loop` runs it.

    program = Program.make(run, parallel.make_mesh({"fsdp": 8}))
    state, frozen = setup.first_state(program), setup.frozen(program).params
    state, metrics = program.train_step(state, frozen, batch)

It needs no weights, so that the same steps can be compiled for devices that are not attached:
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
from llama_jax.errors import ConfigError
from llama_jax.params import Params
from llama_jax.run_config import RunConfig
from llama_jax.train import trainable
from llama_jax.train.objectives import Batch, Objective, objective
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import TrainState, abstract_state, state_shardings
from llama_jax.train.step import make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """The abstract state and the compiled steps that follow from a run and a mesh.

    Attributes:
        run: The run.
        steps: Optimizer steps of the run. With train.epochs it is 0 until `with_steps` sets it.
        layout: The mesh, with the sharding rules of training.
        dtype: Dtype of activations and matrix products.
        optimizer: The optax transformation.
        state: The abstract TrainState: shapes, dtypes and shardings.
        frozen: The abstract params of the frozen model, or None (see `trainable`).
        loss: The loss function; `objective` computes the loss that train.objective names.
    """

    run: RunConfig
    steps: int
    layout: parallel.Layout
    dtype: jnp.dtype
    optimizer: optax.GradientTransformation
    state: TrainState
    frozen: Params | None
    loss: Objective = objective

    @classmethod
    def make(cls, run: RunConfig, mesh: jax.sharding.Mesh, *, loss: Objective = objective) -> Program:
        """The program of a run on a mesh.

        Raises:
            ConfigError: the model or a batch cannot be split over the mesh, the base cannot be quantized, or the
                devices have no products of 8-bit numbers.
        """
        run.check_mesh(dict(mesh.shape))
        if (run.optimizer.offload or run.lora.offload) and not parallel.has_host_memory(mesh):
            raise ConfigError(
                "optimizer.offload and lora.offload need devices that read their host's memory, and these do not with "
                "this jax: set both to False"
            )
        layout = parallel.Layout(mesh, "train", microbatches=run.train.microbatches or parallel.stages(mesh))
        dtype = parallel.compute_dtype(run.train.compute_dtype, mesh)
        if run.train.products == "fp8":
            parallel.check_fp8(mesh)
        optimizer = make_optimizer(run.optimizer, trainable.trained_axes(run), steps=run.train.steps)
        return cls(
            run=run,
            steps=run.train.steps,
            layout=layout,
            dtype=dtype,
            optimizer=optimizer,
            state=abstract_state(run, optimizer, layout),
            frozen=trainable.abstract_frozen(run, layout, dtype),
            loss=loss,
        )

    def with_steps(self, steps: int) -> Program:
        """The program of the same run with its schedule over `steps`."""
        if steps == self.steps:
            return self
        optimizer = make_optimizer(self.run.optimizer, trainable.trained_axes(self.run), steps=steps)
        return dataclasses.replace(self, steps=steps, optimizer=optimizer)

    @property
    def batch_sharding(self) -> jax.sharding.NamedSharding:
        """The sharding of each array (B, T) of a batch."""
        return self.layout.sharding(("batch", "length"))

    @property
    def batch(self) -> Batch:
        """A batch as ShapeDtypeStructs: tokens, targets, positions, segments int32, weights float32, all (B, T)."""
        shape = (self.run.data.batch_size, self.run.data.sequence_length)
        kinds = dict.fromkeys(("tokens", "targets", "positions", "segments"), np.int32) | {"weights": np.float32}
        abstract: Any = {k: jax.ShapeDtypeStruct(shape, d, sharding=self.batch_sharding) for k, d in kinds.items()}
        return abstract

    @functools.cached_property
    def rows_of_host(self) -> list[int]:
        """The rows of a global batch on the devices of this process, in order."""
        shape = self.batch["tokens"].shape
        indices = self.batch_sharding.addressable_devices_indices_map(shape).values()
        return sorted({row for index in indices if index for row in range(*index[0].indices(shape[0]))})

    @functools.cached_property
    def compiler_options(self) -> dict[str, bool | int | str]:
        """The options that the steps are compiled with (parallel/flags.py)."""
        return parallel.compiler_options(self.layout.mesh)

    @functools.cached_property
    def train_step(self) -> Any:
        """The compiled function of (state, frozen, batch) that returns (state, metrics). The state is donated."""
        shardings = state_shardings(self.state)
        schedule = make_schedule(self.run.optimizer, steps=self.steps)
        return jax.jit(
            make_train_step(self.run, self.optimizer, schedule, self.layout, self.dtype, self.loss),
            # The returned state has the shardings of the input state, so that the next call does not recompile. None
            # keeps the shardings that the frozen weights already have.
            in_shardings=(shardings, None, self.batch_sharding),
            out_shardings=(shardings, parallel.replicated(self.layout.mesh)),
            donate_argnums=0,
            compiler_options=self.compiler_options,
        )

    @functools.cached_property
    def eval_step(self) -> Any:
        """The compiled function of (trained, frozen, batch) that returns sums; `count` is the others' divisor."""
        return jax.jit(
            make_eval_step(self.run, self.layout, self.dtype, self.loss),
            in_shardings=(state_shardings(self.state).params, None, self.batch_sharding),
            out_shardings=parallel.replicated(self.layout.mesh),
            compiler_options=self.compiler_options,
        )
