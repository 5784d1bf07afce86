"""Sampling speed compared with transformers on this machine: python benchmarks/inference.py

A model of the shape `160m` (llama_jax.config) with random weights is written as a Hugging Face folder, which both read.
Each row of the table is the median of alternating turns, so that other load on the machine affects both equally. The
time to the first token is measured in a new process each time, with a warm compilation cache. Without torch and
transformers, only our own results are printed. Takes about five minutes.

    pip install torch transformers   # for the comparison
    python benchmarks/inference.py --turns 5
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PREFILL, NEW = 512, 64
TASKS = (f"prefill {PREFILL}", "decode, 1 row", "decode, 8 rows")

OURS_FIRST_TOKEN = """
import sys, time
from llama_jax import compilation_cache
from llama_jax.infer.load import load
from llama_jax.params import init_params
compilation_cache.enable()
print(load({folder!r}, dtype={dtype!r}).generate(list(range(10, 26)), max_new_tokens=1, temperature=0).tokens)
"""
THEIRS_FIRST_TOKEN = """
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads({threads})
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=getattr(torch, {dtype!r}))
ids = torch.arange(10, 26)[None]
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0)
print(out[0, 16:].tolist())
"""


def write_model(folder: Path, name: str) -> None:
    """Writes a model of the shape `name` with random float32 weights as a Hugging Face folder."""
    import jax

    from llama_jax import config
    from llama_jax.params import init_params, unstack
    from llama_jax.weights import export
    from llama_jax.weights.model_files import Metadata

    shape = config.size(name)
    params = unstack(jax.jit(init_params, static_argnums=0)(shape, jax.random.key(0)))
    metadata = Metadata()
    export.save(folder, shape, export.leaves_of(shape, params), metadata, format="hf", dtype="float32")


def prompts(rows: int, length: int) -> list[list[int]]:
    """Prompts of distinct token ids, the same for both implementations."""
    return [[(7 * i + 13 * row) % 30_000 + 10 for i in range(length)] for row in range(rows)]


def ours(folder: Path, dtype: str):
    """One function for each task, which runs one turn of it with llama_jax and returns tokens per second."""
    import numpy as np

    from llama_jax.infer.load import load
    from llama_jax.infer.request import Fill, Request
    from llama_jax.sampling_params import SamplingParams

    engine = load(folder, dtype=dtype).engine
    greedy = SamplingParams(temperature=0.0)

    def start(rows: int, length: int) -> list[Fill]:
        """Makes an empty batch; returns its prompts without their last tokens, which belong to the decode loop."""
        engine.clear()
        engine.resize([], rows=rows, capacity=engine.capacity_for(length + NEW))
        engine.state.tokens_B.block_until_ready()
        return [Fill(row, 0, np.array(ids[:-1], np.int32)) for row, ids in enumerate(prompts(rows, length))]

    def prefill() -> float:
        fills = start(1, PREFILL + 1)
        begin = time.perf_counter()
        engine.prefill(fills)
        engine.state.tokens_B.block_until_ready()
        return PREFILL / (time.perf_counter() - begin)

    def decode(rows: int) -> float:
        engine.prefill(start(rows, 16))
        asked = [Request(tokens=ids, max_new_tokens=NEW, sampling=greedy) for ids in prompts(rows, 16)]
        engine.insert(dict(enumerate(asked)))
        engine.state.tokens_B.block_until_ready()
        begin = time.perf_counter()
        engine.decode([True] * rows, limit=NEW, longest=15)
        return rows * NEW / (time.perf_counter() - begin)

    return dict(zip(TASKS, (prefill, lambda: decode(1), lambda: decode(8)), strict=True))


def theirs(folder: Path, dtype: str):
    """The functions of `ours` for transformers: its forward pass with a cache in a minimal greedy loop."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def prefill() -> float:
        ids = torch.tensor(prompts(1, PREFILL))
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        return PREFILL / (time.perf_counter() - start)

    @torch.inference_mode()
    def decode(rows: int) -> float:
        out = model(torch.tensor(prompts(rows, 16)), use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(NEW):
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(ids, past_key_values=out.past_key_values, use_cache=True)
        return rows * NEW / (time.perf_counter() - start)

    return dict(zip(TASKS, (prefill, lambda: decode(1), lambda: decode(8)), strict=True))


def first_token(code: str) -> float:
    """The seconds from the start of a new process until it prints its first token."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="160m")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    options = parser.parse_args()
    dtypes = options.dtypes.split(",")
    peers = ["ours"]
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        peers.append("transformers")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, options.size)
        rates: dict[tuple[str, str, str], float] = {}
        for dtype in dtypes:
            tasks = {"ours": ours(folder, dtype)}
            if "transformers" in peers:
                tasks["transformers"] = theirs(folder, dtype)
            for task in TASKS:
                turns: dict[str, list[float]] = {peer: [] for peer in peers}
                for turn in range(options.turns + 1):  # the first compiles
                    for peer in peers:
                        rate = tasks[peer][task]()
                        if turn:
                            turns[peer].append(rate)
                for peer in peers:
                    rates[task, peer, dtype] = statistics.median(turns[peer])
                    print(f"{task:16} {peer:13} {dtype:9} {rates[task, peer, dtype]:9.1f} tokens/s", flush=True)
        codes = {
            (peer, dtype): code.format(folder=name, dtype=dtype, threads=os.cpu_count() or 1)
            for peer, code in (("ours", OURS_FIRST_TOKEN), ("transformers", THEIRS_FIRST_TOKEN))
            for dtype in dtypes
            if peer in peers
        }
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in codes}
        for turn in range(options.turns + 1):
            for key, code in codes.items():
                elapsed = first_token(code)
                if turn:
                    seconds[key].append(elapsed)
        print(f"\n| {options.size}, best dtype of each | ours | transformers | ratio |\n|---|---|---|---|")
        for task in TASKS:
            best = {p: max((rates[task, p, d], d) for d in dtypes) for p in peers}
            print_row(task, best, "tokens/s", 1)
        best = {p: min((statistics.median(seconds[p, d]), d) for d in dtypes) for p in peers}
        print_row("start to first token", best, "s", 2)


def print_row(task: str, best: dict[str, tuple[float, str]], unit: str, digits: int) -> None:
    cells = [f"{value:,.{digits}f} {unit} ({dtype})" for value, dtype in best.values()]
    values = [value for value, _ in best.values()]
    ratio = f"{values[0] / values[1]:.2f}" if len(values) == 2 else ""
    print(f"| {task} | {' | '.join(cells)} | {ratio} |")


if __name__ == "__main__":
    main()
