"""Log-probabilities of continuations after their contexts, batched by length in programs of a few shapes.

Letters: B batch, T length, C scored positions of a row, K ids scored at a position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llama_jax.errors import ConfigError, checked_keywords
from llama_jax.infer import inputs
from llama_jax.infer.batches import longest_first, power_of_two
from llama_jax.progress import progress_bar

if TYPE_CHECKING:
    from llama_jax.infer.llama import Llama

_MIN_LENGTH = 16
_QUIET_ROWS = 32  # up to this many rows run without a progress bar


@dataclasses.dataclass(frozen=True)
class Scored:
    """The scores of a continuation of n tokens.

    Attributes:
        logprobs: natural log-probability of each token given all tokens before it, float32 (n,).
        greedy: True where the token is the likeliest one of its position, bool (n,).
    """

    logprobs: np.ndarray
    greedy: np.ndarray


@checked_keywords
def score(
    llama: Llama,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    progress: bool | None = None,
    title: str = "scoring",
) -> Iterator[tuple[int, Scored]]:
    """Score the continuation of each (context, continuation), and yield (index, Scored) after each batch.

    A request that is too long loses tokens of its context from the left, until all but its last token fit `max_length`
    positions. Requests with equal input tokens, such as one-letter answers to the same question, share one row.

    Args:
        llama: the model.
        requests: token ids; a context and a continuation have at least one each.
        max_length: the most positions that the model reads; config.max_seq_len by default.
        batch_size: rows that run together, the longest first.
        progress: True shows a bar on standard error. The default shows it for many rows.
        title: title of the bar.

    Raises:
        ConfigError: an empty context or continuation, a continuation longer than max_length, or an unknown id. It is
            raised at the first step of the iteration, before the model runs.
    """
    max_length = check_length(llama, max_length)
    batch_size = inputs.as_whole(batch_size, "batch_size")
    alike: dict[tuple[int, ...], list[int]] = {}  # input ids, and the requests that they answer
    for i, (context, continuation) in enumerate(requests):
        _check(llama, context, continuation, f"request {i}", max_length)
        alike.setdefault(tuple([*context, *continuation][-max_length - 1 : -1]), []).append(i)
    rows = sorted(alike.items())
    batches = longest_first([len(row) for row, _ in rows], batch_size)
    groups = [[rows[i] for i in batch] for batch in batches]
    height = batch_size if len(groups) > 1 else power_of_two(len(rows))
    shown = len(rows) > _QUIET_ROWS if progress is None else progress
    with progress_bar(len(rows), title, unit="row", shown=shown, delay=0) as bar:
        for group in groups:
            yield from _batch(llama, requests, group, height, max_length)
            bar.update(len(group))


def check_length(llama: Llama, max_length: int | None) -> int:
    """The checked `max_length`, or the model's max_seq_len for None. ConfigError if the model has fewer positions."""
    limit = llama.config.max_seq_len
    max_length = limit if max_length is None else inputs.as_whole(max_length, "max_length")
    if max_length > limit:
        raise ConfigError(f"{max_length:,} positions are more than the model's max_seq_len={limit:,}")
    return max_length


def _check(llama: Llama, context: Sequence[int], continuation: Sequence[int], name: str, max_length: int) -> None:
    if not continuation:
        raise ConfigError(f"{name}: its continuation has no token to score")
    if not context:
        raise ConfigError(f"{name}: its context has no token; give it the token that begins texts")
    if len(continuation) > max_length:
        raise ConfigError(
            f"{name}: its continuation has {len(continuation):,} tokens, and the model reads at most {max_length:,} "
            "at a time: shorten it, or take its rolling log-likelihood"
        )
    vocab = llama.config.vocab_size
    if not (0 <= min(*context, *continuation) and max(*context, *continuation) < vocab):
        raise ConfigError(f"{name} holds an id that is not in the vocabulary: 0 to {vocab - 1:,}")


def _batch(
    llama: Llama,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    group: Sequence[tuple[tuple[int, ...], Sequence[int]]],
    height: int,
    max_length: int,
) -> Iterator[tuple[int, Scored]]:
    """Run one program over rows of (input ids, indices of the requests that they answer)."""
    T = min(power_of_two(max(len(row) for row, _ in group), _MIN_LENGTH), max_length)
    longest = [max(len(requests[i][1]) for i in answers) for _, answers in group]
    C = next(size for size in (8, 64, 512, T) if max(longest) <= size <= T or size == T)  # few sizes, few programs
    K = power_of_two(max(len(answers) for _, answers in group), 1)
    tokens_BT = np.zeros((height, T), np.int32)
    starts_B = np.zeros(height, np.int32)
    candidates_BCK = np.zeros((height, C, K), np.int32)
    for b, (row, answers) in enumerate(group):
        tokens_BT[b, : len(row)] = row
        starts_B[b] = len(row) - longest[b]
        for k, i in enumerate(answers):  # continuations of other lengths end where this row ends
            candidates_BCK[b, longest[b] - len(requests[i][1]) : longest[b], k] = requests[i][1]
    logprobs_BCK, best_BCK = llama.engine.score(tokens_BT, starts_B, candidates_BCK)
    for b, (_, answers) in enumerate(group):
        for k, i in enumerate(answers):
            places = slice(longest[b] - len(requests[i][1]), longest[b])
            yield i, Scored(logprobs_BCK[b, places, k], best_BCK[b, places, k])
