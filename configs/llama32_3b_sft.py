"""Llama 3.2 3B, all weights trained on dialogs, on one large chip; the loss counts what the assistant says.

    python train.py --config configs/llama32_3b_sft.py --config.init_from=Llama-3.2-3B \
        --config.data.train=chats.jsonl --config.data.validation=held_out.jsonl

Hardware: one TPU v5p chip (v5p:1x1x1, 95.74 GiB); float32 weights and moments.
Memory: 67.4 GiB a chip at its peak by the compiler's account (tests/project/test_aot.py); checkpoints take 39 GB each.
Expect: 16,384 tokens a step, a row at a time. Speed and loss are not measured.
Without validation data, add: --config.data.validation= --config.checkpoint.keep_best=0
Elsewhere: a GPU of 80 GB should take it (not tried). On four v6e chips, add --config.train.accumulate=1 (not tried).
"""

import ml_collections

from llama_jax.run_config import default_dict


def get_config() -> ml_collections.ConfigDict:
    """The run; every key can be changed with --config.KEY=VALUE."""
    config = ml_collections.ConfigDict(default_dict())
    config.output = "runs/llama32_3b_sft"
    config.init_from = "meta-llama/Llama-3.2-3B"
    config.data.train = ("data/train",)
    config.data.validation = ("data/validation",)
    config.data.sequence_length = 4096
    config.data.batch_size = 4
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.0  # few steps, from good weights
    config.train.steps = 1000
    config.train.accumulate = 4
    config.train.compute_dtype = "bfloat16"
    config.mesh.fsdp = -1
    config.log.eval_every = 100
    config.checkpoint.every = 200
    config.checkpoint.keep = 1
    config.checkpoint.keep_best = 1
    return config
