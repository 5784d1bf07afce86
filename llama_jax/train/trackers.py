"""Trackers of log.to: TensorBoard and wandb. Each gets the keys of a run, its metrics and its samples."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from llama_jax.errors import ConfigError
from llama_jax.run_config import RunConfig, flat

_METRICS = ("loss", "validation_loss")  # columns of TensorBoard's table of runs
_WANDB_ID = "wandb_id"  # file in the run folder


class Tracker(Protocol):
    """A program that shows the course of a run."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step."""

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Log samples, a text for each prompt."""

    def close(self) -> None:
        """Flush, and end the connection."""


def check(run: RunConfig) -> None:
    """Check that the trackers of a run are installed; ConfigError otherwise."""
    if "wandb" in run.log.to and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"log.to={list(run.log.to)} needs the package wandb, which is not installed: pip install wandb, or leave "
            "wandb out of log.to"
        )


def start(run: RunConfig, folder: Path, *, from_step: int) -> list[Tracker]:
    """The trackers of a run, in the first process. `from_step` is the step that the run resumes from."""
    kinds: dict[str, Callable[[RunConfig, Path, int], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}
    return [kinds[name](run, folder, from_step) for name in run.log.to]


class _TensorBoard:
    """Event files in OUTPUT/tensorboard."""

    def __init__(self, run: RunConfig, folder: Path, from_step: int) -> None:
        from tensorboardX import SummaryWriter
        from tensorboardX.summary import hparams

        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1 if from_step else 0)
        if from_step == 0:
            keys = flat(run.to_dict())
            plain = {k: v if isinstance(v, (bool, int, float, str)) else json.dumps(v) for k, v in keys.items()}
            for summary in hparams(plain, dict.fromkeys(_METRICS, 0.0)):
                self._events.file_writer.add_summary(summary)
            self._events.add_text("config", _fenced(json.dumps(run.to_dict(), indent=2)), 0)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        for prompt, text in texts.items():
            self._events.add_text(f"sample/{prompt}", _fenced(text), step)

    def close(self) -> None:
        self._events.close()


class _Wandb:
    """A run of Weights & Biases. A resumed run continues the same one, whose id is in the run folder."""

    def __init__(self, run: RunConfig, folder: Path, from_step: int) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        kept = folder / _WANDB_ID
        known = kept.read_text().strip() if from_step and kept.is_file() else None
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "llama_jax"),
            name=folder.name,
            id=known,
            resume="allow",
            dir=str(folder),
            config=run.to_dict(),
        )
        kept.write_text(f"{self._run.id}\n")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        table = self._wandb.Table(columns=["prompt", "text"], data=[list(item) for item in texts.items()])
        self._run.log({"samples": table}, step=step)

    def close(self) -> None:
        self._run.finish()


def _fenced(text: str) -> str:
    """A text as a code block of Markdown, which TensorBoard renders."""
    return "\n".join(f"    {line}" for line in text.splitlines())
