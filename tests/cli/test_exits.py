"""The end of a command: exit statuses, one line for each error, signals, and output that nobody reads."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers.paths import ROOT
from helpers.processes import default_signals
from llama_jax.cli import exits, supervise
from llama_jax.errors import ConfigError


def raising(error):
    def command(argv):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ConfigError("a\nb"), 2, "error: a b\n"),
        (FileNotFoundError(2, "No such file", "nowhere/x"), 2, "error: nowhere/x: No such file"),
        (exits.CommandError("the loss is not finite"), 2, "error: the loss is not finite\n"),
        (MemoryError(), 2, "error: out of memory; take a smaller batch"),
        (RuntimeError("RESOURCE_EXHAUSTED: 3 GB\nmore"), 2, "error: out of memory: RESOURCE_EXHAUSTED: 3 GB; take"),
        (KeyboardInterrupt(), 130, "\nstopped by Ctrl-C\n"),
        (exits.Stopped(signal.SIGTERM), 143, "\nstopped by SIGTERM\n"),
        (exits.Stopped(signal.SIGHUP), 129, "\nstopped by SIGHUP\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_status_and_the_line_of_each_end(capsys, error, status, words):
    before = signal.getsignal(signal.SIGINT)
    try:
        assert exits.run(raising(error), []) == status
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.startswith(words)


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exits.run(lambda argv: 1 // 0, [])


def process(body, **options):
    code = f"import sys, time\nfrom llama_jax.cli import exits\ndef command(argv):\n    {body}\n    return 0\n"
    code += "exits.leave(command, [])"
    options = {"preexec_fn": default_signals, **options}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str
)
def test_a_signal_ends_the_process_with_one_line(number, status):
    body = "print('ready', flush=True); time.sleep(60)"
    with process(body, stdout=subprocess.PIPE) as running:
        assert running.stdout.readline() == "ready\n"
        running.send_signal(number)
        assert running.wait(timeout=20) == status
        assert running.stderr.read().strip().startswith("stopped by ")


# The library's lock is taken twice, so that the main thread never runs a handler of Python again.
_STUCK = (
    "lock = ctypes.create_string_buffer(64); take = ctypes.CDLL(None).pthread_mutex_lock\n    take(lock); take(lock)"
)
LOST = {
    "while a library's code runs": f"exits._PATIENCE = 0.5\n    print('ready', flush=True)\n    {_STUCK}",
    "ignored in a callback of the garbage collector": "gc.callbacks.append(lambda *_: time.sleep(0.3))\n"
    "    print('ready', flush=True)\n    while True: gc.collect(); time.sleep(0.3)",
    "caught by a library": "exits._PATIENCE = 0.5\n    print('ready', flush=True)\n    while True:\n"
    "        try: time.sleep(60)\n        except BaseException: pass",
    "made another error": "print('ready', flush=True)\n    try: time.sleep(60)\n"
    "    except BaseException: raise ImportError('of an extension')",
}


@pytest.mark.parametrize("body", LOST.values(), ids=LOST)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_signal_whose_exception_is_lost_ends_the_process_all_the_same(body, number):
    with process(f"import ctypes, gc\n    {body}", stdout=subprocess.PIPE) as running:
        assert running.stdout.readline() == "ready\n"
        time.sleep(0.1)
        running.send_signal(number)
        assert running.wait(timeout=20) == 128 + number
        assert running.stderr.read().strip() == f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}"


@pytest.mark.parametrize("name", ["caught by a library", "while a library's code runs"])
def test_a_second_signal_ends_the_process_at_once(name):
    body = f"import ctypes, gc\n    {LOST[name]}".replace("0.5", "60")
    with process(body, stdout=subprocess.PIPE) as running:
        assert running.stdout.readline() == "ready\n"
        for wait in (0.1, 0.3):
            time.sleep(wait)
            running.send_signal(signal.SIGINT)
        assert running.wait(timeout=20) == 130
        assert running.stderr.read().strip() == "stopped by Ctrl-C"


def test_a_signal_during_an_import_ends_the_process_at_once(tmp_path):
    """An exception there may become a segmentation fault, in the initialization of an extension of C++."""
    lines = ("import time", "print('ready', flush=True)", "try: time.sleep(60)", "except BaseException: 1 // 0")
    (tmp_path / "slow.py").write_text("\n".join(lines))
    body = f"sys.path.insert(0, {str(tmp_path)!r}); import slow"
    with process(body, stdout=subprocess.PIPE) as running:
        assert running.stdout.readline() == "ready\n"
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=20) == 143
        assert running.stderr.read() == "\nstopped by SIGTERM\n"


def test_the_errors_of_the_runtime_are_held_back_and_nothing_else(monkeypatch):
    log = b"1126 21:00:00.123456   12 client.h:80] "
    ours = [b"step 1\n", b"error: a file is full\n", b"stopping after this step\n", b"0.5 GB\n"]
    theirs = [b"E" + log + b"one\n", b"\n", b"RPC: two\n", b"F" + log + b"three\n", b"\n", b"*** stack trace: ***\n"]
    warning = b"W" + log + b"slow\n"
    written = []
    monkeypatch.setattr(supervise, "write_error", written.append)
    lines = [warning, ours[0], *theirs[:3], ours[1], theirs[0], ours[2], warning, ours[3], *theirs[3:]]
    held = supervise._relayed(io.BytesIO(b"".join(lines)))
    assert written == ours
    assert held == b"".join([warning, *theirs[:3], theirs[0], warning, *theirs[3:]])


def test_a_full_or_closed_output_ends_without_a_traceback():
    if os.path.exists("/dev/full"):
        for body in ("print('x')", "print('x', flush=True)"):
            with open("/dev/full", "w") as full, process(body, stdout=full) as running:
                assert running.stderr.read() == "error: standard output: No space left on device\n"
            assert running.returncode == 2
    for body, error in (("print('x')", "error: standard output: Bad file descriptor\n"), ("pass", "")):
        with process(body, preexec_fn=lambda: os.close(1)) as running:
            assert running.stderr.read() == error
        assert running.returncode == (2 if error else 0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "arguments", ["infer --help", "train --help", "train --keys", "eval perplexity --help", "--help"]
)
def test_help_that_cannot_be_written_is_no_success(arguments):
    body = f"from llama_jax.cli import commands; commands.main({arguments.split()})"
    with open("/dev/full", "w") as full, process(body, stdout=full) as running:
        assert running.stderr.read() == "error: standard output: No space left on device\n"
    assert running.returncode == 2


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path):
    """Text of a library for the standard streams would otherwise end up in a checkpoint."""
    body = f"print(open({str(tmp_path / 'file')!r}, 'w').fileno() > 2, repr(sys.stdin.read()), file=sys.stderr)"
    for closed in ((0, 1), (0,), (1,)):
        with process(body, preexec_fn=lambda closed=closed: [os.close(n) for n in closed]) as running:
            assert running.stderr.read() == "True ''\n"
        assert running.returncode == 0


def test_characters_that_the_terminal_lacks_are_replaced():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    with process("print('caf\\u00e9')", stdout=subprocess.PIPE, env=environment) as running:
        assert running.stdout.read() == "caf?\n"
    assert running.returncode == 0
