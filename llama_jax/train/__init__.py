"""Floor 5: the training loop. `llama_jax.train.run.train(run)` does a whole run."""
