"""Fine-tuning speed, of all weights and of LoRA, beside transformers and peft (torch), on the same batches.

    pip install -r requirements.txt torch transformers peft && python benchmarks/finetuning.py

Each contender is a process of its own and they take turns, step by step. By default the model is a 6-layer Llama of
width 384 with a vocabulary of 32,000, batches are 8 full rows of 512 tokens, and LoRA has rank 16 on all seven linears,
no dropout. All use AdamW, clipping at 1.0 and float32 for what is trained. `bfloat16` is autocast in torch, over a base
in bfloat16 where it is frozen, and `train.compute_dtype` here. torch is given what was fastest on a CPU of those
tried: sdpa, AdamW's fused kernel, all cores, and no gradient checkpointing. Read the ratios: single timings on a shared
machine mean little.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics

import training
import turns

RANK = 16
METHODS = {"full": ("ours", "torch"), "lora": ("torch",)}  # and who can do it


def ours(method: str, dtype: str, size: training.Size):
    """A function that does one step."""
    return {"full": training.ours}[method](dtype, size)


def torch(method: str, dtype: str, size: training.Size):
    """A function that does one step."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = training.their_model(size)
    if method == "lora":
        # A frozen base need not be cast anew in every step; peft leaves its own matrices in float32.
        model = model.to(getattr(torch, dtype))
        config = LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules="all-linear"
        )
        model = get_peft_model(model, config).train()
    return training.their_step(model, dtype, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--names", nargs="+", default=["ours", "torch"], choices=["ours", "torch"])
    for field in dataclasses.fields(training.Size):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = training.Size(**{field.name: getattr(args, field.name) for field in dataclasses.fields(training.Size)})
    if args.serve:
        name, method, dtype = args.serve
        return turns.serve({"ours": ours, "torch": torch}[name](method, dtype, size))
    for method in args.methods:  # one after the other: all at once take too much memory
        names = [name for name in METHODS[method] if name in args.names]
        kinds = [(name, method, dtype) for dtype in args.dtypes for name in names]
        seconds = turns.race(kinds, steps=args.steps)
        speeds = {kind: size.tokens / statistics.median(times) for kind, times in seconds.items()}
        for (name, _, dtype), speed in speeds.items():
            print(f"{method:5s} {name:6s} {dtype:9s} {speed:8,.0f} tokens/s", flush=True)
        for dtype in args.dtypes if len(names) > 1 else ():
            ratio = speeds["ours", method, dtype] / speeds["torch", method, dtype]
            print(f"{method:5s} ours / torch, {dtype}: {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
