"""Loading speed of a checkpoint, compared with `cat FILES > /dev/null` on the same warm files, and its peak memory.

    python benchmarks/loading.py [--gigabytes 4] [--repeat 5]

It writes a bfloat16 checkpoint of that size in each format to a temporary folder and loads it, each time in a new
process. The first run is not counted, because a virtual machine provides a page for the first time many times more
slowly than later. It prints the medians of alternating runs, their ratio, and the ratio of peak resident memory (the
operating system's VmHWM, of which the interpreter and jax take 0.2 GB) to the size of the weights.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

_LOAD = """
import json, sys, time
import jax
sys.path.insert(0, {root!r})
from llama_jax.weights.open import open_source
jax.devices()
status = lambda: dict(line.split(":", 1) for line in open("/proc/self/status"))
start = time.perf_counter()
source = open_source({path!r})
params = jax.block_until_ready(source.load(None, None, True))
seconds = time.perf_counter() - start
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps([seconds, size, int(status()["VmHWM"].split()[0]) * 1024]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--formats", default="hf,meta,gguf")
    options = parser.parse_args()
    for format in options.formats.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = _write(Path(folder), format, options.gigabytes * 1e9)
            print(json.dumps({"format": format, **_measure(path, options.repeat)}))


def _write(folder: Path, format: str, size: float) -> Path:
    """Writes a bfloat16 model of about `size` bytes. Its weights repeat one block of random values."""
    import dataclasses

    import ml_dtypes
    import numpy as np

    from llama_jax.config import SIZES
    from llama_jax.weights import export, name_table
    from llama_jax.weights.model_files import Metadata
    from llama_jax.weights.tensor import of_array

    scaling = SIZES["llama3.1-8b"].rope_scaling
    config = dataclasses.replace(SIZES["llama3.2-1b"], vocab_size=32_768, num_layers=1, rope_scaling=scaling)
    layer = dataclasses.replace(config, num_layers=2).num_params - config.num_params
    config = dataclasses.replace(config, num_layers=max(1, round((size / 2 - config.num_params) / layer)))
    largest = max(int(np.prod(weight.shape)) for weight in name_table.weights(config, "huggingface"))
    noise = np.random.default_rng(0).standard_normal(largest, np.float32).astype(ml_dtypes.bfloat16)
    leaves = {
        weight.path: of_array(
            lambda shape=weight.shape: noise[: int(np.prod(shape))].reshape(shape), noise.dtype, weight.shape
        )
        for weight in name_table.weights(config, "huggingface")
    }
    metadata = Metadata()
    path = folder / "model.gguf" if format == "gguf" else folder
    return export.save(path, config, leaves, metadata, format=format, dtype="bfloat16")


def _measure(path: Path, repeat: int) -> dict[str, float]:
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".pth"))
    load = _LOAD.format(root=str(ROOT), path=str(path))
    cats, loads, peaks = [], [], []
    for i in range(repeat + 1):
        start = time.perf_counter()
        with open("/dev/null", "wb") as null:
            subprocess.run(["cat", *files], check=True, stdout=null)
        cat = time.perf_counter() - start
        seconds, size, peak = json.loads(subprocess.check_output([sys.executable, "-c", load], text=True))
        if i:  # the first warms the page cache and the machine's memory
            cats.append(cat)
            loads.append(seconds)
            peaks.append(peak / size)
    return {
        "gigabytes": round(size / 1e9, 2),
        "cat_seconds": round(statistics.median(cats), 3),
        "load_seconds": round(statistics.median(loads), 3),
        "load_best": round(min(loads), 3),
        "cat_over_load": round(statistics.median(c / s for c, s in zip(cats, loads, strict=True)), 2),
        "peak_over_weights": round(max(peaks), 3),
    }


if __name__ == "__main__":
    main()
