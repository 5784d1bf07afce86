"""Floor 5: the training loop. `llama_jax.train.loop.train(run)` does a whole run."""
