"""Alternating steps of several implementations, in one process each, so that other load affects all of them equally."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

Kind = tuple[str, ...]
STEPS = 2  # counted steps of a turn


def serve(one: Callable[[], float]) -> None:
    """Runs one step for every line on standard input, and prints its seconds and loss. Each contender calls it."""
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = one()
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": loss}), flush=True)


def race(kinds: Sequence[Kind], *, steps: int) -> dict[Kind, list[float]]:
    """The seconds of at least `steps` steps of each contender, STEPS in each turn.

    The first step of a turn is not counted: it compiles, or it follows a pause, in which a virtual machine may have
    given the memory that a contender freed after its last step back to the host.

    The process of a contender runs this command with `--serve` and the words of its kind appended.

    Raises:
        RuntimeError: a process ended early. Its own output is on the terminal.
    """
    workers = {
        kind: subprocess.Popen(
            [sys.executable, *sys.argv, "--serve", *kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for kind in kinds
    }
    seconds: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    try:
        for _ in range(-(-steps // STEPS)):
            for kind, worker in workers.items():
                for step in range(STEPS + 1):
                    worker.stdin.write("step\n")
                    worker.stdin.flush()
                    answer = worker.stdout.readline()
                    if not answer:
                        raise RuntimeError(f"the process of {' '.join(kind)} ended after {len(seconds[kind])} steps")
                    if step:
                        seconds[kind].append(json.loads(answer)["seconds"])
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    return seconds
