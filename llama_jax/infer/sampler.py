"""The sampler, which makes requests of prompts for the scheduler, and results of the scheduler's events."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_jax.errors import ConfigError, brief, one_line
from llama_jax.infer.batches import power_of_two, shows_bar
from llama_jax.infer.engine import Engine
from llama_jax.infer.grammar import Grammars
from llama_jax.infer.options import Options, resolve
from llama_jax.infer.request import Request
from llama_jax.infer.result import Likeliest, Result
from llama_jax.infer.scheduler import Event, Scheduler
from llama_jax.progress import progress_bar
from llama_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from llama_jax.text.tokenizer import Tokenizer

_STREAM_STEPS = 8  # most steps in a dispatch of a stream: text appears often, and the host's overhead is small

_LEAST_LENGTH = 16


@dataclasses.dataclass
class _Parts:
    """The tokens and the text of one request so far, collected from the scheduler's events."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top: Likeliest = dataclasses.field(default_factory=list)
    text: str = ""
    last: Event | None = None

    def add(self, event: Event) -> None:
        """Adds the tokens of an event."""
        self.last = event
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        self.top += event.top
        self.text += event.text


class Stream(Iterator[Any]):
    """The pieces of a continuation as they are generated."""

    def __init__(self, pieces: Iterator[Any], result: Callable[[], Result | None]):
        """A stream of `pieces`; `result` makes the Result so far."""
        self._pieces = pieces
        self._result = result

    def __next__(self) -> Any:
        return next(self._pieces)

    @property
    def result(self) -> Result | None:
        """The continuation so far, or None before its first tokens. After the last piece it is complete."""
        return self._result()

    def close(self) -> None:
        """Cancels the rest of the continuation."""
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()


class Sampler:
    """Continues prompts of ids with one engine.

    Attributes:
        engine: weights and compiled programs.
        scheduler: the queue and the rows. It remembers the prompts of earlier calls.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer | None, sampling: SamplingParams, stop_tokens: tuple[int, ...]
    ):
        """Makes a sampler.

        Args:
            engine: weights and compiled programs.
            tokenizer: the tokenizer, or None. Stop strings, constraints and texts need it.
            sampling: default sampling settings.
            stop_tokens: default stop tokens.
        """
        self.engine = engine
        self.scheduler = Scheduler(engine, tokenizer)
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._stop_tokens = stop_tokens
        # A tokenizer of llguidance for the stop tokens that were used last: requests may choose any.
        self._grammars = functools.lru_cache(maxsize=4)(self._grammars_of)

    def options(self, given: Mapping[str, Any], max_new_tokens: int) -> Options:
        """The checked options of a continuation, with `max_new_tokens` as the default of its limit."""
        options = resolve(
            given,
            default=self._sampling,
            stop_tokens=self._stop_tokens,
            vocab_size=self.engine.config.vocab_size,
            max_new_tokens=max_new_tokens,
            has_draft=self.engine.program.draft is not None,
        )
        if self._tokenizer is None and (options.stop or options.constraint):
            needs = "stop strings" if options.stop else options.constraint.kind if options.constraint else ""
            raise ConfigError(f"{needs} need a tokenizer: put tokenizer.model or tokenizer.json in the model's folder")
        return options

    def request(self, ids: Sequence[int], name: str, options: Options, seed: int) -> Request:
        """The request of a prompt. `name` is the prompt's name in messages.

        Raises:
            ConfigError: the prompt is empty, too long or not of this vocabulary, or its constraint cannot be compiled.
        """
        if not ids:
            raise ConfigError(f"{name} is empty: give it at least one token id, such as begin_of_text")
        self.check_ids(np.asarray(ids), name)
        limit, new = self.engine.config.max_seq_len, options.max_new_tokens
        if len(ids) + new > limit:
            remedy = f"max_new_tokens of at most {limit - len(ids):,}" if len(ids) < limit else "a shorter prompt"
            raise ConfigError(
                f"{name} has {len(ids):,} tokens and max_new_tokens is {new:,}, which together exceed the model's "
                f"max_seq_len={limit:,}. Use {remedy}"
            )
        matcher = None
        if options.constraint is not None:
            matcher = self._grammars(options.stop_tokens).matcher(options.constraint)
        return Request(
            tokens=list(ids),
            max_new_tokens=new,
            sampling=options.sampling,
            seed=seed,
            stop_tokens=options.stop_tokens,
            stops=options.stop,
            top_logprobs=options.top_logprobs,
            speculate=options.speculate,
            matcher=matcher,
        )

    def _grammars_of(self, stop_tokens: tuple[int, ...]) -> Grammars:
        assert self._tokenizer is not None  # `options` refuses a constraint without one
        return Grammars(self._tokenizer, self.engine.config.vocab_size, stop_tokens)

    def check_ids(self, ids: np.ndarray, name: str) -> None:
        """Refuses ids that are not in the vocabulary, with a ConfigError."""
        bad = ids[(ids < 0) | (ids >= self.engine.config.vocab_size)]
        if bad.size:
            last = self.engine.config.vocab_size - 1
            raise ConfigError(f"{name} holds id {brief(int(bad[0]))}, but the ids of the vocabulary are 0 to {last}")

    def run(self, requests: Sequence[Request], rows: int, progress: bool | None) -> list[Result]:
        """The results of requests, in their order, with at most `rows` of them in the batch at a time.

        A request that fails has a result with the reason, and the others go on. If all fail, the first error is raised.
        """
        shown = shows_bar(len(requests), rows, progress)
        results: dict[int, Result] = {}
        failed: dict[int, BaseException] = {}
        with progress_bar(len(requests), "generating", unit="prompt", shown=shown, delay=0) as bar:
            for i, result, error in self._ended(requests, rows):
                results[i] = result
                if error is not None:
                    failed[i] = error
                bar.update(1)
        if len(failed) == len(requests):
            raise failed[0]
        return [results[i] for i in range(len(requests))]

    def results(self, requests: Sequence[Request], rows: int) -> Iterator[tuple[int, Result]]:
        """Yields the index and the result of each request as it ends. Raises the error of the first that fails."""
        for i, result, error in self._ended(requests, rows):
            if error is not None:
                raise error
            yield i, result

    def _ended(self, requests: Sequence[Request], rows: int) -> Iterator[tuple[int, Result, BaseException | None]]:
        self.scheduler.rows = rows
        numbers, events = self.scheduler.start(requests)
        index = {number: i for i, number in enumerate(numbers)}
        parts = [_Parts() for _ in requests]
        for event in events:
            i = index[event.number]
            parts[i].add(event)
            if event.finish:
                yield i, self._result(requests[i], parts[i], event), event.error

    def stream(self, request: Request) -> Stream:
        """The continuation of a request in pieces of text, or in ids without a tokenizer."""
        part = _Parts()

        def result() -> Result | None:
            return None if part.last is None else self._result(request, part, part.last)

        return Stream(self._pieces(request, part), result)

    def _pieces(self, request: Request, part: _Parts) -> Iterator[Any]:
        _, events = self.scheduler.start([request], first=1, most=_STREAM_STEPS)
        decoder = None
        if self._tokenizer is not None:
            from llama_jax.text.tokenizer import StreamDecoder

            decoder = StreamDecoder(self._tokenizer, continues=True)
        for event in events:
            part.add(event)
            if event.error is not None:
                raise event.error
            if decoder is None:
                yield from event.tokens
                continue
            text = event.text if request.stops else decoder.push(self.known(event.tokens))
            if event.finish and not request.stops:
                text += decoder.flush()
            if text:
                yield text

    def known(self, tokens: Sequence[int]) -> list[int]:
        """The ids that the tokenizer can decode. A model's vocabulary may be padded beyond that of its tokenizer."""
        return [i for i in tokens if self._tokenizer is not None and i < self._tokenizer.vocab_size]

    def _result(self, request: Request, part: _Parts, last: Event) -> Result:
        text = part.text
        if self._tokenizer is not None and not request.stops:
            text = self._tokenizer.decode(self.known(part.tokens), skip_special=True, continues=True)
        return Result(
            text=text,
            tokens=part.tokens,
            logprobs=part.logprobs,
            finish_reason=last.finish or "length",
            stop=last.stop,
            error="" if last.error is None else one_line(last.error) or type(last.error).__name__,
            prompt_tokens=list(request.tokens),
            top_logprobs=part.top,
            steps=last.steps,
            cached_tokens=last.reused,
        )

    def prompt_logprobs(self, ids: Sequence[int], top: int) -> dict[str, Any]:
        """The fields of a Result about its prompt: logprob of each token but the first, and the likeliest tokens."""
        length = min(power_of_two(len(ids), _LEAST_LENGTH), self.engine.config.max_seq_len)
        tokens_BT = np.zeros((1, length), np.int32)
        tokens_BT[0, : len(ids)] = ids
        next_BCK = np.roll(tokens_BT, -1, axis=1)[..., None]
        found = self.engine.score_top(tokens_BT, np.zeros(1, np.int32), next_BCK, top=top)
        count = len(ids) - 1
        fields: dict[str, Any] = {"prompt_logprobs": found["logprobs"][0, :count, 0].tolist()}
        if top:
            pairs = zip(found["top_ids"][0, :count].tolist(), found["top_logprobs"][0, :count].tolist(), strict=True)
            fields["prompt_top_logprobs"] = [list(zip(*pair, strict=True)) for pair in pairs]
        return fields

    def embed(self, texts: Sequence[Sequence[int]], pool: str | None, rows: int) -> list[np.ndarray]:
        """Hidden states after the final norm, float32: (T, D) for each text, or (D,) with `pool`."""
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        found: dict[int, np.ndarray] = {}
        for start in range(0, len(order), rows):
            group = order[start : start + rows]
            longest = max(len(texts[i]) for i in group)
            length = min(power_of_two(longest, _LEAST_LENGTH), self.engine.config.max_seq_len)
            tokens_BT = np.zeros((min(rows, power_of_two(len(group))), length), np.int32)
            for row, i in zip(tokens_BT, group, strict=False):
                row[: len(texts[i])] = texts[i]
            hidden_BTD = np.asarray(self.engine.hidden(tokens_BT), np.float32)
            for row, i in zip(hidden_BTD, group, strict=False):
                states_TD = row[: len(texts[i])]
                found[i] = {None: states_TD, "mean": states_TD.mean(axis=0), "last": states_TD[-1]}[pool]
        if not all(math.isfinite(float(states.sum())) for states in found.values()):
            raise ValueError(f"the model's hidden states are not finite in {self.engine.dtype} (try float32)")
        return [found[i] for i in range(len(texts))]
