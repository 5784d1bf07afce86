"""The result of check.py, which runs once for each machine: the CUDA kernels that can be used there.

The result is in the cache folder, under a name with a hash of the sources, the versions of jaxlib and the driver, and
the GPU. The check runs in a process of its own, because a wrong kernel can end the process that launches it.
$LLAMA_JAX_GPU_KERNELS=off turns the kernels off.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jax

from llama_jax import compilation_cache
from llama_jax.files import write_json
from llama_jax.ops.gpu import build

ENV = "LLAMA_JAX_GPU_KERNELS"
_SECONDS = 300
_ENDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # by a user: the next start tries again


def gains(device_kind: str) -> Mapping[str, float]:
    """The speed of each kind of CUDA kernel on this machine, as a multiple of that of the kernels that it replaces.

    Raises:
        Unavailable: there is no compiler or no GPU, or the check failed.
    """
    if os.environ.get(ENV, "").lower() in ("off", "0", "false"):
        return {}
    present = [d for d in _local_gpus() if d.device_kind == device_kind]
    if not present:
        return {}  # a program is compiled for a GPU of another machine
    if build.compiler() is None:
        raise build.Unavailable("NVRTC is not installed (pip install nvidia-cuda-nvrtc)")
    folder = compilation_cache.folder()
    if folder is None:
        raise build.Unavailable(f"{compilation_cache.ENV} is off, and kernels are checked into that folder")
    record = folder.parent / "native" / f"gpu-{_key(present[0])}.json"
    try:
        return read(record)
    except (OSError, ValueError):
        pass
    print("checking the GPU kernels, once for this machine (about 20 seconds)", file=sys.stderr, flush=True)
    _check_apart(record)
    try:
        return read(record)
    except (OSError, ValueError) as error:
        raise build.Unavailable(f"the check left no result: {error}") from None


def _local_gpus() -> list[jax.Device]:
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:
        return []


def read(record: Path) -> Mapping[str, float]:
    """The gains in a record. Raises Unavailable if it says that the check failed, ValueError if it is damaged."""
    found = json.loads(record.read_text())
    if "failed" in found:
        raise build.Unavailable(f"{found['failed']} (remove {record} to try again)")
    try:
        return {str(kind): float(gain) for kind, gain in found["gains"].items()}
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{record} is damaged") from None


def _key(device: jax.Device) -> str:
    import jaxlib

    digest = hashlib.sha256()
    for path in sorted([*build.HERE.glob("*.cu*"), *build.HERE.glob("*.py")]):
        digest.update(path.read_bytes())
    digest.update(f"\0{jaxlib.__version__}\0{device.client.platform_version}\0{device.device_kind}".encode())
    return digest.hexdigest()[:16]


def _check_apart(record: Path) -> None:
    """Runs the check in a process that writes the record. It needs little of the GPU's memory.

    Raises:
        Unavailable: it could not run, or failed for a reason that the next start may not have.
    """
    try:
        record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise build.Unavailable(f"{error}; {compilation_cache.ENV} may name another folder") from None
    environment = {
        **os.environ,
        ENV: "off",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONPATH": os.pathsep.join([str(build.HERE.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-m", "llama_jax.ops.gpu.check", str(record)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise build.Unavailable(f"their check did not end: {error}") from None
    if done.returncode < 0 and -done.returncode not in _ENDED:
        write_json(record, {"failed": f"the check of the GPU kernels died of signal {-done.returncode}"})
    elif done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        raise build.Unavailable(f"their check did not end: {lines[-1].strip()[:300]}")
