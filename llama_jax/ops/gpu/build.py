"""Compiles CUDA C++ for the GPU in use with NVRTC, the compiler that jax's CUDA packages bring as a library.

The result is PTX, which XLA launches as a kernel of a program, so that it is part of CUDA graphs and needs no other
library. The source is compiled for constant shapes, in about half a second each.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from llama_jax import parallel

HERE = Path(__file__).parent
HEADERS = ("device.cuh", "numbers.cuh", "units.cuh")  # they come before every source
_TARGET = "__gpu$xla.gpu.ptx"  # XLA's custom call that launches a kernel which is given as PTX
_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12")
_CAPABILITIES = (80, 90)  # compute capabilities that the source is compiled for; later GPUs run the last
# The version of PTX that CUDA 12.0 reads. NVRTC writes its own, which an older driver refuses.
_PTX = "8.0"


class Chip(NamedTuple):
    """The resources of a GPU that the blocks of a launch share.

    Attributes:
        processors: streaming multiprocessors.
        shared: bytes of shared memory that the blocks of a processor can have, with 1 KiB for each block's own use.
    """

    processors: int
    shared: int


_SHARED = {80: 164, 86: 100, 87: 164, 89: 100, 90: 228, 100: 228, 103: 228, 110: 228, 120: 100, 121: 100}  # KiB


def chip() -> Chip:
    """The GPU of the program that is being traced."""
    known = [capability for capability in _SHARED if capability <= parallel.compute_capability()]
    shared = _SHARED[max(known)] if known else 100
    return Chip(int(getattr(parallel.device(), "core_count", 132)), 1024 * shared)


@functools.cache
def compiler() -> ctypes.CDLL | None:
    """NVRTC, or None where it is not installed."""
    for path in candidates():
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


def version() -> str:
    """The version of NVRTC."""
    nvrtc, major, minor = compiler(), ctypes.c_int(), ctypes.c_int()
    if nvrtc is not None:
        nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def candidates() -> Iterator[str]:
    """Paths of NVRTC in the packages of jax, then its names for the system's search."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or [] if spec else []:
        for name in _NAMES:
            yield from map(str, sorted(Path(root).glob(f"*/lib/{name}")))
    yield from _NAMES


@functools.lru_cache(maxsize=1024)
def ptx(name: str, capability: int, constants: tuple[tuple[str, str | int], ...]) -> str:
    """The PTX of the kernel `name`.cu for a GPU of this compute capability (90 for 9.0), with constants of its source.

    Raises:
        RuntimeError: NVRTC refuses the source.
    """
    nvrtc = compiler()
    assert nvrtc is not None
    target = max(known for known in _CAPABILITIES if known <= capability)
    source = "".join((HERE / file).read_text() for file in (*HEADERS, f"{name}.cu"))
    options = [f"-arch=compute_{target}", "-std=c++17", *(f"-D{key}={value}" for key, value in constants)]
    program = ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None))
    try:
        as_bytes = [option.encode() for option in options]
        status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*as_bytes))
        if status:
            raise RuntimeError(f"NVRTC refuses {name}.cu: {_text(nvrtc, program, 'ProgramLog')[:500]}")
        return re.sub(r"\.version \d+\.\d+", f".version {_PTX}", _text(nvrtc, program, "PTX"), count=1)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def call(
    name: str,
    constants: Mapping[str, str | int],
    operands: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    threads: int,
    shared: int,
    in_place: Mapping[int, int] | None = None,
) -> list[jax.Array]:
    """The results of a kernel, whose arguments are the operands and the results, in this order.

    Args:
        name: the kernel, of the file with this name.
        constants: constants of its source.
        operands: arrays in row-major layout.
        results: shape and dtype of each result.
        grid: number of blocks in x, y and z; 1 if it is not given.
        threads: threads of a block.
        shared: bytes of shared memory of a block.
        in_place: the number of the result that has the memory of an operand, by the operand's number.
    """
    text = ptx(name, parallel.compute_capability(), tuple(constants.items()))
    sizes = {f"grid_{axis}": n for axis, n in zip("xyz", (*grid, 1, 1), strict=False)}
    sizes |= {f"block_{axis}": n for axis, n in zip("xyz", (threads, 1, 1), strict=True)}
    attributes = {key: np.int32(n) for key, n in (sizes | {"shared_mem_bytes": shared}).items()}
    launch = jax.ffi.ffi_call(_TARGET, results, vmap_method="sequential", input_output_aliases=dict(in_place or {}))
    return list(launch(*operands, name=name, kernel_type="ptx", kernel_data=text, **attributes))


def float32(number: float) -> str:
    """A float32 constant of C++."""
    return f"{float(number)!r}f"


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    _check(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(getattr(nvrtc, f"nvrtcGet{what}")(program, text))
    return text.value.decode()


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC failed with status {status}")
