"""The scheduler: requests wait in a queue, get a row of the batch, and are decoded together. It does not import jax.

    scheduler = Scheduler(engine, tokenizer, rows=8)
    numbers = [scheduler.submit(request) for request in requests]
    for event in scheduler.events(numbers): ...

`step` admits requests to free rows, dispatches once, and returns what each row generated. `generate`, `stream`, `chat`,
lm_eval's requests and the samples of training are its clients.

A row remembers the tokens whose keys and values are in its cache, also after its request has ended. A new request
starts from the row that shares the longest beginning with it: in that row if it is free, or from a copy of its first
positions. The next turn of a chat, few-shot prompts and several samples of one prompt are read once this way.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llama_jax.infer.batches import power_of_two
from llama_jax.infer.request import DISPATCH, Fill, Piece, Request
from llama_jax.infer.stops import StopScanner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llama_jax.infer.engine import Engine
    from llama_jax.text.tokenizer import Tokenizer

# A shared beginning of fewer tokens is not worth a copy, or a wave of its own.
_LEAST_SHARED = 16
_STOP_STEPS = 16  # most steps between two searches for stop strings
# Tokens that a speculative step guesses for each row of a small batch and of a larger one: with the next token, the
# products have 8 rows for one row, and four times as many as plain decoding for many.
_GUESSES, _FEW_GUESSES, _SMALL_BATCH = 7, 3, 4
# Guesses are judged after so many forward passes of rows. If a pass brought fewer tokens than this, some dispatches, of
# so many steps each, run without guesses.
_JUDGED, _POOR_GAIN, _REST, _REST_STEPS = 48, 1.25, 4, 32


@dataclasses.dataclass(frozen=True)
class Event:
    """The tokens that one dispatch generated for one request.

    Attributes:
        number: the number that `submit` returned.
        tokens: new ids, including a stop token that ended them.
        logprobs: log-probability of each new token under the model's own distribution.
        top: likeliest (id, log-probability) pairs at each position, if the request asks for them.
        text: new text of a request with stop strings, up to the stop string; "" for other requests.
        finish: "stop" or "length" if the request has ended, else None.
        stop: the stop token or the stop string that ended it.
        steps: forward passes so far.
        reused: number of prompt tokens that were in the cache already.
    """

    number: int
    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    text: str
    finish: str | None
    stop: int | str | None
    steps: int
    reused: int


@dataclasses.dataclass
class _Job:
    """A request that is waiting or running, and its progress so far."""

    number: int
    request: Request
    prompt: np.ndarray
    scanner: StopScanner | None
    tokens: list[int] = dataclasses.field(default_factory=list)
    steps: int = 0
    reused: int = 0


@dataclasses.dataclass
class _Row:
    """A row of the batch: `ids` are the tokens whose keys and values it holds, `used` is the time of its last job."""

    ids: np.ndarray
    job: _Job | None = None
    used: int = 0


class Scheduler:
    """Schedules requests on one engine.

    Attributes:
        rows: most rows that run together, rounded up to a power of two.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None = None, *, rows: int = 8):
        """Makes a scheduler without requests; `tokenizer` is needed for stop strings."""
        self.rows = rows
        self._engine = engine
        self._tokenizer = tokenizer
        self._waiting: collections.deque[_Job] = collections.deque()
        self._batch: list[_Row] = []
        self._inbox: dict[int, list[Event]] = {}
        self._next = 0
        self._time = 0
        self._forgotten = 0  # number of times that all requests were cancelled
        self._rest = 0  # dispatches before guessing is tried again
        self._passes = self._gained = 0  # forward passes with guesses since the last judgment, and their tokens
        self._resting = True  # no request has run since the batch was last empty
        self._lock = threading.RLock()

    # The public interface.

    def submit(self, request: Request) -> int:
        """Puts a request into the queue and returns its number."""
        with self._lock:
            scanner = StopScanner(self._tokenizer, request.stops) if request.stops else None
            job = _Job(self._next, request, np.asarray(request.tokens, np.int64), scanner)
            self._next += 1
            self._resting |= self.idle
            self._waiting.append(job)
            return job.number

    def cancel(self, number: int) -> None:
        """Ends a request: it gives no further event, and its iterator ends. Numbers of ended requests are ignored."""
        with self._lock:
            self._inbox.pop(number, None)
            self._waiting = collections.deque(job for job in self._waiting if job.number != number)
            for row in self._batch:
                if row.job is not None and row.job.number == number:
                    self._release(row)

    @property
    def idle(self) -> bool:
        """True if no request waits or runs."""
        return not self._waiting and not self._busy()

    def forget(self) -> None:
        """Forgets the cached prompts, frees the batch and cancels all requests, as new weights require."""
        with self._lock:
            self._waiting.clear()
            self._batch = []
            self._inbox.clear()
            self._forgotten += 1
            self._engine.clear()

    def events(self, numbers: Collection[int], *, first: int | None = None, most: int | None = None) -> Iterator[Event]:
        """Steps until these requests have ended, and yields their events. Closing the iterator cancels those that are
        still running.

        Several iterators may be open, also in several threads. A step of one of them serves the requests of all.

        Args:
            numbers: numbers of submitted requests.
            first: largest number of decoding steps of the first dispatch. It doubles with each dispatch.
            most: largest number of decoding steps of any dispatch.
        """
        most = DISPATCH if most is None else most
        with self._lock:
            for number in numbers:
                self._inbox[number] = []
            return self._iterate(set(numbers), most if first is None else min(first, most), most, self._forgotten)

    def start(
        self, requests: Sequence[Request], *, first: int | None = None, most: int | None = None
    ) -> tuple[list[int], Iterator[Event]]:
        """Submits requests, and returns their numbers and `events`. No step of another thread runs in between."""
        with self._lock:
            numbers = [self.submit(request) for request in requests]
            return numbers, self.events(numbers, first=first, most=most)

    def _iterate(self, left: set[int], limit: int, most: int, forgotten: int) -> Iterator[Event]:
        try:
            while left:
                with self._lock:
                    if self._forgotten != forgotten:
                        raise RuntimeError("a request was lost: another one failed, or the weights were replaced")
                    left &= self._inbox.keys()  # the others were cancelled
                    ready = [event for number in sorted(left) for event in self._inbox[number]]
                    self._inbox |= {number: [] for number in left}
                    if not ready and left:
                        self.step(limit)
                        limit = min(2 * limit, most)
                for event in ready:
                    if event.finish:
                        left.discard(event.number)
                        self._inbox.pop(event.number, None)
                    yield event
        finally:
            for number in left:
                self.cancel(number)

    def step(self, limit: int) -> list[Event]:
        """Admits waiting requests to free rows, decodes up to `limit` steps, and returns the events.

        Open iterators of `events` get their events too. If it raises (or is interrupted), the batch is lost: all
        requests are cancelled and nothing is remembered.
        """
        with self._lock:
            try:
                self._admit()
                events = self._decode(limit) if self._busy() else []
                for event in events:
                    if event.number in self._inbox:
                        self._inbox[event.number].append(event)
                return events
            except BaseException:
                self.forget()
                raise

    # Admission.

    def _busy(self) -> list[_Row]:
        return [row for row in self._batch if row.job is not None]

    def _release(self, row: _Row) -> None:
        row.ids, row.job, row.used = self._held(row), None, self._time

    def _admit(self) -> None:
        self._fit()
        while self._waiting and (free := [i for i, row in enumerate(self._batch) if row.job is None]):
            self._start(self._wave(free))

    def _fit(self) -> None:
        """Makes the batch large enough for the waiting requests. After an idle time it may also shrink."""
        if not self._waiting:
            return
        busy = [i for i, row in enumerate(self._batch) if row.job is not None]
        rows = min(power_of_two(self.rows), power_of_two(len(busy) + len(self._waiting)))
        jobs = [self._batch[i].job for i in busy] + list(itertools.islice(self._waiting, rows))
        need = self._engine.capacity_for(max(len(job.prompt) + job.request.max_new_tokens for job in jobs if job))
        grows = rows > self._engine.rows or need > self._engine.capacity
        shrinks = self._resting and rows < self._engine.rows
        self._resting = False
        if not grows and not shrinks:
            return
        capacity = need if rows > self._engine.rows else max(need, self._engine.capacity)
        rows = max(rows, self._engine.rows) if busy else rows
        lately = sorted((i for i in range(len(self._batch)) if i not in busy), key=lambda i: -self._batch[i].used)
        keep = [*busy, *lately][:rows]
        self._engine.resize(keep, rows=rows, capacity=capacity)
        kept = [self._batch[i] for i in keep]
        for row in kept:
            row.ids = row.ids[:capacity]
        self._batch = kept + [_Row(np.zeros(0, np.int64)) for _ in range(rows - len(kept))]

    def _wave(self, free: list[int]) -> dict[int, tuple[_Job, int, int]]:
        """Chooses the requests to start together: by row, (job, row to copy from, number of tokens to copy).

        All copies are made before any row is written, so a row that is about to be replaced can still be copied from.

        A request that shares a longer beginning with another one of the wave waits for the next wave, and then finds
        that beginning in a row.
        """
        wave: dict[int, tuple[_Job, int, int]] = {}
        later: list[_Job] = []
        while self._waiting and free:
            job = self._waiting.popleft()
            prompt = job.prompt[:-1]
            shares = [_shared(row.ids if row.job is None else self._held(row), prompt) for row in self._batch]
            source = max(range(len(shares)), key=lambda i: (shares[i], i in free))
            in_wave = max((_shared(other.prompt[:-1], prompt) for other, _, _ in wave.values()), default=0)
            if in_wave >= shares[source] + _LEAST_SHARED:
                later.append(job)
                continue
            oldest = min(free, key=lambda i: self._batch[i].used)
            target = source if source in free and 2 * shares[source] >= len(self._batch[source].ids) else oldest
            shared = shares[source] if target == source or shares[source] >= _LEAST_SHARED else 0
            wave[target] = (job, source, shared)
            free.remove(target)
        self._waiting.extendleft(reversed(later))
        return wave

    def _held(self, row: _Row) -> np.ndarray:
        """The tokens whose keys and values are in the cache of a busy row: all but the next input token."""
        assert row.job is not None
        return np.concatenate([row.job.prompt, np.asarray(row.job.tokens, np.int64)])[:-1]

    def _start(self, wave: Mapping[int, tuple[_Job, int, int]]) -> None:
        self._time += 1
        pairs = [(source, row) for row, (_, source, shared) in wave.items() if shared and source != row]
        if pairs:
            self._engine.copy(pairs, max(shared for _, source, shared in wave.values()))
        fills = []
        for row, (job, _, shared) in wave.items():
            job.reused = shared
            self._batch[row].job, self._batch[row].used = job, self._time
            if len(job.prompt) - 1 > shared:
                fills.append(Fill(row, shared, job.prompt[shared:-1].astype(np.int32)))
        if fills:
            self._engine.prefill(sorted(fills, key=lambda fill: -len(fill.tokens)))
        self._engine.insert({row: job.request for row, (job, _, _) in wave.items()})

    # Decoding.

    def _decode(self, limit: int) -> list[Event]:
        busy = self._busy()
        requests = [row.job.request for row in busy if row.job]
        if any(request.stops for request in requests):
            limit = min(limit, _STOP_STEPS)
        guesses, drafter = self._guessing(requests)
        if not guesses and any(request.speculate for request in requests):  # guessing rests
            limit = min(limit, _REST_STEPS)
        allowed = None
        if any(request.matcher for request in requests):
            limit, guesses, drafter, allowed = 1, 0, "", self._allowed()
        pieces = self._engine.decode(
            [row.job is not None for row in self._batch],
            limit=limit,
            longest=max(len(row.job.prompt) + len(row.job.tokens) - 1 for row in busy if row.job),
            # With requests in the queue, rows that have ended are filled again before the others go on.
            least=len(busy) - len(self._batch) // 8 if self._waiting else 0,
            top=max(request.top_logprobs for request in requests),
            allowed=allowed,
            guesses=guesses,
            drafter=drafter,
        )
        events = [self._event(row, piece) for row, piece in zip(self._batch, pieces, strict=True) if row.job]
        if guesses and drafter == "lookup":
            self._judge(pieces)
        return events

    def _judge(self, pieces: Sequence[Piece]) -> None:
        """Turns guessing off for some dispatches if too few guesses were correct to save time."""
        self._passes += sum(piece.steps for piece in pieces)
        self._gained += sum(len(piece.tokens) for piece in pieces)
        if self._passes >= _JUDGED:
            self._rest = _REST if self._gained < _POOR_GAIN * self._passes else 0
            self._passes = self._gained = 0

    def _guessing(self, requests: Sequence[Request]) -> tuple[int, str]:
        """The number of guesses of the next dispatch, and the drafter that makes them."""
        asked = [request.speculate for request in requests if request.speculate]
        if not asked:
            return 0, ""
        if self._rest and asked[0] == "lookup":
            self._rest -= 1
            return 0, ""
        return _GUESSES if len(self._batch) <= _SMALL_BATCH else _FEW_GUESSES, asked[0]

    def _allowed(self) -> np.ndarray:
        """The packed masks of all rows (B, W); zeros for rows without a grammar."""
        masks = {
            i: row.job.request.matcher.mask()
            for i, row in enumerate(self._batch)
            if row.job is not None and row.job.request.matcher is not None
        }
        words = len(next(iter(masks.values())))
        allowed = np.zeros((len(self._batch), words), np.uint32)
        for i, mask in masks.items():
            allowed[i] = mask
        return allowed

    def _event(self, row: _Row, piece: Piece) -> Event:
        job = row.job
        assert job is not None
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
        if finish:
            self._release(row)
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


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """The number of leading tokens that both have in common."""
    length = min(len(a), len(b))
    if not length or a[0] != b[0]:
        return 0
    different = a[:length] != b[:length]
    first = int(different.argmax())
    return first if different[first] else length
