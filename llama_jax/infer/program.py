"""The compiled programs of inference. They take the weights as an argument, and can be lowered without the device.

    program = Program.make(config, mesh=None, dtype=jnp.bfloat16)
    state = program.start(rows=8, capacity=1024)
    state = program.prefill(params, state, chunk, bound=128)      # prompts into the cache
    state = program.insert(state, fresh)                          # rows become live
    state, out = program.decode(params, state, steer, bound=256)  # up to DISPATCH steps for all live rows
    state, logits_BV = program.look(params, state, steer, bound=256)  # or one step in two halves: look, pick

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
from llama_jax.choices import KV_TYPES
from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError, brief
from llama_jax.infer import decoding, whole_texts
from llama_jax.infer.request import MAX_STOPS
from llama_jax.infer.state import ProgramSpec, State, pin_shardings, without_caches
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
            ConfigError: the model cannot be split over the mesh, or `kv` is not one of KV_TYPES.
        """
        if not isinstance(kv, str) or kv not in KV_TYPES:
            raise ConfigError(f"kv must be one of {', '.join(KV_TYPES)}, got {brief(kv)}")
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
        small = jax.tree.map(lambda _: whole, without_caches(shapes))
        cache, draft = (caches.shardings(layout, own) for own in (shapes.cache, shapes.draft))
        return dataclasses.replace(small, cache=cache, draft=draft)

    # The compiled programs.

    @functools.cached_property
    def start(self) -> Any:
        """Compiled `start(*, rows, capacity)`: returns the State of an empty batch, whose rows are all free."""
        return jax.jit(self._trace_start, static_argnames=("rows", "capacity"))

    @functools.cached_property
    def resize(self) -> Any:
        """Compiled `resize(state, rows_R, *, capacity)`: a State of these rows; an index beyond them is a free row.

        It takes and returns a state without caches (`without_caches`). `resize_array` resizes their arrays one by one,
        so that the old and the new cache are not in memory together.
        """
        return jax.jit(self._trace_resize, static_argnames="capacity")

    @functools.cached_property
    def resize_array(self) -> Any:
        """Compiled `resize_array(array, rows_R, *, capacity)`: an array of a cache, with other rows and slots."""

        def resize(array: jax.Array, rows_R: jax.Array, *, capacity: int) -> jax.Array:
            with parallel.use(self.layout):
                return caches.resized(array, rows_R, capacity=capacity)

        return jax.jit(resize, static_argnames="capacity")

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
    def park(self) -> Any:
        """Compiled `park(state, rows_R, *, bound)`: copies the first positions of rows out of the cache.

        Returns a part of the cache, and one of the draft model's cache or None.
        """
        return jax.jit(self._trace_park, static_argnames="bound")

    @functools.cached_property
    def unpark(self) -> Any:
        """Compiled `unpark(state, part, rows_R)`: writes what `park` returned to the first positions of these rows.

        Returns the new State; the old one is donated.
        """
        return jax.jit(self._trace_unpark, donate_argnums=0)

    @functools.cached_property
    def wipe(self) -> Any:
        """Compiled `wipe(state, rows_R)`: makes the cache of these rows as empty as that of a new batch.

        Returns the new State; the old one is donated.
        """
        return jax.jit(self._trace_wipe, donate_argnums=0)

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

        `steer` has alive_B (False ends a row), limit (steps), least (the loop ends when fewer rows are live) and
        drafts_B (True for rows whose guesses the draft model makes). Outputs are a dict: tokens_BO (-1 where no token
        was generated), logprobs_BO, top_ids_BOK, top_logprobs_BOK, count_B (new tokens), steps_B and remaining_B.
        """
        return jax.jit(
            functools.partial(decoding.decode, self),
            static_argnames=("bound", "top", "guesses", "drafter"),
            donate_argnums=1,
        )

    @functools.cached_property
    def look(self) -> Any:
        """Compiled `look(params, state, steer, *, bound)`: the first half of a step, the logits after the next token.

        Returns the new State and float32 logits_BV; the old State is donated. Rows do not advance: `decode` or another
        `look` may follow, and computes the same. The host computes the masks of grammars meanwhile. `steer` has
        alive_B.
        """
        return jax.jit(functools.partial(decoding.look, self), static_argnames="bound", donate_argnums=1)

    @functools.cached_property
    def pick(self) -> Any:
        """Compiled `pick(state, logits_BV, steer, *, top)`: the second half of a step, which samples from the logits.

        It takes a state without caches and donates it. Returns the new one, and outputs as those of `decode`. `steer`
        has alive_B and allowed_BW.
        """
        return jax.jit(functools.partial(decoding.pick, self), static_argnames="top", donate_argnums=0)

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
            return pin_shardings(
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
            kept_R = rows_R < state.tokens_B.shape[0]
            state = jax.tree.map(lambda a: jnp.take(a, rows_R, axis=0, mode="clip"), state)
            ids_RS = state.ids_BS[:, :capacity]
            return pin_shardings(
                dataclasses.replace(
                    state,
                    ids_BS=jnp.pad(ids_RS, ((0, 0), (0, capacity - ids_RS.shape[1]))),
                    remaining_B=jnp.where(kept_R, state.remaining_B, 0),
                )
            )

    def _trace_prefill(self, params: Any, state: State, chunk: dict[str, jax.Array], *, bound: int) -> State:
        with parallel.use(self.layout):
            steps_T = jnp.arange(chunk["tokens_RT"].shape[1])
            positions_RT = chunk["starts_R"][:, None] + steps_T
            real_RT = steps_T < chunk["counts_R"][:, None]

            def feed(config: ModelConfig, params: Any, cache: Any) -> Any:
                alone = cache.rows == 1  # its chunks need no copy of the row
                part = cache if alone else caches.take_rows(cache, chunk["rows_R"], bound=bound)
                tokens_RT, live_RT = chunk["tokens_RT"], real_RT.astype(jnp.int32)
                fed = model.forward(
                    config, params, tokens_RT, positions_RT, live_RT, part, bound=bound, dtype=self.dtype
                )[1]
                assert fed is not None
                return fed if alone else caches.put_rows(cache, fed, chunk["rows_R"])

            target, draft = self.split(params)
            drafted = None if self.draft is None else feed(self.draft, draft, state.draft)
            return pin_shardings(
                dataclasses.replace(state, cache=feed(self.config, target, state.cache), draft=drafted)
            )

    def _trace_copy(self, state: State, sources_R: jax.Array, targets_R: jax.Array, *, bound: int) -> State:
        return self._trace_unpark(state, self._trace_park(state, sources_R, bound=bound), targets_R)

    def _trace_park(self, state: State, rows_R: jax.Array, *, bound: int) -> tuple[KVCache, KVCache | None]:
        with parallel.use(self.layout):
            draft = None if state.draft is None else caches.take_rows(state.draft, rows_R, bound=bound)
            return caches.take_rows(state.cache, rows_R, bound=bound), draft

    def _trace_unpark(self, state: State, part: tuple[KVCache, KVCache | None], rows_R: jax.Array) -> State:
        with parallel.use(self.layout):
            cache = caches.put_rows(state.cache, part[0], rows_R)
            draft = state.draft
            if draft is not None and part[1] is not None:
                draft = caches.put_rows(draft, part[1], rows_R)
            return pin_shardings(dataclasses.replace(state, cache=cache, draft=draft))

    def _trace_wipe(self, state: State, rows_R: jax.Array) -> State:
        with parallel.use(self.layout):
            capacity = state.cache.capacity
            draft = None if self.draft is None else self._cache(self.draft, 1, capacity)
            return self._trace_unpark(state, (self._cache(self.config, 1, capacity), draft), rows_R)

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
            return pin_shardings(
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
