"""Training speed beside Hugging Face transformers (torch), in one process each, taking turns, on the same batches.

    pip install -r requirements.txt torch transformers && python benchmarks/training.py

The model is a 6-layer Llama of width 384 with a vocabulary of 32,000; batches are 8 x 512 tokens; both use AdamW,
clipping at 1.0 and float32 master weights. `bfloat16` is autocast in torch and `train.compute_dtype` here. The figure
to read is the ratio: single timings on a shared machine mean little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, FFN = 32_000, 384, 6, 6, 2, 1024
ROWS, LENGTH = 8, 512


def batches():
    import numpy as np

    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)


def ours(dtype: str):
    """A function that does one step."""
    import numpy as np

    from llama_jax import parallel
    from llama_jax.run_config import RunConfig, default_dict
    from llama_jax.train import start
    from llama_jax.train.program import Program

    values = default_dict("tiny")
    values["output"] = "unused"
    values["data"] |= {"train": ("unused",), "batch_size": ROWS, "sequence_length": LENGTH}
    values["train"] |= {"remat": "full", "vocab_chunk": 4096, "compute_dtype": dtype}
    values["model"] |= {
        "vocab_size": VOCAB,
        "embed_dim": WIDTH,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": WIDTH // HEADS,
        "ffn_dim": FFN,
    }
    run = RunConfig.from_dict(values)
    program = Program.make(run, parallel.make_mesh({}))
    state = start.first_state(program)
    source = batches()

    def one() -> float:
        nonlocal state
        tokens = next(source)
        batch = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)),
            "segments": np.ones((ROWS, LENGTH), np.int32),
            "weights": np.ones((ROWS, LENGTH), np.float32),
        }
        state, metrics = program.train_step(state, None, batch)
        return float(metrics["loss"])

    return one


def transformers(dtype: str):
    """A function that does one step."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    source = batches()

    def one() -> float:
        tokens = torch.from_numpy(next(source)).long()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return one


def serve(name: str, dtype: str) -> None:
    """Do a step for every line on standard input, and answer with its seconds."""
    one = {"ours": ours, "transformers": transformers}[name](dtype)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = one()
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": loss}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(*args.serve)
    kinds = [(name, dtype) for dtype in args.dtypes for name in ("ours", "transformers")]
    workers = {
        kind: subprocess.Popen(
            [sys.executable, __file__, "--serve", *kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for kind in kinds
    }
    seconds: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
    for turn in range(args.steps + 1):
        for kind in kinds:
            workers[kind].stdin.write("step\n")
            workers[kind].stdin.flush()
            answer = json.loads(workers[kind].stdout.readline())
            if turn:  # the first compiles
                seconds[kind].append(answer["seconds"])
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    speeds = {kind: ROWS * LENGTH / statistics.median(times) for kind, times in seconds.items()}
    for (name, dtype), speed in speeds.items():
        print(f"{name:13s} {dtype:9s} {speed:8,.0f} tokens/s")
    best = {name: max(speed for kind, speed in speeds.items() if kind[0] == name) for name in ("ours", "transformers")}
    print(f"ours / transformers, each at its better type: {best['ours'] / best['transformers']:.2f}")


if __name__ == "__main__":
    main()
