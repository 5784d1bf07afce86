"""Llama 3.1 8B with LoRA of rank 16 on every matrix, on dialogs, on one chip.

    python train.py --config configs/llama31_8b_lora.py --config.init_from=Llama-3.1-8B-Instruct \
        --config.data.train=chats.jsonl --config.data.validation=held_out.jsonl

Hardware: one TPU v6e chip (v6e:1x1, 31.25 GiB), Colab's v6e-1; the base in bfloat16.
Memory: 17.9 GiB a chip at its peak by the compiler's account (tests/project/test_aot.py); checkpoints take 0.5 GB each.
Expect: 32,768 tokens a step, a row at a time. Speed and loss are not measured.
Without validation data, add: --config.data.validation= --config.checkpoint.keep_best=0
Elsewhere: on 8 chips a row goes to each with --config.train.accumulate=1. A GPU of 40 GB or more should
take it (not tried); with less, llama31_8b_qlora.py.
"""

import ml_collections

from llama_jax.run_config import default_dict


def get_config() -> ml_collections.ConfigDict:
    """The run; every key can be changed with --config.KEY=VALUE."""
    config = ml_collections.ConfigDict(default_dict())
    config.output = "runs/llama31_8b_lora"
    config.init_from = "meta-llama/Llama-3.1-8B-Instruct"
    config.data.train = ("data/train",)
    config.data.validation = ("data/validation",)
    config.data.sequence_length = 4096
    config.data.batch_size = 8
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.optimizer.learning_rate = 2e-4  # ten times or more the rate for training all weights
    config.optimizer.warmup_steps = 30
    config.optimizer.weight_decay = 0.0
    config.train.steps = 1000
    config.train.accumulate = 8  # one row at a time
    config.train.compute_dtype = "bfloat16"
    config.mesh.fsdp = -1
    config.log.eval_every = 100
    config.checkpoint.every = 100
    config.checkpoint.keep_best = 1
    return config
