"""Llama 3.1 405B with QLoRA: the base in 4 bits, LoRA of rank 16 on every matrix, on dialogs.

    python train.py --config configs/llama31_405b_qlora.py --config.init_from=Llama-3.1-405B-Instruct \
        --config.data.train=chats.jsonl --config.data.validation=held_out.jsonl --config.distributed.coordinator=auto

Hardware: 16 TPU v6e chips (v6e:4x4, 31.25 GiB each) in four hosts; weights split 4 x 4 over fsdp and tensor.
Memory: 23.2 GiB a chip at its peak by the compiler's account (tests/project/test_aot.py); checkpoints take 7.5 GB each.
Expect: 65,536 tokens a step, in four parts of a row for each four chips. Speed and loss are not measured.
Without validation data, add: --config.data.validation= --config.checkpoint.keep_best=0
Elsewhere: tensor may be up to 8; data.batch_size / train.accumulate is a multiple of fsdp. 8 x 80 GB GPUs should take
it with --config.mesh.tensor=8 (not tried).
"""

import ml_collections

from llama_jax.run_config import default_dict


def get_config() -> ml_collections.ConfigDict:
    """The run; every key can be changed with --config.KEY=VALUE."""
    config = ml_collections.ConfigDict(default_dict())
    config.output = "runs/llama31_405b_qlora"
    config.init_from = "meta-llama/Llama-3.1-405B-Instruct"
    config.data.train = ("data/train",)
    config.data.validation = ("data/validation",)
    config.data.sequence_length = 4096
    config.data.batch_size = 16
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.base = "int4"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 30
    config.optimizer.weight_decay = 0.0
    config.train.steps = 1000
    config.train.accumulate = 4
    config.train.compute_dtype = "bfloat16"
    config.mesh.fsdp = -1
    config.mesh.tensor = 4
    config.log.eval_every = 100
    config.checkpoint.every = 100
    config.checkpoint.keep_best = 1
    return config
