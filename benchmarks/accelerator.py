"""Measure an accelerator: its peaks, each attention backend, training, decoding and prefill of Llama 3.1 8B's shape.

    python benchmarks/accelerator.py                  # one GPU or TPU, at most 7 minutes; writes accelerator.json
    python benchmarks/accelerator.py --small          # all of it in small, on any machine, in about a minute

It needs jax, flax, optax, numpy and this project, and compares with torch and transformers where they are installed.
Weights are random. Each section runs in a process of its own, and every result is written to the file as it comes, so
that a section that fails or runs out of time costs itself alone. Shares are of the peaks that the script measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from accelerator_sections import SECTIONS, SMALL, Item, Size

MARK = "RESULT "


def measure(name: str, size: Size) -> None:
    """Run one section in this process and print each result as a line."""
    import jax

    if name == "peaks":
        device = jax.local_devices()[0]
        machine = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}
        print(MARK + json.dumps({"name": "machine"} | machine), flush=True)
    for item in SECTIONS[name](size):
        print(MARK + json.dumps(item), flush=True)
    if name == "decoding" and jax.default_backend() == "gpu":
        from llama_jax.ops.gpu import verdict

        print(MARK + json.dumps({"name": "CUDA kernels as they were checked"} | verdict.results()), flush=True)


def shares(results: dict[str, list[Item]]) -> None:
    """Adds to each result its share of the measured peak and bandwidth."""
    found = {item["name"]: item for item in results.get("peaks", [])}
    peak = found["matmul"]["flops"] / found["matmul"]["seconds"] if "matmul" in found else None
    rates = [found[name]["bytes"] / found[name]["seconds"] for name in ("copy", "read") if name in found]
    for item in (item for items in results.values() for item in items if "seconds" in item):
        if peak and "flops" in item:
            item["tflops"] = item["flops"] / item["seconds"] / 1e12
            item["of_peak"] = item["flops"] / item["seconds"] / peak
            if "seconds_with_backward" in item:  # a backward pass has five products where the forward pass has two
                item["of_peak_with_backward"] = 3.5 * item["flops"] / item["seconds_with_backward"] / peak
        if rates and "bytes" in item:
            item["of_bandwidth"] = item["bytes"] / item["seconds"] / max(rates)


def main() -> int:
    """Run the sections one after the other, each with the time that is left, and write the results as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small sizes, for any machine")
    parser.add_argument("--layers", type=int, default=0, help="layers of all models (default: 32, and what fits)")
    parser.add_argument("--seconds", type=float, default=420, help="time for all sections (default: 420)")
    parser.add_argument("--out", type=Path, default=Path("accelerator.json"), help="the file of the results")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="run this section; may be repeated")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        size = SMALL if options.small else Size()
        if options.layers:
            size = dataclasses.replace(size, layers=(options.layers,), decoder_layers=options.layers)
        measure(options.section, size)
        return 0
    results: dict[str, list[Item]] = {}
    deadline = time.monotonic() + options.seconds
    for name in options.only or SECTIONS:
        results[name] = []
        left = deadline - time.monotonic()
        command = [sys.executable, __file__, "--section", name, *(["--small"] if options.small else [])]
        command += ["--layers", str(options.layers)] if options.layers else []
        # Sections follow one another on one device: none may take all its memory in advance.
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", **os.environ}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as child:
            follow(child, results, name, max(left, 1.0), options.out)
    failed = [item for items in results.values() for item in items if "failed" in item]
    return 1 if failed else 0


def follow(child: subprocess.Popen[str], results: dict[str, list[Item]], name: str, left: float, out: Path) -> None:
    """Write the results of a section as its process prints them; after `left` seconds, end the process."""
    import threading

    timer = threading.Timer(left, child.kill)
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(child.stderr or ()), daemon=True)
    timer.start()
    reader.start()
    for line in child.stdout or ():
        if line.startswith(MARK):
            results[name].append(json.loads(line[len(MARK) :]))
            save(results, out)
            print(f"{name}: {json.dumps(results[name][-1])}", flush=True)
    status = child.wait()
    timer.cancel()
    reader.join(timeout=5)
    if status:
        late = "out of time" if status < 0 else "".join(errors[-3:]).strip()[-500:]
        results[name].append({"name": name, "failed": late or f"exit status {status}"})
        save(results, out)
        print(f"{name} failed: {late}", file=sys.stderr, flush=True)


def save(results: dict[str, list[Item]], out: Path) -> None:
    """Write all results, through a file that replaces the old one."""
    shares(results)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    part.replace(out)


if __name__ == "__main__":
    sys.exit(main())
