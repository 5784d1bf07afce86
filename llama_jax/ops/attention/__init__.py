"""Attention. Masks follow from positions and segments, and are built only in the plain XLA backend."""

from llama_jax.ops.attention.xla import attention

__all__ = ["attention"]
