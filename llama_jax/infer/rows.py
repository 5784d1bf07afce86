"""The rows of a batch on the host: the job of each, the tokens that each remembers, and the start of new jobs.

A row remembers the tokens whose keys and values are in its cache, also after its job has ended. A new job starts from
the row that shares the longest beginning with it: in that row if it is free, or from a copy of its first positions.
A row that is about to be used by another text is parked first: its part of the cache is copied out of the batch, if the
batch is smaller than it may be. This module does not import jax.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_jax.errors import one_line
from llama_jax.infer.batches import power_of_two
from llama_jax.infer.request import Fill, Request
from llama_jax.infer.stops import StopScanner

if TYPE_CHECKING:
    from llama_jax.infer.engine import Engine

_log = logging.getLogger(__name__)

# A shared beginning of fewer tokens is not worth a copy, or waiting for it.
_LEAST_SHARED = 16
_LEAST_PARKED = 64  # a row that would lose fewer tokens than this is not parked
_LATELY = 32  # a resting batch has the capacity that so many last jobs needed


@dataclasses.dataclass(eq=False)
class Job:
    """A request that is waiting or has a row, and its progress.

    Attributes:
        number: number of the request.
        request: the request.
        prompt: int64 ids of its prompt.
        scanner: the search for its stop strings, or None.
        tokens: new tokens so far.
        steps: forward passes so far.
        reused: prompt tokens that were in the cache already.
        filled: prompt tokens that are in the cache.
        live: True if its row decodes. All prompt tokens but the last are in the cache then.
        started: True if it has, or had, a row.
        cancelled: True if nobody waits for it any more.
        alone: True if it starts with an empty row, since what it shared with another was not finite.
    """

    number: int
    request: Request
    prompt: np.ndarray
    scanner: StopScanner | None
    tokens: list[int] = dataclasses.field(default_factory=list)
    steps: int = 0
    reused: int = 0
    filled: int = 0
    live: bool = False
    started: bool = False
    cancelled: bool = False
    alone: bool = False

    @property
    def held(self) -> np.ndarray:
        """The tokens that are in the cache: all but the next input token."""
        if not self.live:
            return self.prompt[: self.filled]
        return np.concatenate([self.prompt, np.asarray(self.tokens, np.int64)])[:-1]


@dataclasses.dataclass(eq=False)
class Row:
    """A row of the batch, or a parked one.

    Attributes:
        ids: tokens whose keys and values are in its cache, for a row without a job.
        job: the job that uses it, or None.
        used: time at which its last job started.
        part: its cache, if it is parked; None for a row of the batch.
        spoiled: True if its cache may hold values that are not finite.
    """

    ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    job: Job | None = None
    used: int = 0
    part: Any = None
    spoiled: bool = False

    @property
    def held(self) -> np.ndarray:
        """The tokens whose keys and values are in the row's cache."""
        return self.ids if self.job is None else self.job.held


@dataclasses.dataclass(frozen=True)
class _Start:
    """The beginning of a job: it shares the first `shared` tokens of `source`, and goes on in `target`."""

    job: Job
    source: Row
    shared: int
    target: Row


class Rows:
    """Manages the rows of one engine's batch, and the parked rows.

    Attributes:
        batch: the rows of the engine's batch.
        parked: rows that are remembered outside the batch.
        failed: jobs that failed since this list was last emptied, with their errors.
    """

    def __init__(self, engine: Engine):
        """Makes a manager without rows, which takes the engine over: its batch is freed."""
        engine.clear()
        self.batch: list[Row] = []
        self.parked: list[Row] = []
        self.failed: list[tuple[Job, BaseException]] = []
        self._engine = engine
        self._time = 0
        self._resizing = False
        self._needed: collections.deque[int] = collections.deque(maxlen=_LATELY)

    @property
    def busy(self) -> list[Row]:
        """The rows with a job."""
        return [row for row in self.batch if row.job is not None]

    @property
    def live(self) -> list[Job]:
        """The jobs whose rows decode."""
        return [row.job for row in self.batch if row.job is not None and row.job.live]

    def release(self, row: Row) -> None:
        """Frees a row, which still remembers its tokens."""
        row.ids, row.job, row.used = row.held, None, self._time

    def fail(self, row: Row, error: BaseException) -> None:
        """Ends the job of a row, whose cache is not used again."""
        assert row.job is not None
        self.failed.append((row.job, error))
        self._spoil(row)

    def _spoil(self, row: Row) -> None:
        row.ids, row.job, row.spoiled = np.zeros(0, np.int64), None, True

    def retry(self, row: Row) -> Job:
        """Frees a row whose first logits were not finite, and forgets what shares the beginning of its prompt.

        Returns its job, as if it had had no row. It starts with an empty row next time: the values that it shared may
        be those of another prompt, whose own tokens are not finite.
        """
        job = row.job
        assert job is not None
        self._spoil(row)

        def shares(other: Row) -> bool:
            return other.job is None and _shared(other.ids, job.prompt) >= _LEAST_SHARED

        for other in filter(shares, self.batch):
            self._spoil(other)
        self.parked = [other for other in self.parked if not shares(other)]
        job.live = job.started = False
        job.reused = job.filled = 0
        job.alone = True
        return job

    def lose(self, error: BaseException) -> None:
        """Ends the jobs of all rows after an error, and frees the batch.

        After an interruption that left the batch as it was, the rows go on remembering what they held before.
        """
        if self._engine.intact and not self._resizing and not isinstance(error, Exception):
            for row in self.busy:
                assert row.job is not None
                self.failed.append((row.job, error))
                self.release(row)
            return
        for row in self.busy:
            self.fail(row, error)
        self.batch, self._resizing = [], False
        self._engine.clear()

    def clear(self) -> None:
        """Forgets what is remembered, parked rows included, and frees the batch. No row may have a job."""
        self.batch, self.parked = [], []
        self._engine.clear()

    def admit(self, queue: collections.deque[Job], *, most: int, rested: bool) -> None:
        """Gives rows to the jobs that wait, and reads at most one chunk of each prompt. Jobs with a row leave `queue`.

        Args:
            queue: the jobs that wait, in their order.
            most: most rows of the batch and of what is parked, rounded up to a power of two.
            rested: True if nothing has run since the batch was last empty, so that it may shrink.
        """
        most = power_of_two(most)
        self.parked = self.parked[: max(0, most - len(self.batch))]  # the newest come first
        for i, row in enumerate(self.batch):
            if row.spoiled:
                self._engine.wipe(i)
                row.spoiled = False
        if queue:
            self._fit(queue, most, rested=rested)
        fed: set[int] = set()
        while True:
            starts = self._wave(queue)
            try:
                self._start(starts, most)
            except BaseException:  # jobs that got no row wait on: nobody else would ever end them
                queue.extendleft(start.job for start in reversed(starts) if not start.job.started)
                raise
            if not self._feed(fed):
                return

    # The size of the batch.

    def _fit(self, queue: collections.deque[Job], most: int, *, rested: bool) -> None:
        """Makes the batch large enough for the waiting jobs. After an idle time it may also shrink."""
        engine, busy = self._engine, self.busy
        rows = min(most, power_of_two(len(busy) + len(queue)))
        next_jobs = list(queue)[:rows]
        jobs = [row.job for row in busy if row.job is not None] + next_jobs
        need = engine.capacity_for(max(len(job.prompt) + job.request.max_new_tokens for job in jobs))
        self._needed.append(need)
        grows = rows > engine.rows or need > engine.capacity
        wide = engine.capacity if busy or not rested else min(engine.capacity, max(self._needed))
        if not grows and not (rested and not busy and (rows < engine.rows or wide < engine.capacity)):
            return
        capacity = need if rows > engine.rows else max(need, wide)
        rows = max(rows, engine.rows) if busy else rows
        idle = sorted((row for row in self.batch if row.job is None), key=lambda row: -row.used)
        keep = [*busy, *idle][:rows]
        try:
            for row in idle:
                if row not in keep or len(row.ids) > capacity:
                    self._park(row, len(row.ids), most - rows)
            self._resizing = True  # until self.batch is that of the engine: an interruption in between loses both
            engine.resize([self.batch.index(row) for row in keep], rows=rows, capacity=capacity)
        except Exception as error:
            if not engine.intact:
                raise
            self._resizing = False
            longest = max(next_jobs, key=lambda job: len(job.prompt) + job.request.max_new_tokens)
            queue.remove(longest)  # the others may fit without it
            self.failed.append((longest, error))
            return
        for row in keep:
            row.ids = row.ids[:capacity]
        self.batch = keep + [Row() for _ in range(rows - len(keep))]
        self._resizing = False
        for i in range(len(keep), rows):  # of what is parked, the most that does not fit any more gets the new rows
            if len(self.parked) + rows > most:
                row = self.parked.pop()
                engine.unpark(row.part, i)
                self.batch[i] = Row(row.ids[:capacity], None, row.used)

    def _park(self, row: Row, lost: int, room: int, *, needed: Iterable[Row] = ()) -> None:
        """Copies what a row remembers out of the batch, if it would lose enough tokens and there is room.

        The oldest parked row makes room if it is older and not among `needed`. If the copy fails, for want of memory
        perhaps, the tokens are lost, and no job fails for it.
        """
        if lost < _LEAST_PARKED or room < 1:
            return
        self.parked.sort(key=lambda other: -other.used)
        if len(self.parked) >= room:
            if self.parked[-1].used >= row.used or self.parked[-1] in needed:
                return
            self.parked.pop()
        try:
            part = self._engine.park(self.batch.index(row), len(row.ids))
        except Exception as error:
            if not self._engine.intact:
                raise
            _log.info("the cache of %d tokens is not kept: %s", len(row.ids), one_line(error))
            return
        self.parked.insert(0, Row(row.ids, None, row.used, part))
        self.parked.sort(key=lambda other: -other.used)

    # The start of jobs.

    def _wave(self, queue: collections.deque[Job]) -> list[_Start]:
        """The jobs that start together.

        A job that shares a longer beginning with a prompt that is still being read waits until it is read, and then
        finds that beginning in a row.
        """
        free = [row for row in self.batch if row.job is None]
        reading = [row.job.prompt[:-1] for row in self.busy if row.job is not None and not row.job.live]
        starts: list[_Start] = []
        later: list[Job] = []
        while queue and free:
            job = queue.popleft()
            prompt = job.prompt[:-1]
            shares = {row: 0 if job.alone else _shared(row.held, prompt) for row in [*self.batch, *self.parked]}
            source = max(shares, key=lambda row: (shares[row], row in free))
            if (
                not job.alone
                and max((_shared(other, prompt) for other in reading), default=0) >= shares[source] + _LEAST_SHARED
            ):
                later.append(job)
                continue
            in_place = source in free and 2 * shares[source] >= len(source.ids)
            target = source if in_place else min(free, key=lambda row: row.used)
            shared = shares[source] if in_place or shares[source] >= _LEAST_SHARED else 0
            starts.append(_Start(job, source, shared, target))
            free.remove(target)
            reading.append(prompt)
        queue.extendleft(reversed(later))
        return starts

    def _start(self, starts: Sequence[_Start], most: int) -> None:
        """Gives the jobs their rows, with the beginnings that they share.

        What is overwritten is parked first, and copies are made before anything is written.
        """
        if not starts:
            return
        self._time += 1
        sources = [start.source for start in starts]
        moved = {start.source for start in starts if 2 * start.shared >= len(start.source.ids)}
        self.parked = [row for row in self.parked if row not in moved]  # these are in the batch again
        for start in starts:
            lost = len(start.target.ids) - (start.shared if start.source is start.target else 0)
            self._park(start.target, lost, most - len(self.batch), needed=sources)
        for start in starts:  # before the engine is called: what fails there is known to have these rows
            start.job.started = True
            start.target.job, start.target.used = start.job, self._time
        place = {row: i for i, row in enumerate(self.batch)}
        copies = [start for start in starts if start.shared and start.source is not start.target]
        pairs = [(place[start.source], place[start.target]) for start in copies if start.source.part is None]
        if pairs:
            self._engine.copy(pairs, max(start.shared for start in copies))
        for start in copies:
            if start.source.part is not None:
                self._engine.unpark(start.source.part, place[start.target])
        for start in starts:
            start.job.reused = start.job.filled = start.shared

    def _feed(self, fed: set[int]) -> bool:
        """Reads the next chunk of the prompts of rows that are not in `fed`, and makes rows live whose prompt is read.

        Returns False if there were no such rows.
        """
        turn = [i for i, row in enumerate(self.batch) if row.job and not row.job.live and i not in fed]
        fed.update(turn)
        self._each([i for i in turn if len(self._unread(i))], self._prefill)
        # The job of a row may have failed.
        self._each([i for i in turn if self.batch[i].job is not None and not len(self._unread(i))], self._insert)
        return bool(turn)

    def _unread(self, row: int) -> np.ndarray:
        """Prompt tokens of a row that are not in the cache yet, without the last one."""
        job = self.batch[row].job
        assert job is not None
        return job.prompt[job.filled : -1]

    def _prefill(self, rows: Sequence[int]) -> None:
        most = self._engine.chunks[-1]
        fills = []
        for i in rows:
            job = self.batch[i].job
            assert job is not None
            fills.append(Fill(i, job.filled, self._unread(i)[:most].astype(np.int32)))
        self._engine.prefill(sorted(fills, key=lambda fill: -len(fill.tokens)))
        for fill in fills:
            job = self.batch[fill.row].job
            assert job is not None
            job.filled += len(fill.tokens)

    def _insert(self, rows: Sequence[int]) -> None:
        jobs = {i: job for i in rows if (job := self.batch[i].job) is not None}
        self._engine.insert({i: job.request for i, job in jobs.items()})
        for job in jobs.values():
            job.live = True

    def _each(self, rows: Sequence[int], call: Callable[[Sequence[int]], None]) -> None:
        """Calls the engine for rows together and, if it raises without losing the batch, for each row alone.

        A row that raises alone fails.
        """
        if not rows:
            return
        try:
            call(rows)
        except Exception as error:
            if not self._engine.intact:
                raise
            if len(rows) == 1:
                self.fail(self.batch[rows[0]], error)
                return
            for row in rows:
                self._each([row], call)


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """The number of leading tokens that both have in common."""
    length = min(len(a), len(b))
    if not length or a[0] != b[0]:
        return 0
    different = a[:length] != b[:length]
    first = int(different.argmax())
    return first if different[first] else length
