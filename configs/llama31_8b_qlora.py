"""Llama 3.1 8B with QLoRA on one chip of 16 GB: the base in 4 bits, LoRA of rank 16 on every matrix, on dialogs.

    python train.py --config configs/llama31_8b_qlora.py --config.init_from=Llama-3.1-8B-Instruct \
        --config.data.train=chats.jsonl --config.data.validation=held_out.jsonl

Hardware: one TPU v5e chip (v5e:1x1, 15.75 GiB), Colab's v5e-1.
Memory: 10.7 GiB a chip at its peak by the compiler's account (tests/project/test_aot.py); checkpoints take 0.5 GB each.
Expect: 16,384 tokens a step, two rows at a time. Speed and loss are not measured.
Without validation data, add: --config.data.validation= --config.checkpoint.keep_best=0
Elsewhere: rows at a time are data.batch_size / train.accumulate; four on a v6e chip. A GPU of 16 GB should take it
(not tried).
"""

import ml_collections

from llama_jax.run_config import default_dict


def get_config() -> ml_collections.ConfigDict:
    """The run; every key can be changed with --config.KEY=VALUE."""
    config = ml_collections.ConfigDict(default_dict())
    config.output = "runs/llama31_8b_qlora"
    config.init_from = "meta-llama/Llama-3.1-8B-Instruct"
    config.data.train = ("data/train",)
    config.data.validation = ("data/validation",)
    config.data.sequence_length = 4096
    config.data.batch_size = 4
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.base = "int4"
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 30
    config.optimizer.weight_decay = 0.0
    config.train.steps = 1000
    config.train.accumulate = 2
    config.train.compute_dtype = "bfloat16"
    config.mesh.fsdp = -1
    config.log.eval_every = 50
    config.checkpoint.every = 50  # such machines can be preempted without notice
    config.checkpoint.keep_best = 1
    return config
