"""Formats of weights on disk: readers of the containers, which are independent of Llama, and of the Llamas in them."""
