"""The closed memory model of a training step: bytes of one device from shapes and shardings, without a compiler.

State (weights, moments, the frozen base) is exact: it is the sum of the shards of the run's own abstract state. The
rest follows the life of a step. At the end of the forward pass a device holds the values of every layer that
rematerialization keeps. During the backward pass it also holds the gradients, and the values of the layer that is
computed again.

Letters: B rows on a device, T tokens of a row on a device, D embedding, N query heads, K key and value heads, H head
dim, F ffn, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax import parallel
from llama_jax.config import ModelConfig
from llama_jax.run_config import RunConfig
from llama_jax.train import trainable
from llama_jax.train.optimizer import make_optimizer
from llama_jax.train.state import TrainState, abstract_state

# Parts of a plan, in the order in which they are drawn.
PARTS = ("weights", "moments", "frozen", "gradients", "activations", "scratch")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Peak bytes of one device by part.

    Attributes:
        weights: Float32 master weights, and their moving average.
        moments: The state of the optimizer.
        frozen: The frozen model of LoRA and DPO.
        gradients: Gradients of the trained weights.
        activations: Values of all layers that rematerialization keeps.
        scratch: Gathered weights, values of one layer, logits, and everything else.
        host: Bytes in the host's memory for one device, which are not part of the peak.
        moved: Bytes that are copied in a step from that memory to the device or back.
    """

    weights: int
    moments: int
    frozen: int
    gradients: int
    activations: int
    scratch: int
    host: int = 0
    moved: int = 0

    @property
    def peak(self) -> int:
        """The sum of all parts in the memory of the device."""
        return sum(getattr(self, part) for part in PARTS)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The share of a step that one device computes.

    Attributes:
        rows: Rows of a batch part (B).
        tokens: Tokens of a row (T).
        tensor: Parts of heads, feed-forward and vocabulary.
        stages: Pipeline stages.
        microbatches: Parts of the rows that follow one another through the stages.
        width: Bytes of a number in the compute dtype.
    """

    rows: int
    tokens: int
    tensor: int
    stages: int
    microbatches: int
    width: int


def training(
    run: RunConfig, sizes: Mapping[str, int], *, dtype: jnp.dtype, flash: bool, platform: str = "tpu"
) -> Memory:
    """The peak memory of a training step on one device of a mesh.

    Args:
        run: The run, with the shape of its model.
        sizes: Devices along each mesh axis, without -1.
        dtype: Compute dtype.
        flash: True if attention runs in a kernel that keeps no scores in memory.
        platform: The compiler: "tpu" or "cuda".
    """
    bare = _without_batch(run)  # the state depends on less than a run, and is cached
    state = _state(bare, tuple(sizes.items()))
    trained = shard_bytes(state.params)
    moments = shard_bytes(state.opt_state)
    average = 0 if state.ema is None else shard_bytes(state.ema)
    frozen, base = _frozen_bytes(bare, tuple(sizes.items()), jnp.dtype(dtype).name)
    host = shard_bytes(state.opt_state, memory=parallel.HOST)
    # One layer of what is in the host's memory is on the device at a time: moments before and after their update, or
    # weights and the next layer's, which are copied meanwhile.
    layer = 2 * max(host, base) // run.shape.num_layers
    shape = share(run, sizes, dtype)
    gradients = trained * (2 if run.train.accumulate > 1 else 1)
    return Memory(
        weights=trained + average,
        moments=moments,
        frozen=frozen,
        gradients=gradients,
        activations=kept(run, shape, flash=flash),
        scratch=_scratch(run, sizes, shape, gradients=trained, flash=flash, platform=platform) + layer,
        host=host + base,
        moved=2 * (host + run.train.accumulate * base),  # read and written, or read in two passes
    )


def share(run: RunConfig, sizes: Mapping[str, int], dtype: jnp.dtype) -> Shape:
    """The part of a run's step that one device computes, with rows and tokens rounded up."""
    rows = math.ceil(run.data.batch_size / run.train.accumulate / parts(sizes, "batch"))
    tokens = math.ceil(run.data.sequence_length / parts(sizes, "length"))
    stages = parts(sizes, "layers")
    microbatches = (run.train.microbatches or stages) if stages > 1 else 1
    return Shape(rows, tokens, parts(sizes, "heads"), stages, microbatches, jnp.dtype(dtype).itemsize)


def parts(sizes: Mapping[str, int], axis: str) -> int:
    """Number of shards of a logical axis in training."""
    return math.prod(sizes.get(name, 1) for name in parallel.RULES["train"][axis])


def shard_bytes(tree: Any, *, memory: str | None = None) -> int:
    """Bytes of one device of a tree of ShapeDtypeStructs with their shardings, in its own memory or in the host's."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if (leaf.sharding.memory_kind == parallel.HOST) == bool(memory)]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * _width(leaf.dtype) for leaf in leaves)


def _width(dtype: Any) -> int:
    return 1 if jnp.issubdtype(dtype, jax.dtypes.extended) else jnp.dtype(dtype).itemsize


def _abstract(sizes: tuple[tuple[str, int], ...]) -> parallel.Layout:
    """A sharding layout of devices that need not be present."""
    known = dict(sizes)
    mesh = parallel.abstract_mesh(known)
    return parallel.Layout(cast(Mesh, mesh), "train")


def _without_batch(run: RunConfig) -> RunConfig:
    """The run with the defaults of all keys that its state does not depend on."""
    data = dataclasses.replace(run.data, batch_size=1, sequence_length=2)
    train = dataclasses.replace(run.train, accumulate=1, remat="full", vocab_chunk=0)
    return dataclasses.replace(run, data=data, train=train)


@functools.lru_cache(maxsize=4096)
def _state(run: RunConfig, sizes: tuple[tuple[str, int], ...]) -> TrainState:
    """The abstract state of a run on a mesh."""
    optimizer = make_optimizer(run.optimizer, trainable.trained_axes(run), steps=max(run.train.steps, 1))
    return abstract_state(run, optimizer, _abstract(sizes))


@functools.lru_cache(maxsize=4096)
def _frozen_bytes(run: RunConfig, sizes: tuple[tuple[str, int], ...], dtype: str) -> tuple[int, int]:
    """Bytes of the frozen weights of one device, in its own memory and in the host's."""
    frozen = trainable.abstract_frozen(run, _abstract(sizes), jnp.dtype(dtype))
    return shard_bytes(frozen), shard_bytes(frozen, memory=parallel.HOST)


def kept(run: RunConfig, shape: Shape, *, flash: bool) -> int:
    """Bytes of the values that rematerialization keeps, over all layers of a device."""
    m, t, s = run.shape, shape.tensor, shape.width
    tokens = shape.rows * shape.tokens
    names = {
        "full": 0,
        "offload": 0,
        "attention": _attention_output(m, t, s),
        "dots": _products(m, t, s) + 4 * m.num_heads // t,
        "none": 2 * _products(m, t, s) + (0 if flash else 4 * m.num_heads // t * run.data.sequence_length),
    }
    a_token = (m.embed_dim // t * s + names[run.train.remat]) * math.ceil(m.num_layers / shape.stages)
    ticks = (shape.microbatches + shape.stages - 1) / shape.microbatches  # an idle stage keeps values too
    states = m.embed_dim // t * s if shape.stages > 1 else 0
    return int(tokens * ticks * (a_token + states))


def _attention_output(m: ModelConfig, t: int, s: int) -> int:
    """Bytes a token of the output and the log-sum-exp of attention."""
    return m.num_heads * m.head_dim // t * s + 4 * m.num_heads // t


def _products(m: ModelConfig, t: int, s: int) -> int:
    """Bytes a token of the results of a layer's matrix products."""
    kv = max(m.num_kv_heads, t) * m.head_dim // t
    return (2 * m.num_heads * m.head_dim // t + 2 * kv + m.embed_dim // t + 3 * m.ffn_dim // t) * s


def _scratch(
    run: RunConfig, sizes: Mapping[str, int], shape: Shape, *, gradients: int, flash: bool, platform: str
) -> int:
    """Bytes of all other live values: the larger of the needs of a layer's backward pass and of the loss.

    `gradients` are the bytes of the gradients of one part of a batch.
    """
    m, t, s = run.shape, shape.tensor, shape.width
    tokens = shape.rows * shape.tokens
    layer = m.embed_dim * m.head_dim * (2 * m.num_heads + 2 * m.num_kv_heads) + 3 * m.embed_dim * m.ffn_dim
    # The stacked weights in the compute dtype, which XLA makes before the scan on several GPUs and on one TPU. GPUs
    # that gather a frozen base copy it too, since the gathered side must be the outer one in memory.
    shards = parts(sizes, "embed") * t * shape.stages
    gathers = parts(sizes, "embed") > 1
    alone = math.prod(sizes.values()) == 1
    copied = (platform == "cuda" and gathers) or (not run.lora.rank and alone == (platform == "tpu"))
    copies = s * m.num_layers * layer // shards if copied else 0
    # The gathered weights of a layer, and the gradient of one matrix, of which a ring holds blocks only.
    gathered = s * layer // t + (0 if platform == "tpu" and gathers else 4 * m.embed_dim * m.ffn_dim // t)
    wide = 3 * m.ffn_dim // t * s + 2 * m.ffn_dim // t * 4
    scores = 0 if flash else 2 * 4 * m.num_heads // t * run.data.sequence_length // 4
    backward = gathered + tokens * (wide + 4 * m.embed_dim * 2 + scores)
    chunk = run.train.vocab_chunk or m.vocab_size
    chunk = min(chunk, math.ceil(m.vocab_size / parts(sizes, "vocab")))
    # Logits in float32 and their gradient in the compute dtype; hidden states gathered over tensor, and their gradient.
    loss = tokens * ((4 + s) * chunk + s * m.embed_dim + 4 * m.embed_dim // t) + chunk * m.embed_dim * (s + 4)
    if alone and not run.lora.rank:
        # The only gradient during the loss is that of the unembedding, and that of the embedding comes after those of
        # the layers. On several devices, buffers of collectives take the place of what is not there yet.
        # One TPU holds the gradient of logits in their place.
        table = 4 * m.vocab_size * m.embed_dim
        loss -= gradients - table + (tokens * s * chunk if platform == "tpu" else 0)
        backward -= 0 if m.tied_embeddings else table
    return copies + max(backward, loss, 0)
