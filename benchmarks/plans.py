"""Write the committed plans: docs/plans/NAME.json by the compilers, and the picture. The page is made from the JSON.

    PYTHONPATH=. TPU_LIBRARY_PATH=.../libtpu.so CUDA_PLUGIN_PATH=... python benchmarks/plans.py [NAME ...] [--closed]
    python docs/generate.py

Without names it makes all of them. --closed compiles nothing: it only writes the figures of the closed model, and draws
the picture, again. One plan takes one to four minutes of a core.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llama_jax.cli.plan import with_shape
from llama_jax.cli.run_flags import parse_run_flags
from llama_jax.config import size
from llama_jax.plan import inference, planner, report
from llama_jax.plan.devices import parse

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "plans"

# Name: device, slices, and the flags beyond the recipe for all weights of 8B in rows of 8,192 tokens.
PLANS: dict[str, tuple[str, int, str]] = {
    "160m-v5e-4": ("v5e:4", 1, "model=160m data.sequence_length=2048 data.batch_size=4"),  # cheap enough for every CI
    "160m-v5e-1": ("v5e:1", 1, "model=160m data.sequence_length=2048 data.batch_size=16"),
    "160m-h100-1": ("h100:1", 1, "model=160m data.sequence_length=2048 data.batch_size=16"),
    "1b-v6e-1": ("v6e:1", 1, "model=llama3.2-1b data.batch_size=1"),
    "1b-h100-1": ("h100:1", 1, "model=llama3.2-1b data.batch_size=2"),
    "8b-v5e-16": ("v5e:16", 1, "data.batch_size=16"),
    "8b-v5e-8-int8": ("v5e:8", 1, "data.batch_size=8 optimizer.moments=int8"),
    "8b-v5e-8-offload": ("v5e:8", 1, "data.batch_size=8 optimizer.offload=True"),
    "8b-lora-v5e-1-offload": ("v5e:1", 1, "data.batch_size=1 lora.rank=16 lora.offload=True"),
    "8b-v5p-16": ("v5p:16", 1, "data.batch_size=16"),
    "8b-v5p-256": ("v5p:256", 1, "data.batch_size=256"),
    "8b-v6e-8": ("v6e:8", 1, "data.batch_size=8"),
    "8b-tpu7x-8": ("tpu7x:8", 1, "data.batch_size=16"),
    "8b-128k-v5p-32": ("v5p:4x4x2", 1, "data.batch_size=4 data.sequence_length=131072 mesh.context=8"),
    "8b-h100-8": ("h100:8", 1, "data.batch_size=8"),
    "8b-128k-h200-8": ("h200:8", 1, "data.batch_size=1 data.sequence_length=131072 mesh.context=8"),
    "70b-v5p-64": ("v5p:64", 1, "model=llama3.1-70b data.batch_size=64"),
    "70b-h200-8-int8": ("h200:8", 1, "model=llama3.1-70b data.batch_size=8 optimizer.moments=int8"),
    "70b-h200-64": ("h200:64", 1, "model=llama3.1-70b data.batch_size=64"),
    "405b-v5p-512": ("v5p:512", 1, "model=llama3.1-405b data.batch_size=64 mesh.tensor=8"),
    "405b-v6e-256": ("v6e:256", 1, "model=llama3.1-405b data.batch_size=16 mesh.tensor=16"),
    "405b-v5p-4096": ("v5p:4096", 1, "model=llama3.1-405b data.batch_size=512 mesh.data=8 mesh.tensor=8"),
    "405b-v5p-8960": (
        "v5p:16x20x28",
        1,
        "model=llama3.1-405b data.batch_size=1120 mesh.data=35 mesh.fsdp=32 mesh.tensor=8",
    ),
    "405b-2-v5p-512": ("v5p:512", 2, "model=llama3.1-405b data.batch_size=128 mesh.data=2 mesh.tensor=8"),
    "405b-h100-512": ("h100:512", 1, "model=llama3.1-405b data.batch_size=64 mesh.tensor=8"),
    "405b-h100-16384": ("h100:16384", 1, "model=llama3.1-405b data.batch_size=2048 mesh.data=32 mesh.tensor=8"),
}


# Name: device, model, and the fields of plan.inference.Serving that differ from its defaults.
DECODING: dict[str, tuple[str, str, dict[str, Any]]] = {
    "decode-8b-int8-v6e-1": ("v6e:1", "llama3.1-8b", {"quantize": "int8"}),
    "decode-8b-int4-v5e-1": ("v5e:1", "llama3.1-8b", {"quantize": "int4", "kv": "int8"}),
    "decode-70b-int8-v5e-16": ("v5e:16", "llama3.1-70b", {"quantize": "int8"}),
    "decode-405b-int4-v6e-16": ("v6e:16", "llama3.1-405b", {"quantize": "int4"}),
    "decode-405b-int8-128k-v5p-8": (
        "v5p:8",
        "llama3.1-405b",
        {"rows": 4, "capacity": 131072, "quantize": "int8", "kv": "int8"},
    ),
    "decode-405b-int8-v6e-64": ("v6e:64", "llama3.1-405b", {"rows": 16, "quantize": "int8"}),
}


def plan(name: str, *, compiling: bool = True) -> dict[str, Any]:
    """The plan of a name as a JSON-able dict; by the closed model if not `compiling`."""
    if name in DECODING:
        device, model, fields = DECODING[name]
        return inference.make(inference.Serving(size(model), **fields), parse(device), compiling=compiling)
    device, slices, changes = PLANS[name]
    flags = [f"--config.{change}" for change in changes.split()]
    run, _ = parse_run_flags(["--config", str(ROOT / "configs" / "llama31_8b.py"), *flags], command="inspect data")
    return planner.make(with_shape(run), parse(device, slices=slices), compiling=compiling).to_dict()


def main() -> None:
    """Make the plans that the arguments name. Then all existing ones get the present closed model, and are drawn."""
    every = [] if "--closed" in sys.argv else [*PLANS, *DECODING]
    for name in [arg for arg in sys.argv[1:] if arg != "--closed"] or every:
        record = plan(name)
        table = inference.table(record) if name in DECODING else report.table(record)
        print(f"{name}: {table}\n", flush=True)
        if record["by"] == "compiler":
            (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    paths = {name: FOLDER / f"{name}.json" for name in (*PLANS, *DECODING)}
    made = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    for name, record in made.items():
        record["closed_peak_bytes"] = plan(name, compiling=False)["closed_peak_bytes"]
        paths[name].write_text(json.dumps(record, indent=1) + "\n")
    training = [(name, record) for name, record in made.items() if name in PLANS]
    if training:
        report.draw(training, FOLDER / "memory.svg")


if __name__ == "__main__":
    main()
