"""Contenders in one process each that take turns, step by step, so that a busy machine hurts them alike."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

Kind = tuple[str, ...]


def serve(one: Callable[[], float]) -> None:
    """In a contender's process: do a step for every line on standard input, and answer with its seconds and loss."""
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = one()
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": loss}), flush=True)


def race(kinds: Sequence[Kind], *, steps: int) -> dict[Kind, list[float]]:
    """The seconds of each step of each kind, the first, which compiles, left out.

    A contender is this very command with `--serve` and the words of its kind at its end. Raises RuntimeError if one
    ends before its time; what it said stands above.
    """
    workers = {
        kind: subprocess.Popen(
            [sys.executable, *sys.argv, "--serve", *kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for kind in kinds
    }
    seconds: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    try:
        for turn in range(steps + 1):
            for kind, worker in workers.items():
                worker.stdin.write("step\n")
                worker.stdin.flush()
                answer = worker.stdout.readline()
                if not answer:
                    raise RuntimeError(f"{' '.join(kind)} ended in its step {turn}")
                if turn:
                    seconds[kind].append(json.loads(answer)["seconds"])
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    return seconds
