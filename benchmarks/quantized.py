"""Decoding speed of quantized weights, compared with dequantized ones: python benchmarks/quantized.py

A model of the shape `160m` with random weights is written as GGUF files in Q8_0, Q4_0 and float32. Each file is loaded
quantized and as plain arrays. The result of each task is the median of alternating turns. Takes about two minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
NEW = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    import jax

    from llama_jax import config
    from llama_jax.infer.llama import Llama
    from llama_jax.infer.load import load
    from llama_jax.params import init_params

    dense = Llama(config.size("160m"), init_params(config.size("160m"), jax.random.key(0)), dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        held = {"float32": dense}
        for dtype in ("q8_0", "q4_0"):
            held[dtype] = load(dense.save(f"{folder}/{dtype}.gguf", "gguf", dtype=dtype))
        times: dict[tuple[str, int], list[float]] = {}
        for turn in range(options.turns + 1):
            for name, llama in held.items():
                for rows in (1, 8):
                    prompts = [[(7 * i + 13 * row) % 30_000 for i in range(16)] for row in range(rows)]
                    start = time.perf_counter()
                    llama.generate(prompts, max_new_tokens=NEW, temperature=0, stop_tokens=())
                    if turn:  # the first compiles
                        times.setdefault((name, rows), []).append(time.perf_counter() - start)
        for (name, rows), seconds in times.items():
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(held[name].params))
            speed = rows * NEW / statistics.median(seconds)
            print(
                json.dumps({"weights": name, "megabytes": round(size / 1e6), "rows": rows, "tokens/s": round(speed, 1)})
            )


if __name__ == "__main__":
    main()
