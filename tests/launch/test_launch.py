"""The launch kit as far as a CPU can test it: its scripts parse, and end in commands that the program takes."""

import os
import shlex
import shutil
import socket
import subprocess
import sys

import pytest
import yaml

from helpers.paths import ROOT
from helpers.runs import metrics_of, write_config
from llama_jax.cli.run_flags import parse_run

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
RUN = ["llama31_8b", "--config.data.train=/mnt/bucket/text", "--config.output=/mnt/bucket/my runs/8b"]


def dry(script, *arguments, **environment):
    """The commands that a script would run."""
    clean = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env=clean | {"DRY_RUN": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("+ ") for line in done.stdout.splitlines()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_stop_at_errors(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "set -euo pipefail" in path.read_text()


def test_a_host_installs_mounts_the_bucket_and_trains(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = dry("host.sh", *RUN, BUCKET="gs://mine/folder", ACCELERATOR="cuda", VENV="/v")
    assert [command.split()[0] for command in commands] == [
        "python3",
        "/v/bin/pip",
        "mkdir",
        "gcsfuse",
        "/v/bin/python",
    ]
    assert ".[cuda,data]" in commands[1] and "--only-dir folder mine /mnt/bucket" in commands[3]
    flags = commands[-1].replace("my runs", "my_runs").split()[2:]
    run, resume = parse_run(flags)
    assert run.distributed.coordinator == "auto" and run.output == "/mnt/bucket/my_runs/8b" and resume
    named = dry("host.sh", *RUN, INSTALL="0", COORDINATOR="10.0.0.1:99", PROCESSES="4", PROCESS="3")[-1]
    run, _ = parse_run(named.replace("my runs", "my_runs").split()[2:])
    assert (run.distributed.coordinator, run.distributed.process_id) == ("10.0.0.1:99", 3)


def test_a_host_without_a_mount_installs_what_reads_the_stores_that_flags_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = ["--config.data.train=s3://mine/text,more/text", "--config.output=gs://mine/runs/8b"]
    commands = dry("host.sh", "llama31_8b", *flags, VENV="/v")
    assert [command.split()[0] for command in commands] == ["python3", "/v/bin/pip", "/v/bin/python"]
    assert ".[tpu,data,gcs,s3]" in commands[1]
    run, _ = parse_run(commands[-1].split()[2:])
    assert run.output == "gs://mine/runs/8b" and run.data.train == ("s3://mine/text", "more/text")
    assert ".[tpu,data]" in dry("host.sh", "llama31_8b", "--config.output=/disk/gs/8b", VENV="/v")[1]


def test_slices_are_made_and_started_together():
    names = {"NAME": "llama", "ZONE": "z", "SLICES": "2", "REPOSITORY": "https://x/y"}
    (made,) = dry("tpu_vm.sh", "create", TYPE="v5p-128", **names)
    assert "--accelerator-type v5p-128" in made and "--node-count 2 --node-prefix llama" in made
    started = dry("tpu_vm.sh", "run", *RUN, **names)
    assert [command.split()[5] for command in started] == ["llama-0", "llama-1"]
    assert all("--worker all" in command and "launch/host.sh llama31_8b" in command for command in started)


def test_xpk_gets_the_command_as_one_argument():
    (command,) = dry("xpk.sh", *RUN, CLUSTER="c", TYPE="v5p-128", IMAGE="i", SLICES="2")
    words = shlex.split(command)
    inner = shlex.split(words[words.index("--command") + 1])
    assert inner[-len(RUN) :] == RUN and words[words.index("--num-slices") + 1] == "2"


def test_yaml_files_hold_runs_that_the_program_takes(monkeypatch):
    monkeypatch.chdir(ROOT)
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]
    pod = job["template"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    recipe, *flags = container["args"]
    run, _ = parse_run(["--config", recipe, *flags])
    assert run.mesh.data == job["replicas"]  # one copy of the model a slice
    assert job["template"]["spec"]["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == 4 * 4 * 4
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    run, _ = parse_run(["--config", task["envs"]["RECIPE"], *task["envs"]["FLAGS"].split()])
    subprocess.run(["bash", "-n"], input=task["run"] + task["setup"], text=True, check=True)
    assert run.output.startswith(next(iter(task["file_mounts"])))


@pytest.mark.slow
def test_two_hosts_train_one_run_and_a_third_finds_it_finished(tmp_path):
    config = write_config(tmp_path, "config.train.steps = 6; config.checkpoint.every = 3; config.data.batch_size = 4")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = os.environ | {"INSTALL": "0", "ACCELERATOR": "cpu", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    base["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    (tmp_path / "python3").symlink_to(shutil.which("python3", path=str(sys.prefix) + "/bin") or sys.executable)

    def start(*flags, **environment):
        command = ["bash", str(LAUNCH / "host.sh"), str(config), "--config.mesh.fsdp=-1", *flags]
        return subprocess.Popen(command, env=base | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    two = {"COORDINATOR": f"127.0.0.1:{port}", "PROCESSES": "2"}
    hosts = [start(PROCESS=str(i), **two) for i in range(2)]
    assert [host.wait(240) for host in hosts] == [0, 0], hosts[0].stdout.read()[-2000:]
    assert start(COORDINATOR="").wait(240) == 0
    assert [line["step"] for line in metrics_of(tmp_path / "run") if "loss" in line] == list(range(1, 7))
