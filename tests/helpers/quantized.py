"""A helper of the tests: quantized weights, and the dense weights with the same values."""

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import SIZES
from llama_jax.ops.quant import QTensor
from llama_jax.params import init_params, unstack

TINY = {**SIZES["tiny"].to_dict(), "embed_dim": 64, "rope_scaling": SIZES["tiny"].rope_scaling}


CONFIG = type(SIZES["tiny"])(**TINY)


def random_quantized(shape, bits, seed=0):
    """A random QTensor, and its values, dequantized one at a time by the definition of Q8_0 and Q4_0."""
    rng = np.random.default_rng(seed)
    out, size = shape
    integers = rng.integers(-127, 128, shape) if bits == 8 else rng.integers(-8, 8, shape)
    scales = (rng.random((out, size // 32)) * 0.01).astype(np.float16)
    numbers = integers.astype(np.float32) * np.repeat(scales, 32, axis=1).astype(np.float32)
    if bits == 8:
        values = integers.astype(np.int8)
    else:
        groups = (integers + 8).reshape(out, -1, 32).astype(np.uint8)
        values = (groups[..., :16] | groups[..., 16:] << 4).reshape(out, -1)
    return QTensor(jnp.asarray(values), jnp.asarray(scales)), numbers


def quantized_params(bits):
    """A model's unrolled weights with every matrix quantized, and the same with arrays."""
    dense = unstack(init_params(CONFIG, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(dense)
    pairs = [
        random_quantized(leaf.shape, bits, seed) if leaf.ndim == 2 else (leaf, leaf) for seed, leaf in enumerate(leaves)
    ]
    return tuple(jax.tree.unflatten(tree, list(side)) for side in zip(*pairs, strict=True))
