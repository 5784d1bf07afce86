"""A helper of the tests: small training runs, their batches, their config files and the metrics that they wrote."""

import functools
import random
from pathlib import Path

import numpy as np

from helpers.files import write
from llama_jax.cli.run_flags import parse_run
from llama_jax.run_config import RunConfig, default_dict
from llama_jax.train.metrics import read_metrics

B, T, V = 8, 32, 512


def run_dict(**changes):
    """A run that is accepted, with dotted keys (`__` for a dot) changed."""
    values = default_dict("tiny") | {"output": "runs/x"}
    values["data"] = values["data"] | {"train": ("a.txt",), "sequence_length": 32}
    for name, value in changes.items():
        *sections, last = name.split("__")
        inner = values
        for section in sections:
            inner = inner[section]
        inner[last] = value
    return values


def make_run(**changes) -> RunConfig:
    """A run of the tiny model with the batches of `batches`: float32, no rematerialization, 20 steps."""
    base = {
        "model__num_layers": 2,
        "data__sequence_length": T,
        "data__batch_size": B,
        "optimizer__learning_rate": 1e-3,
        "optimizer__warmup_steps": 2,
        "train__steps": 20,
        "train__compute_dtype": "float32",
        "train__remat": "none",
        "train__vocab_chunk": 0,
    }
    return RunConfig.from_dict(run_dict(**(base | changes)))


@functools.cache
def batches(count: int) -> list[dict[str, np.ndarray]]:
    """Batches of packed rows of a text that can be learned, two documents a row; some rows are almost empty."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        text = np.cumsum(rng.integers(0, 3, (B, T + 1)), axis=1) % 50
        cut = rng.integers(4, T - 4, B)
        second = np.arange(T) >= cut[:, None]
        positions = np.where(second, np.arange(T) - cut[:, None], np.arange(T))
        lengths = np.array([T, 6, T, 0, T, 3, T, 5])  # every second row goes into the same of two parts
        real = np.arange(T) < lengths[:, None]
        made.append(
            {
                "tokens": np.where(real, text[:, :-1], 0).astype(np.int32),
                "targets": np.where(real, text[:, 1:], 0).astype(np.int32),
                "positions": np.where(real, positions, 0).astype(np.int32),
                "segments": np.where(real, 1 + second, 0).astype(np.int32),
                "weights": (real & (np.arange(T) + 1 != cut[:, None])).astype(np.float32),
            }
        )
    return made


def text_run(tmp_path, **changes) -> RunConfig:
    """A run of eight steps on a text file, with its output and its cache in tmp_path."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    base = {
        "output": str(tmp_path / "run"),
        "data__train": (str(text),),
        "data__cache_dir": str(tmp_path / "cache"),
        "log__to": (),
        "model__num_layers": 1,
        "train__steps": 8,
    }
    return make_run(**(base | changes))


def dialog_run(tmp_path, name: str, records: list | None = None, **changes) -> RunConfig:
    """A run on dialogs.jsonl in tmp_path, which is written from `records` or sixty random ones; its output is the
    folder `name` there.
    """
    path = tmp_path / "dialogs.jsonl"
    if records is not None or not path.exists():
        rng = random.Random(0)
        default = [
            {"instruction": "Say " + "x" * rng.randint(1, 40), "output": "y" * rng.randint(1, 9)} for _ in range(60)
        ]
        write(path, records or default)
    base = {"output": str(tmp_path / name), "data__train": (str(path),), "data__sequence_length": 128}
    return text_run(tmp_path, **(base | changes))


# The config file that write_config writes.
CONFIG = """\
import ml_collections
from llama_jax.run_config import default_dict

def get_config():
    config = ml_collections.ConfigDict(default_dict("tiny"))
    config.output = {output!r}
    config.data.train = ({text!r},)
    config.data.cache_dir = {cache!r}
    config.data.sequence_length = 32
    config.data.batch_size = 8
    config.optimizer.warmup_steps = 2
    config.train.steps = 4
    config.log.to = ()
    {extra}
    return config
"""


def write_config(folder: Path, extra: str = "pass", name: str = "config.py") -> Path:
    """A config file of a small run on a text in `folder`; `extra` is a line of Python that changes the config."""
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    values = {"output": str(folder / "run"), "text": str(text), "cache": str(folder / "cache"), "extra": extra}
    path = folder / name
    path.write_text(CONFIG.format(**values))
    return path


def parse(*arguments) -> tuple[RunConfig, bool]:
    """The run of these arguments of train.py, and whether it may resume."""
    return parse_run(list(map(str, arguments)))


def metrics_of(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl without tokens_per_second, which no two runs share."""
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_metrics(run / "metrics.jsonl")]
