"""Time the CUDA kernel for layers of a decode step by itself, with several tilings.

    pip install cupy-cuda13x
    python benchmarks/gpu_tilings.py                          # 16 layers of 8B, in seconds
    python benchmarks/gpu_tilings.py --bits 4 --stages 4 6 --parts 5 10 --live 131008

Weights are random and not in the L2 cache. `ideal` is the time of reading weights and live cache at the bandwidth that
the script measures. Results of tilings are compared with those of the first.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import cache as caches
from llama_jax.config import SIZES, ModelConfig
from llama_jax.ops import rope
from llama_jax.ops.gpu import build, check, layers

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch of layers.cu as `layers.decode` asks for it.

    Attributes:
        constants: those of the source.
        operands, results: their shapes and dtypes.
        options: grid, threads and bytes of shared memory.
    """

    constants: dict[str, str | int]
    operands: Sequence[jax.ShapeDtypeStruct]
    results: Sequence[jax.ShapeDtypeStruct]
    options: dict[str, Any]


def launch(config: ModelConfig, bits: int, kv: str, live: int, tiling: dict[str, int]) -> Launch:
    """The launch for a cache with `live` slots; `tiling` replaces fields of the tiling that is usual."""
    found: list[Launch] = []

    def call(_: str, constants: Any, operands: Any, results: Any, **options: Any) -> list[jax.Array]:
        found.append(Launch(constants, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands], results, options))
        return [jnp.zeros(result.shape, result.dtype) for result in results]

    def step() -> Any:
        capacity = -(-(live + 256) // 16) * 16
        cache = caches.init_cache(config, batch=1, capacity=capacity, dtype=jnp.bfloat16, kv=kv)
        weights = [check._random_layer(config, bits, jnp.bfloat16, 0) for _ in range(config.num_layers)]
        position, x = jnp.full((1, 1), live), jnp.zeros((1, 1, config.embed_dim), jnp.bfloat16)
        window = caches.window(cache, position, None)
        return layers.decode(config, weights, x, rope.rotations(config, position), window, cache)

    usual, usual_call = layers.tiling, build.call
    layers.tiling = lambda *arguments: usual(*arguments)._replace(**tiling)  # type: ignore[union-attr]
    build.call = call  # type: ignore[assignment]
    try:
        jax.eval_shape(step)
    finally:
        layers.tiling, build.call = usual, usual_call
    if len(found) > 1:
        raise SystemExit(f"{config.num_layers} layers take {len(found)} launches: use fewer --layers")
    return found[0]


def cubin(constants: dict[str, str | int], capability: int) -> bytes:
    """The program of a GPU for layers.cu with constants."""
    nvrtc, program = build.compiler(), ctypes.c_void_p()
    assert nvrtc is not None, "NVRTC is not installed"
    source = "".join((build.HERE / name).read_text() for name in (*build.HEADERS, "layers.cu"))
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"layers.cu", 0, None, None)
    options = [f"-arch=sm_{capability}", "-std=c++17", *(f"-D{key}={value}" for key, value in constants.items())]
    as_bytes = [option.encode() for option in options]
    assert nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*as_bytes)) == 0
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, text)
    return text.raw


def arrays(cp: Any, asked: Launch, live: int, weights: Any, scales: Any) -> tuple[tuple[Any, ...], list[Any]]:
    """Device addresses of the arguments, and arrays to keep; the last three are x, and two of no use.

    Weights and scales are parts of large random arrays.
    """
    at = {"weights": 0, "scales": 0}

    def part(name: str, pool: Any, nbytes: int) -> int:
        at[name] = at[name] if at[name] + nbytes <= pool.nbytes else 0
        at[name] += nbytes
        return pool.data.ptr + at[name] - nbytes

    held, addresses = [], []
    for operand in asked.operands:
        nbytes = int(np.prod(operand.shape)) * operand.dtype.itemsize
        if len(operand.shape) == 2 and operand.dtype == jnp.float16:
            addresses.append(part("scales", scales, nbytes))
        elif len(operand.shape) == 2 and operand.shape[0] > 1:
            addresses.append(part("weights", weights, nbytes))
        else:
            if operand.dtype == jnp.int32:
                array = cp.full(1, live, cp.int32)
            elif operand.dtype == jnp.float32:
                array = cp.full(nbytes // 4, 0.7071, cp.float32)  # cosines and sines
            elif operand.dtype == jnp.bfloat16 and len(operand.shape) in (1, 3):
                array = cp.full(nbytes // 2, 0x3F80, cp.uint16)  # ones
            else:
                array = cp.zeros(nbytes, cp.uint8)
            held.append(array)
            addresses.append(array.data.ptr)
    in_place = {result: operand for operand, result in asked.options["in_place"].items()}
    for i, result in enumerate(asked.results):
        if i not in in_place:
            held.append(cp.zeros(int(np.prod(result.shape)) * result.dtype.itemsize, cp.uint8))
        addresses.append(addresses[in_place[i]] if i in in_place else held[-1].data.ptr)
    return tuple(np.uint64(address) for address in addresses), held


def loaded(cp: Any, program: bytes, asked: Launch) -> Any:
    """The kernel of a program on the GPU."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program)
        file.flush()
        kernel = cp.RawModule(path=file.name).get_function("layers")
    kernel.max_dynamic_shared_size_bytes = asked.options["shared"]
    return kernel


def best(cp: Any, run: Callable[[], Any], turns: int = 5) -> float:
    """The least seconds of a run, after one that is not counted."""
    times = []
    for _ in range(1 + turns):
        start, end = cp.cuda.Event(), cp.cuda.Event()
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(cp.cuda.get_elapsed_time(start, end) / 1e3)
    return min(times[1:])


def main() -> int:
    """Times every combination of the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="*", default=[16, 8, 4], choices=(16, 8, 4))
    parser.add_argument("--kv", default="compute", choices=("compute", "int8"))
    parser.add_argument("--live", type=int, default=1024, help="live slots of the cache")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--stages", type=int, nargs="*", default=[3, 6, 10])
    parser.add_argument("--parts", type=int, nargs="*", default=[3, 5, 10, 16])
    options = parser.parse_args()
    import cupy as cp

    config = dataclasses.replace(SIZES["llama3.1-8b"], num_layers=options.layers, max_seq_len=options.live + 512)
    weights = (0.012 * cp.random.standard_normal(GIB, dtype=cp.float32)).view(cp.uint32) >> 16
    weights = weights.astype(cp.uint16)  # 2 GiB of bfloat16
    scales = (0.001 * cp.abs(cp.random.standard_normal(GIB // 8, dtype=cp.float32))).astype(cp.float16)
    words = weights.view(cp.uint32)
    bandwidth = weights.nbytes / best(cp, lambda: words.max())
    print(f"{cp.cuda.runtime.getDeviceProperties(0)['name'].decode()}, {bandwidth / 1e12:.2f} TB/s", flush=True)
    capability = int(cp.cuda.Device().compute_capability)
    asked = [
        (bits, stages, parts, launch(config, bits, options.kv, options.live, {"stages": stages, "parts": parts}))
        for bits, stages, parts in itertools.product(options.bits, options.stages, options.parts)
    ]
    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(lambda item: cubin(item[-1].constants, capability), asked))
    expected: dict[int, np.ndarray] = {}
    for (bits, stages, parts, one), program in zip(asked, programs, strict=True):
        kernel = loaded(cp, program, one)
        arguments, held = arrays(cp, one, options.live, weights, scales)
        grid, threads, shared = one.options["grid"], one.options["threads"], one.options["shared"]
        took = best(cp, lambda k=kernel, a=arguments, g=grid, t=threads, s=shared: k(g, (t,), a, shared_mem=s))
        moved = sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in one.operands if len(a.shape) == 2)
        moved += options.live * config.cache_bytes_per_token(1 if options.kv == "int8" else 2)
        out = held[-3].view(cp.uint16).get().astype(np.uint32) << 16
        first = expected.setdefault(bits, out.view(np.float32))
        gap = float(np.linalg.norm(out.view(np.float32) - first) / np.linalg.norm(first))
        each = 1e6 / options.layers
        print(
            f"{bits} bits, {stages} stages, {parts} parts: {took * each:.1f} microseconds a layer, "
            f"ideal {moved / bandwidth * each:.1f}, differs by {gap:.1e}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
