"""Llama 3.1 70B with LoRA of rank 16 on every matrix, on dialogs.

    python train.py --config configs/llama31_70b_lora.py --config.init_from=Llama-3.1-70B-Instruct \
        --config.data.train=chats.jsonl --config.data.validation=held_out.jsonl

Hardware: one host of 8 TPU v6e chips (v6e:2x4, 31.25 GiB each); the base in bfloat16 split eight ways.
Memory: 27.5 GiB a chip at its peak by the compiler's account (tests/project/test_aot.py); checkpoints take 2.5 GB each.
Expect: 65,536 tokens a step, in two parts of a row a chip. Speed and loss are not measured.
Without validation data, add: --config.data.validation= --config.checkpoint.keep_best=0
Elsewhere: data.batch_size / train.accumulate is a multiple of the chips. 4 v5p chips take about 50 GiB each.
4 x 80 GB GPUs should take it with
--config.train.accumulate=4 (not tried).
"""

import ml_collections

from llama_jax.run_config import default_dict


def get_config() -> ml_collections.ConfigDict:
    """The run; every key can be changed with --config.KEY=VALUE."""
    config = ml_collections.ConfigDict(default_dict())
    config.output = "runs/llama31_70b_lora"
    config.init_from = "meta-llama/Llama-3.1-70B-Instruct"
    config.data.train = ("data/train",)
    config.data.validation = ("data/validation",)
    config.data.sequence_length = 4096
    config.data.batch_size = 16
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 30
    config.optimizer.weight_decay = 0.0
    config.train.steps = 1000
    config.train.accumulate = 2
    config.train.compute_dtype = "bfloat16"
    config.mesh.fsdp = -1
    config.log.eval_every = 100
    config.checkpoint.every = 100
    config.checkpoint.keep_best = 1
    return config
