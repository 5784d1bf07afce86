"""Choices that depend on the platform."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.errors import ConfigError

_log = logging.getLogger(__name__)


def has_bfloat16(device: jax.Device) -> bool:
    """True if a device multiplies bfloat16: TPUs, and NVIDIA GPUs of compute capability 8.0 (Ampere) and above.

    CPUs count too; their instructions differ, and `infer` looks at them.
    """
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

    `auto` is bfloat16 on accelerators and float32 on CPUs. In float32 a run gives the same losses on any mesh and any
    CPU. bfloat16 trains 1.6 times as fast on a CPU with avx512_bf16 (benchmarks/training.py). On a GPU that has no
    bfloat16, `auto` is float32: gradients in float16 would need a scaled loss.

    Args:
        name: the config value.
        mesh: the devices, where they are not the default ones: a plan is made for devices that are not here.
    """
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    if name == "auto":
        name = "float32" if device.platform == "cpu" or not has_bfloat16(device) else "bfloat16"
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
