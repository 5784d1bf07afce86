"""Reports of a run: a status line, metrics.jsonl with its trackers, and a picture of the loss."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llama_jax.files import naming, write_whole
from llama_jax.progress import duration, show
from llama_jax.train.trackers import Tracker

# Dense bfloat16 peak of one device, FLOP/s, from the makers' data sheets. MFU is not shown for other devices.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """The dense bfloat16 peak of a device, FLOP/s, or None if it is not known."""
    return _PEAK_FLOPS.get(device.device_kind)


def say(text: str) -> None:
    """Print a line, in the first process only."""
    if jax.process_index() == 0:
        show(text + "\n")


class MetricLog:
    """metrics.jsonl of a run folder, and the run's trackers. A resumed run drops the lines of steps that it does again.

    Args:
        folder: The run folder.
        from_step: The step of the checkpoint that the run resumes from; 0 starts with no lines.
        trackers: Trackers that get the same numbers.
    """

    def __init__(self, folder: Path, *, from_step: int, trackers: Sequence[Tracker] = ()):
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if from_step and line["step"] <= from_step]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = self.path.open("a")
        self._trackers = trackers

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write the metrics of a step as one line. A non-finite number becomes null, so that the line is valid JSON."""
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
        with naming(self.path):
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
        numbers = {name: value for name, value in finite.items() if isinstance(value, (int, float))}
        for tracker in self._trackers:
            tracker.numbers(step, numbers)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Give the trackers the samples of a step, a text for each prompt."""
        for tracker in self._trackers:
            tracker.texts(step, texts)

    def close(self) -> None:
        """Flush and close the files, and end the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without an incomplete last line of a killed process."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


class Progress:
    """The status line of a run: a live line with a bar at a terminal, and otherwise a plain line every few steps."""

    def __init__(self, *, start: int, steps: int, every: int, tokens_per_step: int, flops_per_step: float):
        self._start, self._steps, self._every = start, steps, every
        self._tokens, self._flops = tokens_per_step, flops_per_step
        self._times: list[tuple[int, float]] = []
        self._live = sys.stdout.isatty()
        peak = peak_flops(jax.devices()[0])
        self._peak = peak * jax.device_count() if peak else None

    def speed(self, step: int) -> dict[str, float]:
        """The tokens/s, and the MFU if the device's peak is known, over the last twenty calls."""
        now = time.monotonic()
        self._times = [*self._times[-20:], (step, now)]
        first_step, first_time = self._times[0]
        if step == first_step:
            return {}
        seconds = (now - first_time) / (step - first_step)
        speed = {"tokens_per_second": self._tokens / seconds}
        if self._peak:
            speed["mfu"] = self._flops / seconds / self._peak
        return speed

    def show(self, step: int, *, values: dict[str, float], speed: dict[str, float]) -> None:
        """Update the display with the metrics of a step."""
        rate = speed.get("tokens_per_second")
        parts = [f"step {step:>{len(str(self._steps))}}/{self._steps}", f"loss {values['loss']:.4f}"]
        if "accuracy" in values:
            parts.append(f"accuracy {values['accuracy']:.0%}")
        parts.append(f"lr {values['learning_rate']:.2e}")
        if rate:
            parts += [f"{rate:,.0f} tokens/s", f"eta {duration((self._steps - step) * self._tokens / rate)}"]
        if "mfu" in speed:
            parts.append(f"mfu {speed['mfu']:.1%}")
        text = "  ".join(parts)
        if self._live:
            done = round(24 * step / self._steps)
            show(f"\r\x1b[K[{'=' * done}{' ' * (24 - done)}] {text}")
        if step % self._every == 0 or step in (self._start + 1, self._steps):
            self.say(text)

    def say(self, text: str) -> None:
        """Print a line above the status line, where it remains."""
        show(("\r\x1b[K" if self._live else "") + text + "\n")

    def pause(self) -> None:
        """Restart the clock of `speed` after a pause of training: a compilation, an evaluation or a sample."""
        self._times = []


_LOSSES = {"sft": "cross-entropy (nats per token)", "dpo": "preference loss (per pair)"}


def draw_loss(folder: Path, objective: str) -> Path:
    """Draw loss.png: the training loss of every step, its running mean, and the validation losses."""
    from matplotlib.figure import Figure  # not pyplot, whose backend belongs to the caller

    lines = read_metrics(folder / "metrics.jsonl")
    train = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    validation = [(line["step"], line["validation_loss"]) for line in lines if line.get("validation_loss") is not None]
    figure = Figure(figsize=(8, 4.5), dpi=120)
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        width = max(1, len(losses) // 50)
        means = [sum(losses[max(0, i - width) : i + 1]) / (i + 1 - max(0, i - width)) for i in range(len(losses))]
        axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training")
        axes.plot(steps, means, color="#08519c", linewidth=1.6, label=f"training, mean of {width + 1}")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="#d94801", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel=_LOSSES[objective], title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "loss.png")
    return folder / "loss.png"
