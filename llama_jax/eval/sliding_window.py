"""Perplexity of a model on texts, read through a sliding window.

Each document is read by itself, after the token that begins texts. The first window predicts `context` tokens; each
further one moves on by `stride` and predicts that many, after the `context - stride` tokens before them or more. So
every token is predicted once, and all but a document's first have at least `context - stride` tokens before them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llama_jax.errors import ConfigError
from llama_jax.eval import scoring
from llama_jax.infer import inputs

if TYPE_CHECKING:
    from llama_jax.infer.llama import Llama

_CONTEXT = 2048


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model predicts texts.

    Attributes:
        nats_per_token: the mean of -log p, natural logarithm.
        standard_error: of nats_per_token, by the variation among documents, or among windows where there is one
            document (see `_ratio_error`); nan where there is one window.
        tokens: predicted ones.
        bytes: of UTF-8 that they stand for.
        documents: texts with at least one predicted token.
        windows: the windows that they were read through.
        context, stride: of the windows. Numbers are comparable between equal ones only.
    """

    nats_per_token: float
    standard_error: float
    tokens: int
    bytes: int
    documents: int
    windows: int
    context: int
    stride: int

    @property
    def perplexity(self) -> float:
        """e to the nats per token."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, as perplexity is not."""
        return self.nats_per_token * self.tokens / math.log(2) / self.bytes


def perplexity(
    llama: Llama,
    texts: Sequence[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool | None = None,
) -> Perplexity:
    """The perplexity of `llama` on texts, one document each.

    The names of control tokens in a text are text. A model whose tokenizer has no token to begin with, nor one to end
    with, does not predict a document's first token.

    Args:
        llama: a model with a tokenizer.
        texts: documents.
        context: tokens that a window holds; by default 2,048, or all that a model of fewer has.
        stride: tokens that it moves on by; half of `context` by default. A smaller one gives each token more context
            and takes more time; `context` itself is the fastest.
        batch_size: windows that run together.
        progress: a bar on standard error; by default where there are many windows.

    Raises:
        ConfigError: no tokenizer, no token to predict, or a context or stride that cannot be.
    """
    if llama.tokenizer is None:
        raise ConfigError("perplexity needs a tokenizer: put tokenizer.model or tokenizer.json in the model's folder")
    if isinstance(texts, str):
        raise ConfigError("texts must be a list of documents, got one text: give [text]")
    limit = llama.config.max_seq_len
    context = scoring.check_length(llama, min(_CONTEXT, limit) if context is None else context)
    stride = inputs.as_whole(max(1, context // 2) if stride is None else stride, "stride")
    if stride > context:
        raise ConfigError(f"stride must be from 1 to context={context:,}, got {stride:,}: it would jump over tokens")
    requests: list[tuple[Sequence[int], Sequence[int]]] = []
    document_of: list[int] = []
    total_bytes = 0
    for number, text in enumerate(texts):
        ids = llama.tokenizer.encode(text)
        begin = begin_id(llama)
        ids = ids if begin is None else [begin, *ids]
        total_bytes += len(llama.tokenizer.decode_bytes(ids[1:]))
        for request in windows(ids, context=context, stride=stride):
            requests.append(request)
            document_of.append(number)
    if not requests:
        raise ConfigError("the texts hold no token to predict: give at least one of a few words")
    nats = np.zeros(len(requests))
    counts = np.array([len(targets) for _, targets in requests])
    for i, found in scoring.score(
        llama, requests, max_length=context, batch_size=batch_size, progress=progress, title="windows"
    ):
        nats[i] = -found.logprobs.sum(dtype=np.float64)
    documents, of = np.unique(document_of, return_inverse=True)
    parts = (nats, counts)
    if len(documents) > 1:
        parts = (np.bincount(of, nats), np.bincount(of, counts))
    return Perplexity(
        nats_per_token=float(nats.sum() / counts.sum()),
        standard_error=_ratio_error(*parts),
        tokens=int(counts.sum()),
        bytes=total_bytes,
        documents=len(documents),
        windows=len(requests),
        context=context,
        stride=stride,
    )


def begin_id(llama: Llama) -> int | None:
    """The id that a text begins after: the tokenizer's token for it, else the one that ends texts, if there is one."""
    tokenizer = llama.tokenizer
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def windows(ids: Sequence[int], *, context: int, stride: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(context, continuation) pairs in which every id but the first is in one continuation, each of `context` + 1 ids.

    The last window reaches back as far as the others, so that its few tokens have a full context too. With a stride
    of `context` this is the rolling window of EleutherAI's harness.
    """
    begin = 1
    while begin < len(ids):
        end = min(begin + (context if begin == 1 else stride), len(ids))
        yield ids[max(0, end - 1 - context) : begin], ids[begin:end]
        begin = end


def _ratio_error(nats: np.ndarray, counts: np.ndarray) -> float:
    """The standard error of sum(nats) / sum(counts) over clusters drawn at random (Cochran, Sampling Techniques, 2.11).

    Tokens of one text are no independent draws, so that an error from single tokens would be far too small.
    """
    n = len(nats)
    if n < 2:
        return math.nan
    rest = nats - counts * (nats.sum() / counts.sum())
    return float(math.sqrt(n / (n - 1) * (rest**2).sum()) / counts.sum())
