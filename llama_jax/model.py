"""The decoder: Llama 3.1's forward pass, written once, for training, prefill and decoding. The only file with flax.

Modules hold parameters and say what each axis is; mathematics lives in `ops`. Outside this file parameters are a plain
dict, in one of two layouts: `layers` is a dict of arrays with a leading layer axis (stacked: scanned, for training) or
a tuple of dicts (unrolled, for decoding).

Letters: B batch, T length, S cache slots, D embedding, N query heads, K key/value heads, H head dim, F ffn, V vocab,
L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llama_jax import parallel
from llama_jax.cache import KVCache, write
from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError
from llama_jax.ops import linear as linear_ops
from llama_jax.ops import norm, rope
from llama_jax.ops.attention import attention

Params = dict[str, Any]
LayerCache = tuple[jax.Array, jax.Array]

# What a block keeps for its backward pass: everything, the results of its products, or only its input.
REMAT = ("none", "dots", "full")
_INIT_STD = 0.02  # of every matrix; those that write to the residual stream are scaled down by depth (GPT-2's rule)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Where:
    """Where the tokens of a batch stand: what every layer needs to know beside their hidden states."""

    positions_BT: jax.Array
    segments_BT: jax.Array | None
    k_positions_BS: jax.Array
    slots_BT: jax.Array  # of the cache, to write to; beyond its capacity for padding
    cos_BTR: jax.Array  # R = H / 2
    sin_BTR: jax.Array


def _matrix(rngs: nnx.Rngs | None, shape: tuple[int, ...], axes: tuple[str, ...], *, std: float) -> nnx.Param:
    if rngs is None:  # only shapes are wanted: tracing the draws of 126 unrolled layers would take 12 s, not 0.3
        return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)
    value = std * jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32)
    return nnx.Param(value, axes=axes)


class RMSNorm(nnx.Module):
    """Root mean square normalisation with a learned scale (D,)."""

    def __init__(self, config: ModelConfig, *, stack: tuple[int, ...] = ()):
        axes = ("layers",) * len(stack) + ("norm",)
        self.scale = nnx.Param(jnp.ones((*stack, config.embed_dim), jnp.float32), axes=axes)
        self.eps = config.norm_eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return norm.rms_norm(x_BTD, self.scale[...], eps=self.eps)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., arXiv:2305.13245) with rotary positions."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None, stack: tuple[int, ...] = ()):
        self.config = config
        D, NH, KH = (
            config.embed_dim,
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        lead = ("layers",) * len(stack)
        self.q = _matrix(rngs, (*stack, NH, D), (*lead, "heads", "embed"), std=_INIT_STD)
        self.k = _matrix(rngs, (*stack, KH, D), (*lead, "kv_heads", "embed"), std=_INIT_STD)
        self.v = _matrix(rngs, (*stack, KH, D), (*lead, "kv_heads", "embed"), std=_INIT_STD)
        self.o = _matrix(rngs, (*stack, D, NH), (*lead, "embed", "heads"), std=_residual_std(config))

    def __call__(self, x_BTD: jax.Array, where: Where, cache: LayerCache | None) -> tuple[jax.Array, LayerCache | None]:
        B, T, _ = x_BTD.shape
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        with jax.named_scope("qkv"):
            q_BTNH = _linear(x_BTD, self.q).reshape(B, T, N, H)
            k_BTKH = _linear(x_BTD, self.k).reshape(B, T, K, H)
            v_BTKH = _linear(x_BTD, self.v).reshape(B, T, K, H)
            q_BTNH = parallel.constrain(q_BTNH, "batch", "length", "heads", None)
            k_BTKH = parallel.constrain(k_BTKH, "batch", "length", "kv_heads", None)
            v_BTKH = parallel.constrain(v_BTKH, "batch", "length", "kv_heads", None)
        with jax.named_scope("rope"):
            q_BTNH = rope.rotate(q_BTNH, where.cos_BTR, where.sin_BTR)
            k_BTKH = rope.rotate(k_BTKH, where.cos_BTR, where.sin_BTR)
        if cache is None:
            k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
        else:
            with jax.named_scope("cache"):
                k_BKSH = write(cache[0], k_BTKH, where.slots_BT)
                v_BKSH = write(cache[1], v_BTKH, where.slots_BT)
                cache = (k_BKSH, v_BKSH)
        with jax.named_scope("attend"):
            out_BTNH = attention(
                q_BTNH,
                k_BKSH,
                v_BKSH,
                q_positions_BT=where.positions_BT,
                k_positions_BS=where.k_positions_BS,
                q_segments_BT=where.segments_BT if cache is None else None,
                k_segments_BS=where.segments_BT if cache is None else None,
                aligned=cache is None,
                unsplit=parallel.axis_size("length") == 1,
            )
        with jax.named_scope("out"):
            return _linear(out_BTNH.reshape(B, T, -1), self.o), cache


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer, arXiv:2002.05202): down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None, stack: tuple[int, ...] = ()):
        D, F = config.embed_dim, config.ffn_dim
        lead = ("layers",) * len(stack)
        self.gate = _matrix(rngs, (*stack, F, D), (*lead, "ffn", "embed"), std=_INIT_STD)
        self.up = _matrix(rngs, (*stack, F, D), (*lead, "ffn", "embed"), std=_INIT_STD)
        self.down = _matrix(rngs, (*stack, D, F), (*lead, "embed", "ffn"), std=_residual_std(config))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        hidden_BTF = jax.nn.silu(_linear(x_BTD, self.gate)) * _linear(x_BTD, self.up)
        return _linear(parallel.constrain(hidden_BTF, "batch", "length", "ffn"), self.down)


class Block(nnx.Module):
    """One pre-norm decoder layer; with `stack=(L,)`, the parameters of L of them with a leading layer axis."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None, stack: tuple[int, ...] = ()):
        self.attention_norm = RMSNorm(config, stack=stack)
        self.attention = Attention(config, rngs=rngs, stack=stack)
        self.ffn_norm = RMSNorm(config, stack=stack)
        self.ffn = FeedForward(config, rngs=rngs, stack=stack)

    def __call__(self, x_BTD: jax.Array, where: Where, cache: LayerCache | None) -> tuple[jax.Array, LayerCache | None]:
        with jax.named_scope("attention"):
            out_BTD, cache = self.attention(self.attention_norm(x_BTD), where, cache)
            x_BTD = parallel.constrain(x_BTD + out_BTD, "batch", "length", "act_embed")
        with jax.named_scope("ffn"):
            x_BTD = x_BTD + self.ffn(self.ffn_norm(x_BTD))
            return parallel.constrain(x_BTD, "batch", "length", "act_embed"), cache


class Decoder(nnx.Module):
    """Embedding, blocks, final norm and unembedding."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None, stacked: bool):
        V, D, L = config.vocab_size, config.embed_dim, config.num_layers
        self.config = config
        self.embed = _matrix(rngs, (V, D), ("vocab", "embed"), std=_INIT_STD)
        if stacked:
            self.layers = Block(config, rngs=rngs, stack=(L,))
        else:
            self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(L)])
        self.norm = RMSNorm(config)
        if not config.tied_embeddings:
            self.unembed = _matrix(rngs, (V, D), ("vocab", "embed"), std=_INIT_STD)

    def __call__(
        self, tokens_BT: jax.Array, where: Where, cache: KVCache | None, dtype: jnp.dtype, remat: str
    ) -> tuple[jax.Array, KVCache | None]:
        with jax.named_scope("embed"):
            x_BTD = linear_ops.embed(self.embed.get_value(), tokens_BT, dtype)
            x_BTD = parallel.constrain(x_BTD, "batch", "length", "act_embed")
        if isinstance(self.layers, Block) and cache is None:
            x_BTD = _scan(self.layers, x_BTD, where, remat)
        else:
            x_BTD, cache = _unroll(self._each_layer(), x_BTD, where, cache, remat)
        with jax.named_scope("norm"):
            return self.norm(x_BTD), cache

    def _each_layer(self) -> Sequence[Block]:
        if not isinstance(self.layers, Block):
            return self.layers
        graph, stacked = nnx.split(self.layers)
        slices = (jax.tree.map(operator.itemgetter(i), stacked) for i in range(self.config.num_layers))
        return [nnx.merge(graph, layer) for layer in slices]


def _linear(x: jax.Array, w: nnx.Param) -> jax.Array:
    return checkpoint_name(linear_ops.linear(x, w.get_value(), w.axes[-2:]), "product")


def _rematerialised(function: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """`function` with its intermediates kept for the backward pass as `remat` says (see REMAT)."""
    if remat == "none":
        return function
    if remat == "dots":
        return jax.checkpoint(function, policy=jax.checkpoint_policies.save_only_these_names("product"))
    return jax.checkpoint(function)


def _scan(layers: Block, x_BTD: jax.Array, where: Where, remat: str) -> jax.Array:
    """All layers as one scan over their stacked parameters: compiled once, whatever the depth."""
    graph, stacked = nnx.split(layers)

    def body(x_BTD: jax.Array, layer: nnx.State) -> tuple[jax.Array, None]:
        return nnx.merge(graph, layer)(x_BTD, where, None)[0], None

    return jax.lax.scan(_rematerialised(body, remat), x_BTD, stacked)[0]


def _unroll(
    layers: Sequence[Block], x_BTD: jax.Array, where: Where, cache: KVCache | None, remat: str
) -> tuple[jax.Array, KVCache | None]:
    """The layers one after the other, each with its own cache arrays, so that a donated cache is updated in place."""
    if cache is None:
        for layer in layers:
            x_BTD = _rematerialised(lambda x, layer=layer: layer(x, where, None)[0], remat)(x_BTD)
        return x_BTD, None
    slots = []
    for layer, slot in zip(layers, zip(cache.k, cache.v, strict=True), strict=True):
        graph, weights = nnx.split(layer)
        x_BTD, slot = _cached_layer(graph, parallel.active(), weights, x_BTD, where, slot)
        slots.append(slot)
    k, v = zip(*slots, strict=True)
    return x_BTD, KVCache(k=k, v=v)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _cached_layer(
    graph: nnx.GraphDef,
    layout: parallel.Layout | None,
    weights: nnx.State,
    x_BTD: jax.Array,
    where: Where,
    slot: LayerCache,
) -> tuple[jax.Array, LayerCache]:
    """One layer of `_unroll`. All layers are alike, so that within a jit they are traced and lowered only once."""
    with parallel.use(layout):
        return nnx.merge(graph, weights)(x_BTD, where, slot)


def forward(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    cache: KVCache | None = None,
    *,
    dtype: jnp.dtype | None = None,
    remat: str = "none",
) -> tuple[jax.Array, KVCache | None]:
    """Hidden states after the final norm. Without a cache this is training; with one, a prefill chunk or a decode step.

    Args:
        config: the model's shape.
        params: its weights, stacked or unrolled (see the head of this file).
        tokens_BT: token ids.
        positions_BT: positions within each document; with a cache, also the slots to write.
        segments_BT: document numbers of packed rows (equal numbers attend to each other), or None for one document
            a row. With a cache, 0 marks padding, whose keys and values are not kept.
        cache: keys and values of what came before, or None. Donate it.
        dtype: of the activations and of the products' operands; the embedding's own by default.
        remat: one of REMAT; only without a cache.

    Returns:
        hidden_BTD in dtype, and the cache with these tokens in it (None without one).

    Raises:
        ConfigError: more positions than config.max_seq_len, or weights that are not of this config.
    """
    T = tokens_BT.shape[1]
    capacity = T if cache is None else cache.capacity
    if capacity > config.max_seq_len:
        raise ConfigError(f"{capacity} positions are more than the model's max_seq_len={config.max_seq_len}")
    if remat not in REMAT:
        raise ConfigError(f"remat must be one of {REMAT}, got {remat!r}")
    slots_BT, k_positions_BS = positions_BT, positions_BT
    if cache is not None:
        k_positions_BS = jnp.broadcast_to(jnp.arange(capacity), (tokens_BT.shape[0], capacity))
        if segments_BT is not None:
            slots_BT = jnp.where(segments_BT > 0, positions_BT, capacity)
    cos_BTR, sin_BTR = rope.rotations(config, positions_BT)
    where = Where(positions_BT, segments_BT, k_positions_BS, slots_BT, cos_BTR, sin_BTR)
    decoder = _bind(config, params)
    dtype = decoder.embed.dtype if dtype is None else jnp.dtype(dtype)
    return decoder(tokens_BT, where, cache, dtype, remat)


def unembedding(config: ModelConfig, params: Params) -> jax.Array:
    """The (V, D) matrix that scores hidden states: the embedding itself where they are tied."""
    return params["embed"] if config.tied_embeddings else params["unembed"]


def unembed(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """Logits (..., V) in float32 of hidden states (..., D)."""
    with jax.named_scope("unembed"):
        logits = linear_ops.linear_f32(hidden, unembedding(config, params))
        middle = ("length",) if hidden.ndim == 3 else ()
        return parallel.constrain(logits, "batch", *middle, "vocab")


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 weights in the stacked layout: normal, with the deviations said at the head of this file."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(params=key), stacked=True)))


def abstract_params(config: ModelConfig, *, stacked: bool, dtype: jnp.dtype = jnp.float32) -> Params:
    """The tree of weights as ShapeDtypeStructs: what init, loading, sharding and compiling ahead of time start from."""
    _, state = _abstract(config, stacked)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), nnx.to_pure_dict(state))
    return shapes if stacked else {**shapes, "layers": tuple(shapes["layers"][i] for i in range(config.num_layers))}


def logical_axes(config: ModelConfig, *, stacked: bool) -> Params:
    """The same tree with the logical names of each weight's axes, e.g. ("layers", "heads", "embed")."""
    _, state = _abstract(config, stacked)
    axes = nnx.to_pure_dict(jax.tree.map(lambda p: p.axes, state, is_leaf=lambda p: isinstance(p, nnx.Variable)))
    return axes if stacked else {**axes, "layers": tuple(axes["layers"][i] for i in range(config.num_layers))}


def check_params(config: ModelConfig, params: Params) -> None:
    """Refuse weights that are not of this config, naming the first that is missing, unknown or of another shape."""
    stacked = isinstance(params.get("layers"), dict)
    expected = _paths(abstract_params(config, stacked=stacked))
    given = _paths(params)
    for path in sorted(expected.keys() | given.keys()):
        if path not in given or path not in expected:
            word = "missing" if path not in given else "unknown"
            raise ConfigError(f"{word} weight {path}: the weights are not those of this config")
        if given[path].shape != expected[path].shape:
            raise ConfigError(
                f"weight {path} has shape {given[path].shape}, but this config needs {expected[path].shape}"
            )


def _paths(tree: Params) -> dict[str, Any]:
    is_leaf = lambda x: hasattr(x, "shape")  # noqa: E731
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def _residual_std(config: ModelConfig) -> float:
    return _INIT_STD / (2 * config.num_layers) ** 0.5


@functools.lru_cache(maxsize=64)
def _abstract(config: ModelConfig, stacked: bool) -> tuple[nnx.GraphDef, nnx.State]:
    make = lambda: Decoder(config, rngs=None, stacked=stacked)  # noqa: E731
    return nnx.split(nnx.eval_shape(make))


def _bind(config: ModelConfig, params: Params) -> Decoder:
    """The module that holds `params`; merging happens while tracing and costs nothing at run time."""
    check_params(config, params)
    stacked = isinstance(params["layers"], dict)
    graph, state = _abstract(config, stacked)
    state = jax.tree.map(lambda a: a, state)  # a copy: the next line writes into it
    nnx.replace_by_pure_dict(state, params if stacked else {**params, "layers": dict(enumerate(params["layers"]))})
    return nnx.merge(graph, state)
