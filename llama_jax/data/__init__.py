"""Data: sources of text, the token store, packed rows and the loader. Nothing here computes with jax."""
