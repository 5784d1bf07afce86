"""TODO"""

import ml_collections

from llama_jax.run_config import default_dict


def get_config() -> ml_collections.ConfigDict:
    """The run; every key can be changed with --config.KEY=VALUE."""
    config = ml_collections.ConfigDict(default_dict("quickstart"))
    config.output = "runs/sft_quickstart"
    config.init_from = "runs/quickstart"
    config.data.train = ("stdlib:chat-train",)
    config.data.validation = ("stdlib:chat-validation",)
    config.data.sequence_length = 256
    config.data.batch_size = 4
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50
    config.train.steps = 1000
    config.train.vocab_chunk = 1024
    config.log.every = 50
    config.log.eval_every = 250
    config.log.sample_every = 500
    config.log.sample_as = "chat"
    config.log.sample_prompts = ("What does `math.gcd` do?", "Could you tell me what str.split does?")
    config.log.sample_tokens = 48
    config.checkpoint.every = 500
    return config
