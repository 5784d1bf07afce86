"""Rows of fixed length cut from the store: all documents end to end, then split every T tokens.

T is the sequence length. Row i reads tokens [i * T, i * T + T], one more than T: the last is only a target,
and the next row begins with it. So each token but the first is the target of exactly one place in exactly one
row.
"""

import numpy as np

from llama_jax.data.store import TokenStore


class PackedRows:
    """Random access to the packed rows of a store: `rows[i]` is a pure function of the store, T and i."""

    def __init__(self, store: TokenStore, *, sequence_length: int) -> None:
        """Take rows of `sequence_length` tokens; raises ValueError where there is nothing to predict."""
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, got {sequence_length}")
        if store.num_tokens < 2:
            raise ValueError(f"the store holds {store.num_tokens} tokens; at least 2 are needed to predict one")
        self.store = store
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        """Rows in one epoch: the last may be part padding."""
        return -(-(self.store.num_tokens - 1) // self.sequence_length)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One row, each array of shape (T,).

        tokens, targets int32: the token and the one after it.
        positions int32: from 0 at the row's start and again at each document's.
        segments int32: the document's number within the row, from 1; 0 is padding.
        weights float32: 1 where the target continues the token's document, otherwise 0.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
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
        row = self.padding_row()
        row["tokens"][:length] = window[:-1]
        row["targets"][:length] = window[1:]
        row["positions"][:length] = (np.arange(len(window)) - first)[:-1]
        row["segments"][:length] = document[:-1] + 1
        row["weights"][:length] = document[1:] == document[:-1]
        return row

    def padding_row(self) -> dict[str, np.ndarray]:
        """A row of nothing: all zeros, so no loss and no segment."""
        names = ("tokens", "targets", "positions", "segments")
        row = {name: np.zeros(self.sequence_length, np.int32) for name in names}
        return {**row, "weights": np.zeros(self.sequence_length, np.float32)}
