"""Llama 3.2 3B with LoRA of rank 16 on every matrix, on dialogs, on one small chip.

    python train.py --config configs/llama32_3b_lora.py --config.init_from=Llama-3.2-3B-Instruct \
        --config.data.train=chats.jsonl --config.data.validation=held_out.jsonl

Hardware: one TPU v5e chip (v5e:1x1, 15.75 GiB), Colab's v5e-1; the base in bfloat16.
Memory: 7.8 GiB a chip at its peak by the compiler's account (tests/project/test_aot.py); checkpoints take 0.3 GB each.
Expect: 32,768 tokens a step, a row at a time. Speed and loss are not measured.
Without validation data, add: --config.data.validation= --config.checkpoint.keep_best=0
Elsewhere: a GPU of 16 GB or more should take it (not tried).
"""

import ml_collections

from llama_jax.run_config import default_dict


def get_config() -> ml_collections.ConfigDict:
    """The run; every key can be changed with --config.KEY=VALUE."""
    config = ml_collections.ConfigDict(default_dict())
    config.output = "runs/llama32_3b_lora"
    config.init_from = "meta-llama/Llama-3.2-3B-Instruct"
    config.data.train = ("data/train",)
    config.data.validation = ("data/validation",)
    config.data.sequence_length = 4096
    config.data.batch_size = 8
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 30
    config.optimizer.weight_decay = 0.0
    config.train.steps = 1000
    config.train.accumulate = 8
    config.train.compute_dtype = "bfloat16"
    config.mesh.fsdp = -1
    config.log.eval_every = 100
    config.checkpoint.every = 100
    config.checkpoint.keep_best = 1
    return config
