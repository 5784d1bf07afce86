"""Llama 3.1 8B, all weights trained on preference pairs by DPO; the reference is the model that it starts from.

    python train.py --config configs/llama31_8b_dpo.py --config.init_from=runs/llama31_8b_sft \
        --config.data.train=pairs.jsonl --config.data.validation=held_out.jsonl

Hardware: one host of 8 TPU v6e chips (v6e:2x4, 31.25 GiB each); a bfloat16 reference and float32 weights.
Memory: 22.6 GiB a chip at its peak by the compiler's account (tests/project/test_aot.py); checkpoints take 96 GB each.
Expect: 65,536 tokens a step, which is some 60 pairs of 1,000 tokens. The loss begins at 0.693. Speed and the final loss
are not measured.
Without validation data, add: --config.data.validation= --config.checkpoint.keep_best=0
Elsewhere: data.batch_size is two rows a chip. 8 x 80 GB GPUs should take it as it is (not tried). For less,
add LoRA: --config.lora.rank=16 --config.lora.alpha=32 --config.optimizer.learning_rate=5e-6
"""

import ml_collections

from llama_jax.run_config import default_dict


def get_config() -> ml_collections.ConfigDict:
    """The run; every key can be changed with --config.KEY=VALUE."""
    config = ml_collections.ConfigDict(default_dict())
    config.output = "runs/llama31_8b_dpo"
    config.init_from = "meta-llama/Llama-3.1-8B-Instruct"
    config.data.train = ("data/train",)
    config.data.validation = ("data/validation",)
    config.data.sequence_length = 4096
    config.data.batch_size = 16
    config.optimizer.learning_rate = 5e-7
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.0
    config.train.objective = "dpo"
    config.train.steps = 1000
    config.train.compute_dtype = "bfloat16"
    config.dpo.beta = 0.1
    config.mesh.fsdp = -1
    config.log.eval_every = 100
    config.checkpoint.every = 200
    config.checkpoint.keep = 1
    config.checkpoint.keep_best = 1
    return config
