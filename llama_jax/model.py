"""The decoder: Llama 3.1's forward pass, written once for training, prefill and decoding. Only this file imports flax.

Modules are built inside the traced function, around parameters that exist already (a plain dict, see `params.py`).
Construction costs nothing at run time, and only plain dicts cross the borders of jit and scan. Mathematics is in `ops`.

Letters: B batch, T length, S cache slots, D embedding, N query heads, K key/value heads, H head dim, F ffn, V vocab, L
layers, R rotary pairs (H / 2).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax import parallel
from llama_jax.cache import KVCache, Leaf, Window, window, write
from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError
from llama_jax.ops import cpu, gpu, norm, rope
from llama_jax.ops import linear as linear_ops
from llama_jax.ops.attention import Call, attention
from llama_jax.ops.remat import REMAT, with_remat
from llama_jax.params import BY_PATH, Params, check_params, unstack

LayerCache = tuple[Leaf, Leaf]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
    """Positions of a batch of tokens, computed once and shared by all layers.

    Attributes:
        positions_BT: position of each token within its document.
        segments_BT: document number of each token, or None if every row is one document.
        window: the part of the cache that is written and read; None without a cache.
        cos_BTR: cosine of each rotary angle, float32.
        sin_BTR: sine of each rotary angle, float32.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None
    window: Window | None
    cos_BTR: jax.Array
    sin_BTR: jax.Array


def _weight(params: Params, *path: str) -> nnx.Param:
    """The weight at the end of `path` as a Param with its logical axes; `params` is the dict of its own module."""
    return nnx.Param(params[path[-1]], axes=BY_PATH[path].axes)


def _linears(
    x: jax.Array,
    *weights: nnx.Param,
    norm: RMSNorm | None = None,
    up: jax.Array | None = None,
    plus: jax.Array | None = None,
) -> list[jax.Array]:
    before = None if norm is None else (norm.scale[...], norm.eps)
    return linear_ops.linears(x, [(w.get_value(), w.axes) for w in weights], norm=before, up=up, plus=plus)


class RMSNorm(nnx.Module):
    """Root mean square normalization with a learned scale (D,) (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(self, config: ModelConfig, params: Params):
        self.scale = nnx.Param(params["scale"])
        self.eps = config.norm_eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return norm.rms_norm(x_BTD, self.scale[...], eps=self.eps)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., arXiv:2305.13245) with rotary positions: x + attention(norm(x)).

    Without a norm it is x + attention(x).
    """

    def __init__(self, config: ModelConfig, params: Params):
        self.config = config
        self.q = _weight(params, "attention", "q")
        self.k = _weight(params, "attention", "k")
        self.v = _weight(params, "attention", "v")
        self.o = _weight(params, "attention", "o")

    def __call__(
        self, x_BTD: jax.Array, pos: Positions, cache: LayerCache | None, norm: RMSNorm | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        B, T, _ = x_BTD.shape
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        with jax.named_scope("qkv"):
            q, k, v = _linears(x_BTD, self.q, self.k, self.v, norm=norm)
            q_BTNH = parallel.constrain(q.reshape(B, T, N, H), "batch", "length", "heads", None)
            k_BTKH = parallel.constrain(k.reshape(B, T, K, H), "batch", "length", "kv_heads", None)
            v_BTKH = parallel.constrain(v.reshape(B, T, K, H), "batch", "length", "kv_heads", None)
        with jax.named_scope("rope"):
            q_BTNH = rope.rotate(q_BTNH, pos.cos_BTR, pos.sin_BTR)
            k_BTKH = rope.rotate(k_BTKH, pos.cos_BTR, pos.sin_BTR)
        if cache is not None and pos.window is not None:
            with jax.named_scope("cache"):
                cache = (write(cache[0], k_BTKH, pos.window), write(cache[1], v_BTKH, pos.window))
            call = Call(q_BTNH, *cache, pos.positions_BT, None, pos.window)
        else:
            keys, values = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
            call = Call(q_BTNH, keys, values, pos.positions_BT, pos.segments_BT)
        with jax.named_scope("attend"):
            out_BTNH = attention(call)
        with jax.named_scope("out"):
            return _linears(out_BTNH.reshape(B, T, -1), self.o, plus=x_BTD)[0], cache


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer, arXiv:2002.05202): x + down(silu(gate y) * up y), y = norm(x) or x."""

    def __init__(self, params: Params):
        self.gate = _weight(params, "ffn", "gate")
        self.up = _weight(params, "ffn", "up")
        self.down = _weight(params, "ffn", "down")

    def __call__(self, x_BTD: jax.Array, norm: RMSNorm | None = None) -> jax.Array:
        gate, up = _linears(x_BTD, self.gate, self.up, norm=norm)
        gate_BTF = parallel.constrain(gate, "batch", "length", "ffn")
        up_BTF = parallel.constrain(up, "batch", "length", "ffn")
        return _linears(gate_BTF, self.down, up=up_BTF, plus=x_BTD)[0]


class Block(nnx.Module):
    """One pre-norm decoder layer around the weights of that layer."""

    def __init__(self, config: ModelConfig, params: Params):
        self.attention_norm = RMSNorm(config, params["attention_norm"])
        self.attention = Attention(config, params["attention"])
        self.ffn_norm = RMSNorm(config, params["ffn_norm"])
        self.ffn = FeedForward(params["ffn"])

    def __call__(
        self, x_BTD: jax.Array, pos: Positions, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        with jax.named_scope("attention"):
            x_BTD, cache = self.attention(x_BTD, pos, cache, self.attention_norm)
            x_BTD = parallel.constrain(x_BTD, "batch", "length", "act_embed")
        with jax.named_scope("ffn"):
            x_BTD = self.ffn(x_BTD, self.ffn_norm)
            return parallel.constrain(x_BTD, "batch", "length", "act_embed"), cache


class Decoder(nnx.Module):
    """Embedding, blocks and final norm. `unembed` turns the output into logits."""

    def __init__(self, config: ModelConfig, params: Params):
        self.config = config
        self.embed = _weight(params, "embed")
        self.layers = nnx.data(params["layers"])  # plain dicts: each becomes a Block when it runs
        self.norm = RMSNorm(config, params["norm"])

    def __call__(
        self, tokens_BT: jax.Array, pos: Positions, cache: KVCache | None, dtype: jnp.dtype, remat: str
    ) -> tuple[jax.Array, KVCache | None]:
        with jax.named_scope("embed"):
            x_BTD = linear_ops.embed(self.embed.get_value(), tokens_BT, dtype)
            x_BTD = parallel.constrain(x_BTD, "batch", "length", "act_embed")
        if isinstance(self.layers, dict) and cache is None:
            x_BTD = _scan(self.config, self.layers, x_BTD, pos, remat)
        elif cache is None:
            x_BTD = _unroll(self.config, self.layers, x_BTD, pos, remat)
        else:
            x_BTD, cache = _unroll_cached(self.config, self.layers, x_BTD, pos, cache)
        with jax.named_scope("norm"):
            return self.norm(x_BTD), cache


def _scan(config: ModelConfig, layers: Params, x_BTD: jax.Array, pos: Positions, remat: str) -> jax.Array:
    """Runs stacked layers as one scan, which compiles one layer for any depth. Pipeline stages have one scan each."""

    def run(layers: Params, x_BTD: jax.Array, pos: Positions) -> jax.Array:
        def body(x_BTD: jax.Array, layer: Params) -> tuple[jax.Array, None]:
            return Block(config, parallel.on_device(layer))(x_BTD, pos, None)[0], None

        return jax.lax.scan(with_remat(body, remat), x_BTD, layers)[0]

    return parallel.pipeline(run, layers, x_BTD, pos)


def _unroll(config: ModelConfig, layers: Sequence[Params], x_BTD: jax.Array, pos: Positions, remat: str) -> jax.Array:
    """Runs unrolled layers one after the other, without a cache."""
    for layer in layers:
        x_BTD = with_remat(lambda x_BTD, layer: Block(config, layer)(x_BTD, pos, None)[0], remat)(x_BTD, layer)
    return x_BTD


def _unroll_cached(
    config: ModelConfig, layers: Sequence[Params], x_BTD: jax.Array, pos: Positions, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Runs the layers one after the other, each with cache arrays of its own: a donated cache is updated in place."""
    for kernels in (cpu, gpu):
        if pos.window is not None and kernels.takes_layers(config, layers, x_BTD, cache):
            with jax.named_scope("layers"):
                return kernels.layers.decode(config, layers, x_BTD, (pos.cos_BTR, pos.sin_BTR), pos.window, cache)
    updated = []
    for layer, layer_cache in zip(layers, zip(cache.k, cache.v, strict=True), strict=True):
        x_BTD, layer_cache = _cached_layer(config, parallel.active(), layer, x_BTD, pos, layer_cache)
        updated.append(layer_cache)
    k, v = zip(*updated, strict=True)
    return x_BTD, dataclasses.replace(cache, k=k, v=v)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _cached_layer(
    config: ModelConfig,
    layout: parallel.Layout | None,
    params: Params,
    x_BTD: jax.Array,
    pos: Positions,
    cache: LayerCache,
) -> tuple[jax.Array, LayerCache]:
    """One layer of `_unroll_cached`. A jit of its own lets all layers share one trace and one lowering."""
    with parallel.use(layout):
        x_BTD, updated = Block(config, params)(x_BTD, pos, cache)
        assert updated is not None  # a block returns a cache for a cache
        return x_BTD, updated


def forward(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    cache: KVCache | None = None,
    *,
    bound: int | None = None,
    dtype: jnp.dtype | None = None,
    remat: str = "none",
) -> tuple[jax.Array, KVCache | None]:
    """Hidden states after the final norm. Without a cache this is training; with one, a prefill chunk or a decode step.

    Args:
        config: the model's shape.
        params: the weights, stacked or unrolled (see `params.py`).
        tokens_BT: token ids.
        positions_BT: positions within each document; with a cache, also the slots to write.
        segments_BT: document numbers of packed rows (equal numbers attend to each other), or None for one document
            a row. With a cache, 0 marks padding, whose keys and values are not kept.
        cache: keys and values of the tokens before these, or None. Donate it.
        bound: number of cache slots to read, greater than all positions; by default the capacity.
        dtype: dtype of the activations and of the products' operands; by default the embedding's own.
        remat: one of REMAT; it has no effect with a cache.

    Returns:
        hidden_BTD in `dtype`, and the cache with these tokens in it (None without one).

    Raises:
        ConfigError: there are more positions than config.max_seq_len, or the weights do not belong to this config.
    """
    positions_BT = jnp.broadcast_to(positions_BT, tokens_BT.shape)  # kernels read a position for every token
    T = tokens_BT.shape[1]
    capacity = T if cache is None else cache.capacity
    if capacity > config.max_seq_len:
        raise ConfigError(f"{capacity} positions are more than the model's max_seq_len={config.max_seq_len}")
    if remat not in REMAT:
        raise ConfigError(f"remat must be one of {REMAT}, got {remat!r}")
    check_params(config, params)
    at = None
    if cache is not None:
        params = unstack(params)  # each layer updates cache arrays of its own
        at = window(cache, positions_BT, None if segments_BT is None else segments_BT > 0, bound=bound)
        segments_BT = None
    pos = Positions(positions_BT, segments_BT, at, *rope.rotations(config, positions_BT))
    dtype = params["embed"].dtype if dtype is None else jnp.dtype(dtype)
    return Decoder(config, params)(tokens_BT, pos, cache, dtype, remat)


def unembedding(config: ModelConfig, params: Params) -> jax.Array:
    """The (V, D) matrix that scores hidden states: the embedding itself in a tied model."""
    return params["embed"] if config.tied_embeddings else params["unembed"]


def unembed(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """Logits (..., V) in float32 of hidden states (..., D)."""
    with jax.named_scope("unembed"):
        logits = linear_ops.linear_f32(hidden, unembedding(config, params))
        middle = ("length",) if hidden.ndim == 3 else ()
        return parallel.constrain(logits, "batch", *middle, "vocab")
