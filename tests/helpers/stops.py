"""A helper of the tests, and a program: train.py is stopped by a signal at random instants and at marks of its log.

`python -m helpers.stops FOLDER --count N` does it N times and prints each stop that was not clean.
"""

import argparse
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers.processes import SETTINGS, Process, slowdown_of
from llama_jax.checkpoint import Checkpoints

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MARKS = ("train: ", "model: ", "compiling", "step 1/", "step 12/", "validation loss", "finished", "loss: ")
LONGEST = 10.0  # seconds from a signal to the exit, on a machine that does nothing else


def stop_once(folder: Path, compiled: Path | str, number: int, when: float | str, *arguments: str) -> str:
    """Start a run in `folder`, send it a signal, and judge its end; "" is clean.

    Args:
        folder: Holds the run.
        compiled: The compilation cache, or "off".
        number: The signal.
        when: Seconds after the first line of train.py, or words in the log.
        *arguments: Further arguments of train.py.
    """
    before = max(Checkpoints(folder / "run", create=False).steps(), default=0)
    start = time.monotonic()
    program = Process(folder, compiled, *arguments, settings=SETTINGS)
    program.until(lambda: _watches(program.process.pid))
    if isinstance(when, str):
        program.until(lambda: when in program.log.read_text())
    else:
        time.sleep(when)
    if program.process.poll() is not None:
        return ""  # it was over before
    slowdown = slowdown_of(program.process.pid, start)
    begin = time.monotonic()
    program.process.send_signal(number)
    try:
        status = program.wait(120)
    except subprocess.TimeoutExpired:
        return f"{number} at {when}: still running after 120 s"
    seconds, text = time.monotonic() - begin, program.log.read_text()
    problems = []
    if status != 128 + number and not (status == 0 and "Sample from it" in text):
        problems.append(f"status {status}")
    if seconds > slowdown * LONGEST:
        problems.append(f"{seconds:.1f} s on a machine that is {slowdown:.1f} times as slow as it would be alone")
    if any(word in text for word in ("Traceback", "Exception ignored", "Fatal Python", "Check failure")):
        problems.append("a traceback")
    if "stop" not in text:
        problems.append("not a word")
    newest = max(Checkpoints(folder / "run", create=False).steps(), default=0)
    steps = max((line for line in range(program.lines() + 1)), default=0)
    if newest < before or (number == signal.SIGINT and "stopped at step" in text and f"step {newest} of" not in text):
        problems.append(f"step {newest} after {before}, {steps} lines")
    return f"{number} at {when}: {', '.join(problems)}\n{text[-800:]}" if problems else ""


def _watches(pid: int) -> bool:
    """True once the first line of train.py has been run: it blocks the signals until they are handled."""
    lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    blocked, caught = (int(lines.get(name, "0"), 16) for name in ("SigBlk", "SigCgt"))
    return bool((blocked | caught) & 1 << signal.SIGTERM - 1)


def main() -> None:
    """The long form of the drill."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("folder", type=Path)
    flags.add_argument("--count", type=int, default=60)
    flags.add_argument("--seed", type=int, default=0)
    options = flags.parse_args()
    rng = random.Random(options.seed)
    bad = 0
    for i in range(options.count):
        folder = options.folder / str(i)
        folder.mkdir(parents=True)
        compiled = "off" if rng.random() < 0.2 else options.folder / "compiled"
        when = rng.choice(MARKS) if rng.random() < 0.4 else rng.uniform(0, 12) if i % 3 else rng.uniform(0, 1.5)
        word = stop_once(folder, compiled, rng.choice(SIGNALS), when)
        bad += bool(word)
        print(f"{i}: {word or 'clean'}", flush=True)
    print(f"{bad} of {options.count} stops were not clean", file=sys.stderr)


if __name__ == "__main__":
    main()
