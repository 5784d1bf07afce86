"""`plan`: estimates the memory and the time of a training run on devices that need not be present.

jax is imported only after the arguments are checked.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.cli import parser
from llama_jax.cli.run_flags import parse_run_flags
from llama_jax.config import SIZES, ModelConfig
from llama_jax.errors import ConfigError
from llama_jax.files import expanded
from llama_jax.plan.devices import Devices, parse
from llama_jax.run_config import RunConfig

_EXAMPLES = """\
examples:
  PROGRAM --config configs/llama31_8b.py --device v5p:2x2x4 --config.data.batch_size=16
  PROGRAM --config configs/llama31_8b.py --config.model=llama3.1-405b --device v6e:16x16 --search
  PROGRAM --config configs/llama31_8b_lora.py --device h100:8 --json
"""
DEVICE = "KIND:SHAPE or KIND:COUNT, e.g. v5p:4x4x4, v5e:16, v6e:4x8, tpu7x:2x2x1, h100:8, h200:64"


def add_flags(flags: argparse.ArgumentParser) -> None:
    """The flags of `plan` besides those of a run."""
    add = flags.add_argument
    add("--device", required=True, metavar="DEVICE", help=f"the devices: {DEVICE}")
    add("--slices", type=parser.whole(1), default=1, metavar="N", help="TPU slices of that shape")
    add("--search", action="store_true", help="propose meshes, batches, remat and accumulation, without a compiler")
    add(
        "--batch",
        type=parser.whole(1),
        metavar="N",
        help="rows of a batch that --search keeps to",
    )
    add("--closed", action="store_true", help="use the closed memory model even where a compiler is installed")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--picture", type=parser.path, metavar="FILE", help="draw the memory of a device as a bar, .svg or .png")


def main(argv: Sequence[str]) -> int:
    """Print the plan, and return 0, or 1 if nothing fits. Errors are raised."""
    run, options = parse_run_flags(argv, command="plan", add=add_flags, examples=_EXAMPLES)
    return show(run, parse(options.device, slices=options.slices), options)


def of_training(run: RunConfig, device: str) -> int:
    """`train --plan DEVICE`: the plan of the run that would start."""
    options = argparse.Namespace(search=False, batch=None, closed=False, json=False, picture=None)
    return show(run, parse(device), options)


def show(run: RunConfig, devices: Devices, options: argparse.Namespace) -> int:
    """Make and print a plan or the proposals of a search; 1 if it does not fit."""
    if options.picture and Path(options.picture).suffix not in (".svg", ".png"):
        raise ConfigError(f"--picture={options.picture} must end in .svg or .png")
    run = with_shape(run)

    from llama_jax.plan import planner, report, search

    if options.search:
        found = search.search(run, devices, batch=options.batch)
        records = [_record(one) for one in found]
        print(json.dumps(records, indent=2) if options.json else report.proposals(found, devices))
        return 0 if found else 1
    plan = planner.make(run, devices, compiling=not options.closed)
    record = plan.to_dict()
    print(json.dumps(record, indent=2) if options.json else report.table(record))
    if options.picture:
        report.draw([(devices.name, record)], Path(options.picture))
    return 0 if plan.fits else 1


def _record(one: Any) -> dict[str, Any]:
    """A proposal as a JSON-able dict."""
    from llama_jax.plan.memory import PARTS

    return {
        "mesh": one.sizes,
        "batch_size": one.run.data.batch_size,
        "accumulate": one.run.train.accumulate,
        "remat": one.run.train.remat,
        "peak_bytes": one.memory.peak,
        "parts": {name: getattr(one.memory, name) for name in PARTS},
        "host_bytes": one.memory.host,
        "projection": dataclasses.asdict(one.projection),
        "flags": one.flags,
    }


def with_shape(run: RunConfig) -> RunConfig:
    """The run with the shape of its model. A published name such as Llama-3.1-8B-Instruct needs no file."""
    return run if isinstance(run.model, ModelConfig) else run.with_shape(shape_of(run.init_from))


def shape_of(model: str) -> ModelConfig:
    """The shape of a model by its source. A published name such as Llama-3.1-8B-Instruct needs no file."""
    match = re.search(r"llama-?(\d\.\d)-(\d+b)\b", model.rpartition("/")[2].lower())
    name = f"llama{match[1]}-{match[2]}" if match else ""
    if name in SIZES:
        return SIZES[name]
    from llama_jax.weights.open import open_source

    return open_source(model).config


def _stays_packed(model: str) -> str | None:
    """The quantization in which most tensors of a local model stay in memory: "int8" or "int4", or None."""
    if not expanded(model).exists():
        return None
    from llama_jax.weights.open import open_source
    from llama_jax.weights.source import FileSource

    source = open_source(model)
    kinds = collections.Counter(leaf.kind for leaf in source.leaves.values()) if isinstance(source, FileSource) else {}
    most = max(kinds, key=lambda kind: kinds[kind], default="")
    return {"Q8_0": "int8", "Q8": "int8", "Q4_0": "int4", "Q4": "int4"}.get(most)


def of_inference(model: str, device: str, mesh: dict[str, int] | None, *, as_json: bool, **serving: Any) -> int:
    """`infer --plan DEVICE`: prints the plan of prefill and decoding; 1 if they do not fit.

    Args:
        model: source of the model, as `infer --model`.
        device: the devices.
        mesh: devices along the axes of the mesh, or None.
        as_json: True prints JSON.
        **serving: fields of `plan.inference.Serving`; None is their default.
    """
    devices, shape = parse(device), shape_of(model)

    from llama_jax.plan import inference

    serving["quantize"] = serving.get("quantize") or _stays_packed(model)
    serving = {"capacity": min(8192, shape.max_seq_len)} | {k: v for k, v in serving.items() if v is not None}
    found = inference.make(inference.Serving(shape, **serving), devices, mesh)
    print(json.dumps(found, indent=2) if as_json else inference.table(found))
    return 0 if found["fits"] else 1
