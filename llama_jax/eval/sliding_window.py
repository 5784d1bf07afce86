"""Perplexity of a model on texts and dialogs, read through a sliding window.

Each document is read separately. The first window predicts `context` tokens. Each following window starts `stride`
tokens later and predicts the next `stride` tokens, given at least the `context - stride` tokens before them. So every
token is predicted once, and all but the first tokens of a document have at least `context - stride` tokens before them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llama_jax.data.corpus import Document
from llama_jax.data.encoding import encode
from llama_jax.data.records import Completion, Dialog
from llama_jax.errors import ConfigError, brief, checked_keywords
from llama_jax.eval import scoring
from llama_jax.infer import inputs
from llama_jax.text import control_tokens
from llama_jax.text.record_encoder import NO, RecordEncoder
from llama_jax.text.tokenizer import require_tokenizer

if TYPE_CHECKING:
    from llama_jax.infer.llama import Llama

Sample = str | Document | Dialog | Completion
_CONTEXT = 2048
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The perplexity of a model.

    Attributes:
        nats_per_token: mean of -log p over the counted tokens, natural logarithm.
        standard_error: standard error of nats_per_token, from the variation among documents, or among windows where
            there is one document (see `_ratio_error`); nan where there is one window.
        tokens: number of counted tokens.
        bytes: number of UTF-8 bytes of the counted tokens' text, without control tokens.
        documents: number of texts and dialogs with at least one counted token.
        windows: number of windows with a counted token.
        context, stride: lengths of the windows. Only perplexities of equal ones can be compared.
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
        """The perplexity: e to the power of nats_per_token."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text. It can be compared between tokenizers, which perplexity cannot."""
        return self.nats_per_token * self.tokens / math.log(2) / self.bytes


@checked_keywords
def perplexity(
    llama: Llama,
    texts: Sequence[Sample],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool | None = None,
) -> Perplexity:
    """Measure a model on texts, dialogs and completions.

    Every token of a text counts, except the one that begins it. In dialogs and completions, the same tokens count as in
    the training loss: the assistant's, or the completion's. Names of control tokens in a text are plain text. A model
    whose tokenizer has no token to begin with, nor one to end with, does not predict a text's first token.

    Args:
        llama: a model with a tokenizer.
        texts: texts, and dialogs and completions as `data.records.parse` makes them.
        context: tokens in a window; by default 2,048, or all positions of a model that has fewer.
        stride: tokens between windows; half of `context` by default. A smaller one gives each token more context and
            takes more time; `context` itself is the fastest.
        batch_size: windows that run together.
        progress: True shows a bar on standard error. The default shows it for many windows.

    Raises:
        ConfigError: no tokenizer, no token to predict, a dialog that the chat format cannot encode, or a context or
            stride that is out of range.
    """
    require_tokenizer(llama.tokenizer, "perplexity")
    if isinstance(texts, str):
        raise ConfigError("texts must be a list of documents, got one text: give [text]")
    context, stride = _lengths(llama, context, stride)
    texts = list(texts)
    _warn_of_names(llama, texts)
    counted = [counted_ids(llama, sample) for sample in texts]
    parts = [
        _Window(number, before, ids, keep)
        for number, (document, targets) in enumerate(counted)
        for before, ids, keep in _targeted(document, targets, context=context, stride=stride)
    ]
    if not parts:
        raise ConfigError("the texts hold no token to predict: give at least one of a few words")
    nats = np.zeros(len(parts))
    requests = [(part.context, part.ids) for part in parts]
    for i, scored in scoring.score(
        llama, requests, max_length=context, batch_size=batch_size, progress=progress, title="windows"
    ):
        nats[i] = -scored.logprobs.sum(dtype=np.float64, where=parts[i].counted)
    counts = np.array([part.counted.sum() for part in parts])
    documents, document_of = np.unique([part.document for part in parts], return_inverse=True)
    several = len(documents) > 1
    clusters = (np.bincount(document_of, nats), np.bincount(document_of, counts)) if several else (nats, counts)
    return Perplexity(
        nats_per_token=float(nats.sum() / counts.sum()),
        standard_error=_ratio_error(*clusters),
        tokens=int(counts.sum()),
        bytes=sum(_bytes(llama, document, targets) for document, targets in counted),
        documents=len(documents),
        windows=len(parts),
        context=context,
        stride=stride,
    )


@dataclasses.dataclass(frozen=True)
class _Window:
    """A window of a document: context ids, ids to predict, and a mask of the predicted ids that count."""

    document: int
    context: Sequence[int]
    ids: Sequence[int]
    counted: np.ndarray


def _lengths(llama: Llama, context: int | None, stride: int | None) -> tuple[int, int]:
    """Context and stride with their defaults, checked."""
    context = scoring.check_length(llama, min(_CONTEXT, llama.config.max_seq_len) if context is None else context)
    stride = inputs.as_whole(max(1, context // 2) if stride is None else stride, "stride")
    if stride > context:
        raise ConfigError(
            f"stride must be from 1 to context={context:,}, got {stride:,}: a greater one would skip tokens"
        )
    return context, stride


def _warn_of_names(llama: Llama, samples: Sequence[Sample]) -> None:
    """Logs a warning about the first text with the name of a control token, which a rendered dialog would have."""
    tokenizer = require_tokenizer(llama.tokenizer, "perplexity")
    texts = (s if isinstance(s, str) else s.text for s in samples if isinstance(s, str | Document))
    if name := next(filter(None, (control_tokens.first_name(tokenizer, text) for text in texts)), None):
        _log.warning(
            "warning: a text holds %r, the name of a control token, which is read as plain text: give a dialog as "
            '{"messages": [...]} if it was rendered from one',
            name,
        )


def counted_ids(llama: Llama, sample: Sample) -> tuple[list[int], np.ndarray]:
    """The ids of a sample, and a mask of those that count."""
    tokenizer = require_tokenizer(llama.tokenizer, "perplexity")
    if isinstance(sample, (str, Document)):
        ids = tokenizer.encode(sample if isinstance(sample, str) else sample.text)
        begin = begin_id(llama)
        ids = ids if begin is None else [begin, *ids]
        return ids, np.arange(len(ids)) > 0
    if not isinstance(sample, (Dialog, Completion)):
        raise ConfigError(f"perplexity is measured on texts, dialogs and completions, got {brief(sample)}")
    assert llama.chat_format is not None  # every tokenizer has one
    try:
        ids, targets = encode(sample, RecordEncoder(tokenizer, llama.chat_format, NO), max_length=None)
    except ValueError as error:
        raise ConfigError(f"{sample.name}: {error}") from None
    counted = np.ones(len(ids), bool) if targets is None else np.array(targets)
    counted[:1] = False  # nothing precedes the first token
    return ids, counted


def _targeted(
    ids: Sequence[int], counted: np.ndarray, *, context: int, stride: int
) -> Iterator[tuple[Sequence[int], Sequence[int], np.ndarray]]:
    """The windows of a document that predict a counted token, with the mask of the counted ones."""
    end = 1
    for before, predicted in windows(ids, context=context, stride=stride):
        keep = counted[end : end + len(predicted)]
        end += len(predicted)
        if keep.any():
            yield before, predicted, keep


def _bytes(llama: Llama, ids: Sequence[int], counted: np.ndarray) -> int:
    kept = [i for i, keep in zip(ids, counted, strict=True) if keep]
    tokenizer = require_tokenizer(llama.tokenizer, "perplexity")
    return len(tokenizer.decode_bytes(kept, skip_special=True))


def begin_id(llama: Llama) -> int | None:
    """The id that a text begins after: the tokenizer's token for it, else the one that ends texts, if there is one."""
    tokenizer = require_tokenizer(llama.tokenizer, "a text without a context")
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def windows(ids: Sequence[int], *, context: int, stride: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(context, continuation) pairs of `context` + 1 ids. Every id but the first is in one continuation.

    The last window reaches back as far as the others, so that its few tokens have a full context too. With a stride
    of `context` this is the rolling window of EleutherAI's harness (lm_eval/utils.py, get_rolling_token_windows).
    """
    begin = 1
    while begin < len(ids):
        end = min(begin + (context if begin == 1 else stride), len(ids))
        yield ids[max(0, end - 1 - context) : begin], ids[begin:end]
        begin = end


def _ratio_error(nats: np.ndarray, counts: np.ndarray) -> float:
    """The standard error of sum(nats) / sum(counts) over clusters drawn at random (Cochran, Sampling Techniques, 2.11).

    Tokens of one text are not independent, so that an error estimated from single tokens would be far too small.
    """
    n = len(nats)
    if n < 2:
        return math.nan
    rest = nats - counts * (nats.sum() / counts.sum())
    return float(math.sqrt(n / (n - 1) * (rest**2).sum()) / counts.sum())
