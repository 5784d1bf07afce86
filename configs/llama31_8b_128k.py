"""Llama 3.1 8B, all weights trained further on long documents, in rows of 131,072 tokens.

    python train.py --config configs/llama31_8b_128k.py --config.init_from=Llama-3.1-8B \
        --config.data.train='/data/books/*.jsonl' --config.distributed.coordinator=auto

Hardware: 32 TPU v5p chips (v5p:4x4x2, 95.74 GiB each), a v5p-64; four rows at a time, each on eight chips.
Memory: 12.1 GiB a chip at its peak by the compiler's account (tests/project/test_aot.py); checkpoints take 96 GB each.
Expect: 524,288 tokens a step. Speed and loss are not measured.
Elsewhere: a row needs eight chips (mesh.context=8): data.batch_size is a multiple of the groups of eight.
There is no kernel for such rows on GPUs yet.
"""

import ml_collections

from llama_jax.run_config import default_dict


def get_config() -> ml_collections.ConfigDict:
    """The run; every key can be changed with --config.KEY=VALUE."""
    config = ml_collections.ConfigDict(default_dict())
    config.output = "runs/llama31_8b_128k"
    config.init_from = "meta-llama/Llama-3.1-8B"
    config.data.train = ("data/train",)
    config.data.sequence_length = 131072
    config.data.batch_size = 4
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 50
    config.train.steps = 1000
    config.train.compute_dtype = "bfloat16"
    config.mesh.fsdp = -1
    config.mesh.context = 8
    config.log.eval_every = 0
    config.checkpoint.every = 100
    return config
