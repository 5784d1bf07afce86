"""Fine-tuning speed of all weights and of LoRA, compared with transformers and peft (torch) on the same batches.

    pip install -r requirements.txt torch transformers peft && python benchmarks/finetuning.py

Each implementation runs in a process of its own, and the processes alternate step by step. By default the model is a
6-layer Llama of width 384 with a vocabulary of 32,000, batches are 8 full rows of 512 tokens, and LoRA has rank 16 on
all seven linear layers, without dropout. All use AdamW, clipping at 1.0 and float32 for the trained weights. `bfloat16`
means autocast in torch, with a frozen base in bfloat16, and `train.compute_dtype` here. torch uses the fastest of the
tried settings on a CPU: sdpa, AdamW's fused kernel, all cores, no gradient checkpointing. `compiled` is the same with
torch.compile, which needs a C++ compiler. Compare the ratios: single timings on a shared machine mean little.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics

import training
import turns

RANK = 16
METHODS = ("full", "lora")
NAMES = ("ours", "torch", "compiled")


def ours(method: str, dtype: str, size: training.Size):
    """A function that does one step."""
    from llama_jax.run_config import default_dict

    lora = default_dict("tiny")["lora"] | {"rank": RANK, "alpha": float(RANK)}
    keys = {"full": {}, "lora": {"lora": lora, "init_from": "random"}}[method]  # its weights are not read
    return training.ours(dtype, size, keys=keys)


def theirs(method: str, dtype: str, size: training.Size, *, compiled: bool):
    """A function that does one step."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = training.their_model(size)
    if method == "lora":
        # A frozen base is cast once, not in every step. peft keeps the LoRA matrices in float32.
        model = model.to(getattr(torch, dtype))
        config = LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules="all-linear"
        )
        model = get_peft_model(model, config).train()
    if compiled:
        model.compile()
    return training.their_step(model, dtype, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--names", nargs="+", default=list(NAMES), choices=NAMES, help="who takes part")
    for field in dataclasses.fields(training.Size):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = training.Size(**{field.name: getattr(args, field.name) for field in dataclasses.fields(training.Size)})
    if args.serve:
        name, method, dtype = args.serve
        if name == "ours":
            training.freed_memory.at_start()
            return turns.serve(ours(method, dtype, size))
        return turns.serve(theirs(method, dtype, size, compiled=name == "compiled"))
    for method, dtype in itertools.product(args.methods, args.dtypes):  # one at a time, to measure its memory
        seconds = turns.race([(name, method, dtype) for name in args.names], steps=args.steps)
        speeds = {name: size.tokens / statistics.median(times) for (name, *_), times in seconds.items()}
        for name, speed in speeds.items():
            print(f"{method:5s} {dtype:9s} {name:9s} {speed:8,.0f} tokens/s", flush=True)
        peers = [speed for name, speed in speeds.items() if name != "ours"]
        if peers and "ours" in speeds:
            print(f"{method:5s} {dtype:9s} ours / the faster of theirs: {speeds['ours'] / max(peers):.2f}", flush=True)


if __name__ == "__main__":
    main()
