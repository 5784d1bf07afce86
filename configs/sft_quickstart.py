"""The quickstart model taught to answer: "What does `math.gcd` do?", for 698 names of the standard library.

    python train.py --config configs/quickstart.py       # first: it is what this one starts from
    python train.py --config configs/sft_quickstart.py

Hardware: a laptop's CPU; a million tokens, two minutes on 2 cores at 9,000 tokens/s, and three times that where they
are shared with others. All 2.4 million weights are trained, on questions and answers made of docstrings
(llama_jax/data/questions.py; they differ between Python versions), seen 1.9 times. Expect a validation loss of about
0.004 nats per token, which is over the same facts asked for in phrasings that training has not, and 98.7 % of those
answers right to the letter (benchmarks/sft_quickstart.py). It knows no other names, and does not know that: asked for
one, it answers with something that it has learnt.
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
    config.train.vocab_chunk = 1024
    config.log.every = 50
    config.log.eval_every = 250
    config.log.sample_every = 500
    config.log.sample_as = "chat"
    config.log.sample_prompts = ("What does `math.gcd` do?", "Could you tell me what str.split does?")
    config.log.sample_tokens = 48
    config.checkpoint.every = 500
    return config
