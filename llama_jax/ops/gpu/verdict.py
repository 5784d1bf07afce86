"""The results of check.py for each kind of CUDA kernel, which is checked once for each machine, when it is needed.

The results are in a file in the cache folder, under a name with a hash of the sources, the versions of jaxlib, NVRTC
and the driver, and the GPU. The check runs in a process of its own, because a wrong kernel ends the process that
launches it. $LLAMA_JAX_GPU_KERNELS=off turns the kernels off.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from llama_jax.files import write_json
from llama_jax.ops import native
from llama_jax.ops.gpu import build
from llama_jax.ops.native import Unavailable

ENV = "LLAMA_JAX_GPU_KERNELS"
_SECONDS = 240


def gain(device_kind: str, kind: str) -> float:
    """The speed of a kind of kernel on a GPU of this kind, as a multiple of that of the kernels that it replaces.

    The first call on a machine runs the check. The result is 0 where the kernels are off, or the GPU is not here.

    Raises:
        Unavailable: the kernel failed, there is no compiler or no folder to write to, or the check did not end.
    """
    number = next((i for i, gpu in enumerate(_local_gpus()) if gpu.device_kind == device_kind), None)
    if os.environ.get(ENV, "").lower() in ("off", "0", "false") or number is None:
        return 0.0  # off, or a program is compiled for a GPU of another machine
    if build.compiler() is None:
        raise Unavailable("NVRTC is not installed (pip install nvidia-cuda-nvrtc)")
    folder = native.folder()
    native.prepare(folder)
    record = folder / f"gpu-{_key(_local_gpus()[number])}.json"
    try:
        found = _read(record).get(kind) or _checked(number, kind, record)
    except OSError as error:
        raise Unavailable(f"the result of the kernels' check cannot be written: {error}") from None
    if "failed" in found:
        raise Unavailable(f"{found['failed']} (remove {record} to try again)")
    return float(found["gain"])


def _checked(number: int, kind: str, record: Path) -> dict[str, Any]:
    """The result of a kind, which is written to the record."""
    with _alone(record):
        found = _read(record).get(kind)  # if another process has checked it in the meantime
        if found is None:
            print(f"checking a GPU kernel, once for this machine: {kind}", file=sys.stderr, flush=True)
            found = _checked_apart(number, kind, record)
            write_json(record, {**_read(record), kind: found})
        return found


def results() -> dict[str, Any]:
    """All results for the first GPU of this machine so far."""
    folder = native.folder()
    return _read(folder / f"gpu-{_key(_local_gpus()[0])}.json") if _local_gpus() else {}


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


def _read(record: Path) -> dict[str, Any]:
    """The results of a record by kind; none if there is no record, or it is damaged."""
    try:
        found = json.loads(record.read_text())
        return {kind: result for kind, result in found.items() if "failed" in result or float(result["gain"]) >= 0}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


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


def _checked_apart(number: int, kind: str, record: Path) -> dict[str, Any]:
    """The result of the check of a kind in a process of its own. It needs some GB of the GPU's memory.

    Raises:
        Unavailable: it failed for a reason that the next start may not have.
    """
    environment = {ENV: "off", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    result = record.with_suffix(".result")
    result.unlink(missing_ok=True)
    try:
        done = native.run_apart("llama_jax.ops.gpu.check", [number, kind, result], _SECONDS, environment)
    except OSError as error:
        raise Unavailable(f"the kernels' check did not run: {error}") from None
    except subprocess.TimeoutExpired:
        return {"failed": f"the check of a kernel did not end in {_SECONDS} seconds"}
    if done.returncode < 0 and done.returncode not in native.ENDED:
        return {"failed": f"the check of a kernel died of signal {-done.returncode}"}
    if done.returncode:
        raise Unavailable(f"the kernels' check did not end: {native.last_line(done)}")
    try:
        return json.loads(result.read_text())
    except (OSError, ValueError):
        raise Unavailable("the kernels' check left no result") from None
    finally:
        result.unlink(missing_ok=True)
