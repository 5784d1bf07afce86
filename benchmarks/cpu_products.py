"""Products of few rows on a CPU, native kernels compared with XLA: python benchmarks/cpu_products.py

Twelve weights of 2048 x 2048 are multiplied in turn, so that they do not stay in the processor's cache. Each number is
the median of alternating turns, in GB of weights a second. Takes about a minute.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
SIZE, COUNT, TURNS = 2048, 12, 9


def main() -> None:
    import jax
    import jax.numpy as jnp

    from llama_jax.ops import linear, quant
    from llama_jax.ops.cpu import calls, ready

    if not ready():
        raise SystemExit("the CPU kernels cannot be used here: a warning above says why")
    bench = {
        "kernel": lambda x, w: calls.linears(x, [w], dtype=x.dtype)[0],
        "XLA": lambda x, w: linear._xla_f32(x, w).astype(x.dtype),
    }
    print("| weights, activations | rows | kernel | XLA |\n|---|---|---|---|")
    for kind, dtype in (
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("int8", "float32"),
        ("int8", "bfloat16"),
        ("int4", "float32"),
        ("int4", "bfloat16"),
    ):
        keys = jax.random.split(jax.random.key(0), COUNT)
        dense = [jax.random.normal(key, (SIZE, SIZE)) for key in keys]
        bits = {"int8": 8, "int4": 4}.get(kind)
        weights = [quant.quantize(w, bits) if bits else w.astype(kind) for w in dense]
        nbytes = sum(a.nbytes for a in jax.tree.leaves(weights))
        for rows in (1, 8):
            x = jax.random.normal(jax.random.key(1), (rows, SIZE)).astype(dtype)

            def chain(product, x, weights):
                for w in weights:
                    x = product(x, w) * jnp.asarray(SIZE**-0.5, x.dtype)
                return x

            runs = {name: jax.jit(lambda x, w, p=product: chain(p, x, w)) for name, product in bench.items()}
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range(TURNS + 1):
                for name, run in runs.items():
                    start = time.perf_counter()
                    run(x, weights).block_until_ready()
                    if turn:
                        seconds[name].append(time.perf_counter() - start)
            rates = [f"{nbytes / statistics.median(seconds[name]) / 1e9:.1f} GB/s" for name in bench]
            print(f"| {kind}, {dtype} | {rows} | {' | '.join(rates)} |", flush=True)


if __name__ == "__main__":
    main()
