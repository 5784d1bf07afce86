"""The decoding state of a batch on the devices, and the specification of its programs.

Letters: B rows of the batch, S cache slots.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import cache as caches
from llama_jax import parallel
from llama_jax.cache import KVCache
from llama_jax.config import ModelConfig
from llama_jax.ops import sampling
from llama_jax.params import Params


@dataclasses.dataclass(frozen=True)
class ProgramSpec:
    """Everything that the programs of a model depend on, apart from weights and batches.

    Attributes:
        config: shape of the model.
        layout: mesh and sharding rules, or None for one device.
        dtype: dtype of activations and, for kv="compute", of the KV cache.
        kv: one of choices.KV_TYPES.
        draft: shape of the draft model, or None.
    """

    config: ModelConfig
    layout: parallel.Layout | None
    dtype: jnp.dtype
    kv: str = "compute"
    draft: ModelConfig | None = None

    def split(self, params: Any) -> tuple[Params, Params | None]:
        """The weights of the model and of the draft model. With a draft, params are a pair."""
        return (params, None) if self.draft is None else params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The decoding state of a batch. A row is live while its `remaining_B` is above 0.

    Attributes:
        cache: KV cache of all rows.
        draft: KV cache of the draft model, or None.
        ids_BS: int32 token at each position of the row, up to the next input token.
        tokens_B: int32 next input token of each row; it is not in the cache yet.
        positions_B: int32 position of that token.
        remaining_B: int32 number of tokens that the row may still generate.
        sampling: settings and text statistics of each row.
    """

    cache: KVCache
    draft: KVCache | None
    ids_BS: jax.Array
    tokens_B: jax.Array
    positions_B: jax.Array
    remaining_B: jax.Array
    sampling: sampling.SamplingState


def without_caches(state: State) -> State:
    """The state with None in place of its caches, whose arrays have shardings and shapes of their own."""
    nothing: Any = None
    return dataclasses.replace(state, cache=nothing, draft=None)


def pin_shardings(state: State) -> State:
    """Constrains the shardings of a state that a program returns: a sharded cache, and replicated small arrays.

    Without the constraint, XLA may choose other shardings, and the next call recompiles.
    """
    small = replicate(without_caches(state))
    return dataclasses.replace(small, cache=caches.constrained(state.cache), draft=caches.constrained(state.draft))


def replicate(tree: Any) -> Any:
    """The arrays of a tree, constrained to be replicated."""
    return jax.tree.map(lambda a: parallel.constrain(a, *(None,) * a.ndim), tree)
