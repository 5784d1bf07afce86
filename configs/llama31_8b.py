"""Llama 3.1 8B, all weights trained on your own text in rows of 8,192 tokens (for dialogs: llama31_8b_sft.py).

    python train.py --config configs/llama31_8b.py --config.data.train='/data/**/*.jsonl' \
        --config.init_from=Llama-3.1-8B

Hardware: one host of 8 TPU v6e chips (v6e:2x4, 31.25 GiB each); float32 weights and moments split eight ways.
Memory: 20.8 GiB a chip at its peak by the compiler's account (tests/project/test_aot.py); checkpoints take 96 GB each.
Expect: 65,536 tokens a step. Speed and loss are not measured.
Elsewhere: see llama31_8b_sft.py.
"""

import ml_collections

from llama_jax.run_config import default_dict


def get_config() -> ml_collections.ConfigDict:
    """The run; every key can be changed with --config.KEY=VALUE."""
    config = ml_collections.ConfigDict(default_dict())
    config.output = "runs/llama31_8b"
    config.init_from = "meta-llama/Llama-3.1-8B"
    config.data.train = ("data/train",)
    config.data.sequence_length = 8192
    config.data.batch_size = 8
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 100
    config.train.steps = 2000
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    config.train.vocab_chunk = 8192
    config.mesh.fsdp = -1
    config.log.eval_every = 200
    config.checkpoint.every = 200
    return config
