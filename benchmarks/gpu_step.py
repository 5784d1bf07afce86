"""Print where the time of a decode step goes on a GPU: each kernel, its launches a step and its time.

python benchmarks/gpu_step.py                          # 8 layers of 8B, one row, in bfloat16, int8 and int4
LLAMA_JAX_GPU_KERNELS=off python benchmarks/gpu_step.py --rows 8    # without the CUDA kernels
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from accelerator_sections import SMALL, Size, decode_loop, model_shape, random_weights

from llama_jax import cache as caches


def kernels(run: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """The name, the number of launches and the seconds of each kernel of a run, those that take longest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = Path(folder).glob("**/*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    named = {(e["pid"], e.get("tid")): str(e["args"].get("name")) for e in events if e.get("name") == "thread_name"}
    launches: collections.Counter[str] = collections.Counter()
    seconds: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("ph") == "X" and named.get((event["pid"], event.get("tid")), "").startswith("Stream"):
            launches[event["name"]] += 1
            seconds[event["name"]] += event["dur"] / 1e6
    return [(name, launches[name], took) for name, took in seconds.most_common()]


def main() -> int:
    """Measures each kind of weights at each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1])
    parser.add_argument("--bits", type=int, nargs="*", default=[0, 8, 4], choices=(0, 8, 4), help="0 is bfloat16")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--small", action="store_true", help="small sizes, for any machine")
    options = parser.parse_args()
    size = dataclasses.replace(SMALL if options.small else Size(), decoder_layers=options.layers)
    shape = model_shape(size, options.layers)
    run = decode_loop(size, shape)
    for bits in options.bits:
        params = random_weights(shape, bits)
        for rows in options.rows:
            state = [
                jnp.ones((rows, 1), jnp.int32),
                caches.init_cache(shape, batch=rows, capacity=2 * size.live, dtype=jnp.bfloat16),
            ]

            def steps(state: list[Any] = state, params: Any = params) -> float:
                start = time.perf_counter()
                state[:] = jax.block_until_ready(run(params, state[1], state[0]))
                return (time.perf_counter() - start) / size.steps

            took = min([steps() for _ in range(1 + size.repeats)][1:])
            print(f"{bits or 16} bits, {rows} rows: {1e6 * took:.0f} microseconds a step", flush=True)
            for name, launches, seconds in kernels(steps):
                share = f"{launches / size.steps:5.1f} launches of {1e6 * seconds / launches:7.2f}"
                print(f"  {1e6 * seconds / size.steps:8.1f}  {share}  {name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
