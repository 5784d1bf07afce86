"""Facts about a program that the compiler of absent devices has compiled, or has refused for its memory."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax

from llama_jax.plan import hlo, traffic
from llama_jax.plan.devices import GIB, Devices


def facts_of(lowered: jax.stages.Lowered, devices: Devices, islands: Sequence[int] = ()) -> dict[str, Any]:
    """Compiles a lowered program. Returns its memory, collectives, kernels and products as a JSON-able dict.

    `islands` has the host or slice of each device (`hlo.collectives`).

    `fits` is False if the compiler refuses the program for its memory, or if the peak is more than the memory of a
    device. `loop_bytes` are those that a turn of a loop, such as a decode step, moves to and from a TPU's memory.
    """
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = bytes_needed(str(error))
        if needed is None:
            raise
        return {"fits": False, "peak_bytes": needed}
    memory: Any = executable.memory_analysis()
    text = executable.as_text() or ""
    peak = memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes  # it counts both memories
    return {
        "fits": peak <= devices.chip.hbm,
        "peak_bytes": peak,
        "host_bytes": memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes,
        "collectives": [vars(one) for one in hlo.collectives(text, islands)],
        "kernels": hlo.kernels(text),
        "loop_bytes": traffic.bytes_of_step(text) if devices.chip.platform == "tpu" else None,
        "operations": hlo.operations(text),
    }


def bytes_needed(message: str) -> int | None:
    """The bytes that a program needs, from the compiler's message that it does not fit; None for any other message."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    match = re.search(r"Used ([\d.]+)([KMG]) of", message) or re.search(
        r"([\d.]+)([KMG])\)? (?:of|out of|exceeds)", message
    )
    scale = {"K": 1 << 10, "M": 1 << 20, "G": GIB}
    return math.ceil(float(match[1]) * scale[match[2]]) if match else 0
