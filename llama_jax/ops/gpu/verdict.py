"""The result of check.py, which runs once for each machine: the CUDA kernels that can be used there.

The result is in the cache folder, under a name with a hash of the sources, the versions of jaxlib, NVRTC and the
driver, and the GPU. The check runs in a process of its own, because a wrong kernel ends the process that launches it.
$LLAMA_JAX_GPU_KERNELS=off turns the kernels off.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from llama_jax.files import write_json
from llama_jax.ops import native
from llama_jax.ops.gpu import build
from llama_jax.ops.native import Unavailable

ENV = "LLAMA_JAX_GPU_KERNELS"
_SECONDS = 240


class Verdict(NamedTuple):
    """The result of a check.

    Attributes:
        gains: speed of each kind of kernel, as a multiple of that of the kernels that it replaces.
        failed: the reason for each kind that failed.
    """

    gains: Mapping[str, float]
    failed: Mapping[str, str]


def gains(device_kind: str) -> Verdict:
    """The result of the check for a GPU of this kind; the first call on a machine runs the check.

    Raises:
        Unavailable: there is no compiler or no folder to write to, or the check did not end.
    """
    none = Verdict({}, {})
    if os.environ.get(ENV, "").lower() in ("off", "0", "false"):
        return none
    number = next((i for i, gpu in enumerate(_local_gpus()) if gpu.device_kind == device_kind), None)
    if number is None:
        return none  # a program is compiled for a GPU of another machine
    if build.compiler() is None:
        raise Unavailable("NVRTC is not installed (pip install nvidia-cuda-nvrtc)")
    folder = native.folder()
    native.prepare(folder)
    record = folder / f"gpu-{_key(_local_gpus()[number])}.json"
    if (found := _read(record)) is not None:
        return found
    with _alone(record):
        if (found := _read(record)) is None:  # not checked by another process in the meantime
            print("checking the GPU kernels, once for this machine (about a minute)", file=sys.stderr, flush=True)
            _check_apart(number, record)
            found = _read(record)
    if found is None:
        raise Unavailable("their check left no result")
    return found


def _local_gpus() -> list[jax.Device]:
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:
        return []


@contextlib.contextmanager
def _alone(record: Path) -> Iterator[None]:
    """Keeps other processes from checking the same GPU at the same time, which would disturb the times."""
    with open(record.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(record: Path) -> Verdict | None:
    """The verdict in a record; None if there is none, or it is damaged."""
    try:
        found = json.loads(record.read_text())
        advice = f" (remove {record} to try again)"
        return Verdict(
            {str(kind): float(gain) for kind, gain in found["gains"].items()},
            {str(kind): str(reason) + advice for kind, reason in found["failed"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _key(device: jax.Device) -> str:
    import jaxlib

    replaced = [build.HERE.parent / "few_rows_gpu.py", build.HERE.parent / "attention" / "split.py"]
    files = sorted([*build.HERE.glob("*.cu*"), *build.HERE.glob("*.py"), *replaced])
    try:
        driver = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        driver = ""
    platform_version = device.client.platform_version
    return native.digest(files, (jaxlib.__version__, platform_version, device.device_kind, build.version(), driver))


def _check_apart(number: int, record: Path) -> None:
    """Runs the check in a process that writes the record. It needs about 1.5 GB of the GPU's memory.

    Raises:
        Unavailable: it failed for a reason that the next start may not have.
    """
    environment = {ENV: "off", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = native.run_apart("llama_jax.ops.gpu.check", [number, record], _SECONDS, environment)
    except OSError as error:
        raise Unavailable(f"their check did not run: {error}") from None
    except subprocess.TimeoutExpired:
        _fail(record, f"their check did not end in {_SECONDS} seconds")
        return
    if done.returncode < 0 and done.returncode not in native.ENDED:
        _fail(record, f"their check died of signal {-done.returncode}")
    elif done.returncode:
        raise Unavailable(f"their check did not end: {native.last_line(done)}")


def _fail(record: Path, reason: str) -> None:
    write_json(record, {"gains": {}, "failed": {"all kinds": reason}})
