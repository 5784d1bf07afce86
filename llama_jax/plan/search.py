"""Propose meshes, batches, rematerialization and accumulation that fit, from the closed memory model alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import jax.numpy as jnp

from llama_jax.errors import ConfigError
from llama_jax.parallel import AXES
from llama_jax.plan import memory, projection
from llama_jax.plan.devices import Devices
from llama_jax.run_config import RunConfig

# Fraction of a device's memory that a proposal may use by the closed model, which is within 10 % of the TPU compiler.
HEADROOM = 0.9
_REMAT = ("dots", "attention", "full")
_MAX_TENSOR = 16
_STAGES, _MANY = (1, 2, 4, 8), 64  # pipeline stages are proposed from so many devices
_LONG = 32_768  # tokens of a row from which splitting it is proposed


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A way to train a model on some devices.

    Attributes:
        run: The run with its batch, rematerialization, accumulation and mesh.
        sizes: Devices along each mesh axis.
        memory: Peak memory of a device by the closed model.
        projection: The projected step.
    """

    run: RunConfig
    sizes: dict[str, int]
    memory: memory.Memory
    projection: projection.Projection

    @property
    def flags(self) -> str:
        """The flags that make a run this proposal."""
        sizes = [f"--config.mesh.{axis}={n}" for axis, n in self.sizes.items() if n > 1 or axis == AXES[1]]
        train, data = self.run.train, self.run.data
        keys = [f"--config.data.batch_size={data.batch_size}", f"--config.train.remat={train.remat}"]
        keys += [f"--config.train.microbatches={train.microbatches}"] if train.microbatches else []
        keys += ["--config.optimizer.offload=True"] if self.run.optimizer.offload else []
        return " ".join([*sizes, *keys, f"--config.train.accumulate={train.accumulate}"])


def search(run: RunConfig, devices: Devices, *, keep: int = 5, batch: int | None = None) -> list[Proposal]:
    """The proposals with the most projected tokens a second that fit, the best first.

    Args:
        run: The run; its model, optimizer, row length and objective are kept.
        devices: The devices.
        keep: Number of proposals.
        batch: Rows of a batch; None proposes one too, of at most 16 million tokens.
    """
    found = _fitting(run, devices, batch)
    if not found and not run.optimizer.offload and run.optimizer.name == "adamw":
        moved = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, offload=True))
        found = _fitting(moved, devices, batch)
    found.sort(key=lambda one: (-one.projection.tokens_per_second, one.memory.peak))
    best: dict[tuple[tuple[str, int], ...], Proposal] = {}
    for one in found:
        best.setdefault(tuple(one.sizes.items()), one)
    return list(best.values())[:keep]


def _fitting(run: RunConfig, devices: Devices, batch: int | None) -> list[Proposal]:
    """All proposals that fit, as `search` describes them."""
    dtype = jnp.dtype("float32" if run.train.compute_dtype == "float32" else "bfloat16")
    found: list[Proposal] = []
    for sizes in meshes(run, devices):
        for candidate in _candidates(run, sizes, batch):
            try:
                candidate.check_mesh(sizes)
            except ConfigError:
                continue
            parts = memory.training(candidate, sizes, dtype=dtype, flash=True, platform=devices.chip.platform)
            if parts.peak <= HEADROOM * devices.chip.hbm:
                step = projected(candidate, devices, sizes, dtype, parts.moved)
                found.append(Proposal(candidate, sizes, parts, step))
    return found


def projected(
    run: RunConfig, devices: Devices, sizes: dict[str, int], dtype: jnp.dtype, host: float
) -> projection.Projection:
    """The projection by formulas, of a device that copies `host` bytes from and to its host.

    Tensor parallelism is exposed, and weights are gathered while a layer computes.
    """
    shape = memory.share(run, sizes, dtype)
    exposed: dict[int, float] = {}
    overlapped: dict[int, float] = {}
    for axis, sent in projection.wire_bytes(run, sizes, shape).items():
        sends, ports = exposed if axis == "heads" else overlapped, projection.ports(devices, sizes, axis)
        sends[ports] = sends.get(ports, 0.0) + sent
    return projection.project(
        run,
        devices,
        exposed=exposed,
        overlapped=overlapped,
        host=host,
        stages=shape.stages,
        microbatches=shape.microbatches,
    )


def meshes(run: RunConfig, devices: Devices) -> Iterator[dict[str, int]]:
    """The mesh sizes that are worth a look: powers of two, and copies of the model across slices."""
    inside = devices.count // devices.slices
    data, fsdp, stage, context, tensor = AXES
    for t, c in itertools.product(_powers(min(_MAX_TENSOR, inside)), _powers(min(16, inside))):
        if inside % (t * c) or (c > 1 and run.data.sequence_length < _LONG):
            continue
        rest = inside // (t * c)
        for s, f in itertools.product(_STAGES if rest >= _MANY else (1,), _divisors(rest)):
            copies = rest // f // s
            if f * s * copies == rest and (copies <= 64 or f == rest) and run.shape.num_layers % s == 0:
                yield {data: devices.slices * copies, fsdp: f, stage: s, context: c, tensor: t}


def _candidates(run: RunConfig, sizes: dict[str, int], batch: int | None) -> Iterator[RunConfig]:
    """The run with each batch, accumulation and rematerialization that a mesh divides."""
    split, stages = memory.parts(sizes, "batch"), memory.parts(sizes, "layers")
    for rows, accumulate, remat in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), _REMAT):
        total = split * rows * accumulate
        if rows < stages:
            continue
        if (batch is not None and total != batch) or total * run.data.sequence_length > 1 << 24:
            continue
        yield dataclasses.replace(
            run,
            data=dataclasses.replace(run.data, batch_size=total),
            train=dataclasses.replace(run.train, accumulate=accumulate, remat=remat, microbatches=rows * (stages > 1)),
        )


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length()) if 1 << i <= most]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0 and (d & (d - 1) == 0 or d == n)]
