"""Prefill and decoding on a CPU compared with transformers and llama.cpp in one run: python benchmarks/cpu.py

A model of the shape `160m` with random weights (or one that --model names) is written as a Hugging Face folder and as
GGUF files. Each contender has a process of its own and runs one task at a time, in turns, so that other load affects
all equally. A contender that is not installed is left out. Takes about six minutes; --only and --turns make it shorter.

    pip install torch transformers llama-cpp-python
    python benchmarks/cpu.py --turns 3
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PROMPT, SHORT, NEW = 512, 16, 48
TASKS = ("prefill", "decode 1", "decode 8")
CONTENDERS = (
    "ours bfloat16",
    "ours float32",
    "ours int8",
    "ours int4",
    "transformers bfloat16",
    "transformers float32",
    "llama.cpp bf16",
    "llama.cpp q8_0",
    "llama.cpp q4_0",
)
# On a busy machine, --one_core runs each contender on one processor and counts its own CPU seconds.
ONE_CORE = os.environ.get("ONE_CORE") == "1"
CLOCK = time.process_time if ONE_CORE else time.perf_counter
Run = Callable[[int, int, int], float]  # (rows, tokens of a prompt, new tokens) -> seconds


_runs = itertools.count()


def prompts(rows: int, length: int) -> list[list[int]]:
    """Prompts of token ids, the same for all contenders and other ones at each call, so that nobody reuses a cache."""
    run = next(_runs)
    return [[(7 * i + 13 * row + 101 * run) % 30_000 + 10 for i in range(length)] for row in range(rows)]


def ours(folder: Path, kind: str) -> Run:
    from llama_jax import compilation_cache
    from llama_jax.infer.load import load

    compilation_cache.enable()
    quantize = kind if kind.startswith("int") else None
    llama = load(folder / "hf", dtype=None if quantize else kind, quantize=quantize)

    def run(rows: int, length: int, new: int) -> float:
        start = CLOCK()
        llama.generate(prompts(rows, length), max_new_tokens=new, temperature=0, stop_tokens=(), batch_size=rows)
        return CLOCK() - start

    return run


def transformers(folder: Path, kind: str) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=getattr(torch, kind)).eval()
    threads: dict[tuple[int, int], int] = {}

    @torch.inference_mode()
    def run(rows: int, length: int, new: int) -> float:
        if (rows, length) not in threads:  # all processors are not always faster than one, so the faster is chosen
            threads[rows, length] = 0
            seconds = {}
            for count in range(1, len(os.sched_getaffinity(0)) + 1):
                torch.set_num_threads(count)
                seconds[count] = min(run(rows, length, 4) for _ in range(2))
            threads[rows, length] = min(seconds, key=seconds.__getitem__)
        if threads[rows, length]:
            torch.set_num_threads(threads[rows, length])
        start = CLOCK()
        out = model(torch.tensor(prompts(rows, length)), use_cache=True, logits_to_keep=1)
        for _ in range(new - 1):
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(ids, past_key_values=out.past_key_values, use_cache=True)
        return CLOCK() - start

    return run


def llama_cpp(folder: Path, kind: str) -> Run:
    import llama_cpp as cpp
    import numpy as np

    model_params = cpp.llama_model_default_params()
    if os.environ.get("LLAMA_CPP_REPACK") == "off":
        model_params.use_extra_bufts = False
    model = cpp.llama_model_load_from_file(str(folder / f"{kind}.gguf").encode(), model_params)
    settings = cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = 8192, 8192, 512, 8
    settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
    context = cpp.llama_init_from_model(model, settings)
    vocab = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))
    batch = cpp.llama_batch_init(8192, 0, 1)

    def feed(rows: list[list[int]], start: int) -> None:
        batch.n_tokens = 0
        for row, ids in enumerate(rows):
            for i, token in enumerate(ids):
                n = batch.n_tokens
                batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = token, start + i, 1, row
                batch.logits[n] = i == len(ids) - 1
                batch.n_tokens = n + 1
        if cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def best(rows: int, length: int) -> list[list[int]]:
        each = (cpp.llama_get_logits_ith(context, (row + 1) * length - 1) for row in range(rows))
        return [[int(np.ctypeslib.as_array(logits, (vocab,)).argmax())] for logits in each]

    def run(rows: int, length: int, new: int) -> float:
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        start = CLOCK()
        feed(prompts(rows, length), 0)
        ids = best(rows, length)
        for i in range(new - 1):
            feed(ids, length + i)
            ids = best(rows, 1)
        return CLOCK() - start

    return run


def serve(folder: Path, contender: str) -> None:
    """Runs the tasks that lines of standard input name, and prints tokens per second."""
    if ONE_CORE:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    peer, kind = contender.split()
    run = {"ours": ours, "transformers": transformers, "llama.cpp": llama_cpp}[peer](folder, kind)
    for line in sys.stdin:
        task = line.strip()
        if task == "prefill":
            rate = PROMPT / run(1, PROMPT, 1)
        else:
            rows = int(task.split()[1])
            first = run(rows, SHORT, 1)
            rate = rows * (NEW - 1) / (run(rows, SHORT, NEW) - first)
        print(json.dumps(rate), flush=True)


def write(folder: Path, model: str, kinds: list[str]) -> None:
    """Writes the model as a Hugging Face folder and as the GGUF files that llama.cpp needs."""
    import jax

    from llama_jax import config
    from llama_jax.infer.llama import Llama
    from llama_jax.infer.load import load
    from llama_jax.params import init_params

    if model in config.SIZES:
        llama = Llama(config.size(model), init_params(config.size(model), jax.random.key(0)), dtype="bfloat16")
    else:
        llama = load(model, dtype="bfloat16", quantize="none")
    llama.save(folder / "hf", "hf")
    for kind in kinds:
        llama.save(folder / f"{kind}.gguf", "gguf", dtype={"bf16": "bfloat16"}.get(kind, kind))


def ask(worker: subprocess.Popen[str], task: str) -> str:
    """The line that a contender prints for a task; "" if it has ended."""
    try:
        worker.stdin.write(task + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return ""
    return worker.stdout.readline()


def race(
    folder: Path, contenders: list[str], tasks: list[str], turns: int, one_core: bool
) -> dict[tuple[str, str], list[float]]:
    """The tokens per second of each contender and task in each turn, without the first turn, which compiles."""

    def start(name: str, **settings: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, __file__, "--serve", str(folder), name],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "ONE_CORE": str(int(one_core)), **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    workers = {name: start(name) for name in contenders}
    rates: dict[tuple[str, str], list[float]] = {}
    try:
        for task in tasks:
            for turn in range(turns + 1):
                for name in contenders:
                    # Not counted: after a pause, memory that a contender freed may have gone back to the host.
                    ask(workers[name], task)
                    answer = ask(workers[name], task)
                    if not answer and turn == 0 and name.startswith("llama.cpp"):
                        # With AMX, the code that repacks weights crashes for some types.
                        print(f"{name} ended in {task}, and runs without repacking", flush=True)
                        workers[name] = start(name, LLAMA_CPP_REPACK="off")
                        answer = ask(workers[name], task)
                    if not answer:
                        raise RuntimeError(f"{name} ended in {task}")
                    if turn:
                        rates.setdefault((name, task), []).append(json.loads(answer))
            for name in contenders:
                print(f"{task:9} {name:22} {statistics.median(rates[name, task]):9.1f} tokens/s", flush=True)
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="160m", help="a shape of llama_jax.config, or a model")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--only", default="", help="words, separated by commas; contenders with one of them run")
    parser.add_argument("--folder", type=Path, help="keeps the written model here, and reuses it")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--one_core", action="store_true", help="one processor each, and tokens a CPU second")
    options = parser.parse_args()
    if options.serve:
        serve(Path(options.serve[0]), options.serve[1])
        return
    words = [word for word in options.only.split(",") if word]
    missing = {
        peer: importlib.util.find_spec(module) is None
        for peer, module in (("transformers", "torch"), ("llama.cpp", "llama_cpp"), ("ours", "jax"))
    }
    chosen = [
        name
        for name in CONTENDERS
        if not missing[name.split()[0]] and (not words or any(word in name for word in words))
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        if not (folder / "hf").exists():
            write(folder, options.model, ["bf16", "q8_0", "q4_0"])
        rates = race(folder, chosen, options.tasks.split(","), options.turns, options.one_core)
    tasks = options.tasks.split(",")
    unit = "tokens a CPU second of one core" if options.one_core else "tokens/s"
    print(f"\n| {options.model}, {unit} | {' | '.join(tasks)} |\n|---|{'---|' * len(tasks)}")
    for name in chosen:
        print(f"| {name} | {' | '.join(f'{statistics.median(rates[name, task]):,.1f}' for task in tasks)} |")


if __name__ == "__main__":
    main()
