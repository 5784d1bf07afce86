"""Weights on disk, a format at a time: the container, which knows nothing of Llama, and the Llama in it."""
