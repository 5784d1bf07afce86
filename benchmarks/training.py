"""Training speed compared with Hugging Face transformers (torch): alternating processes, same batches.

    pip install -r requirements.txt torch transformers && python benchmarks/training.py

The model is a 6-layer Llama of width 384 with a vocabulary of 32,000; batches are 8 x 512 tokens; both use AdamW,
clipping at 1.0 and float32 master weights. `bfloat16` means autocast in torch and `train.compute_dtype` here. Both keep
activations and logits for the backward pass, as there is memory for them. Ours has the memory settings of train.py;
with $GLIBC_TUNABLES in the environment both have the same. Compare the ratios: single timings on a shared machine mean
little.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import turns

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from llama_jax.cli import freed_memory  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of the model and of a batch."""

    vocab: int = 32_000
    width: int = 384
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    ffn: int = 1024
    rows: int = 8
    length: int = 512

    @property
    def tokens(self) -> int:
        """The number of tokens in a batch."""
        return self.rows * self.length


def batches(size: Size):
    import numpy as np

    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(0, size.vocab, (size.rows, size.length + 1)).astype(np.int32)


def our_config(size: Size) -> dict:
    """The config keys of our run, as nested dicts."""
    from llama_jax.run_config import default_dict

    values = default_dict("tiny")
    values["output"] = "unused"
    values["data"] |= {"train": ("unused",), "batch_size": size.rows, "sequence_length": size.length}
    values["train"] |= {"remat": "none", "vocab_chunk": 0}  # torch keeps activations and logits too
    values["model"] |= {
        "vocab_size": size.vocab,
        "embed_dim": size.width,
        "num_layers": size.layers,
        "num_heads": size.heads,
        "num_kv_heads": size.kv_heads,
        "head_dim": size.width // size.heads,
        "ffn_dim": size.ffn,
    }
    return values


def our_batches(size: Size):
    """The batches in the form of our train step: dicts of arrays (B, T)."""
    import numpy as np

    for tokens in batches(size):
        yield {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": np.broadcast_to(np.arange(size.length, dtype=np.int32), (size.rows, size.length)),
            "segments": np.ones((size.rows, size.length), np.int32),
            "weights": np.ones((size.rows, size.length), np.float32),
        }


def ours(dtype: str, size: Size, *, keys: Mapping[str, Any] = MappingProxyType({})):
    """A function that does one step of our training run. `keys` replace sections and keys of `our_config`."""
    import jax

    from llama_jax import parallel
    from llama_jax.params import init_params
    from llama_jax.run_config import RunConfig
    from llama_jax.train import setup
    from llama_jax.train.program import Program

    values = our_config(size) | keys
    values["train"] |= {"compute_dtype": dtype}
    run = RunConfig.from_dict(values)
    program = Program.make(run, parallel.make_mesh({}))
    state = setup.first_state(program)

    def random_base():
        params = init_params(run.model, jax.random.key(0))
        return jax.tree.map(lambda weight, like: weight.astype(like.dtype), params, program.frozen)

    frozen = None if program.frozen is None else jax.jit(random_base)()
    source = our_batches(size)

    def one() -> float:
        nonlocal state
        state, metrics = program.train_step(state, frozen, next(source))
        return float(metrics["loss"])

    return one


def their_model(size: Size):
    """The Llama of transformers in this size, with random float32 weights and its default attention (sdpa)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.width,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def their_step(model, dtype: str, size: Size):
    """A function that does one torch training step on the trainable weights of the model."""
    import torch

    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    source = batches(size)

    def one() -> float:
        tokens = torch.from_numpy(next(source)).long()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return one


def transformers(dtype: str, size: Size):
    """A function that does one training step with transformers."""
    return their_step(their_model(size), dtype, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = Size()
    if args.serve:
        name, dtype = args.serve
        if name == "ours":
            freed_memory.at_start()  # as train.py does
        return turns.serve({"ours": ours, "transformers": transformers}[name](dtype, size))
    kinds = [(name, dtype) for dtype in args.dtypes for name in ("ours", "transformers")]
    seconds = turns.race(kinds, steps=args.steps)
    speeds = {kind: size.tokens / statistics.median(times) for kind, times in seconds.items()}
    for (name, dtype), speed in speeds.items():
        print(f"{name:13s} {dtype:9s} {speed:8,.0f} tokens/s")
    best = {name: max(speed for kind, speed in speeds.items() if kind[0] == name) for name in ("ours", "transformers")}
    print(f"ours / transformers, each at its better type: {best['ours'] / best['transformers']:.2f}")


if __name__ == "__main__":
    main()
