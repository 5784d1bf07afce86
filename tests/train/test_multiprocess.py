"""Two processes of four devices each do what one process of eight does."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from helpers import sound
from helpers.paths import ROOT
from helpers.processes import Processes, free_port
from helpers.runs import metrics_of
from llama_jax.checkpoint import Checkpoints, SaveError
from llama_jax.errors import TRY_AGAIN
from llama_jax.parallel import processes
from llama_jax.weights import export
from llama_jax.weights.model_files import Metadata
from llama_jax.weights.open import open_source

ROUNDING = 2e-5


def compare(tmp_path, compiled, *arguments, steps=6):
    """Runs both ways, and continues each folder the other way."""
    arguments = [*arguments, "--config.optimizer.schedule=constant", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    runs = {}
    for first, second in ((2, 1), (1, 2)):
        folder = tmp_path / f"{first}{second}"
        folder.mkdir()
        Processes(folder, compiled, first, *arguments, f"--config.train.steps={steps}").wait()
        Processes(folder, compiled, second, *arguments, f"--config.train.steps={2 * steps}").wait()
        runs[first] = metrics_of(folder / "run")
    losses = {k: [line["loss"] for line in lines if "loss" in line] for k, lines in runs.items()}
    validated = {k: [line for line in lines if "validation_loss" in line] for k, lines in runs.items()}
    valid = {k: [line["validation_loss"] for line in lines] for k, lines in validated.items()}
    assert len(losses[1]) == len(losses[2]) == 2 * steps
    # Before the first step, each 10 steps, and at the end of each half; not again where the second half starts.
    assert all([line["step"] for line in lines] == [0, steps, 10, 2 * steps] for lines in validated.values())
    np.testing.assert_allclose(losses[2], losses[1], rtol=ROUNDING)
    np.testing.assert_allclose(valid[2], valid[1], rtol=ROUNDING)


def test_two_processes_train_to_the_metrics_of_one(tmp_path, compiled):
    """The weights are sharded over both processes."""
    arguments = ["--config.train.steps=4", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    runs = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        Processes(folder, compiled, count, *arguments).wait()
        runs[count] = metrics_of(folder / "run")
    assert [line["step"] for line in runs[2]] == [0, 1, 2, 3, 4, 4]  # the validation loss is at both ends
    for a, b in zip(runs[1], runs[2], strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=10 * ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        {"fsdp": 8},
        {"data": 2, "stage": 2, "tensor": 2},
        {"fsdp": 2, "context": 2, "tensor": 2},
        {"data": 2, "context": 4},
    ],
    ids=["fsdp", "stages", "rows split", "long rows"],
)
def test_two_and_four_processes_have_the_losses_and_gradients_of_one_device(tmp_path, compiled, mesh):
    """The norms of the gradients are logged for each group of weights."""
    shared = ["--config.model.num_layers=2", "--config.train.steps=3", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    shared += [f"--config.data.{part}={tmp_path / 'text.txt'}" for part in ("train", "validation")]
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    sizes = [f"--config.mesh.{axis}={n}" for axis, n in ({"fsdp": 1} | mesh).items()]
    runs = {}
    for count, devices, layout in ((1, 1, []), (2, 8, sizes), (4, 8, sizes)):
        folder = tmp_path / str(count)
        folder.mkdir()
        runs[count] = metrics_of(Processes(folder, compiled, count, *shared, *layout, devices=devices).wait().run)
    assert [line["step"] for line in runs[1]] == [0, 1, 2, 3, 3] and "grad_norm/attention" in runs[1][1]
    for count in (2, 4):
        for found, expected in zip(runs[count], runs[1], strict=True):
            assert found.keys() == expected.keys()
            np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


LOAD_AND_SAVE = """
"One of two processes that load a model together and save it in three formats; prints the bytes that it read."
import sys
import jax
address, index, source, folder = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
from llama_jax import parallel
from llama_jax.weights import export
from llama_jax.weights.model_files import Metadata
from llama_jax.weights.tensor import File
from llama_jax.weights.open import open_source

found, read, read_into = open_source(source), [], File.read_into
File.read_into = lambda self, out, start: (read.append(len(out)), read_into(self, out, start))
layout = parallel.Layout(parallel.make_mesh({"fsdp": 8}), "train")
params = found.load(layout, None, "none")
print(sum(read), flush=True)
metadata = Metadata()
leaves = export.leaves_of(found.config, params)
for format, name in (("hf", "hf"), ("meta", "meta"), ("gguf", "m.gguf")):
    export.save(folder + "/" + name, found.config, leaves, metadata, format=format, dtype="float32")
"""


def test_each_process_reads_only_its_part_and_the_first_saves_the_whole(tmp_path):
    metadata = Metadata()
    config = dataclasses.replace(sound.CONFIG, embed_dim=512, head_dim=128)  # half a row is 1 KB, and read alone
    source = export.save(tmp_path / "in", config, sound.random_leaves(config), metadata, format="hf", dtype="float32")
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD_AND_SAVE, address, str(i), str(source), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    read = [int(process.communicate(timeout=120)[0].split()[0]) for process in started]
    assert [process.returncode for process in started] == [0, 0]
    matrices = sum(entry.nbytes for entry in open_source(source).leaves.values() if len(entry.shape) == 2)
    norms = sum(entry.nbytes for entry in open_source(source).leaves.values()) - matrices
    assert read == [matrices // 2 + norms] * 2  # the devices of a process hold the same norms
    for name in ("hf", "meta", "m.gguf"):
        for path, entry in open_source(tmp_path / name).leaves.items():
            np.testing.assert_array_equal(entry.read(), open_source(source).leaves[path].read())


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        ["--config.mesh.fsdp=8"],
        ["--config.mesh.fsdp=1", "--config.mesh.tensor=8", "--config.model.num_kv_heads=8"],
        ["--config.mesh.fsdp=1", "--config.mesh.context=8"],
        ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.train.accumulate=2"],
    ],
    ids=["fsdp", "tensor", "context", "mixed"],
)
def test_processes_and_meshes_across_them_change_no_number_and_no_checkpoint(tmp_path, compiled, mesh):
    compare(tmp_path, compiled, *mesh)


@pytest.mark.slow
@pytest.mark.parametrize("told", [[0], [1], [0, 1]], ids=str)
def test_sigterm_of_any_process_stops_all_after_the_same_step(tmp_path, compiled, told):
    endless = ["--config.train.steps=1000000", "--config.checkpoint.every=1000000", "--config.log.eval_every=0"]
    job = Processes(tmp_path, compiled, 2, *endless)
    try:
        while len(metrics_of(job.run)) < 5:
            assert all(process.poll() is None for process in job.processes)
        for i in told:
            job.processes[i].send_signal(signal.SIGTERM)
    finally:
        job.wait(code=143)
    steps = [line["step"] for line in metrics_of(job.run)]
    assert steps == list(range(1, len(steps) + 1))
    assert Checkpoints(job.run).latest() == len(steps)


ENDLESS = ["--config.train.steps=1000000", "--config.checkpoint.every=5", "--config.log.eval_every=0"]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_others_in_one_line(tmp_path, compiled, lost):
    """Process 0 is the one that the others are connected to."""
    job = Processes(tmp_path, compiled, 2, *ENDLESS)
    try:
        while len(metrics_of(job.run)) < 12:
            assert all(process.poll() is None for process in job.processes)
            time.sleep(0.1)
        slowdown = 1.0 if os.getloadavg()[0] < 2 * os.cpu_count() else 2.0  # the processes do not only compute
        job.processes[lost].kill()
        begin = time.monotonic()
        assert job.processes[1 - lost].wait(60) == TRY_AGAIN
        assert time.monotonic() - begin < 20 * slowdown
    finally:
        for process in job.processes:
            process.kill()
    text = job.logs[1 - lost].read_text()
    last = text.splitlines()[-1]
    assert (
        last.startswith("error: another process of this run was lost") and "continues from its last checkpoint" in last
    )
    assert not any(word in text for word in ("Traceback", "stack trace", "coordination_service", "    @ "))
    assert Checkpoints(job.run).latest() >= 5


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_when_a_process_is_lost_half_the_devices_go_on_with_the_same_batches(tmp_path, compiled, lost):
    """The run that goes on has the losses of one that was never killed, step by step. No two of its rows are alike."""
    shared = ["--config.log.eval_every=0", "--config.checkpoint.every=4", f"--config.data.cache_dir={tmp_path / 'c'}"]
    shared += [f"--config.data.{part}={tmp_path / 'text.txt'}" for part in ("train", "validation")]
    folders = [tmp_path / name for name in ("whole", "broken")]
    for folder in folders:
        folder.mkdir()
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz "), 20_000)
    (tmp_path / "text.txt").write_text("".join(letters))
    Processes(folders[0], compiled, 1, *shared).wait()
    job = Processes(folders[1], compiled, 2, *shared)
    try:
        while len(metrics_of(job.run)) < 10:
            assert all(process.poll() is None for process in job.processes)
            time.sleep(0.02)
        job.processes[lost].kill()
        assert job.processes[1 - lost].wait(120) == TRY_AGAIN
    finally:
        for process in job.processes:
            process.kill()
    assert 4 <= Checkpoints(job.run).latest() < 40
    Processes(folders[1], compiled, 1, *shared, devices=4).wait()
    whole, broken = (metrics_of(folder / "run") for folder in folders)
    assert [line["step"] for line in broken] == [line["step"] for line in whole] == list(range(1, 41))
    for name in ("tokens", "learning_rate"):
        assert [line[name] for line in broken] == [line[name] for line in whole]
    np.testing.assert_allclose([line["loss"] for line in broken], [line["loss"] for line in whole], rtol=ROUNDING)


def test_a_checkpoint_that_fails_for_a_lost_process_is_reported_as_its_loss():
    lost = jax.errors.JaxRuntimeError("INTERNAL: Barrier failed because: UNAVAILABLE: Task 1 heartbeat timeout")
    for cause, expected in ((lost, True), (OSError("No space left on device"), False)):
        error = SaveError("the checkpoint of step 4 could not be saved")
        error.__cause__ = cause
        assert processes.is_loss(error) is expected
    assert processes.is_loss(lost) and not processes.is_loss(ValueError("a shape"))


def test_a_process_that_waits_too_long_for_the_others_says_so(tmp_path, compiled):
    job = Processes(tmp_path, compiled, 2, "--config.distributed.timeout_seconds=6", only=[0])
    job.wait(code=TRY_AGAIN)
    (line,) = [line for line in job.logs[0].read_text().splitlines() if line]
    assert line.startswith("error: not all 2 processes of the run have connected to distributed.coordinator='127.0.0.1")
    assert line.endswith("within 6 s: start them together, or raise distributed.timeout_seconds")


def test_each_process_fills_its_own_compilation_cache(tmp_path):
    """On hosts that share no disk, a restart would otherwise compile on all hosts but one."""
    caches = [tmp_path / "cache0", tmp_path / "cache1"]
    Processes(tmp_path, caches, 2, "--config.train.steps=2").wait()
    programs = [{path.name.partition("-")[0] for path in (cache / "jax").iterdir()} for cache in caches]
    assert {"jit_train_step", "jit_eval_step"} <= programs[0] & programs[1], programs


@pytest.mark.slow
def test_a_process_that_must_compile_holds_no_other_one_up_until_it_fails(tmp_path, compiled):
    """Process 0 finds every program in its cache, and process 1 none."""
    (tmp_path / "first").mkdir()
    Processes(tmp_path / "first", [compiled, tmp_path / "a"], 2, "--config.train.steps=2").wait()
    (tmp_path / "second").mkdir()
    Processes(tmp_path / "second", [compiled, tmp_path / "b"], 2, "--config.train.steps=2").wait()
