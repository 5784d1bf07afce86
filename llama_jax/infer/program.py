"""The compiled programs of inference. They take the weights as an argument, and can be lowered without the device.

    program = Program.make(config, mesh=None, dtype=jnp.bfloat16)
    state = program.start(rows=8, capacity=1024)
    state = program.prefill(params, state, chunk, bound=128)      # prompts into the cache
    state = program.insert(state, fresh)                          # rows become live
    state, out = program.decode(params, state, steer, bound=256)  # up to DISPATCH steps for all live rows

A batch is a number of rows, each of which serves one request after another. A row is free when it has nothing left to
generate. Prefill writes prompt tokens into the cache, insert gives a row its last prompt token, its limit and its
settings, and decode advances all live rows in one `while_loop` on the device, so that device and host synchronize once
a dispatch. Rows do not depend on each other. Shapes come from small sets (see `engine`), and everything else is an
array, so any mix of prompts, settings and limits needs a bounded number of compilations.

Letters: B rows of the batch, R rows of one call, T chunk length, S cache slots, V vocab, N stop tokens, O width of the
output buffer, P padded prompt length, G guessed tokens of a step, W words of a mask. In scoring: C scored positions,
K candidate ids at each of them, n positions whose logits are in memory at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax import cache as caches
from llama_jax import model, parallel
from llama_jax.cache import KVCache
from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError
from llama_jax.infer import decoding, whole_texts
from llama_jax.infer.request import MAX_STOPS
from llama_jax.infer.state import ProgramSpec, State, settled, without_caches
from llama_jax.ops import sampling
from llama_jax.params import Params, abstract_params, logical_axes


class Program(ProgramSpec):
    """The programs of one model shape on one mesh. Its attributes are those of `ProgramSpec`."""

    @classmethod
    def make(
        cls,
        config: ModelConfig,
        *,
        mesh: Mesh | None,
        dtype: jnp.dtype,
        kv: str = "compute",
        draft: ModelConfig | None = None,
    ) -> Program:
        """The programs of a model on a mesh.

        Raises:
            ConfigError: the model cannot be split over the mesh, or `kv` is not one of cache.KV_TYPES.
        """
        if kv not in caches.KV_TYPES:
            raise ConfigError(f"kv must be one of {', '.join(caches.KV_TYPES)}, got {kv!r}")
        if draft is not None and draft.vocab_size != config.vocab_size:
            raise ConfigError(
                f"the draft model has {draft.vocab_size:,} tokens and the model {config.vocab_size:,}: a draft needs "
                "the same vocabulary"
            )
        if draft is not None:  # beyond its own context its guesses are worse, and never wrong
            draft = dataclasses.replace(draft, max_seq_len=max(draft.max_seq_len, config.max_seq_len))
        return cls(config, layout_of(config, mesh), jnp.dtype(dtype), kv, draft)

    # Abstract values, for compiling without weights and without devices.

    def abstract_params(self, dtype: jnp.dtype | None = None) -> Params:
        """The unrolled weights as ShapeDtypeStructs with their shardings."""
        shapes = abstract_params(self.config, stacked=False, dtype=self.dtype if dtype is None else dtype)
        if self.layout is None:
            return shapes
        axes = logical_axes(self.config, stacked=False)
        return parallel.abstract(shapes, parallel.shardings(self.layout, axes, shapes))

    def abstract_state(self, *, rows: int, capacity: int) -> State:
        """The state as ShapeDtypeStructs with their shardings."""
        shapes = jax.eval_shape(functools.partial(self._trace_start, rows=rows, capacity=capacity))
        if self.layout is None:
            return shapes
        return parallel.abstract(shapes, self._state_shardings(shapes))

    def _state_shardings(self, shapes: State) -> State:
        layout = self.layout
        assert layout is not None
        whole = parallel.replicated(layout.mesh)

        def cache_sharding(a: jax.Array) -> jax.sharding.NamedSharding:
            return layout.sharding(caches.AXES[: a.ndim], a.shape)

        small = jax.tree.map(lambda _: whole, without_caches(shapes))
        return dataclasses.replace(
            small,
            cache=jax.tree.map(cache_sharding, shapes.cache),
            draft=jax.tree.map(cache_sharding, shapes.draft),
        )

    # The compiled programs.

    @functools.cached_property
    def start(self) -> Any:
        """Compiled `start(*, rows, capacity)`: returns the State of an empty batch, whose rows are all free."""
        return jax.jit(self._trace_start, static_argnames=("rows", "capacity"))

    @functools.cached_property
    def resize(self) -> Any:
        """Compiled `resize(state, rows_R, *, capacity)`: a State of these rows; an index beyond them is a free row."""
        return jax.jit(self._trace_resize, static_argnames="capacity")

    @functools.cached_property
    def prefill(self) -> Any:
        """Compiled `prefill(params, state, chunk, *, bound)`: writes a chunk of prompt tokens into the cache.

        Returns the new State; the old one is donated.

        `chunk` has rows_R, tokens_RT, starts_R (position of the first token) and counts_R (number of real tokens).
        `bound` is at least the end of every row's tokens.
        """
        return jax.jit(self._trace_prefill, static_argnames="bound", donate_argnums=1)

    @functools.cached_property
    def copy(self) -> Any:
        """Compiled `copy(state, sources_R, targets_R, *, bound)`: copies the first `bound` cache slots from row to row.

        Returns the new State; the old one is donated.
        """
        return jax.jit(self._trace_copy, static_argnames="bound", donate_argnums=0)

    @functools.cached_property
    def insert(self) -> Any:
        """Compiled `insert(state, fresh)`: makes rows live. Returns the new State; the old one is donated.

        `fresh` has rows_R, prompts_RP, lengths_R, remaining_R, stops_RN, controls, and bias_RV or None.
        """
        return jax.jit(self._trace_insert, donate_argnums=0)

    @functools.cached_property
    def decode(self) -> Any:
        """Compiled `decode(params, state, steer, *, bound, top, guesses, drafter)`: advances all live rows by several
        tokens.

        Returns the new State and outputs; the old State is donated.

        `steer` has alive_B (False ends a row), limit (steps), least (the loop ends when fewer rows are live), and
        allowed_BW or None. Outputs are a dict: tokens_BO (-1 where no token was generated), logprobs_BO, top_ids_BOK,
        top_logprobs_BOK, count_B (new tokens), steps_B and remaining_B.
        """
        return jax.jit(
            functools.partial(decoding.decode, self),
            static_argnames=("bound", "top", "guesses", "drafter"),
            donate_argnums=1,
        )

    @functools.cached_property
    def logits(self) -> Any:
        """Compiled `logits(params, tokens_BT)`: float32 logits (B, T, V) by the forward pass without a cache."""
        return jax.jit(functools.partial(whole_texts.logits, self))

    @functools.cached_property
    def hidden(self) -> Any:
        """Compiled `hidden(params, tokens_BT)`: hidden states (B, T, D) after the final norm, in `dtype`."""
        return jax.jit(functools.partial(whole_texts.hidden, self))

    @functools.cached_property
    def score(self) -> Any:
        """Compiled `score(params, tokens_BT, starts_B, candidates_BCK, *, top)`; `Engine.score` documents it."""
        return jax.jit(functools.partial(whole_texts.score, self), static_argnames="top")

    @property
    def compilations(self) -> int:
        """The number of programs that have been compiled so far."""
        compiled = [value for value in vars(self).values() if hasattr(value, "_cache_size")]
        return sum(program._cache_size() for program in compiled)

    # The methods from here on are traced by jit.

    def _trace_start(self, *, rows: int, capacity: int) -> State:
        with parallel.use(self.layout):
            zeros = jnp.zeros(rows, jnp.int32)
            words = -(-self.config.vocab_size // 32)
            settings = sampling.Controls(**{field.name: zeros for field in dataclasses.fields(sampling.Controls)})
            typed = sampling.controls([], [])
            settings = jax.tree.map(lambda a, like: a.astype(like.dtype), settings, typed)
            return settled(
                State(
                    cache=self._cache(self.config, rows, capacity),
                    draft=None if self.draft is None else self._cache(self.draft, rows, capacity),
                    ids_BS=jnp.zeros((rows, capacity), jnp.int32),
                    tokens_B=zeros,
                    positions_B=zeros,
                    remaining_B=zeros,
                    sampling=sampling.SamplingState(
                        controls=settings,
                        seen_BV=jnp.zeros((rows, self.config.vocab_size), bool),
                        counts_BV=jnp.zeros((rows, self.config.vocab_size), jnp.int32),
                        bias_BV=jnp.zeros((rows, self.config.vocab_size), jnp.float32),
                        allowed_BW=jnp.zeros((rows, words), jnp.uint32),
                        stops_BN=jnp.full((rows, MAX_STOPS), -1, jnp.int32),
                    ),
                )
            )

    def _cache(self, config: ModelConfig, rows: int, capacity: int) -> KVCache:
        return caches.init_cache(config, batch=rows, capacity=capacity, dtype=self.dtype, kv=self.kv)

    def _trace_resize(self, state: State, rows_R: jax.Array, *, capacity: int) -> State:
        with parallel.use(self.layout):
            kept_R = rows_R < state.cache.rows
            small = jax.tree.map(lambda a: jnp.take(a, rows_R, axis=0, mode="clip"), without_caches(state))
            ids_RS = small.ids_BS[:, :capacity]
            caches_of = functools.partial(caches.resized, rows_R=rows_R, capacity=capacity)
            return settled(
                dataclasses.replace(
                    small,
                    cache=caches_of(state.cache),
                    draft=None if state.draft is None else caches_of(state.draft),
                    ids_BS=jnp.pad(ids_RS, ((0, 0), (0, capacity - ids_RS.shape[1]))),
                    remaining_B=jnp.where(kept_R, small.remaining_B, 0),
                )
            )

    def _trace_prefill(self, params: Any, state: State, chunk: dict[str, jax.Array], *, bound: int) -> State:
        with parallel.use(self.layout):
            steps_T = jnp.arange(chunk["tokens_RT"].shape[1])
            positions_RT = chunk["starts_R"][:, None] + steps_T
            real_RT = steps_T < chunk["counts_R"][:, None]

            def feed(config: ModelConfig, params: Any, cache: Any) -> Any:
                part = caches.take_rows(cache, chunk["rows_R"], bound=bound)
                slots_RT = real_RT.astype(jnp.int32)
                tokens_RT = chunk["tokens_RT"]
                fed = model.forward(config, params, tokens_RT, positions_RT, slots_RT, part, dtype=self.dtype)[1]
                assert fed is not None
                return caches.put_rows(cache, fed, chunk["rows_R"])

            target, draft = self.split(params)
            drafted = None if self.draft is None else feed(self.draft, draft, state.draft)
            return settled(dataclasses.replace(state, cache=feed(self.config, target, state.cache), draft=drafted))

    def _trace_copy(self, state: State, sources_R: jax.Array, targets_R: jax.Array, *, bound: int) -> State:
        with parallel.use(self.layout):

            def copied(cache: KVCache) -> KVCache:
                return caches.put_rows(cache, caches.take_rows(cache, sources_R, bound=bound), targets_R)

            draft = None if state.draft is None else copied(state.draft)
            return settled(dataclasses.replace(state, cache=copied(state.cache), draft=draft))

    def _trace_insert(self, state: State, fresh: dict[str, Any]) -> State:
        with parallel.use(self.layout):
            rows_R, prompts_RP, lengths_R = fresh["rows_R"], fresh["prompts_RP"], fresh["lengths_R"]
            R, P = prompts_RP.shape
            V = self.config.vocab_size
            lines_R1 = jnp.arange(R)[:, None]
            ids_RP = jnp.where(jnp.arange(P) < lengths_R[:, None], prompts_RP, V)  # padding is dropped
            seen_RV = jnp.zeros((R, V), bool).at[lines_R1, ids_RP].set(True, mode="drop")
            last_R = jnp.take_along_axis(prompts_RP, lengths_R[:, None] - 1, axis=1)[:, 0]

            def put(old: Any, new: Any) -> jax.Array:
                return old.at[rows_R].set(new.astype(old.dtype), mode="drop")

            old = state.sampling
            settings = dataclasses.replace(
                old,
                controls=jax.tree.map(put, old.controls, fresh["controls"]),
                seen_BV=put(old.seen_BV, seen_RV),
                counts_BV=put(old.counts_BV, jnp.zeros((R, V), jnp.int32)),
                bias_BV=old.bias_BV if fresh["bias_RV"] is None else put(old.bias_BV, fresh["bias_RV"]),
                stops_BN=put(old.stops_BN, fresh["stops_RN"]),
            )
            width = min(P, state.ids_BS.shape[1])
            return settled(
                dataclasses.replace(
                    state,
                    ids_BS=state.ids_BS.at[rows_R, :width].set(prompts_RP[:, :width], mode="drop"),
                    tokens_B=put(state.tokens_B, last_R),
                    positions_B=put(state.positions_B, lengths_R - 1),
                    remaining_B=put(state.remaining_B, fresh["remaining_R"]),
                    sampling=settings,
                )
            )


def layout_of(config: ModelConfig, mesh: Mesh | None) -> parallel.Layout | None:
    """The sharding layout of inference: batch rows over data and fsdp, weights over tensor, cache slots over context.

    Raises:
        ConfigError: the tensor axis neither divides the key/value heads nor is a multiple of them.
    """
    if mesh is None:
        return None
    layout = parallel.Layout(mesh, "infer")
    parts, heads = layout.parts("kv_heads"), config.num_kv_heads
    if heads % parts and (parts % heads or config.num_heads % parts):
        legal = [
            n
            for n in range(1, config.num_heads + 1)
            if heads % n == 0 or (n % heads == 0 and config.num_heads % n == 0)
        ]
        raise ConfigError(
            f"mesh tensor={parts} does not fit the model's {heads} key/value heads and {config.num_heads} query heads: "
            f"use tensor = one of {legal}, and data for the other devices"
        )
    return layout
