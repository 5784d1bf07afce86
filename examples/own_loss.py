"""A loss of your own: the focal loss (Lin et al., arXiv:1708.02002), which gives less weight to tokens that the model
already predicts well.

python examples/own_loss.py
"""

import jax.numpy as jnp

from llama_jax.train.objectives import token_losses
from llama_jax.train.run import Result, train

RUN = {
    "output": "runs/own_loss",
    "model": {"name": "tiny", "num_layers": 1},
    "data": {"sequence_length": 64, "batch_size": 8},
    "optimizer": {"warmup_steps": 5, "learning_rate": 3e-3},
    "train": {"steps": 30, "compute_dtype": "float32"},
}
TEXTS = [f"The number {n} comes after {n - 1} and before {n + 1}." for n in range(1, 200)]


def focal(run, policy, reference, batch, *, dtype):
    """The sum of (1 - p)^2 * -log p over all target tokens, and the sums to report."""
    nll_BT, _ = token_losses(run, policy, batch, dtype)
    focus_BT = jnp.square(1 - jnp.exp(-nll_BT))
    loss = jnp.sum(batch["weights"] * focus_BT * nll_BT)
    cross_entropy = jnp.sum(batch["weights"] * nll_BT)
    return loss, {"count": jnp.sum(batch["weights"]), "loss": loss, "cross_entropy": cross_entropy}


def main() -> Result:
    """Train with the focal loss."""
    return train(RUN, records=TEXTS, loss=focal)


if __name__ == "__main__":
    print(main().losses)
