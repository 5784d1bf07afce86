"""Time the tilings of the CUDA kernel of few rows on a GPU, beside the kernels that it replaces.

    python benchmarks/gpu_tilings.py                         # 8B's weights, one row, in about two minutes
    python benchmarks/gpu_tilings.py --rows 8 --bits 4 8

Each line is one product: microseconds by tiling (warps, tiles, stages, parts, blocks), the fastest first. Several
copies of the weights are multiplied in turn, so that none is in a cache. `ideal` is the time of reading the weights at
the bandwidth that the script measures.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import jax
import jax.numpy as jnp
from accelerator_sections import Size, peaks, seconds

from llama_jax.ops import few_rows_gpu, gpu, quant
from llama_jax.ops.gpu import build, products

D, F, V = 4096, 14336, 128256
PRODUCTS = {
    "q, k, v": [(D, D), (1024, D), (1024, D)],
    "o": [(D, D)],
    "gate, up": [(F, D), (F, D)],
    "down": [(D, F)],
    "unembed": [(V, D)],
}
FEW = [(8, 1, 4, 2), (8, 1, 3, 2), (8, 1, 3, 3), (8, 1, 6, 1), (4, 1, 4, 4), (4, 1, 6, 2), (16, 1, 3, 1), (16, 1, 4, 1)]
MANY = [(2, 4, 4, 1), (1, 8, 4, 1), (4, 2, 4, 1), (2, 4, 3, 1), (1, 4, 4, 2), (4, 4, 3, 1), (2, 8, 3, 1)]
_BYTES = 240 << 20  # of all copies of the weights: more than any cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def draw(shape: tuple[int, ...], bits: int, seed: int) -> Any:
    """A random weight in 16, 8 or 4 bits."""
    weight = 0.02 * jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
    return quant.quantize(weight.astype(jnp.float32), bits) if bits < 16 else weight


def tilings(bits: int, rows: int, width: int) -> Iterator[products.Tiling]:
    """The tilings to time, with as many parts of the inputs as shared memory asks for."""
    shared = build.chip().shared
    for warps, tiles, stages, blocks in FEW if rows <= 8 else MANY:
        for parts in range(1, math.ceil(width * bits / 1024) + 1):
            tiling = products.Tiling(warps, tiles, stages, parts, blocks)
            if (products.shared_bytes(bits, rows, width, tiling) + 1024) * blocks <= shared:
                yield tiling
                break


def lowered(module: Any, tiling: products.Tiling | None, arguments: Any) -> Any:
    """The products with all copies of the weights by a module that has `linears`, with a tiling if one is given."""

    def run(x: jax.Array, copies: Any) -> list[list[jax.Array]]:
        return [module.linears(x, weights, dtype=x.dtype) for weights in copies]

    usual = products.tiling
    if tiling is not None:
        products.tiling = lambda *_: tiling
    try:
        return jax.jit(run).lower(*arguments)
    finally:
        products.tiling = usual


def times(name: str, bits: int, rows: int, pool: ThreadPoolExecutor) -> list[tuple[float, str]]:
    """Microseconds of each tiling, and of the kernels in Pallas, the least first."""
    shapes = PRODUCTS[name]
    copies = max(2, min(24, _BYTES // bytes_of(name, bits)))
    weights = [[draw(shape, bits, 7 * i + j) for j, shape in enumerate(shapes)] for i in range(copies)]
    x = jax.random.normal(jax.random.key(rows), (rows, shapes[0][1]), jnp.bfloat16)
    programs: dict[str, Any] = {
        str(tuple(tiling)): lowered(gpu, tiling, (x, weights)) for tiling in tilings(bits, rows, shapes[0][1])
    }
    if few_rows_gpu.takes(x, weights[0]):
        programs["Pallas"] = lowered(few_rows_gpu, None, (x, weights))
    compiling = {key: pool.submit(program.compile) for key, program in programs.items()}
    wait(compiling.values())  # compiling would disturb the times
    found = []
    for key, job in compiling.items():
        try:
            run = functools.partial(job.result(), x, weights)
            found.append((1e6 * seconds(run, 3, calls=6) / copies, key))
        except jax.errors.JaxRuntimeError as error:
            found.append((math.inf, f"{key} failed: {str(error)[:100]}"))
    return sorted(found)


def bytes_of(name: str, bits: int) -> int:
    """Bytes of the weights of a product, with their scales."""
    return sum(math.prod(shape) for shape in PRODUCTS[name]) * (2 * bits + (bits < 16)) // 16


def main() -> int:
    """Times every product that the options name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1])
    parser.add_argument("--bits", type=int, nargs="*", default=[16, 8, 4], choices=(16, 8, 4))
    parser.add_argument("--products", nargs="*", default=list(PRODUCTS), choices=PRODUCTS)
    options = parser.parse_args()
    bandwidth = max(item["bytes"] / item["seconds"] for item in peaks(Size(matrix=1024)) if "bytes" in item)
    print(f"{jax.local_devices()[0].device_kind}, {bandwidth / 1e12:.2f} TB/s", flush=True)
    with ThreadPoolExecutor() as pool:
        for rows in options.rows:
            for bits in options.bits:
                for name in options.products:
                    ideal = 1e6 * bytes_of(name, bits) / bandwidth
                    row = "  ".join(f"{took:.1f} {key}" for took, key in times(name, bits, rows, pool))
                    print(f"{name}, {bits} bits, {rows} rows, ideal {ideal:.1f}:  {row}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
