"""The data loader, on top of grain: batches that are seeded, split over hosts and resumable to the exact batch.

The rows have one endless order, a pure function of the rows and the seed. It visits every row once an epoch, and each
epoch has a new shuffle. In a mixture, each part has its own epochs and is drawn in proportion to its weight. A batch of
B rows at position p holds the global rows order[p : p + B], and the next batch begins at p + B. A position in the data
is therefore one number, which means the same rows for any batch size, and each host computes its own part of any batch
without communication.
"""

import bisect
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.data.packing import Mixture, Rows, padding_row

Batch = dict[str, np.ndarray]


class Loader:
    """An iterator of batches, each a dict of arrays (rows of this host, T) with the names of `Rows`.

    Epochs follow one another without a gap, also inside a batch. Rows at the end of the last epoch that do not fill a
    batch are not used.
    """

    def __init__(
        self,
        rows: Rows | Mixture,
        *,
        batch_size: int,
        seed: int,
        rows_of_host: Sequence[int] | None = None,
        start_step: int = 0,
        prefetch: int = 2,
        shuffle: bool = True,
        epochs: int | None = None,
    ) -> None:
        """Start at batch `start_step`.

        Args:
            rows: the rows, or several sources of them with weights.
            batch_size: rows of a global batch (B).
            seed: seed of the order.
            rows_of_host: indices of the rows of a global batch that this host needs, in order. None: all.
            start_step: number of the first batch.
            prefetch: batches that are prepared ahead, in as many threads. 0: none.
            shuffle: draw a new order in each epoch. False: the order of `rows`.
            epochs: epochs until the iterator ends. None: it never ends.

        Raises:
            ValueError: the settings cannot give a batch.
        """
        import grain  # slow to import, and it brings jax along where that is installed

        self._rows_of_host = _checked_rows(rows_of_host, batch_size)
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1, got {seed}")
        if start_step < 0 or prefetch < 0:
            raise ValueError(f"start_step and prefetch cannot be negative, got {start_step} and {prefetch}")
        mixture = rows if isinstance(rows, Mixture) else Mixture((rows,), (1.0,))
        if epochs is not None and len(mixture.parts) > 1:
            raise ValueError("epochs must be None for a mixture, whose parts each have epochs of their own")
        total = sum(map(len, mixture.parts))
        if epochs is not None and (epochs < 1 or epochs * total < batch_size):
            raise ValueError(
                f"{epochs} epochs of {total} rows do not fill one batch of {batch_size}; take more epochs"
                " (None repeats for ever), a smaller batch_size or a shorter sequence_length"
            )
        self._rows = mixture.parts
        self._ends = list(
            itertools.accumulate(map(len, self._rows))
        )  # the ends of the parts in a numbering of all rows
        orders = []
        for part, end in enumerate(self._ends):
            order = grain.MapDataset.range(end - len(self._rows[part]), end).seed((seed + part) % 2**32)
            orders.append((order.shuffle() if shuffle else order).repeat(epochs))
        self._order = orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, mixture.weights)
        for order in (*orders, self._order):
            order[0]  # grain sets up its statistics on first use, which is not safe from several threads
        self._batch_size = batch_size
        self._identity = {
            "store": mixture.fingerprint,
            "sequence_length": mixture.sequence_length,
            "seed": seed,
            "shuffle": shuffle,
        }
        self._options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
        self._seek(start_step * batch_size)

    @property
    def position(self) -> int:
        """The number of rows in all batches so far."""
        return self._position

    def __iter__(self) -> "Loader":
        """The loader itself: a second `for` continues where the first stopped."""
        return self

    def __next__(self) -> Batch:
        """The next batch. `state()` counts its rows from now on."""
        batch = next(self._batches)
        self._position += self._batch_size
        return batch

    def state(self) -> dict[str, Any]:
        """The position as values for JSON: the number of rows so far, and all that their order depends on."""
        return {"rows": self._position, **self._identity}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position that `state()` of a loader returned, which may have had another batch size.

        Raises:
            ValueError: the position belongs to other data or settings.
        """
        for key, current in self._identity.items():
            saved = state.get(key)
            if saved != current:
                change = f"{key} was {saved!r} when it was saved and is {current!r} now"
                if key == "store":
                    change = "the text, tokenizer, weights or loss of data.train are not what they were"
                raise ValueError(
                    f"cannot resume the data: {change}; set it back, or start a new run to train on from these weights"
                )
        self._seek(position_of(state))

    def close(self) -> None:
        """Stop the prefetching threads."""
        self._batches.close()

    def _seek(self, position: int) -> None:
        import grain

        if hasattr(self, "_batches"):
            self.close()
        count = max((len(self._order) - position) // self._batch_size, 0)
        starts = functools.partial(self._batch, position)
        self._batches = iter(grain.MapDataset.range(count).map(starts).to_iter_dataset(self._options))
        self._position = position

    def _batch(self, first: int, number: int) -> Batch:
        start = first + int(number) * self._batch_size
        return _stack([self._row(int(self._order[start + row])) for row in self._rows_of_host])

    def _row(self, number: int) -> Batch:
        part = bisect.bisect_right(self._ends, number)
        return self._rows[part][number - self._ends[part] + len(self._rows[part])]


def position_of(state: Mapping[str, Any]) -> int:
    """The number of rows before a position that `Loader.state` returned; ValueError for values that are not such a
    position.
    """
    rows = state.get("rows")
    if rows is None and isinstance(state.get("step"), int):  # earlier versions counted batches
        rows = state["step"] * state.get("batch_size", 0)
    if not isinstance(rows, int) or rows < 0:
        raise ValueError(f"cannot resume the data: rows must be a count of rows, got {rows!r}")
    return rows


def evaluation_batches(
    rows: Rows,
    *,
    batch_size: int,
    max_batches: int | None,
    rows_of_host: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """The rows in order, once, as batches. The last batch is filled with rows of padding.

    Args:
        rows: the rows.
        batch_size: rows of a global batch.
        max_batches: the most batches. None: all.
        rows_of_host: as in `Loader`. Every host gets the same number of batches.

    Raises:
        ValueError: a setting that cannot give a batch.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1 (or None for all), got {max_batches}")
    wanted = _checked_rows(rows_of_host, batch_size)
    steps = -(-len(rows) // batch_size)
    steps = steps if max_batches is None else min(steps, max_batches)

    def batches() -> Iterator[Batch]:
        for start in range(0, steps * batch_size, batch_size):
            indices = [start + row for row in wanted]
            yield _stack([rows[i] if i < len(rows) else padding_row(rows.sequence_length) for i in indices])

    return batches()


def _checked_rows(rows_of_host: Sequence[int] | None, batch_size: int) -> list[int]:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    wanted = list(range(batch_size) if rows_of_host is None else map(int, rows_of_host))
    if not wanted or min(wanted) < 0 or max(wanted) >= batch_size:
        raise ValueError(f"rows_of_host must name rows from 0 to {batch_size - 1} of the batch, got {wanted}")
    return wanted


def _stack(rows: list[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
