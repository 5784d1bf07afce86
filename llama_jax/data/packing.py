"""Packing: rows of fixed length T made of a store's documents.

A store of plain texts is concatenated and split every T tokens (`PackedRows`), so that only the last row has padding.
In a store that has dialogs or completions, whole documents are fitted into rows (`WholeRows`), because these may not be
split; the rest of each row is padding. The two documents of a preference pair stay in one row. Both classes yield the
same arrays.
"""

import dataclasses
import hashlib
from typing import Protocol

import numpy as np

from llama_jax.data.store import TokenStore
from llama_jax.errors import ConfigError


class Rows(Protocol):
    """Random access to rows: `rows[i]` is a pure function of the store, T and i.

    Attributes:
        store: the documents.
        sequence_length: tokens of a row (T).
        fingerprint: hash (hex) of everything but T that the rows depend on.
        padding_fraction: the fraction of all positions that is padding.
    """

    store: TokenStore
    sequence_length: int
    fingerprint: str
    padding_fraction: float

    def __len__(self) -> int:
        """Rows in one epoch."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One row, a dict of arrays of shape (T,).

        tokens, targets (int32): the token, and the one after it.
        positions (int32): the position, from 0 at the start of the row and at the start of each document.
        segments (int32): the number of the document within the row, from 1; 0 is padding.
        weights (float32): 1 where the target continues the token's document and the loss counts it, otherwise 0.
        """


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several sources of rows of one length, from which `Loader` draws in proportion to their weights.

    Attributes:
        parts: the rows of each source.
        weights: one number above 0 for each part: of every sum(weights) rows drawn, so many are of that part. A part
            whose rows have all been drawn starts its next epoch.
    """

    parts: tuple[Rows, ...]
    weights: tuple[float, ...]

    @property
    def sequence_length(self) -> int:
        """Tokens of a row (T), the same in all parts."""
        return self.parts[0].sequence_length

    @property
    def fingerprint(self) -> str:
        """A hash (hex) of everything but T that the rows and their order depend on."""
        if len(self.parts) == 1:
            return self.parts[0].fingerprint
        identity = [(rows.fingerprint, weight) for rows, weight in zip(self.parts, self.weights, strict=True)]
        return hashlib.sha256(repr(identity).encode()).hexdigest()


def pack(store: TokenStore, *, sequence_length: int, loss_on: str) -> Rows:
    """The rows of a store.

    Args:
        store: the documents.
        sequence_length: tokens of a row (T).
        loss_on: "assistant" counts targets only (see `encoding`), "all" every token.

    Raises:
        ConfigError: loss_on is "all", and the store has preference pairs or messages that are not to be learned.
        ValueError: a pair is longer than a row, or there is nothing to predict.
    """
    if store.masked:
        return WholeRows(store, sequence_length=sequence_length, loss_on=loss_on)
    return PackedRows(store, sequence_length=sequence_length)


def padding_row(sequence_length: int) -> dict[str, np.ndarray]:
    """A row of padding: all zeros, so that it has no loss and no segment."""
    names = ("tokens", "targets", "positions", "segments")
    row = {name: np.zeros(sequence_length, np.int32) for name in names}
    return {**row, "weights": np.zeros(sequence_length, np.float32)}


def _check(store: TokenStore, sequence_length: int, least: int) -> None:
    if sequence_length < least:
        raise ValueError(f"sequence_length must be at least {least}, got {sequence_length}")
    if store.num_tokens < 2:
        raise ValueError(f"the store holds {store.num_tokens} tokens; at least 2 are needed to predict one")


class PackedRows:
    """All documents concatenated, then split every T tokens.

    Row i reads tokens [i * T, i * T + T], one more than T: the last is only a target, and the next row begins with it.
    Each token but the first is therefore the target of exactly one position in exactly one row.
    """

    def __init__(self, store: TokenStore, *, sequence_length: int) -> None:
        """Set the length of rows; raises ValueError if there is nothing to predict."""
        _check(store, sequence_length, 1)
        self.store = store
        self.sequence_length = sequence_length
        self.fingerprint = store.fingerprint
        self.padding_fraction = 1 - (store.num_tokens - 1) / (len(self) * sequence_length)

    def __len__(self) -> int:
        """Rows in one epoch. The last may end in padding."""
        return -(-(self.store.num_tokens - 1) // self.sequence_length)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One row, with the arrays of `Rows`."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} does not exist: there are {len(self)} rows, from 0 on")
        start = index * self.sequence_length
        window = np.asarray(self.store.tokens[start : start + self.sequence_length + 1], dtype=np.int32)
        offsets = self.store.offsets
        # Documents may start anywhere after the row's first token up to its last target.
        low = np.searchsorted(offsets, start, side="right")
        high = np.searchsorted(offsets, start + len(window), side="left")
        starts = offsets[low:high] - start
        is_start = np.zeros(len(window), dtype=np.int32)
        is_start[starts] = 1
        document = np.cumsum(is_start)  # within the window, from 0
        first = np.concatenate([[0], starts])[document]

        length = len(window) - 1  # under T only in the last row
        row = padding_row(self.sequence_length)
        row["tokens"][:length] = window[:-1]
        row["targets"][:length] = window[1:]
        row["positions"][:length] = (np.arange(len(window)) - first)[:-1]
        row["segments"][:length] = document[:-1] + 1
        row["weights"][:length] = document[1:] == document[:-1]
        return row


class WholeRows:
    """Whole documents fitted into rows, each row padded to T tokens.

    A row holds its documents in the order of the store, and rows are ordered by their first documents. Only texts may
    be longer than T, since `build_store` leaves out or cuts the rest. Such a text is split into pieces of T tokens,
    each beginning with the last token of the one before, so that every prediction is made once.

    A pair is fitted as one piece, so that segments 2k - 1 and 2k of a row are the chosen and the rejected answer to one
    prompt.
    """

    def __init__(self, store: TokenStore, *, sequence_length: int, loss_on: str) -> None:
        """Fit the documents into rows. The same store gives the same rows; errors are those of `pack`."""
        _check(store, sequence_length, 2)
        if store.pairs and loss_on == "all":
            raise ConfigError(
                "data.loss_on='all' would count the prompts of preference pairs, which both answers share: set it to "
                "'assistant'"
            )
        self.store = store
        self.sequence_length = sequence_length
        kind = "pairs" if store.pairs else "whole"
        self.fingerprint = hashlib.sha256(f"{store.fingerprint} {kind} {loss_on}".encode()).hexdigest()
        if store.marked and loss_on == "all":
            raise ConfigError(
                "data.loss_on='all' would count messages that the data mark as not to be learned: set it to "
                "'assistant', or remove the marks"
            )
        self._all = loss_on == "all"
        starts, lengths = _pieces(np.asarray(store.offsets), sequence_length)
        if store.pairs:
            both = np.diff(store.offsets[::2])
            if both.max() > sequence_length:
                raise ValueError(f"a pair of {both.max():,} tokens does not fit into rows of {sequence_length}")
            row_of_piece = np.repeat(best_fit(both, sequence_length), 2)
        else:
            row_of_piece = best_fit(lengths, sequence_length)
        # Rows are renumbered by their first pieces: `unique` finds the first piece, and its rank is the new number.
        _, first, row_of_piece = np.unique(row_of_piece, return_index=True, return_inverse=True)
        row_of_piece = np.argsort(np.argsort(first))[row_of_piece]
        order = np.argsort(row_of_piece, kind="stable")
        self._starts, self._lengths = starts[order], lengths[order]
        self._first = np.concatenate([[0], np.cumsum(np.bincount(row_of_piece))])
        self.padding_fraction = 1 - int(lengths.sum()) / (len(self) * sequence_length)

    def __len__(self) -> int:
        """Rows in one epoch."""
        return len(self._first) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One row, with the arrays of `Rows`."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} does not exist: there are {len(self)} rows, from 0 on")
        row = padding_row(self.sequence_length)
        at = 0
        for segment, piece in enumerate(range(self._first[index], self._first[index + 1]), start=1):
            start, length = int(self._starts[piece]), int(self._lengths[piece])
            tokens = self.store.tokens[start : start + length]
            here, predicting = slice(at, at + length), slice(at, at + length - 1)
            row["tokens"][here] = tokens
            row["targets"][predicting] = tokens[1:]
            row["positions"][here] = np.arange(length)
            row["segments"][here] = segment
            row["weights"][predicting] = 1 if self._all else self.store.targets(start + 1, start + length)
            at += length
        return row


def _pieces(offsets: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
    """The starts and lengths of all documents; those longer than T are split into pieces that overlap by one token."""
    lengths = np.diff(offsets)
    counts = np.where(lengths <= T, 1, -(-(lengths - 1) // (T - 1)))
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = offsets[document] + number * (T - 1)
    return starts, np.minimum(offsets[document + 1] - starts, T)


def best_fit(lengths: np.ndarray, T: int) -> np.ndarray:
    """The row of each piece, by best-fit decreasing (Johnson, 1973).

    Pieces are taken longest first, each into the row with the least room that still fits it, or else into a new row.
    This takes at most 11/9 of the fewest rows possible. Rows are grouped by the room that they have left. The sizes of
    room that some row has are the bits of one integer, so that the best row is found in constant time.
    """
    row_of_piece = np.empty(len(lengths), np.int64)
    rows_with: list[list[int]] = [[] for _ in range(T + 1)]
    rooms = 0
    rows = 0
    sizes = lengths.tolist()
    for piece in np.argsort(-lengths, kind="stable").tolist():
        size = sizes[piece]
        if fitting := rooms >> size:
            room = size + (fitting & -fitting).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                rooms ^= 1 << room
        else:
            room, row = T, rows
            rows += 1
        row_of_piece[piece] = row
        if room > size:
            rows_with[room - size].append(row)
            rooms |= 1 << (room - size)
    return row_of_piece
