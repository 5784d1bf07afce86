"""Inputs of the attention tests, and the plain attention that kernels are compared with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import cache, parallel
from llama_jax.config import SIZES
from llama_jax.ops.attention import Call, xla


def described_h100():
    """A context for lowering kernels for an H100 that is not here: those of jax 0.12 ask which GPU they are for."""
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("gpu",), abstract_device=device))


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def packed(rows, T):
    """Segments and positions of rows with documents of these lengths, and padding after them."""
    segments, positions = np.zeros((2, len(rows), T), np.int32)
    for row, lengths in enumerate(rows):
        at = 0
        for number, length in enumerate(lengths, start=1):
            segments[row, at : at + length] = number
            positions[row, at : at + length] = np.arange(length)
            at += length
    return jnp.asarray(segments), jnp.asarray(positions)


def plain(q, k, v, segments, positions):
    return xla.attend(Call(q, k, v, positions, segments))


def with_gradients(attend, q, k, v, cotangent):
    """The result and the gradients of q, k and v."""

    @jax.jit
    def run(q, k, v):
        out, back = jax.vjp(attend, q, k, v)
        return (out, *back(cotangent.astype(out.dtype)))

    return run(q, k, v)


def filled(kv, N, K, H, T, dtype=jnp.float32, *, S=192, block=64):
    """A call of T queries a row at the end of a cache of S slots, and one with NaN in the blocks after the live slots.

    The first row has only these T slots, the second 130, which is off the edges of blocks. Blocks with live slots are
    read whole.
    """
    config = dataclasses.replace(SIZES["tiny"], num_layers=1, num_heads=N, num_kv_heads=K, head_dim=H)
    lengths = np.asarray([T, 130])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "device_platform", lambda: "cuda")  # where a cache is not stored as bits
        store = cache.init_cache(config, batch=2, capacity=S, dtype=dtype, kv=kv)
    at = cache.window(store, jnp.broadcast_to(jnp.arange(S), (2, S)), None)
    k, v = (cache.write(leaf[0], draw(seed, 2, S, K, H), at) for seed, leaf in ((2, store.k), (3, store.v)))
    positions = jnp.asarray(lengths[:, None] - T + np.arange(T))
    call = Call(draw(1, 2, T, N, H, dtype=dtype), k, v, positions, None, cache.window(store, positions, None))
    ends = -(-lengths // block) * block
    beyond = jnp.asarray(np.arange(S) >= ends[:, None])[:, None, :]
    assert beyond.any()

    def spoiled(leaf):
        if kv == "int8":
            return dataclasses.replace(leaf, scales_BKS=jnp.where(beyond, jnp.nan, leaf.scales_BKS))
        return jnp.where(beyond[..., None], jnp.nan, leaf)

    return call, call._replace(k=spoiled(k), v=spoiled(v))
