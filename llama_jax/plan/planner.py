"""Plans: the memory and communication of a training run on devices that need not be present.

They come from the compiler, or from the closed memory model (`memory`) without one.

    plan = planner.make(run, devices.parse("v5p:4x4x4"))

The compiler runs in a process of its own (`compile`) on the `train.Program` that the run would execute. Its
answers are kept by a hash of the run, the devices, the versions of the libraries and the source of this package.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import compilation_cache, parallel
from llama_jax.cache import kv_heads
from llama_jax.errors import ConfigError
from llama_jax.files import expanded
from llama_jax.ops.attention import Call, Target, choose
from llama_jax.plan import memory, projection, search
from llama_jax.plan.devices import Devices
from llama_jax.run_config import RunConfig

TPU_LIBRARY = "TPU_LIBRARY_PATH"
CUDA_PLUGIN = "CUDA_PLUGIN_PATH"
_INSTALL = {
    "tpu": f"pip install --no-deps --target DIR libtpu==0.0.42.1, then {TPU_LIBRARY}=DIR/libtpu/libtpu.so",
    "cuda": f'pip install --target DIR "jax-cuda13-plugin[with-cuda]==JAX" (4.4 GB), then {CUDA_PLUGIN}=DIR',
}
_SECONDS = 3600  # of one compilation


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory that a training step needs on one device, its communication, and its projected time.

    Attributes:
        run: The run, with the shape of its model.
        devices: The devices.
        sizes: Devices along each mesh axis.
        closed: Peak memory by the closed model.
        peak: Peak bytes of one device: the compiler's, or the closed model's without one.
        fits: True if the peak is within the memory of a device, and the compiler accepts the program.
        compiled: The compiler's facts (`compile.compiled`), or None.
        proof: Reason why the plan is not compiled, with instructions, or "" if this plan is.
        projection: The projected step.
        instead: Flags of proposals that fit, if this plan does not.
    """

    run: RunConfig
    devices: Devices
    sizes: dict[str, int]
    closed: memory.Memory
    peak: int
    fits: bool
    compiled: dict[str, Any] | None
    proof: str
    projection: projection.Projection
    instead: tuple[str, ...]

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each part of the peak. With a compiler, scratch is what its peak has beyond the other parts."""
        parts = {name: getattr(self.closed, name) for name in memory.PARTS}
        if self.compiled is not None:
            parts["scratch"] = max(0, self.peak - (self.closed.peak - self.closed.scratch))
        return parts

    @property
    def attention(self) -> tuple[str, str]:
        """The attention kernel, and the reason for it."""
        return attention_kernel(self.run, self.sizes, self.devices)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict of the plan and of its inputs."""
        m, train, data = self.run.shape, self.run.train, self.run.data
        work = projection.flops(self.run)
        kernel, why = self.attention
        return {
            "model": {"parameters": m.num_params, "layers": m.num_layers, "embed_dim": m.embed_dim},
            "device": self.devices.name,
            "chips": self.devices.chips,
            "mesh": self.sizes,
            "batch_size": data.batch_size,
            "sequence_length": data.sequence_length,
            "accumulate": train.accumulate,
            "remat": train.remat,
            "products": train.products,
            "moments": self.run.optimizer.moments,
            "lora_rank": self.run.lora.rank,
            "fits": self.fits,
            "by": "closed model" if self.compiled is None else "compiler",
            "limit_bytes": self.devices.chip.hbm,
            "peak_bytes": self.peak,
            "closed_peak_bytes": self.closed.peak,
            "parts": self.parts,
            "host_bytes": self.closed.host,
            "collectives": [] if self.compiled is None else self.compiled.get("collectives", []),
            "kernels": {} if self.compiled is None else self.compiled.get("kernels", {}),
            "attention": {"kernel": kernel, "why": why},
            "flops": dataclasses.asdict(work),
            # of the matrix products that one device computes, without those of kernels
            "compiled_flops": None if self.compiled is None else self.compiled.get("operations"),
            "projection": dataclasses.asdict(self.projection) | {"assumed_efficiency": projection.EFFICIENCY},
            "assumed_speeds": self.devices.speeds,
            "instead": list(self.instead),
            "compiler_options": {} if self.compiled is None else self.compiled.get("compiler_options", {}),
            "compile_seconds": None if self.compiled is None else self.compiled["seconds"],
            "libraries": None if self.compiled is None else self.compiled["libraries"],
            "proof": self.proof,
        }


def make(run: RunConfig, devices: Devices, *, compiling: bool = True) -> Plan:
    """The plan of a run with the shape of its model; `compiling=False` uses the closed model even with a compiler.

    Raises:
        ConfigError: the mesh does not fit the devices, or the model and batch do not fit the mesh.
    """
    sizes = parallel.resolve(dataclasses.asdict(run.mesh), devices.count)
    run.check_mesh(sizes)
    if run.train.products == "fp8" and devices.chip.platform != "cuda":
        raise parallel.no_fp8(devices.name)
    dtype = parallel.named_dtype(run.train.compute_dtype)
    kernel, _ = attention_kernel(run, sizes, devices)
    closed = memory.training(run, sizes, dtype=dtype, flash=kernel != "xla", platform=devices.chip.platform)
    environment = environment_of(devices)
    facts, proof = None, ""
    if closed.host and devices.chip.platform == "cuda":
        proof = "none: jax compiles for absent GPUs as if they could not read the host's memory"
    elif environment is None:
        proof = f"no compiler for this device is installed. For a compiled plan: {proof_of(devices)}"
    elif compiling:
        facts = ask({"run": run.to_dict()}, devices, sizes, environment)
    peak = closed.peak if facts is None else facts["peak_bytes"] or closed.peak
    fits = peak <= devices.chip.hbm and (facts is None or facts["fits"])
    return Plan(
        run=run,
        devices=devices,
        sizes=sizes,
        closed=closed,
        peak=peak,
        fits=fits,
        compiled=facts,
        proof=proof,
        projection=_projection(run, devices, sizes, facts, closed.moved),
        instead=() if fits else tuple(one.flags for one in search.search(run, devices, keep=3)),
    )


def attention_kernel(run: RunConfig, sizes: dict[str, int], devices: Devices) -> tuple[str, str]:
    """The attention kernel of a training step on some devices, and why each better one of their platform does not."""
    m, heads = run.shape, memory.parts(sizes, "heads")
    rows, T = math.ceil(run.data.batch_size / run.train.accumulate), run.data.sequence_length
    dtype = parallel.named_dtype(run.train.compute_dtype)
    array: Any = jax.ShapeDtypeStruct
    keys = array((rows, kv_heads(m.num_kv_heads, heads), T, m.head_dim), dtype)
    tokens = array((rows, T), jnp.int32)
    call = Call(array((rows, T, m.num_heads, m.head_dim), dtype), keys, keys, tokens, tokens)
    length = memory.parts(sizes, "length")
    chip = devices.chip
    backend, reasons = choose(call, Target(chip.platform, chip.capability, length=length, heads=heads))
    return backend.name, "; ".join(f"not {name}, because {reason}" for name, reason in reasons.items())


def _projection(
    run: RunConfig, devices: Devices, sizes: dict[str, int], facts: dict[str, Any] | None, host: int
) -> projection.Projection:
    """The projection from the compiled collectives, or from formulas without them; `host` as in `search.projected`."""
    dtype = parallel.named_dtype(run.train.compute_dtype)
    if facts is None or "collectives" not in facts:
        return search.projected(run, devices, sizes, dtype, host)
    shape, moved = memory.share(run, sizes, dtype), facts["collectives"]
    exposed, overlapped = (
        {ports: sum(one[key] for one in moved if one["ports"] == ports) for ports in {one["ports"] for one in moved}}
        for key in ("exposed", "overlapped")
    )
    return projection.project(
        run,
        devices,
        exposed=exposed,
        overlapped=overlapped,
        host=host,
        stages=shape.stages,
        microbatches=shape.microbatches,
    )


def proof_of(devices: Devices) -> str:
    """The instruction for a compiled plan where no compiler is installed."""
    return _INSTALL[devices.chip.platform].replace("JAX", importlib.metadata.version("jax"))


def environment_of(devices: Devices) -> dict[str, str] | None:
    """The environment of a process that compiles for some devices; None where the compiler is not installed."""
    # XLA_FLAGS of this process are for its own devices, and would make plans depend on them.
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    base = {**kept, "JAX_PLATFORMS": "cpu", "JAX_TRACEBACK_FILTERING": "off", "PYTHONPATH": os.pathsep.join(_roots())}
    if devices.chip.platform == "tpu":
        library = _tpu_library()
        more = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", TPU_LIBRARY: str(library)}
        return None if library is None else base | more
    folder = os.environ.get(CUDA_PLUGIN, "")
    if folder and (expanded(folder) / "jax_plugins").is_dir():
        return base | {"PYTHONPATH": os.pathsep.join([*_roots(), str(expanded(folder))])}
    return base if any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (13, 12)) else None


def _roots() -> list[str]:
    """The folders that this process imports from, which the compiling process needs too."""
    return [str(Path(__file__).resolve().parents[2]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def _tpu_library() -> Path | None:
    """The libtpu.so of $TPU_LIBRARY_PATH or of this environment."""
    named = os.environ.get(TPU_LIBRARY, "")
    if named:
        path = expanded(named)
        if not path.is_file():
            raise ConfigError(f"{TPU_LIBRARY}={named!r} is not a file: name a libtpu.so, or unset it")
        return path
    spec = importlib.util.find_spec("libtpu")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "libtpu.so"


def ask(what: dict[str, Any], devices: Devices, sizes: dict[str, int], environment: dict[str, str]) -> dict[str, Any]:
    """The compiler's facts, from the cache of results or by compiling.

    `what` has the "run" of a training step, or the "serving" of inference. ConfigError if the compiler refuses it.
    """
    request = {**what, "devices": dataclasses.astuple(devices), "mesh": sizes}
    path = _result_path(request, environment)
    if path is not None and path.is_file():
        return json.loads(path.read_text())
    command = [sys.executable, "-m", "llama_jax.plan.compile"]
    done = subprocess.run(
        command, input=json.dumps(request), env=environment, capture_output=True, text=True, timeout=_SECONDS
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ConfigError(f"the program does not compile for {devices.name}: {reason[0]}")
    line = done.stdout.splitlines()[-1]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line)
    return json.loads(line)


def _result_path(request: dict[str, Any], environment: dict[str, str]) -> Path | None:
    """The file of a result, named by a hash of everything that it depends on; None if the compilation cache is off."""
    folder = compilation_cache.folder()
    if folder is None:
        return None
    run = request.get("serving")
    if run is None:
        run = {key: request["run"][key] for key in ("model", "optimizer", "train", "lora", "dpo")}
        run["rows"] = [request["run"]["data"][key] for key in ("batch_size", "sequence_length")]
    library = Path(environment[TPU_LIBRARY]).stat() if request["devices"][0].startswith(("v", "tpu")) else None
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")]
    key = [run, request["devices"], request["mesh"], versions, library and library.st_size, _source_hash()]
    return folder.parent / "plans" / f"{hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:32]}.json"


@functools.cache
def _source_hash() -> str:
    """A hash of the source files that the programs are compiled from."""
    root = Path(__file__).resolve().parents[1]
    packages = ("parallel", "ops", "train", "infer", "plan", "weights")
    files = [*sorted(root.glob("*.py")), *(path for name in packages for path in sorted((root / name).rglob("*.py")))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
