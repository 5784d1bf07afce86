"""A fuzzer of the scheduler: requests are submitted and cancelled at random, by one client or by several threads.

    python -m helpers.crowd --minutes 10        (from tests/)

Every request comes from a pool whose texts are known from runs alone. A text that ends must be that text, a failure
must be one that was provoked, and at the end no request, row or array is left over and memory has not grown.
"""

import argparse
import dataclasses
import json
import threading
import time

import jax
import numpy as np

from helpers.inference import GREEDY, WARM, engine, new_program, prompt, run, shared_program
from llama_jax import compilation_cache
from llama_jax.config import size
from llama_jax.infer.request import Request
from llama_jax.infer.scheduler import Scheduler
from llama_jax.params import init_params, unstack
from llama_jax.sampling_params import SamplingParams

CONFIG = size("tiny")
FEW = SamplingParams(temperature=1.0, allowed_tokens=range(40), frequency_penalty=0.3)


class Letters:
    """A grammar of its own: tokens 3 to 9, and now and then one that fails."""

    def __init__(self, fails_after=None):
        self.left = fails_after

    def mask(self):
        mask = np.zeros(-(-CONFIG.vocab_size // 32), np.uint32)
        mask[0] = 0b1111111000
        return mask

    def consume(self, tokens):
        assert all(3 <= token <= 9 for token in tokens)
        if self.left is not None:
            self.left -= len(tokens)
            if self.left < 0:
                raise OSError("a grammar that was made to fail")


@dataclasses.dataclass(frozen=True)
class Case:
    """A request of the pool. `grammar` is "", "letters" or "fails"."""

    request: Request
    grammar: str = ""

    def fresh(self):
        """The request with a grammar at its start."""
        if not self.grammar:
            return self.request
        return dataclasses.replace(self.request, matcher=Letters(3 if self.grammar == "fails" else None))


def pool(count, *, wide):
    """Requests of many lengths, settings and beginnings. `wide` ones need more capacities, guesses and a draft."""
    rng = np.random.default_rng(5)
    shared = [prompt(n, 99) for n in (30, 90 if wide else 50)]
    cases = []
    for i in range(count):
        start = shared[i % 2] if rng.random() < 0.5 else []
        length = int(rng.integers(70, 150)) if wide and rng.random() < 0.2 else int(rng.integers(1, 40))
        grammar = "fails" if i % 8 == 3 else "letters" if rng.random() < 0.15 else ""
        speculate = rng.choice(["lookup", "draft"]) if wide and rng.random() < 0.4 else ""
        cases.append(
            Case(
                Request(
                    tokens=start + prompt(length, i),
                    max_new_tokens=int(rng.integers(1, 24)) + 8 * (grammar == "fails"),
                    sampling=(GREEDY, WARM, FEW)[i % 3],
                    seed=i,
                    stop_tokens=(5, 6) if rng.random() < 0.2 and not grammar else (),
                    speculate=str(speculate),
                    top_logprobs=2 if wide and rng.random() < 0.1 else 0,
                ),
                grammar,
            )
        )
    return cases


def alone(cases, e):
    """The tokens of each request in a batch of one row, without guesses; a failing grammar's are None."""
    scheduler = Scheduler(e, rows=1)
    texts = []
    for case in cases:
        bare = dataclasses.replace(case.fresh(), speculate="")
        texts.append(None if case.grammar == "fails" else run([bare], on=scheduler)[0][0][0])
    return texts


class Crowd:
    """The fuzzer.

    Attributes:
        ended: number of texts that ended, and were equal to themselves alone.
        failed: number of requests that failed as they were made to.
        cancelled: number of requests that were cancelled.
    """

    def __init__(self, *, cases=40, rows=4, wide=False):
        program = new_program(draft=CONFIG) if wide else shared_program()
        other = unstack(init_params(CONFIG, jax.random.key(9))) if wide else None
        self.cases = pool(cases, wide=wide)
        self.expected = alone(self.cases, engine())
        self.scheduler = Scheduler(engine(program, draft=other), rows=rows)
        self.ended = self.failed = self.cancelled = 0
        self._count = threading.Lock()

    def check(self, which, tokens, event):
        """A text that ended is that of the request alone."""
        if event.finish == "error":
            assert self.cases[which].grammar == "fails" and isinstance(event.error, OSError), event
            with self._count:
                self.failed += 1
            return
        assert tokens == self.expected[which], (which, event.finish)
        with self._count:
            self.ended += 1

    def steps(self, rng, count):
        """One client that submits, cancels and steps itself."""
        open_, texts = {}, {}
        for i in range(count):
            if len(open_) < 12 and i < 0.8 * count and rng.random() < 0.5:
                which = int(rng.integers(len(self.cases)))
                open_[self.scheduler.submit(self.cases[which].fresh())] = which
            if open_ and rng.random() < 0.15:
                number = int(rng.choice(list(open_)))
                self.scheduler.cancel(number)
                del open_[number]
                self.cancelled += 1
            for event in self.scheduler.step(int(rng.integers(1, 9))):
                texts.setdefault(event.number, []).extend(event.tokens)
                if event.finish:
                    self.check(open_.pop(event.number), texts.pop(event.number), event)
        while not self.scheduler.idle:
            for event in self.scheduler.step(16):
                texts.setdefault(event.number, []).extend(event.tokens)
                if event.finish:
                    self.check(open_.pop(event.number), texts.pop(event.number), event)
        assert not open_, "rows were lost"

    def threads(self, rng, count, clients=3):
        """Several clients with iterators, which some of them leave before the end."""
        errors = []

        def client(rng):
            try:
                for _ in range(count):
                    picked = rng.integers(len(self.cases), size=int(rng.integers(1, 4))).tolist()
                    requests = [self.cases[i].fresh() for i in picked]
                    numbers, events = self.scheduler.start(requests, first=int(rng.integers(1, 9)), most=8)
                    which, texts, patience = dict(zip(numbers, picked, strict=True)), {}, rng.integers(1, 20)
                    for event in events:
                        texts.setdefault(event.number, []).extend(event.tokens)
                        if event.finish:
                            self.check(which.pop(event.number), texts.pop(event.number), event)
                        patience -= 1
                        if not patience:
                            events.close()
                            break
                    assert not which or not patience, "rows were lost"
                    self.cancelled += len(which)
            except BaseException as error:
                errors.append(error)

        workers = [
            threading.Thread(target=client, args=(np.random.default_rng(seed),))
            for seed in rng.integers(1 << 31, size=clients)
        ]
        [worker.start() for worker in workers]
        [worker.join(300) for worker in workers]
        assert not any(worker.is_alive() for worker in workers), "a client waits for ever"
        if errors:
            raise errors[0]

    def nothing_left(self):
        """No request, event or array is left but the batch and what is parked."""
        scheduler = self.scheduler
        scheduler.step(1)
        assert scheduler.idle and not scheduler._inbox and not scheduler._jobs and not scheduler._rows.busy
        assert len(scheduler._rows.batch) + len(scheduler._rows.parked) <= scheduler.rows


def resident():
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def arrays():
    """Bytes of the arrays that are alive."""
    return sum(a.nbytes for a in jax.live_arrays())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wide", action="store_true", help="long prompts, look-up, a draft model, likeliest tokens")
    options = parser.parse_args()
    compilation_cache.enable()
    rng = np.random.default_rng(options.seed)
    crowd = Crowd(cases=60, wide=options.wide)
    start, rounds, marks = time.monotonic(), 0, []
    while time.monotonic() - start < 60 * options.minutes:
        crowd.steps(rng, 150)
        crowd.nothing_left()
        crowd.threads(rng, 8)
        crowd.nothing_left()
        if rounds % 10 == 9:
            crowd.scheduler.forget()
        rounds += 1
        marks.append((time.monotonic() - start, resident(), arrays(), crowd.scheduler._engine.compilations))
    assert rounds > 3, f"{rounds} rounds say nothing about memory: compiling took the time, so run it again"
    half = [mark for mark in marks if mark[0] > 30 * options.minutes]
    growth = half[-1][1] - half[0][1]
    print(
        json.dumps(
            {
                "rounds": rounds,
                "ended": crowd.ended,
                "failed": crowd.failed,
                "cancelled": crowd.cancelled,
                "resident_mb": [round(mark[1] / 1e6) for mark in (marks[0], half[0], half[-1])],
                "array_mb": [round(mark[2] / 1e6, 1) for mark in (marks[0], half[0], half[-1])],
                "growth_mb": round(growth / 1e6, 1),
                "programs": [mark[3] for mark in (marks[0], half[0], half[-1])],
            }
        )
    )
    assert growth < 50e6 and max(mark[2] for mark in half) <= 1.05 * max(mark[2] for mark in marks[: len(marks) // 2])


if __name__ == "__main__":
    main()
