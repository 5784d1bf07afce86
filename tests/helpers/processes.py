"""A helper of the tests: train.py in processes of its own, some of which are killed."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from helpers.paths import ROOT
from helpers.runs import metrics_of, write_config

SETTINGS = (
    "config.model.num_layers = 1; config.train.steps = 40; config.checkpoint.every = 4; config.log.eval_every = 10; "
    "config.data.validation = config.data.train; config.train.compute_dtype = 'float32'"
)


def say_last(log: Path) -> str:
    """The last 2,000 characters of a log, for the message of a failed assertion."""
    return log.read_text()[-2000:]


def default_signals() -> None:
    """Undoes what a child inherits from tests that run in the background, where SIGINT and SIGHUP may be ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def slowdown_of(pid: int, started: float) -> float:
    """Seconds that a process waits for each second that it computes, at least 1: bounds of time grow with it.

    Args:
        pid: The number of the process, which has computed without pauses.
        started: The time at which it was started.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    computed = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return max(1.0, (time.monotonic() - started) / max(0.1, computed))


class Process:
    """train.py in a process of its own."""

    def __init__(self, folder: Path, compiled: Path | str, *arguments, devices=1, settings=SETTINGS):
        self.run = folder / "run"
        self.log = folder / f"log{time.monotonic_ns()}.txt"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "LLAMA_JAX_CACHE": str(compiled),
            "PYTHONUNBUFFERED": "1",
        }
        command = [sys.executable, str(ROOT / "train.py"), f"--config={write_config(folder, settings)}", *arguments]
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, preexec_fn=default_signals
            )

    def wait(self, seconds: float = 120) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()

    def until(self, happened, seconds: float = 120) -> None:
        """Wait for a condition, or for the process to end."""
        end = time.monotonic() + seconds
        while not happened() and self.process.poll() is None:
            assert time.monotonic() < end, say_last(self.log)
            time.sleep(0.005)

    def lines(self) -> int:
        path = self.run / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0


def kill_and_compare(tmp_path, compiled, *, devices, kills, arguments=(), data=None):
    """Compare a run that is killed and started again, `kills` times at random instants, with an undisturbed one.

    Both must log every step once, with the same metrics to the bit. Returns the last process of the killed run.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    # The same text under the same path: what a store is made of is part of the run.
    text = data or whole / "text.txt"
    shared = [
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        *(f"--config.data.{part}={text}" for part in ("train", "validation")),
        *arguments,
    ]
    first = Process(whole, compiled, *shared, devices=devices)
    assert first.wait() == 0, say_last(first.log)
    rng = random.Random(devices)
    killed = 0
    for _ in range(kills):
        program = Process(broken, compiled, *shared, devices=devices)
        lines = program.lines()
        program.until(lambda program=program, lines=lines: program.lines() > lines)
        time.sleep(rng.uniform(0.0, 0.3))
        if program.process.poll() is None:
            program.process.kill()
            killed += 1
        program.wait()
    last = Process(broken, compiled, *shared, devices=devices)
    assert last.wait() == 0, say_last(last.log)
    expected, found = metrics_of(whole / "run"), metrics_of(broken / "run")
    assert killed >= min(2, kills)
    assert [line["step"] for line in found if "loss" in line] == list(range(1, 41))
    assert found == expected
    return last


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Processes:
    """train.py in `count` processes that share eight devices, or `devices`."""

    def __init__(self, folder, compiled, count, *arguments, only=None, devices=8):
        config = write_config(folder, SETTINGS)
        self.run = folder / "run"
        self.logs = [folder / f"log{count}_{i}.txt" for i in range(count)]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices // count),
        }
        caches = compiled if isinstance(compiled, list) else [compiled] * count
        address = f"127.0.0.1:{free_port()}"
        self.processes = []
        for i in range(count) if only is None else only:
            command = [sys.executable, str(ROOT / "train.py"), f"--config={config}", *arguments]
            if count > 1:
                connection = {"coordinator": address, "num_processes": count, "process_id": i}
                command += [f"--config.distributed.{k}={v}" for k, v in connection.items()]
            with self.logs[i].open("w") as out:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=environment | {"LLAMA_JAX_CACHE": str(caches[i])},
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self, *, code=0):
        try:
            codes = [process.wait(180) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        assert codes == [code] * len(codes), "\n".join(log.read_text()[-1500:] for log in self.logs)
        return self
