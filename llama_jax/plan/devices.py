"""The accelerators that a plan can be made for, and the names that describe a group of them. This module does not
import jax.

Sources: cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x: peak, bandwidth, interconnect, and the network of a host,
divided by its chips), jax-ml.github.io/scaling-book/tpus (the link to the host: 15 GB/s a chip, and 32 GB/s for v6e;
that of a tpu7x is assumed to be that of a v5p), and NVIDIA's data sheets of H100 SXM and H200 SXM (450 GB/s of NVLink
and 64 GB/s of PCIe in each direction) and of DGX H100 (one port of 400 Gb/s for each GPU). Usable memory of TPUs is
what their compiler allows a program (docs/measurements/tpu-compiler.md).
"""

from __future__ import annotations

import dataclasses
import math
import re

from llama_jax.errors import ConfigError, brief, nearest

GIB = 1 << 30
GPUS_PER_HOST = 8
_EXAMPLES = "v5p:4x4x4, v5e:16, v6e:4x8, tpu7x:2x2x1, v5p-128, h100:8"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
        platform: The compiler: "tpu" or "cuda".
        hbm: Usable bytes of memory of one device.
        flops: Peak bfloat16 operations of one device in a second.
        bandwidth: Bytes that one device reads from its memory in a second.
        link: Bytes that one device sends in a second to the devices of its slice or host, over all links.
        network: Bytes that one device sends in a second to devices of other slices or hosts.
        host: Bytes that one device copies in a second from or to the memory of its host.
        axes: Number of axes of the grid of chips in a slice; 0 for GPUs.
        largest: Number of chips in the largest slice, or of GPUs in a host.
        devices: jax devices of one chip.
        capability: Compute capability of a GPU times ten; 0 for TPUs.
    """

    platform: str
    hbm: int
    flops: float
    bandwidth: float
    link: float
    network: float
    host: float
    axes: int
    largest: int
    devices: int = 1
    capability: int = 0


CHIPS: dict[str, Chip] = {
    "v5e": Chip("tpu", int(15.75 * GIB), 197e12, 819e9, 200e9, 3.125e9, 15e9, 2, 256),
    "v5p": Chip("tpu", int(95.74 * GIB), 459e12, 2765e9, 600e9, 6.25e9, 15e9, 3, 8960),
    "v6e": Chip("tpu", int(31.25 * GIB), 918e12, 1640e9, 448e9, 12.5e9, 32e9, 2, 256),
    "tpu7x": Chip("tpu", int(94.75 * GIB), 1153e12, 3690e9, 600e9, 6.25e9, 15e9, 3, 9216, devices=2),
    # 0.95 of the memory of a GPU, which XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 gives to jax.
    "h100": Chip("cuda", int(0.95 * 84978434048), 989e12, 3350e9, 450e9, 50e9, 64e9, 0, GPUS_PER_HOST, capability=90),
    "h200": Chip("cuda", int(0.95 * 150754820096), 989e12, 4800e9, 450e9, 50e9, 64e9, 0, GPUS_PER_HOST, capability=90),
}


@dataclasses.dataclass(frozen=True)
class Devices:
    """A group of equal accelerators.

    Attributes:
        kind: A key of CHIPS.
        shape: Chips along each axis of the grid of one slice; for GPUs (hosts, GPUs of a host).
        slices: Number of TPU slices that only a slow network connects.
    """

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """The kind of accelerator."""
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """Number of chips in all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def count(self) -> int:
        """Number of jax devices in all slices."""
        return self.chips * self.chip.devices

    @property
    def island(self) -> int:
        """Number of jax devices in one host of GPUs or one slice of TPUs, which a slower network connects to others."""
        return self.shape[-1] if self.chip.platform == "cuda" else self.count // self.slices

    @property
    def speeds(self) -> dict[str, float]:
        """Bytes that one device is assumed to move in a second over each kind of link that these devices have."""
        speeds = {"link": self.chip.link, "network": self.chip.network, "host": self.chip.host}
        unused = {name for name, used in (("link", self.island > 1), ("network", self.island < self.count)) if not used}
        return {name: speed for name, speed in speeds.items() if name not in unused}

    @property
    def name(self) -> str:
        """The description that `parse` reads, e.g. "v5p:4x4x4", with the number of slices in front if not 1."""
        shape = str(self.chips) if self.chip.platform == "cuda" else "x".join(map(str, self.shape))
        return f"{f'{self.slices} x ' if self.slices > 1 else ''}{self.kind}:{shape}"


def parse(text: str, *, slices: int = 1) -> Devices:
    """The devices that a text describes: KIND:SHAPE, KIND:COUNT, KIND for one chip, or a Cloud TPU such as v5p-128.

    A count of TPU chips becomes the most compact grid of powers of two. The number in v5p-128 counts cores, of which a
    v5p chip has two; in v5e-16 and v6e-8 it counts chips. "2 x v5p:4x4x4" is the same as two `slices`.

    Raises:
        ConfigError: an unknown kind, a shape that the kind does not have, or slices of GPUs.
    """
    plain = text.strip().lower().replace("v5litepod", "v5e")
    several = re.fullmatch(r"(\d{1,9}) ?x ?([a-z].*)", plain)
    if several and slices == 1:
        slices, plain = int(several[1]), several[2]
    plain = f"{plain}:1" if plain in CHIPS else plain
    match = re.fullmatch(r"([a-z]\w*?)([:-])(\d{1,9}(?:x\d{1,9})*)", plain)
    kind = match[1] if match else re.split(r"[:-]", plain)[0]
    if kind not in CHIPS:
        near = nearest(kind, list(CHIPS)) or "."
        raise ConfigError(f"device {brief(text)} is not known{near} Kinds: {', '.join(CHIPS)}; e.g. {_EXAMPLES}")
    if match is None or (match[2] == "-" and ("x" in match[3] or kind == "tpu7x" or CHIPS[kind].platform == "cuda")):
        raise ConfigError(f"device {brief(text)} has a shape that cannot be read: write e.g. {_EXAMPLES}")
    numbers = tuple(int(n) for n in match[3].split("x"))
    if min(numbers) < 1 or slices < 1:
        raise ConfigError(f"device {brief(text)} with {slices} slices: every number must be at least 1")
    if match[2] == "-" and kind == "v5p":
        if numbers[0] % 2:
            raise ConfigError(f"device {brief(text)}: v5p-N counts cores, two a chip, so that N must be even")
        numbers = (numbers[0] // 2,)
    if CHIPS[kind].platform == "cuda":
        return _gpus(text, kind, numbers, slices)
    return _tpus(text, kind, numbers, slices)


def _gpus(text: str, kind: str, numbers: tuple[int, ...], slices: int) -> Devices:
    """GPUs by count, in hosts of eight, or as HOSTSxGPUS."""
    if slices > 1:
        raise ConfigError(f"{slices} slices: only TPUs have them. Give the number of all GPUs, e.g. {kind}:64")
    if len(numbers) == 2:
        return Devices(kind, numbers)
    count = numbers[0]
    if len(numbers) > 2 or (count > GPUS_PER_HOST and count % GPUS_PER_HOST):
        raise ConfigError(f"device {brief(text)}: GPUs come in hosts of {GPUS_PER_HOST}: give up to 8 or a multiple")
    hosts = max(1, count // GPUS_PER_HOST)
    return Devices(kind, (hosts, count // hosts))


def _tpus(text: str, kind: str, numbers: tuple[int, ...], slices: int) -> Devices:
    """A grid of TPU chips, or the most compact one of so many chips."""
    chip = CHIPS[kind]
    if len(numbers) == 1:
        numbers = _grid(numbers[0], chip.axes)
        if not numbers:
            raise ConfigError(f"device {brief(text)}: a count of chips must be a power of two, or give the grid itself")
    if len(numbers) != chip.axes:
        example = "x".join(["4"] * chip.axes)
        raise ConfigError(f"device {brief(text)}: {kind} has a grid of {chip.axes} axes, e.g. {kind}:{example}")
    if math.prod(numbers) > chip.largest:
        raise ConfigError(
            f"device {brief(text)} has {math.prod(numbers):,} chips, but a slice of {kind} has at most "
            f"{chip.largest:,}: use --slices"
        )
    return Devices(kind, numbers, slices)


def _grid(chips: int, axes: int) -> tuple[int, ...]:
    """The most compact grid of powers of two with so many chips; () if the count is no power of two."""
    if chips & (chips - 1):
        return ()
    power = chips.bit_length() - 1
    if axes == 2:
        return (1 << power // 2, 1 << (power - power // 2))
    if chips <= 4:
        return {1: (1, 1, 1), 2: (2, 1, 1), 4: (2, 2, 1)}[chips]
    return tuple(1 << (power + i) // 3 for i in range(3))
