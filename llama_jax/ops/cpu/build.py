"""The build of the CPU kernels: compiled on the machine that runs them, at their first use, and checked against XLA.

The library's name in the cache folder has a hash of the sources, the version of jaxlib, the compiler and the features
of the processor. A library is compiled and checked in a process of its own under a temporary name, and renamed when it
has passed, so that two processes may build at once and a crash harms nothing. A failure is recorded under the same
name, and is not tried again.

Products of many rows are timed once, in turns with XLA's, and the ratio is kept in a file next to the library.

    python -m llama_jax.ops.cpu.build FILE    # compiles, checks, times and writes FILE
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from llama_jax.files import expanded, write_json
from llama_jax.ops import native
from llama_jax.ops.native import Unavailable

HERE = Path(__file__).parent
SOURCES = tuple(sorted([*HERE.glob("*.cc"), *HERE.glob("*.h"), HERE / "check.py"]))
ENV = "LLAMA_JAX_CPU_KERNELS"
TARGETS = (
    "llama_layers",
    "llama_linear",
    "llama_product",
    "llama_attention",
    "llama_attention_many",
    "llama_attention_gradient",
    "llama_rotate",
    "llama_rows",
    "llama_loss",
    "llama_loss_gradient",
    "llama_kept_gradient",
)
_COMPILERS = ("g++", "clang++", "c++")
_SECONDS = 300


def library() -> Path:
    """The path of a checked library for this machine, which is built if there is none yet.

    It is in the folder that $LLAMA_JAX_CPU_KERNELS names, by default in the cache folder.

    Raises:
        Unavailable: no compiler, no folder to write to, or a build or check that failed.
    """
    compiler = _compiler()
    target = _target(compiler)
    failed = target.with_suffix(".failed")
    if _is_ours(target):
        return target
    if failed.exists():
        raise Unavailable(f"{failed.read_text(errors='replace').strip()} (remove {failed} to try again)")
    if compiler is None:
        raise Unavailable(f"no C++ compiler is installed ({', '.join(_COMPILERS)})")
    native.prepare(target.parent)
    print("compiling the CPU kernels, once for this machine (about 25 seconds)", file=sys.stderr, flush=True)
    if reason := _build_apart(target):
        failed.write_text(reason + "\n")
        raise Unavailable(reason)
    return target


def _target(compiler: str | None) -> Path:
    """The path of the library for this machine."""
    chosen = os.environ.get(ENV)
    if (chosen or "").lower() in ("on", "1", "true"):
        chosen = None
    folder = expanded(chosen) if chosen else native.folder()
    return folder / f"cpu-{_key(compiler)}.so"


def gain_of_many_rows(library: Path) -> float:
    """The speed of products of many rows, as a multiple of XLA's, when a library was built; 0 if it is not known."""
    try:
        return float(json.loads(library.with_suffix(".json").read_text())["gain_of_many_rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _compiler() -> str | None:
    chosen = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, (chosen,) if chosen else _COMPILERS)), None)


def _key(compiler: str | None) -> str:
    import jaxlib

    return native.digest(SOURCES, (jaxlib.__version__, compiler, _flags(), platform.machine(), _features()))


def _flags() -> list[str]:
    """More flags of the compiler, for tests and measurements of other processors' code."""
    return os.environ.get("LLAMA_JAX_CXXFLAGS", "").split()


def _features() -> str:
    """Text that names the processor and its features, as Linux reports them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _is_ours(path: Path) -> bool:
    """True if the library exists and only this user (or root) could have written it."""
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid in (0, os.getuid()) and not status.st_mode & 0o022


def _build_apart(target: Path) -> str:
    """Builds and checks the library in another process, which may crash. Returns the reason of a failure, or "".

    Raises:
        Unavailable: the process could not run, or a signal ended it, such as Ctrl-C: the next start tries again.
    """
    try:
        done = native.run_apart("llama_jax.ops.cpu.build", [target], _SECONDS, {"JAX_PLATFORMS": "cpu"})
    except OSError as error:
        raise Unavailable(f"their build did not run: {error}") from None
    except subprocess.TimeoutExpired as error:
        return f"their build failed: {error}"
    if done.returncode in native.ENDED:
        raise Unavailable(f"their build was ended by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        return f"their build failed: {native.last_line(done)}"
    return ""


def compile_to(path: Path) -> None:
    """Compiles the kernels for this machine's processor. Raises RuntimeError with the compiler's first error."""
    import jax

    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler")
    target = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    command = [compiler, "-std=c++17", "-O3", target, "-fPIC", "-shared", "-w", "-I", jax.ffi.include_dir()]
    command += [*_flags(), "-o", str(path), str(HERE / "kernels.cc")]
    if platform.system() == "Darwin":
        command += ["-undefined", "dynamic_lookup"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise RuntimeError(f"{Path(compiler).name}: {errors[0].strip()}")


def register(path: Path) -> None:
    """Loads a library and registers its kernels with XLA, for the CPU."""
    import jax

    loaded = ctypes.CDLL(str(path))
    if allowed := allowed_processors():
        loaded.llama_set_threads(allowed)
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")


def allowed_processors(groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The processors whose time a container gives this process, rounded up; None if it has no limit.

    XLA has a thread for each processor of the machine. Threads that wait would use up the time of the others. Only the
    control group that the container shows as the root counts.

    Args:
        groups: folder of Linux's control groups, of version 1 or 2.
    """
    try:
        if (groups / "cpu.max").exists():
            quota, period = (groups / "cpu.max").read_text().split()
        else:
            quota, period = ((groups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return max(1, math.ceil(int(quota) / int(period))) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no control groups, or "max"
        return None


def main(target: Path) -> None:
    """Compiles, checks, times and writes a library."""
    from llama_jax.ops.cpu import check

    descriptor, name = tempfile.mkstemp(prefix=".building-", suffix=".so", dir=target.parent)
    os.close(descriptor)
    building = Path(name)
    try:
        compile_to(building)
        register(building)
        check.against_xla()
        write_json(target.with_suffix(".json"), {"gain_of_many_rows": round(check.gain_of_many_rows(), 2)})
        building.chmod(0o700)
        os.replace(building, target)
    finally:
        building.unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
