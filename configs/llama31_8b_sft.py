"""Llama 3.1 8B, all weights trained on dialogs; the loss counts what the assistant says.

    python train.py --config configs/llama31_8b_sft.py --config.init_from=Llama-3.1-8B \
        --config.data.train=chats.jsonl --config.data.validation=held_out.jsonl

Hardware: one host of 8 TPU v6e chips (v6e:2x4, 31.25 GiB each); float32 weights and moments split eight ways.
Memory: 20.8 GiB a chip at its peak by the compiler's account (tests/project/test_aot.py); checkpoints take 96 GB each.
Expect: 65,536 tokens a step, some of them padding. Speed and loss are not measured.
Without validation data, add: --config.data.validation= --config.checkpoint.keep_best=0
Elsewhere: data.batch_size is a row a chip. 16 v5e chips take about 12 GiB each, 4 v5p 34.
8 x 80 GB GPUs should take it as it is (not tried).
"""

import ml_collections

from llama_jax.run_config import default_dict


def get_config() -> ml_collections.ConfigDict:
    """The run; every key can be changed with --config.KEY=VALUE."""
    config = ml_collections.ConfigDict(default_dict())
    config.output = "runs/llama31_8b_sft"
    config.init_from = "meta-llama/Llama-3.1-8B"
    config.data.train = ("data/train",)
    config.data.validation = ("data/validation",)
    config.data.sequence_length = 8192  # dialogs are packed; those longer than a row are left out
    config.data.batch_size = 8
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.0  # few steps, from good weights
    config.train.steps = 1000
    config.train.compute_dtype = "bfloat16"
    config.mesh.fsdp = -1
    config.log.eval_every = 100
    config.checkpoint.every = 200
    config.checkpoint.keep = 1
    config.checkpoint.keep_best = 1
    return config
