"""The compiled programs of inference: prefill, decoding, logits and scoring.

*Prefill* writes all prompt tokens except the last of each row into the KV cache. It processes the whole batch at once,
in chunks of a few fixed sizes. *Decode* starts from the last prompt token and runs up to DISPATCH steps in one
`while_loop` on the device, so that device and host synchronize once a dispatch. Shapes come from small sets (rows and
cache capacity are powers of two), and everything else is an array. Any mix of prompts, settings and limits therefore
needs a bounded number of compilations.

The state between calls is explicit: `state = engine.prefill(requests)`, then `state, slice = engine.decode(state,
limit=...)` until all rows are done. `run` is that loop.

Letters: B batch, T chunk length, S cache slots, V vocab, O width of the output buffer. In scoring: C scored positions,
K candidate ids at each of them, n positions whose logits are in memory at a time.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from llama_jax import model, parallel
from llama_jax.cache import KVCache, init_cache
from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError
from llama_jax.infer.batches import power_of_two
from llama_jax.ops import sampling
from llama_jax.ops.linear import Weight
from llama_jax.ops.lora import LoraTensor
from llama_jax.ops.quant import QTensor
from llama_jax.params import Params, logical_axes
from llama_jax.sampling_params import GREEDY, SamplingParams

# Most steps in one dispatch: enough to hide the host's work, few enough that a cancelled request ends soon.
DISPATCH = 64
CHUNKS = (16, 64, 256, 512)
_MIN_CAPACITY = 128
_MIN_STOPS = 4
_LOGITS = 1 << 26  # most float32 logits in memory at a time while scoring (256 MiB)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One row of a batch: its prompt, its limit of new tokens, its sampling settings and its seed."""

    tokens: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParams
    seed: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The decoding state of a batch.

    A row is done when its `remaining_B` is 0. Rows that only pad the batch are done from the start.

    Attributes:
        cache: KV cache of all rows.
        tokens_B: int32 next input token of each row; it is not in the cache yet.
        positions_B: int32 position of that token.
        remaining_B: int32 number of tokens that the row may still generate.
        seen_BV: bool, True for the tokens of the row's prompt and text so far, for the repetition penalty.
        controls: sampling settings of each row.
        stops_S: int32 ids that end a row, padded with -1.
    """

    cache: KVCache
    tokens_B: jax.Array
    positions_B: jax.Array
    remaining_B: jax.Array
    seen_BV: jax.Array
    controls: sampling.Controls
    stops_S: jax.Array


@dataclasses.dataclass(frozen=True)
class Slice:
    """The tokens that one dispatch generated, on the host.

    Attributes:
        tokens: new ids of each row of the batch, including the stop token that ended it.
        logprobs: log-probability of each new id under the model (see `sampling.sample`).
        done: for each row, True if it generates no more tokens.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    done: list[bool]


class Engine:
    """Compiled prefill and decode for one model on one mesh.

    Args:
        config: the model's shape.
        params: weights in the unrolled layout, already on the mesh (see `placed`).
        mesh: mesh of the weights; None is one device.
        dtype: dtype of activations and of the KV cache.
        max_chunk: length in tokens of the longest prefill chunk, one of CHUNKS. Longer chunks use the device better
            and need more scratch memory.

    Raises:
        ConfigError: the model cannot be split over the mesh, or max_chunk is not one of CHUNKS.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        mesh: Mesh | None,
        dtype: jnp.dtype,
        max_chunk: int = CHUNKS[-1],
    ):
        if max_chunk not in CHUNKS:
            raise ConfigError(f"max_chunk must be one of {CHUNKS}, got {max_chunk}")
        self.config = config
        self.params = params
        self.layout = layout(config, mesh)
        self.dtype = jnp.dtype(dtype)
        self.chunks = tuple(size for size in CHUNKS if size <= max_chunk)
        self._begin = jax.jit(self._trace_begin, static_argnames=("capacity", "bound"))
        self._extend = jax.jit(self._trace_extend, static_argnames="bound", donate_argnums=1)
        self._decode = jax.jit(self._trace_decode, donate_argnums=1)
        self._logits = jax.jit(self._trace_logits)
        self._score = jax.jit(self._trace_score)

    def of(self, params: Params, config: ModelConfig) -> Engine:
        """An engine for other weights that shares this engine's compiled programs.

        Weights with the same leaf types and shapes need no further compilation. If `config` differs from this engine's
        config, the result is a new engine with its own programs, and `params` are put on the mesh.
        """
        if config != self.config:  # the adapter adds rows to the vocabulary, or unties the embeddings
            mesh = None if self.layout is None else self.layout.mesh
            params = placed(config, params, mesh=mesh, dtype=self.dtype)
            return Engine(config, params, mesh=mesh, dtype=self.dtype, max_chunk=self.chunks[-1])
        other = copy.copy(self)
        other.params = params
        return other

    @property
    def compilations(self) -> int:
        """The number of programs that this engine has compiled so far."""
        programs = (self._begin, self._extend, self._decode, self._logits, self._score)
        return sum(program._cache_size() for program in programs)

    def prefill(self, requests: Sequence[Request], *, stop_tokens: Sequence[int], rows: int = 1) -> State:
        """The state of a new batch, whose cache holds all prompt tokens except the last of each row.

        Args:
            requests: the rows of the batch. Each has at least one prompt token, and its prompt and new tokens together
                fit config.max_seq_len. `Llama` checks this beforehand; it is not checked here.
            stop_tokens: ids that end a row.
            rows: minimum batch size. Smaller groups are padded to it and reuse the compiled programs.
        """
        rows = power_of_two(max(len(requests), rows), 1)
        lengths = [len(r.tokens) for r in requests] + [1] * (rows - len(requests))
        longest = max(lengths) - 1
        need = max(len(r.tokens) + r.max_new_tokens for r in requests)
        capacity = min(power_of_two(need, _MIN_CAPACITY), self.config.max_seq_len)
        spans = _spans(longest, self.chunks)
        prompts_BT = np.zeros((rows, spans[-1][0] + spans[-1][1] + 1), np.int32)
        for row, request in zip(prompts_BT, requests, strict=False):
            row[: len(request.tokens)] = request.tokens
        state = None
        with jax.transfer_guard("disallow"):
            for start, size in spans:
                bound = min(power_of_two(start + size, _MIN_CAPACITY), capacity)
                chunk = {
                    "tokens_BT": prompts_BT[:, start : start + size],
                    "fed_B": np.array(lengths, np.int32) - 1,
                    "start": np.int32(start),
                }
                if state is None:
                    fresh = self._fresh(requests, prompts_BT, lengths, stop_tokens)
                    chunk, fresh = self._put((chunk, fresh))
                    state = self._begin(self.params, chunk, fresh, capacity=capacity, bound=bound)
                else:
                    state = self._extend(self.params, state, self._put(chunk), bound=bound)
        return state

    def decode(self, state: State, *, limit: int) -> tuple[State, Slice]:
        """Generates up to `limit` more tokens for every row that is not done. `state` is donated.

        Raises:
            ConfigError: `limit` is not from 1 to DISPATCH.
            ValueError: the model's logits are not finite.
        """
        if not 1 <= limit <= DISPATCH:
            raise ConfigError(f"limit must be from 1 to {DISPATCH}, got {limit}")
        with jax.transfer_guard("disallow"):
            state, out = self._decode(self.params, state, self._put(np.int32(limit)))
            tokens_BO, logprobs_BO, remaining_B = jax.device_get((*out, state.remaining_B))
        self._check_finite(logprobs_BO)
        counts = (tokens_BO >= 0).sum(axis=1)
        return state, Slice(
            tokens=[row[:n].tolist() for row, n in zip(tokens_BO, counts, strict=True)],
            logprobs=[row[:n].tolist() for row, n in zip(logprobs_BO, counts, strict=True)],
            done=(remaining_B == 0).tolist(),
        )

    def run(
        self,
        requests: Sequence[Request],
        *,
        stop_tokens: Sequence[int],
        rows: int = 1,
        first: int = DISPATCH,
        most: int = DISPATCH,
    ) -> Iterator[Slice]:
        """Yields slices until every row is done.

        Args:
            requests: as in `prefill`.
            stop_tokens: ids that end a row.
            rows: minimum batch size.
            first: largest number of steps of the first dispatch. The limit doubles with each dispatch.
            most: largest number of steps of any dispatch.
        """
        state = self.prefill(requests, stop_tokens=stop_tokens, rows=rows)
        limit = min(first, most)
        while True:
            state, piece = self.decode(state, limit=limit)
            yield piece
            if all(piece.done):
                return
            limit = min(2 * limit, most)

    def logits(self, tokens_BT: np.ndarray) -> jax.Array:
        """Logits (B, T, V) float32 of token ids (B, T), by the forward pass without a cache that training uses."""
        return self._logits(self.params, self._put(tokens_BT))

    def score(
        self, tokens_BT: np.ndarray, starts_B: np.ndarray, candidates_BCK: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of candidate next tokens, computed without the logits of all positions in memory at once.

        Args:
            tokens_BT: int32 token ids. The first token of each row has position 0.
            starts_B: index of the first scored position of each row. The logits at scored position c of row b are
                those after the token `tokens_BT[b, starts_B[b] + c]`. An index beyond the row means its last token.
            candidates_BCK: candidate ids at each scored position.

        Returns:
            Log-probabilities (B, C, K) float32, and bool (B, C, K): True where the candidate is the likeliest token of
            the vocabulary. Of equally likely tokens, the one with the lowest id counts as the likeliest.

        Raises:
            ValueError: the model's logits are not finite.
        """
        with jax.transfer_guard("disallow"):
            given = self._put((tokens_BT, starts_B, candidates_BCK))
            logprobs_BCK, best_BCK = jax.device_get(self._score(self.params, *given))
        self._check_finite(logprobs_BCK)
        return logprobs_BCK, best_BCK

    def _check_finite(self, logprobs: np.ndarray) -> None:
        if not np.isfinite(logprobs).all():
            raise ValueError(
                f"the model's logits are not finite: its weights are damaged, or overflow in {self.dtype} (try float32)"
            )

    def _fresh(
        self,
        requests: Sequence[Request],
        prompts_BT: np.ndarray,
        lengths: Sequence[int],
        stop_tokens: Sequence[int],
    ) -> dict[str, object]:
        """The parts of a new State that come from the host."""
        padding = len(prompts_BT) - len(requests)
        params = [r.sampling for r in requests] + [GREEDY] * padding
        stops = np.full(power_of_two(len(stop_tokens), _MIN_STOPS), -1, np.int32)
        stops[: len(stop_tokens)] = stop_tokens
        positions_B = np.array(lengths, np.int32) - 1
        return {
            "tokens_B": np.take_along_axis(prompts_BT, positions_B[:, None], axis=1)[:, 0],
            "positions_B": positions_B,
            "remaining_B": np.array([r.max_new_tokens for r in requests] + [0] * padding, np.int32),
            "controls": sampling.controls(params, [r.seed for r in requests] + [0] * padding),
            "stops_S": stops,
        }

    def _put(self, tree: object) -> object:
        """Copies host arrays to the devices, replicated. The transfer guard disallows implicit copies."""
        return jax.device_put(tree, None if self.layout is None else parallel.replicated(self.layout.mesh))

    # The methods from here on are traced by jit.

    def _trace_logits(self, params: Params, tokens_BT: jax.Array) -> jax.Array:
        with parallel.use(self.layout):
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
            hidden_BTD, _ = model.forward(self.config, params, tokens_BT, positions_BT, None, dtype=self.dtype)
            return model.unembed(self.config, params, hidden_BTD)

    def _trace_score(
        self, params: Params, tokens_BT: jax.Array, starts_B: jax.Array, candidates_BCK: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        with parallel.use(self.layout):
            B, T = tokens_BT.shape
            C = candidates_BCK.shape[1]
            positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
            hidden_BTD, _ = model.forward(self.config, params, tokens_BT, positions_BT, None, dtype=self.dtype)
            places_BC = jnp.minimum(starts_B[:, None] + jnp.arange(C), T - 1)
            hidden_BCD = jnp.take_along_axis(hidden_BTD, places_BC[..., None], axis=1)

            def piece(given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                hidden_BnD, ids_BnK = given
                logits_BnV = model.unembed(self.config, params, hidden_BnD)
                chosen_BnK = jnp.take_along_axis(logits_BnV, ids_BnK, axis=-1)
                total_Bn1 = jax.nn.logsumexp(logits_BnV, axis=-1, keepdims=True)
                return chosen_BnK - total_Bn1, ids_BnK == jnp.argmax(logits_BnV, axis=-1, keepdims=True)

            n = min(C, max(1, _LOGITS // (B * self.config.vocab_size)))
            pieces = -(-C // n)
            cut = lambda a: jnp.pad(a, ((0, 0), (0, pieces * n - C), (0, 0))).reshape(B, pieces, n, -1).swapaxes(0, 1)  # noqa: E731
            joined = lambda a: a.swapaxes(0, 1).reshape(B, pieces * n, -1)[:, :C]  # noqa: E731
            return _all_whole(jax.tree.map(joined, lax.map(piece, (cut(hidden_BCD), cut(candidates_BCK)))))

    def _trace_begin(self, params: Params, chunk: dict, fresh: dict, *, capacity: int, bound: int) -> State:
        with parallel.use(self.layout):
            rows = chunk["tokens_BT"].shape[0]
            cache = init_cache(self.config, batch=rows, capacity=capacity, dtype=self.dtype)
            seen_BV = jnp.zeros((rows, self.config.vocab_size), bool)
            seen_BV = seen_BV.at[jnp.arange(rows), fresh["tokens_B"]].set(True)
            state = State(cache=cache, seen_BV=seen_BV, **fresh)
            return self._feed(params, state, chunk, bound)

    def _trace_extend(self, params: Params, state: State, chunk: dict, *, bound: int) -> State:
        with parallel.use(self.layout):
            return self._feed(params, state, chunk, bound)

    def _feed(self, params: Params, state: State, chunk: dict, bound: int) -> State:
        """Processes one prefill chunk. It attends only to the first `bound` cache slots: later ones are still empty."""
        tokens_BT = chunk["tokens_BT"]
        rows, size = tokens_BT.shape
        positions_BT = jnp.broadcast_to(chunk["start"] + jnp.arange(size), (rows, size))
        real_BT = positions_BT < chunk["fed_B"][:, None]
        whole = state.cache
        part = jax.tree.map(lambda a: a[:, :, :bound], whole)
        _, part = model.forward(
            self.config, params, tokens_BT, positions_BT, real_BT.astype(jnp.int32), part, dtype=self.dtype
        )
        cache = jax.tree.map(lambda a, b: lax.dynamic_update_slice(a, b, (0, 0, 0, 0)), whole, part)
        ids_BT = jnp.where(real_BT, tokens_BT, self.config.vocab_size)
        seen_BV = state.seen_BV.at[jnp.arange(rows)[:, None], ids_BT].set(True, mode="drop")
        return _settled(dataclasses.replace(state, cache=cache, seen_BV=seen_BV))

    def _trace_decode(
        self, params: Params, state: State, limit: jax.Array
    ) -> tuple[State, tuple[jax.Array, jax.Array]]:
        with parallel.use(self.layout):
            rows = state.tokens_B.shape[0]
            out = (jnp.full((rows, DISPATCH), -1, jnp.int32), jnp.zeros((rows, DISPATCH), jnp.float32))
            start = (jnp.int32(0), _settled(state), _all_whole(out))
            step = functools.partial(self._step, params)
            _, state, out = lax.while_loop(
                lambda carry: (carry[0] < limit) & jnp.any(carry[1].remaining_B > 0), step, start
            )
            return state, out

    def _step(self, params: Params, carry: tuple) -> tuple:
        """Generates one token for every row that is not done. Other rows keep their state and write nothing."""
        step, state, (tokens_BO, logprobs_BO) = carry
        live_B = state.remaining_B > 0
        hidden_BTD, cache = model.forward(
            self.config,
            params,
            state.tokens_B[:, None],
            state.positions_B[:, None],
            live_B.astype(jnp.int32)[:, None],
            state.cache,
            dtype=self.dtype,
        )
        next_B, logprob_B = sampling.sample(
            model.unembed(self.config, params, hidden_BTD[:, 0]),
            seen_BV=state.seen_BV,
            controls=state.controls,
            positions_B=state.positions_B + 1,
        )
        stopped_B = jnp.any(next_B[:, None] == state.stops_S, axis=1)
        rows = jnp.arange(next_B.shape[0])
        seen_ids_B = jnp.where(live_B, next_B, self.config.vocab_size)
        out = (
            tokens_BO.at[:, step].set(jnp.where(live_B, next_B, -1)),
            logprobs_BO.at[:, step].set(jnp.where(live_B, logprob_B, 0)),
        )
        state = dataclasses.replace(
            state,
            cache=cache,
            tokens_B=jnp.where(live_B, next_B, state.tokens_B),
            positions_B=state.positions_B + live_B,
            remaining_B=jnp.where(stopped_B, 0, jnp.maximum(state.remaining_B - 1, 0)),
            seen_BV=state.seen_BV.at[rows, seen_ids_B].set(True, mode="drop"),
        )
        return step + 1, _settled(state), _all_whole(out)


def layout(config: ModelConfig, mesh: Mesh | None) -> parallel.Layout | None:
    """The sharding layout of inference: batch rows over data and fsdp, weights over tensor, replicated over other axes.

    Raises:
        ConfigError: the tensor axis does not divide the key/value heads.
    """
    if mesh is None:
        return None
    layout = parallel.Layout(mesh, "infer")
    parts = layout.parts("kv_heads")
    if config.num_kv_heads % parts:
        legal = [n for n in range(1, config.num_kv_heads + 1) if config.num_kv_heads % n == 0]
        raise ConfigError(
            f"mesh tensor={parts} does not divide the model's {config.num_kv_heads} key/value heads: "
            f"use tensor = one of {legal}, and data for the other devices"
        )
    return layout


def placed(config: ModelConfig, params: Params, *, mesh: Mesh | None, dtype: jnp.dtype) -> Params:
    """Unrolled weights cast to `dtype` and sharded over the mesh. Arrays that already are so are not copied."""

    def cast(leaf: Weight) -> Weight:
        if isinstance(leaf, LoraTensor):  # its scale stays in float32
            return dataclasses.replace(leaf, base=cast(leaf.base), a=cast(leaf.a), b=cast(leaf.b))
        return leaf if isinstance(leaf, QTensor) or leaf.dtype == dtype else jnp.asarray(leaf).astype(dtype)

    params = jax.tree.map(cast, params, is_leaf=lambda x: isinstance(x, (QTensor, LoraTensor)))
    where = layout(config, mesh)
    if where is None:
        return jax.device_put(params)
    axes = logical_axes(config, stacked=False)
    return jax.device_put(params, parallel.shardings(where, axes, params))


def _settled(state: State) -> State:
    """Constrains the shardings of a state that a program returns: a sharded cache, and replicated small arrays.

    Without the constraint, XLA may choose other shardings, and the next call recompiles.
    """
    return dataclasses.replace(
        _all_whole(dataclasses.replace(state, cache=None)),
        cache=jax.tree.map(lambda a: parallel.constrain(a, "batch", "kv_heads", None, None), state.cache),
    )


def _all_whole(tree: object) -> object:
    return jax.tree.map(lambda a: parallel.constrain(a, *(None,) * a.ndim), tree)


def _spans(length: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """The (start, size) of each chunk that covers `length` tokens.

    All chunks but the last have the largest size. The last has the smallest size that covers the remaining tokens.
    """
    spans = []
    start = 0
    while not spans or start < length:
        left = length - start
        size = next((s for s in sizes if s >= left), sizes[-1])
        spans.append((start, size))
        start += size
    return spans
