"""The quickstart model taught to answer: "What does `math.gcd` do?", for 698 names of the standard library.

    python train.py --config configs/quickstart.py       # first: the model that this run starts from
    python train.py --config configs/sft_quickstart.py

Hardware: a laptop's CPU; a million tokens, two minutes on 2 cores at 9,000 tokens/s, and three times that on cores that
other programs use too. All 2.4 million weights are trained on questions and answers made from docstrings
(llama_jax/data/questions.py; they differ between Python versions), seen 1.9 times. The validation set asks for the same
facts in phrasings that are not in the training set. Expect a validation loss of about 0.004 nats per token, and 98.7 %
of its answers exactly right (benchmarks/sft_quickstart.py). The model knows no other names. Asked for one, it answers
with a sentence that it has learned.
"""

import ml_collections

from llama_jax.run_config import default_dict


def get_config() -> ml_collections.ConfigDict:
    """The run; every key can be changed with --config.KEY=VALUE."""
    config = ml_collections.ConfigDict(default_dict())
    config.output = "runs/sft_quickstart"
    config.init_from = "runs/quickstart"
    config.data.train = ("stdlib:chat-train",)
    config.data.validation = ("stdlib:chat-validation",)
    config.data.sequence_length = 256
    config.data.batch_size = 4
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50
    config.train.steps = 1000
    config.train.remat = "none"
    config.log.every = 50
    config.log.eval_every = 250
    config.log.sample_every = 500
    config.log.sample_as = "chat"
    config.log.sample_prompts = ("What does `math.gcd` do?", "Could you tell me what str.split does?")
    config.log.sample_tokens = 48
    config.checkpoint.every = 500
    return config
