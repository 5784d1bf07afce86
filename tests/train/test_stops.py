"""Signals stop train.py cleanly at any instant, and output that cannot be written does not stop it."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from helpers import stops
from helpers.paths import ROOT
from helpers.processes import Process, default_signals, say_last
from helpers.runs import metrics_of, write_config
from llama_jax.train.stop import Interrupted, StopSignal


@pytest.mark.parametrize(
    ("number", "when"),
    [
        (signal.SIGINT, 0.0),
        (signal.SIGTERM, 0.3),
        (signal.SIGHUP, "train: "),
        (signal.SIGINT, "step 1/"),
    ],
    ids=str,
)
def test_a_signal_at_any_instant_is_one_line_and_the_usual_status(tmp_path, compiled, number, when):
    """`python -m helpers.stops` is the long form."""
    assert stops.stop_once(tmp_path, compiled, number, when) == ""


@pytest.mark.slow
def test_signals_at_random_instants_stop_cleanly(tmp_path, compiled):
    rng = random.Random(0)
    problems = []
    for i in range(30):
        (tmp_path / str(i)).mkdir()
        when = rng.choice(stops.MARKS) if i % 2 else rng.uniform(0, 8)
        problems.append(stops.stop_once(tmp_path / str(i), compiled, rng.choice(stops.SIGNALS), when))
    assert not any(problems), "\n".join(filter(None, problems))


def test_a_second_ctrl_c_leaves_at_once(tmp_path, compiled):
    code = (
        "import time\n"
        "from llama_jax.train.stop import StopSignal\n"
        "with StopSignal(owns_process=True) as stop:\n"
        "    stop.begin_work()\n"
        "    print('ready', flush=True)\n"
        "    while True:\n"
        "        time.sleep(1)\n"
    )
    command = [sys.executable, "-c", code]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": default_signals}
    with subprocess.Popen(command, cwd=ROOT, **options) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        error = process.stderr.read()
    waits, leaves = filter(None, error.split("\n"))
    assert waits == "stopping after this step; Ctrl-C again leaves at once"
    assert leaves == "stopped by Ctrl-C; the same command continues"


@pytest.fixture
def control_c():
    """Python's own handler of Ctrl-C. A test run in the background inherits an ignored SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("control_c")
def test_a_notebook_gets_keyboard_interrupt_where_a_stop_loses_nothing():
    with StopSignal() as stop:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not stop.requested
        stop.begin_work()
        signal.raise_signal(signal.SIGINT)
        assert stop.requested and stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("control_c")
def test_long_work_between_steps_is_dropped_by_a_signal():
    with StopSignal() as stop:
        stop.begin_work()
        with pytest.raises(Interrupted):
            with stop.interruptible():
                # From another thread, during the call: Python may see a signal that it raises itself only after it.
                threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
                time.sleep(60)
        with pytest.raises(Interrupted), stop.interruptible():
            raise AssertionError("the work must not begin")
        assert stop.requested


@pytest.mark.parametrize("output", ["a reader that leaves", "a full disk", "ascii"])
def test_output_that_cannot_be_written_ends_no_run(tmp_path, compiled, output):
    config = write_config(tmp_path, "config.log.sample_every = 2; config.log.sample_prompts = ('caf\\u00e9 \\u4e2d',)")
    command = f"{sys.executable} {ROOT}/train.py --config={config}"
    ends = {
        "a reader that leaves": "| head -n 1",
        "a full disk": "> /dev/full",
        "ascii": f"> {tmp_path}/out.txt",
    }
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "LLAMA_JAX_CACHE": str(compiled), "PYTHONIOENCODING": "ascii"}
    shell = ["bash", "-c", f"set -o pipefail; {command} {ends[output]}"]
    done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line["step"] for line in metrics_of(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4]
    assert "Traceback" not in done.stderr
    if output in ("a reader that leaves", "a full disk"):
        assert done.stderr.count("standard output cannot be written") == 1
    if output == "ascii":
        assert "sample: caf? ?|" in (tmp_path / "out.txt").read_text()


def test_a_stop_during_the_first_compilation_leaves_at_once(tmp_path):
    program = Process(tmp_path, "off", "--config.train.steps=100000")
    program.until(lambda: "compiling" in program.log.read_text())
    program.process.send_signal(signal.SIGINT)
    assert program.wait(30) == 130, say_last(program.log)
    assert program.log.read_text().endswith("\nstopped by Ctrl-C; the same command continues\n")
