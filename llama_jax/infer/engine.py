"""The host's part of a batch: it keeps weights and state, and rounds shapes for the programs of a `Program`.

Every method takes and returns numpy values, and chooses shapes from small sets so that few programs are compiled: rows
of a call are powers of four, lengths come from CHUNKS, capacities and bounds from `round_up`.

Letters: B rows of the batch, R rows of one call, T chunk length, V vocab, P padded prompt length, C scored positions, K
candidate ids.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax import parallel
from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError
from llama_jax.infer.batches import power_of_two
from llama_jax.infer.program import Program, layout_of
from llama_jax.infer.request import DISPATCH, MAX_STOPS, Fill, Piece, Request
from llama_jax.infer.state import State, without_caches
from llama_jax.ops import sampling
from llama_jax.ops.lora import LoraTensor
from llama_jax.ops.quant import QTensor
from llama_jax.params import Params, logical_axes

CHUNKS = (16, 64, 256, 512)  # lengths of prefill
_TOPS = (0, 5, 20)  # numbers of likeliest tokens that a step may report
_LEAST_CAPACITY = 128
_PROMPT = 64  # least width of the prompts of an insert; the others are its products with powers of four
_FINE = 4096  # capacities above it are multiples of it; below it, powers of two


class Engine:
    """Weights and the rows of one batch.

    Attributes:
        program: the compiled programs; other engines may share them.
        params: weights in the unrolled layout, on the mesh (see `placed`).
        draft: weights of the draft model, or None.
        state: the batch, or None before the first `resize`.
    """

    def __init__(self, program: Program, params: Params, *, draft: Params | None = None, max_chunk: int = CHUNKS[-1]):
        """An engine without rows.

        Args:
            program: the programs of the model.
            params: its weights.
            draft: weights of the program's draft model.
            max_chunk: length in tokens of the longest prefill chunk, one of CHUNKS. Longer chunks use the device better
                and need more scratch memory.

        Raises:
            ConfigError: max_chunk is not one of CHUNKS.
        """
        if max_chunk not in CHUNKS:
            raise ConfigError(f"max_chunk must be one of {CHUNKS}, got {max_chunk}")
        self.program = program
        self.params = params
        self.draft = draft
        self.state: State | None = None
        self._logits_BV: jax.Array | None = None  # of the next tokens, if `look` was the last program to feed a token
        self.chunks = tuple(size for size in CHUNKS if size <= max_chunk)

    @property
    def _weights(self) -> Any:
        if not self.params:
            raise ConfigError("the model has no weights since set_params(None): give it others with set_params")
        return self.params if self.program.draft is None else (self.params, self.draft)

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self.program.config

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the activations."""
        return self.program.dtype

    @property
    def layout(self) -> parallel.Layout | None:
        """Mesh and sharding rules."""
        return self.program.layout

    @property
    def rows(self) -> int:
        """Number of rows of the batch."""
        return 0 if self.state is None else self.state.cache.rows

    @property
    def capacity(self) -> int:
        """Positions that a row can hold."""
        return 0 if self.state is None else self.state.cache.capacity

    @property
    def intact(self) -> bool:
        """False if a failed call has lost the batch, because its arrays were donated to the call."""
        return not any(a.is_deleted() for a in jax.tree.leaves(self.state))

    @property
    def compilations(self) -> int:
        """The number of programs that have been compiled so far."""
        return self.program.compilations

    def of(self, params: Params, config: ModelConfig) -> Engine:
        """An engine without rows for other weights, which shares this engine's compiled programs.

        Weights with the same leaf types and shapes need no further compilation. If `config` differs from this engine's
        config, the result has its own programs, and `params` are put on the mesh.
        """
        other = copy.copy(self)
        other.clear()
        if config != self.config:  # the adapter adds rows to the vocabulary, or unties the embeddings
            mesh = None if self.layout is None else self.layout.mesh
            params = placed(config, params, mesh=mesh, dtype=self.dtype)
            other.program = Program.make(config, mesh=mesh, dtype=self.dtype, kv=self.program.kv)
            other.draft = None
        other.params = params
        return other

    # Rows.

    def capacity_for(self, length: int) -> int:
        """The capacity of a batch whose longest row has `length` positions."""
        return min(round_up(length), self.config.max_seq_len)

    def resize(self, keep: Sequence[int], *, rows: int, capacity: int) -> None:
        """Makes a batch of `rows` rows, whose first are the rows `keep` of the present batch.

        `capacity` is at least the length of every kept row that matters; later positions are discarded. One array after
        the other is copied and freed, so that the old and the new cache are not in memory together.
        """
        self._logits_BV = None
        with jax.transfer_guard("disallow"):
            if self.state is None:
                self.state = self.program.start(rows=rows, capacity=capacity)
                return
            order = np.full(rows, self.rows, np.int32)
            order[: len(keep)] = keep
            rows_R = self._put(order)

            def resized(array: jax.Array) -> jax.Array:
                new = self.program.resize_array(array, rows_R, capacity=capacity).block_until_ready()
                if new is not array:
                    array.delete()
                return new

            old = self.state
            small = self.program.resize(without_caches(old), rows_R, capacity=capacity)
            cache, draft = (jax.tree.map(resized, own) for own in (old.cache, old.draft))
            self.state = dataclasses.replace(small, cache=cache, draft=draft)

    def clear(self) -> None:
        """Frees the batch."""
        self.state = self._logits_BV = None

    def park(self, row: int, length: int) -> Any:
        """A copy of the first `length` positions of a row, or some more, for `unpark`."""
        with jax.transfer_guard("disallow"):
            return self.program.park(self.state, self._put(np.array([row], np.int32)), bound=self._bound(length))

    def unpark(self, part: Any, row: int) -> None:
        """Writes what `park` returned to the first positions of a row."""
        with jax.transfer_guard("disallow"):
            self.state = self.program.unpark(self.state, part, self._put(np.array([row], np.int32)))

    def wipe(self, row: int) -> None:
        """Empties the cache of a row. A value that is not finite would spoil later texts, since 0 * NaN is NaN."""
        with jax.transfer_guard("disallow"):
            self.state = self.program.wipe(self.state, self._put(np.array([row], np.int32)))

    def prefill(self, fills: Sequence[Fill]) -> None:
        """Writes prompt tokens into the cache. Rows of similar numbers of tokens should come together."""
        groups = _groups(fills, self.rows)
        with jax.transfer_guard("disallow"):
            for group, height in groups:
                for start, size in spans(max(len(fill.tokens) for fill in group), self.chunks):
                    chunk = {
                        "rows_R": np.full(height, self.rows, np.int32),
                        "tokens_RT": np.zeros((height, size), np.int32),
                        "starts_R": np.zeros(height, np.int32),
                        "counts_R": np.zeros(height, np.int32),
                    }
                    for i, fill in enumerate(group):
                        part = fill.tokens[start : start + size]
                        chunk["rows_R"][i] = fill.row if len(part) else self.rows
                        chunk["tokens_RT"][i, : len(part)] = part
                        chunk["starts_R"][i] = fill.start + start
                        chunk["counts_R"][i] = len(part)
                    end = int((chunk["starts_R"] + chunk["counts_R"]).max())
                    self.state = self.program.prefill(
                        self._weights, self.state, self._put(chunk), bound=self._bound(end)
                    )

    def copy(self, pairs: Sequence[tuple[int, int]], length: int) -> None:
        """Copies at least the first `length` positions of the cache from row to row, for (source, target) pairs."""
        height = _height(len(pairs), self.rows)
        sources, targets = (np.full(height, self.rows, np.int32) for _ in range(2))
        sources[: len(pairs)], targets[: len(pairs)] = zip(*pairs, strict=True)
        with jax.transfer_guard("disallow"):
            self.state = self.program.copy(self.state, *self._put((sources, targets)), bound=self._bound(length))

    def insert(self, requests: Mapping[int, Request]) -> None:
        """Starts decoding in rows whose cache has all prompt tokens but the last. `requests` maps rows to requests."""
        self._logits_BV = None
        for group, height in _groups(list(requests.items()), self.rows):
            padding = height - len(group)
            picked = [request for _, request in group] + [_NOTHING] * padding
            width = _PROMPT
            while width < max(len(r.tokens) for r in picked):
                width *= 4
            fresh: dict[str, Any] = {
                "rows_R": np.array([row for row, _ in group] + [self.rows] * padding, np.int32),
                "prompts_RP": np.zeros((height, width), np.int32),
                "lengths_R": np.array([len(r.tokens) for r in picked], np.int32),
                "remaining_R": np.array([r.max_new_tokens for r in picked], np.int32),
                "stops_RN": np.full((height, MAX_STOPS), -1, np.int32),
                "controls": sampling.controls(
                    [r.sampling for r in picked],
                    [r.seed for r in picked],
                    masked=[r.matcher is not None for r in picked],
                ),
                "bias_RV": None,
            }
            for i, request in enumerate(picked):
                fresh["prompts_RP"][i, : len(request.tokens)] = request.tokens
                fresh["stops_RN"][i, : len(request.stop_tokens)] = request.stop_tokens
            if any(sampling.has_bias(r.sampling) for r in picked):
                fresh["bias_RV"] = np.stack([sampling.bias(r.sampling, self.config.vocab_size) for r in picked])
            with jax.transfer_guard("disallow"):
                self.state = self.program.insert(self.state, self._put(fresh))

    def decode(
        self,
        alive: Sequence[bool],
        *,
        limit: int,
        longest: int,
        least: int = 0,
        top: int = 0,
        allowed: np.ndarray | None = None,
        guesses: int = 0,
        drafters: Sequence[str] = (),
    ) -> list[Piece]:
        """Up to `limit` steps for all live rows.

        Args:
            alive: False for rows that end now, even if they have tokens left to generate.
            limit: number of steps, from 1 to DISPATCH.
            longest: greatest position of a live row's next input token.
            least: the dispatch ends early when fewer rows than this are live.
            top: number of likeliest tokens to report at each position.
            allowed: uint32 (B, W) tokens that grammars allow next (see SamplingState), or None without grammars. With
                masks there is one step, without guesses.
            guesses: tokens to guess at each step.
            drafters: source of the guesses of each row, from request.SPECULATE; "" for any.

        Returns:
            The new tokens of each row. A row whose logits are not finite has an error.

        Raises:
            ConfigError: `limit` is not from 1 to DISPATCH.
        """
        if not 1 <= limit <= DISPATCH:
            raise ConfigError(f"limit must be from 1 to {DISPATCH}, got {limit}")
        width = next(size for size in (*_TOPS, power_of_two(top)) if size >= top)
        if allowed is not None:
            return self._decode_masked(alive, allowed, longest=longest, top=top, width=width)
        # Near the end of a bound the dispatch is short, so that the steps after it do not pay for a larger one.
        bound = round_up(longest + 2)
        limit = max(1, min(limit, (bound - longest - 1) // (guesses + 1)))
        bound = self._bound(longest + limit * (guesses + 1) + 1)
        steer = {
            "alive_B": np.array(alive, bool),
            "limit": np.int32(limit),
            "least": np.int32(least),
            "drafts_B": np.array([drafter == "draft" for drafter in drafters] or [False] * self.rows, bool),
        }
        drafter = "draft" if "draft" in drafters else "lookup" if guesses else ""
        self._logits_BV = None
        with jax.transfer_guard("disallow"):
            self.state, out = self.program.decode(
                self._weights, self.state, self._put(steer), bound=bound, top=width, guesses=guesses, drafter=drafter
            )
            out = jax.device_get(out)
        return [self._piece(out, row, top) for row in range(self.rows)]

    def _decode_masked(
        self, alive: Sequence[bool], allowed: np.ndarray, *, longest: int, top: int, width: int
    ) -> list[Piece]:
        """One step for all live rows. The device computes the next logits while the host prepares the next masks."""
        with jax.transfer_guard("disallow"):
            alive_B, allowed_BW = self._put((np.array(alive, bool), allowed))
            if self._logits_BV is None:
                self._look(alive_B, longest)
            assert self.state is not None
            steer = {"alive_B": alive_B, "allowed_BW": allowed_BW}
            small, out = self.program.pick(without_caches(self.state), self._logits_BV, steer, top=width)
            self.state = dataclasses.replace(small, cache=self.state.cache, draft=self.state.draft)
            self._look(alive_B, longest + 1)
            out = jax.device_get(out)
        return [self._piece(out, row, top) for row in range(self.rows)]

    def _look(self, alive_B: jax.Array, longest: int) -> None:
        bound = self._bound(longest + 2)
        self.state, self._logits_BV = self.program.look(self._weights, self.state, {"alive_B": alive_B}, bound=bound)

    def _piece(self, out: Mapping[str, np.ndarray], row: int, top: int) -> Piece:
        count = int(out["count_B"][row])
        likeliest = []
        if top:
            ids, logprobs = (out[name][row, :count, :top].tolist() for name in ("top_ids_BOK", "top_logprobs_BOK"))
            likeliest = [list(zip(*pair, strict=True)) for pair in zip(ids, logprobs, strict=True)]
        logprobs_O = out["logprobs_BO"][row, :count]
        return Piece(
            tokens=out["tokens_BO"][row, :count].tolist(),
            logprobs=logprobs_O.tolist(),
            top=likeliest,
            done=bool(out["remaining_B"][row] == 0),
            steps=int(out["steps_B"][row]),
            error=None if np.isfinite(logprobs_O).all() else self._not_finite(),
        )

    # Whole texts.

    def logits(self, tokens_BT: np.ndarray) -> jax.Array:
        """Logits (B, T, V) float32 of token ids (B, T), by the forward pass without a cache that training uses."""
        return self.program.logits(self._weights, self._put(tokens_BT))

    def hidden(self, tokens_BT: np.ndarray) -> jax.Array:
        """Hidden states (B, T, D) after the final norm, of token ids (B, T)."""
        return self.program.hidden(self._weights, self._put(tokens_BT))

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
        found = self.score_top(tokens_BT, starts_B, candidates_BCK, top=0)
        return found["logprobs"], found["best"]

    def score_top(
        self, tokens_BT: np.ndarray, starts_B: np.ndarray, candidates_BCK: np.ndarray, *, top: int
    ) -> dict[str, np.ndarray]:
        """`score` as a dict of logprobs and best, with top_ids and top_logprobs (B, C, top) of the likeliest tokens."""
        with jax.transfer_guard("disallow"):
            given = self._put((tokens_BT, starts_B, candidates_BCK))
            found = jax.device_get(self.program.score(self._weights, *given, top=top))
        if not np.isfinite(found["logprobs"]).all():
            raise self._not_finite()
        return found

    def _not_finite(self) -> ValueError:
        other = "" if self.dtype == jnp.float32 else f", or they overflow in {self.dtype}: try float32"
        return ValueError(f"the model's logits are not finite: its weights are damaged{other}")

    def _bound(self, end: int) -> int:
        return min(round_up(end), self.capacity)

    def _put(self, tree: Any) -> Any:
        """Copies host arrays to the devices, replicated. The transfer guard disallows implicit copies."""
        return jax.device_put(tree, None if self.layout is None else parallel.replicated(self.layout.mesh))


_NOTHING = Request(tokens=[0], max_new_tokens=1, sampling=sampling.SamplingParams())


def round_up(length: int) -> int:
    """The capacity or bound for `length` positions: a power of two of at least 128, or a multiple of 4,096."""
    if length > _FINE:
        return -(-length // _FINE) * _FINE
    return power_of_two(length, _LEAST_CAPACITY)


def spans(length: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """The (start, size) of each chunk that covers `length` tokens.

    All chunks but the last have the largest size. The last has the smallest size that covers the remaining tokens.
    """
    chunks = []
    for start in range(0, length, sizes[-1]):
        chunks.append((start, next((size for size in sizes if size >= length - start), sizes[-1])))
    return chunks


def _height(count: int, rows: int) -> int:
    """The number of rows of a call for `count` of them: a power of four, or all rows."""
    height = 1
    while height < count:
        height *= 4
    return min(height, rows)


def _groups(items: Sequence[Any], rows: int) -> list[tuple[Sequence[Any], int]]:
    """Splits items into calls of a few fixed numbers of rows, as (items, rows of the call).

    Two or three items of a large batch run one by one, which computes less than a padded call of four rows.
    """
    groups: list[tuple[Sequence[Any], int]] = []
    done = 0
    while done < len(items):
        left = len(items) - done
        height = _height(left, rows)
        if left <= height // 2:
            height = max(1, height // 4)
        groups.append((items[done : done + height], height))
        done += height
    return groups


def placed(config: ModelConfig, params: Params, *, mesh: Mesh | None, dtype: jnp.dtype) -> Params:
    """Unrolled weights, cast to `dtype` and sharded over the mesh. Arrays that need neither are not copied."""

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, LoraTensor):  # its scale stays in float32
            return dataclasses.replace(leaf, base=cast(leaf.base), a=cast(leaf.a), b=cast(leaf.b))
        return leaf if isinstance(leaf, QTensor) or leaf.dtype == dtype else jnp.asarray(leaf).astype(dtype)

    params = jax.tree.map(cast, params, is_leaf=lambda x: isinstance(x, (QTensor, LoraTensor)))
    where = layout_of(config, mesh)
    if where is None:
        return jax.device_put(params)
    axes = logical_axes(config, stacked=False)
    return jax.device_put(params, parallel.shardings(where, axes, params))
