"""Choices that depend on the platform."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.errors import ConfigError

_log = logging.getLogger(__name__)


@functools.cache
def cpu_features() -> frozenset[str]:
    """Names of this machine's processor features as Linux spells them, such as avx512_bf16; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(word for line in named for word in line.split())


def has_bfloat16(device: jax.Device) -> bool:
    """True if a device multiplies bfloat16.

    These are TPUs, NVIDIA GPUs of compute capability 8.0 (Ampere) and above, and processors with avx512_bf16 or AMX, as
    far as Linux names them. On other processors bfloat16 is slower than float32.
    """
    if device.platform == "cpu":
        return not cpu_features().isdisjoint({"avx512_bf16", "amx_bf16"})
    try:
        return float(getattr(device, "compute_capability", "") or 8) >= 8
    except ValueError:  # the name of another maker's chip
        return True


def check_fp8(mesh: Mesh) -> None:
    """Checks that the devices multiply 8-bit floats: NVIDIA GPUs of compute capability 8.9 and above. CPUs emulate it.

    Raises:
        ConfigError: they do not.
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        _say_once("train.products=fp8 is emulated on a CPU, which is slower than train.products=compute")
        return
    try:
        able = device.platform in ("gpu", "cuda") and float(device.compute_capability) >= 8.9
    except (AttributeError, ValueError):  # another maker's chip
        able = False
    if not able:
        raise no_fp8(device.device_kind)


def no_fp8(device: str) -> ConfigError:
    """The error of a run with 8-bit products for a device that has none."""
    return ConfigError(
        f"train.products=fp8 needs NVIDIA GPUs of compute capability 8.9 or above, and this is {device}: set "
        "train.products=compute"
    )


def compute_dtype(name: str, mesh: Mesh | None = None) -> jnp.dtype:
    """The dtype for a config value of `float32`, `bfloat16` or `auto`.

    `auto` is bfloat16 on devices that multiply it, and float32 on others: gradients in float16 would need a scaled
    loss. CPUs of several processes may differ, and have float32. In float32 a run gives the same losses on any mesh and
    any device, to about 1e-5. bfloat16 trains 1.5 times as fast on a CPU with avx512_bf16
    (docs/measurements/finetuning-speed.md).

    Args:
        name: the config value.
        mesh: the devices, where they are not the default ones: a plan is made for devices that are not here.
    """
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    if name == "auto":
        alike = device.platform != "cpu" or jax.process_count() == 1
        name = "bfloat16" if alike and has_bfloat16(device) else "float32"
        if name == "float32" and device.platform != "cpu":
            _say_once(
                f"{device.device_kind} has no bfloat16, so that training runs in float32, at about an eighth of the "
                "speed of float16; sampling runs in float16"
            )
    return jnp.dtype(name)


@functools.cache
def _say_once(text: str) -> None:
    _log.warning("%s", text)


def named_dtype(name: str) -> jnp.dtype:
    """The compute dtype of a config value on an accelerator."""
    return jnp.dtype("bfloat16" if name == "auto" else name)
