"""The scheduler: requests wait in a queue, get a row of the batch, and are decoded together. It does not import jax.

    scheduler = Scheduler(engine, tokenizer, rows=8)
    numbers, events = scheduler.start(requests)
    for event in events: ...

`step` admits requests to free rows, reads a chunk of each prompt, dispatches once, and returns what each row generated.
`generate`, `stream`, `chat`, lm_eval's requests and the samples of training are its clients; a server is another.
`rows` decides which row a request gets, and what it finds there.

A request that fails ends with an event that has the error, and the others go on. If the batch is lost, as after an
error of the device, the requests that have rows fail, and those that wait go on.

Two locks: `_turn` is held by the thread that steps, and `_lock` for moments by anyone, so that `submit` and `cancel`
never wait for a dispatch.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llama_jax.errors import ConfigError
from llama_jax.infer.request import DISPATCH, Piece, Request
from llama_jax.infer.rows import Job, Row, Rows
from llama_jax.infer.stops import StopScanner

if TYPE_CHECKING:
    from llama_jax.infer.engine import Engine
    from llama_jax.text.tokenizer import Tokenizer

_STOP_STEPS = 16  # most steps between two searches for stop strings
# Tokens that a speculative step guesses for each row of a small batch and of a larger one: with the next token, the
# products have 8 rows for one row, and four times as many as plain decoding for many.
_GUESSES, _FEW_GUESSES, _SMALL_BATCH = 7, 3, 4
# Guesses are judged after so many forward passes of rows. If a pass brought fewer tokens than this, some dispatches, of
# so many steps each, run without guesses.
_JUDGED, _POOR_GAIN, _REST, _REST_STEPS = 48, 1.25, 4, 32


class QueueFull(RuntimeError):
    """The error of a full queue, which has as many requests as it may have. A server answers that it is busy."""


@dataclasses.dataclass(frozen=True)
class Event:
    """The tokens that one dispatch generated for one request.

    Attributes:
        number: the number that `submit` returned.
        tokens: new ids, including a stop token that ended them.
        logprobs: log-probability of each new token under the model's own distribution.
        top: likeliest (id, log-probability) pairs at each position, if the request asks for them.
        text: new text of a request with stop strings, up to the stop string; "" for other requests.
        finish: "stop", "length" or "error" if the request has ended, else None.
        stop: the stop token or the stop string that ended it.
        steps: forward passes so far.
        reused: number of prompt tokens that were in the cache already.
        error: the exception that ended the request, or None.
    """

    number: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    text: str = ""
    finish: str | None = None
    stop: int | str | None = None
    steps: int = 0
    reused: int = 0
    error: BaseException | None = None


class Scheduler:
    """Schedules requests on one engine.

    Attributes:
        rows: most rows that run together, rounded up to a power of two. It also bounds the rows that are remembered.
        queue: most requests that may wait for a row; `submit` raises QueueFull beyond it. None is without a bound, for
            clients that hold their requests anyway. A server should have one.
        interleave: most decoding steps of other rows between two chunks of a long prompt (`Engine.chunks`). More steps
            delay the first token of the long prompt, and fewer slow the others down.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None = None,
        *,
        rows: int = 8,
        queue: int | None = None,
        interleave: int = 16,
    ):
        """Makes a scheduler without requests; stop strings need `tokenizer`. ConfigError for a number below 1."""
        for name, value in (("rows", rows), ("queue", queue), ("interleave", interleave)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value}")
        self.rows = rows
        self.queue = queue
        self.interleave = interleave
        self._engine = engine
        self._tokenizer = tokenizer
        self._turn = threading.RLock()
        self._lock = threading.RLock()
        # Under `_lock`: requests that have not ended, those that no step has seen, and the events of open iterators.
        self._jobs: dict[int, Job] = {}
        self._arrived: list[Job] = []
        self._inbox: dict[int, list[Event]] = {}
        self._next = 0
        self._rested = True  # no request has run since the batch was last empty
        # Under `_turn`.
        self._queue: collections.deque[Job] = collections.deque()
        self._rows = Rows(engine)
        self._late: list[Event] = []  # events for the next step to return
        self._rest = 0  # dispatches before guessing is tried again
        self._passes = self._gained = 0  # forward passes with guesses since the last judgment, and their tokens

    # The public interface.

    def submit(self, request: Request) -> int:
        """Puts a request into the queue and returns its number. QueueFull if as many wait as may."""
        return self._submit([request])[0]

    def _submit(self, requests: Sequence[Request]) -> list[int]:
        jobs = []
        for request in requests:
            scanner = StopScanner(self._tokenizer, request.stops) if request.stops else None
            jobs.append(Job(-1, request, np.asarray(request.tokens, np.int64), scanner))
        with self._lock:
            if self.queue is not None:
                waiting = sum(not job.started for job in self._jobs.values())
                if waiting + len(jobs) > self.queue:
                    raise QueueFull(f"{waiting} requests wait already: at most {self.queue} may; try again later")
            self._rested |= not self._jobs
            for job in jobs:
                job.number = self._next
                self._next += 1
                self._jobs[job.number] = job
                self._arrived.append(job)
            return [job.number for job in jobs]

    def cancel(self, number: int) -> None:
        """Ends a request: it gives no further event, and its iterator ends. Numbers of ended requests are ignored.

        The next step frees its row.
        """
        with self._lock:
            self._inbox.pop(number, None)
            job = self._jobs.pop(number, None)
            if job is not None:
                job.cancelled = True

    @property
    def idle(self) -> bool:
        """True if no request waits or runs."""
        return not self._jobs

    def forget(self, change: Callable[[], None] | None = None) -> None:
        """Forgets the cached prompts and frees the batch. Requests that have not ended fail.

        Args:
            change: called while nothing runs and nothing is remembered, for instance to replace the weights.
        """
        with self._turn:
            with self._lock:
                self._queue.clear()
                self._arrived.clear()
                error = RuntimeError("a request was lost: the weights were replaced, or the cache was cleared")
                self._late += self._delivered([_failure(job, error) for job in self._jobs.values()])
            for row in self._rows.busy:
                self._rows.release(row)
            self._rows.clear()
            if change is not None:
                change()

    def events(self, numbers: Collection[int], *, first: int | None = None, most: int | None = None) -> Iterator[Event]:
        """Steps until these requests have ended, and yields their events. Closing the iterator cancels those that are
        still running.

        Several iterators may be open, also in several threads. A step of one of them serves the requests of all.

        Args:
            numbers: numbers of submitted requests.
            first: largest number of decoding steps of the first dispatch. It doubles with each dispatch.
            most: largest number of decoding steps of any dispatch.

        Raises:
            ConfigError: a request has ended already, as it may if another thread steps. Use `start`.
        """
        most = DISPATCH if most is None else most
        with self._lock:
            ended = [number for number in numbers if number not in self._jobs]
            if ended:
                raise ConfigError(f"request {ended[0]} has ended, or was never submitted: use start, which does both")
            for number in numbers:
                self._inbox[number] = []
        left = set(numbers)
        return _Events(self._iterate(left, most if first is None else min(first, most), most), left, self.cancel)

    def start(
        self, requests: Sequence[Request], *, first: int | None = None, most: int | None = None
    ) -> tuple[list[int], Iterator[Event]]:
        """Submits requests, and returns their numbers and `events`. No step of another thread runs in between."""
        with self._lock:
            numbers = self._submit(requests)
            return numbers, self.events(numbers, first=first, most=most)

    def _iterate(self, left: set[int], limit: int, most: int) -> Iterator[Event]:
        while left:
            ready = self._collect(left)
            if not ready and left:
                with self._turn:
                    ready = self._collect(left)  # another thread may have stepped meanwhile
                    if not ready and left and self.step(limit):
                        limit = min(2 * limit, most)
            yield from ready

    def _collect(self, left: set[int]) -> list[Event]:
        """Takes the events of these requests that have come. Requests that have ended are removed from `left`."""
        with self._lock:
            left.intersection_update(self._inbox)  # the others were cancelled
            ready = [event for number in sorted(left) for event in self._inbox[number]]
            self._inbox |= {number: [] for number in left}
            ended = {event.number for event in ready if event.finish}
            for number in ended:
                del self._inbox[number]
            left.difference_update(ended)
            return ready

    def step(self, limit: int) -> list[Event]:
        """Admits waiting requests to free rows, reads a chunk of each prompt that is not read yet, decodes up to
        `limit` steps, and returns the events.

        Open iterators of `events` get their events too. An exception of the engine fails the requests that it concerns:
        their events have the error. One that is no Exception, such as KeyboardInterrupt, is raised again.
        """
        with self._turn:
            with self._lock:
                self._queue = collections.deque(job for job in [*self._queue, *self._arrived] if not job.cancelled)
                self._arrived.clear()
                rested, self._rested = self._rested, False
            for row in self._rows.busy:
                if row.job is not None and row.job.cancelled:
                    self._rows.release(row)
            events: list[Event] = []
            try:
                self._rows.admit(self._queue, most=self.rows, rested=rested)
                if self._rows.live:
                    events = self._decode(limit)
            except BaseException as error:
                self._lose(error)
                if not isinstance(error, Exception):
                    self._late += self._delivered(self._failures())
                    raise
            events, self._late = [*self._late, *self._delivered(events + self._failures())], []
            return events

    def _lose(self, error: BaseException) -> None:
        """Ends all requests that have, or had, a row. An interruption may have come after a row was freed."""
        self._rows.lose(error)
        with self._lock:
            ended = {job.number for job, _ in self._rows.failed}
            lost = [job for job in self._jobs.values() if job.started and job.number not in ended]
            self._rows.failed += [(job, error) for job in lost]

    def _failures(self) -> list[Event]:
        failed, self._rows.failed = self._rows.failed, []
        return [_failure(job, error) for job, error in failed]

    def _delivered(self, events: Sequence[Event]) -> list[Event]:
        """Puts events into the inboxes of iterators, and returns those of requests that were not cancelled."""
        with self._lock:
            events = [event for event in events if event.number in self._jobs]
            for event in events:
                if event.number in self._inbox:
                    self._inbox[event.number].append(event)
                if event.finish:
                    del self._jobs[event.number]
            return events

    # Decoding.

    def _decode(self, limit: int) -> list[Event]:
        batch, live = self._rows.batch, self._rows.live
        requests = [job.request for job in live]
        if any(request.stops for request in requests):
            limit = min(limit, _STOP_STEPS)
        if len(self._rows.busy) > len(live):  # a prompt is not read yet
            limit = min(limit, self.interleave)
        guesses, drafters = self._guessing()
        if not guesses and any(request.speculate for request in requests):  # guessing rests
            limit = min(limit, _REST_STEPS)
        allowed = None
        if any(request.matcher for request in requests):
            limit, guesses, drafters, allowed = 1, 0, (), self._allowed()
        pieces = self._engine.decode(
            [row.job is not None and row.job.live for row in batch],
            limit=limit,
            longest=max(len(job.prompt) + len(job.tokens) - 1 for job in live),
            # With requests in the queue, rows that have ended are filled again before the others go on.
            least=len(live) - len(batch) // 8 if self._queue else 0,
            top=max(request.top_logprobs for request in requests),
            allowed=allowed,
            guesses=guesses,
            drafters=drafters,
        )
        events = [self._event(row, piece) for row, piece in zip(batch, pieces, strict=True) if row.job and row.job.live]
        if guesses and "draft" not in drafters:
            self._judge(pieces)
        return [event for event in events if event is not None]

    def _judge(self, pieces: Sequence[Piece]) -> None:
        """Turns guessing off for some dispatches if too few guesses were correct to save time."""
        self._passes += sum(piece.steps for piece in pieces)
        self._gained += sum(len(piece.tokens) for piece in pieces)
        if self._passes >= _JUDGED:
            self._rest = _REST if self._gained < _POOR_GAIN * self._passes else 0
            self._passes = self._gained = 0

    def _guessing(self) -> tuple[int, tuple[str, ...]]:
        """The number of guesses of the next dispatch, and the drafter of each row; "" takes that of the others."""
        rows = self._rows.batch
        drafters = tuple(row.job.request.speculate if row.job and row.job.live else "" for row in rows)
        if not any(drafters):
            return 0, ()
        if self._rest and "draft" not in drafters:
            self._rest -= 1
            return 0, ()
        return _GUESSES if len(rows) <= _SMALL_BATCH else _FEW_GUESSES, drafters

    def _allowed(self) -> np.ndarray | None:
        """The packed masks of all rows (B, W); zeros for rows without a grammar. A row whose grammar fails ends."""
        masks = {}
        for i, row in enumerate(self._rows.batch):
            if row.job is not None and row.job.live and row.job.request.matcher is not None:
                try:
                    masks[i] = row.job.request.matcher.mask()
                except Exception as error:
                    self._rows.fail(row, error)
        if not masks:
            return None
        allowed = np.zeros((len(self._rows.batch), len(next(iter(masks.values())))), np.uint32)
        for i, mask in masks.items():
            allowed[i] = mask
        return allowed

    def _event(self, row: Row, piece: Piece) -> Event | None:
        """The event of a row's new tokens; None if the row failed, which `_failures` reports."""
        assert row.job is not None
        try:
            if piece.error is not None:
                if row.job.reused and not row.job.tokens:
                    self._queue.appendleft(self._rows.retry(row))
                    return None
                raise piece.error
            event = _event(row.job, piece)
        except Exception as error:
            self._rows.fail(row, error)
            return None
        if event.finish:
            self._rows.release(row)
        return event


class _Events(Iterator[Event]):
    """The events of some requests. Closing or dropping it cancels those that have not ended, also before its first."""

    def __init__(self, events: Iterator[Event], left: set[int], cancel: Callable[[int], None]):
        self._events = events
        self._left = left
        self._cancel = cancel

    def __next__(self) -> Event:
        try:
            return next(self._events)
        except BaseException:  # it has ended: of themselves, by an error, or by an interruption
            self.close()
            raise

    def close(self) -> None:
        self._events = iter(())
        while self._left:
            self._cancel(self._left.pop())

    __del__ = close


def _event(job: Job, piece: Piece) -> Event:
    """Adds new tokens to a job. Raises what its grammar or its stop strings raise."""
    request = job.request
    job.tokens += piece.tokens
    job.steps += piece.steps
    if request.matcher is not None:
        request.matcher.consume([token for token in piece.tokens if token not in request.stop_tokens])
    count, text = len(piece.tokens), ""
    finish: str | None = None
    stop: int | str | None = None
    if piece.done:
        ended = piece.tokens[-1] in request.stop_tokens
        finish, stop = ("stop", piece.tokens[-1]) if ended else ("length", None)
    if job.scanner is not None:
        used, text, found = job.scanner.push(piece.tokens, end=piece.done)
        if found is not None:
            count, stop, finish = used, found, "stop"
    wanted = request.top_logprobs
    return Event(
        job.number,
        piece.tokens[:count],
        piece.logprobs[:count],
        [best[:wanted] for best in piece.top[:count]] if wanted else [],
        text,
        finish,
        stop,
        job.steps,
        job.reused,
    )


def _failure(job: Job, error: BaseException) -> Event:
    return Event(job.number, finish="error", error=error, steps=job.steps, reused=job.reused)
