"""FLOPs of a training step, bytes on the wire, and a projection of its time. No time here is measured.

The projection assumes that products reach EFFICIENCY of a device's peak, that overlapped collectives are hidden behind
them, and that collectives use their links at full speed: those within a host of GPUs or a slice of TPUs all links of a
device, and others the network (`speed`).

Letters as in `memory`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from llama_jax import parallel
from llama_jax.plan.devices import Chip, Devices
from llama_jax.plan.memory import Shape, parts
from llama_jax.run_config import RunConfig

EFFICIENCY = 0.6  # of peak, that products and attention reach; published runs are at 0.4 to 0.65 altogether


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of one step on all devices.

    Attributes:
        model: Operations of the forward and backward pass, causal attention counted once: the numerator of MFU.
        hardware: The same, with the operations that rematerialization repeats.
    """

    model: float
    hardware: float


@dataclasses.dataclass(frozen=True)
class Projection:
    """A projected step. Nothing of it is measured.

    Attributes:
        seconds: Time of a step.
        mfu: Model operations as a fraction of the devices' peak in that time.
        tokens_per_second: Tokens a second and chip.
        bubble: Fraction of the time that a pipeline's stages wait.
    """

    seconds: float
    mfu: float
    tokens_per_second: float
    bubble: float


def flops(run: RunConfig) -> Flops:
    """The operations of one training step, by the formulas of PaLM (arXiv:2204.02311, appendix B)."""
    m = run.shape
    tokens = run.data.batch_size * run.data.sequence_length
    matrices = 2 * m.matmul_params
    attention = 2 * m.num_layers * m.num_heads * m.head_dim * run.data.sequence_length  # causal: half of the scores
    forward = tokens * (matrices + attention)
    # A backward pass costs two forward passes; LoRA skips the half that makes gradients of the frozen weights.
    model = forward * (2 if run.lora.rank else 3) + (forward if run.train.objective == "dpo" else 0)
    layers = tokens * (matrices - 2 * m.vocab_size * m.embed_dim + attention)
    again = {
        "none": 0.0,
        "dots": 0.0,
        "attention": tokens * (matrices - 2 * m.vocab_size * m.embed_dim),
        "offload": tokens * (matrices - 2 * m.vocab_size * m.embed_dim),
        "full": layers,
    }
    return Flops(model, model + again[run.train.remat])


def wire_bytes(run: RunConfig, sizes: Mapping[str, int], shape: Shape) -> dict[str, float]:
    """Bytes that one device sends in a step by logical axis, by formulas: weights are gathered and gradients reduced
    along `embed`, activations along `heads`, gradients along `gathered_batch`, and keys and values along `length`.
    """
    m = run.shape
    layer = m.embed_dim * m.head_dim * (2 * m.num_heads + 2 * m.num_kv_heads) + 3 * m.embed_dim * m.ffn_dim
    weights = m.num_layers * layer / shape.tensor / shape.stages
    gathers = (3 if run.train.remat in ("full", "attention") else 2) * run.train.accumulate
    n = parts(sizes, "embed")
    fsdp = (n - 1) / n * weights * (shape.width * gathers + (0 if run.lora.rank else 4 * run.train.accumulate))
    tokens = shape.rows * shape.tokens * run.train.accumulate
    t = shape.tensor
    activations = 6 * 2 * (t - 1) / t * tokens * m.embed_dim * shape.width * m.num_layers / shape.stages
    copies = parts(sizes, "gathered_batch")
    data = 2 * (copies - 1) / copies * 4 * weights / n * (0 if run.lora.rank else 1)
    c = parts(sizes, "length")
    kv = 2 * m.num_kv_heads * m.head_dim / min(t, m.num_kv_heads) * shape.width
    context = 4 * (c - 1) * tokens * kv * m.num_layers / shape.stages
    return {"embed": fsdp, "heads": activations, "gathered_batch": data, "length": context}


def speed(chip: Chip, ports: int) -> float:
    """Bytes that a device sends in a second of a collective, whose `ports` are those of `hlo.Collective`.

    A collective of several hosts passes a host's border once in each of as many rings as it has devices there, since
    each device has its own port to the network.
    """
    return min(chip.link, ports * chip.network) if ports else chip.link


def ports(devices: Devices, sizes: Mapping[str, int], axis: str) -> int:
    """The ports (`hlo.Collective`) of a collective along a logical axis of a mesh whose last axis changes fastest."""
    members, inside, stride = 1, 1, 1
    for name in reversed(parallel.AXES):
        n = sizes.get(name, 1)
        if name in parallel.RULES["train"][axis]:
            members *= n
            inside *= max(1, min(n, devices.island // stride))
        stride *= n
    return inside if inside < members else 0


def project(
    run: RunConfig,
    devices: Devices,
    *,
    exposed: Mapping[int, float],
    overlapped: Mapping[int, float],
    host: float = 0.0,
    stages: int = 1,
    microbatches: int = 1,
) -> Projection:
    """The projected step on devices that send so many exposed and overlapped bytes each, by ports (`hlo.Collective`).

    Copies from and to the host (`host` bytes) are assumed to overlap nothing.
    """
    chip = devices.chip
    work = flops(run)
    bubble = (stages - 1) / (microbatches + stages - 1)
    compute = work.hardware / devices.count / (EFFICIENCY * chip.flops) / (1 - bubble)
    waiting, hidden = (
        sum(sent / speed(chip, number) for number, sent in sends.items()) for sends in (exposed, overlapped)
    )
    seconds = max(compute, hidden) + waiting + host / chip.host
    tokens = run.data.batch_size * run.data.sequence_length
    return Projection(
        seconds=seconds,
        mfu=work.model / (seconds * devices.count * chip.flops),
        tokens_per_second=tokens / seconds / devices.chips,
        bubble=bubble,
    )
