"""A small Llama 3.1 (2.4 million weights) trained on the documentation that comes with every Python.

    python train.py --config configs/quickstart.py

Hardware: a laptop's CPU; 4 minutes on 2 cores, at 9,000 tokens/s. The text is the language reference and
the docstrings of the standard library, about half a million tokens (they differ between Python versions), seen 3.4
times. Expect a validation loss of about 4.4 nats per token, and sentences that read like English and mean little.
"""

import ml_collections

from llama_jax.run_config import default_dict


def get_config() -> ml_collections.ConfigDict:
    """The run; every key can be changed with --config.KEY=VALUE."""
    config = ml_collections.ConfigDict(default_dict("quickstart"))
    config.output = "runs/quickstart"
    config.data.train = ("stdlib:train",)
    config.data.validation = ("stdlib:validation",)
    config.data.sequence_length = 256
    config.data.batch_size = 4  # small batches learn most from little text
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.final_fraction = 0.2  # lower rates at the end learn less in so few steps
    config.train.steps = 1800
    config.train.remat = "none"  # a small model has memory for all activations
    config.log.every = 50
    config.log.eval_every = 300
    config.log.eval_batches = 28
    config.log.sample_every = 600
    config.log.sample_prompts = ("The function returns", "If the file")
    config.log.sample_tokens = 48
    config.checkpoint.every = 600
    return config
