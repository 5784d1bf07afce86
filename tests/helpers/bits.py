"""A helper of the tests, and a program: flips single bits of a run's files, and then runs everything that reads them.

`python -m helpers.bits FOLDER --every K` makes a LoRA run and a run of all weights in FOLDER, flips every K-th bit of
every file below them and of the token cache, and prints each flip that changed a result without an error or a warning.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import random
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import llama_jax
from helpers import sound
from helpers.runs import dialog_run, metrics_of
from llama_jax.cli import convert
from llama_jax.run_config import RunConfig
from llama_jax.run_keys import LoraConfig
from llama_jax.train.run import train

IDS = [[1, 2, 3, 40, 50]]
DIALOG = [{"role": "user", "content": "Hi"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"


@dataclasses.dataclass(frozen=True)
class Drill:
    """A finished run, and the functions that read it.

    Attributes:
        folder: Contains `run`, the token cache `cache` and the data.
        run: The run, with more steps to do.
        readers: Functions of the folder by name. Each returns a value that a changed model would change.
    """

    folder: Path
    run: RunConfig
    readers: dict[str, Callable[[Path], object]]


def make(folder: Path, base: Path, *, lora: bool) -> Drill:
    """Train two steps on dialogs in `folder`, from the model in `base`."""
    rank = {"lora": LoraConfig(rank=2)} if lora else {}
    run = dialog_run(folder, "run", init_from=str(base), train__steps=2, log__tensorboard=False)
    values = run.to_dict() | {"model": {}}
    run = dataclasses.replace(RunConfig.from_dict(values), **rank)
    with contextlib.redirect_stdout(io.StringIO()):
        train(run)
    longer = with_steps(run, 3)
    readers: dict[str, Callable[[Path], object]] = {"sample": _sample, "convert": _convert}
    if lora:
        readers["convert the adapter"] = lambda path: _convert(path, base, "--adapter", str(path / "run" / "adapter"))
        readers["adapter"] = lambda path: _logits(llama_jax.load(base, adapters=path / "run" / "adapter"))
    readers["train on"] = lambda path: _train_on(longer, path)
    return Drill(folder, longer, readers)


def with_steps(run: RunConfig, steps: int) -> RunConfig:
    """The run with other steps."""
    return dataclasses.replace(run, train=dataclasses.replace(run.train, steps=steps))


def _sample(path: Path) -> object:
    return _logits(llama_jax.load(path / "run"))


def _logits(llama: llama_jax.Llama) -> object:
    dialog = None if llama.tokenizer is None else llama.encode_dialog(DIALOG)
    return np.asarray(llama.logits(IDS)[0]).tobytes(), dialog, llama.sampling, llama.stop_tokens


def _convert(path: Path, *source: object) -> object:
    out = path / "converted"
    shutil.rmtree(out, ignore_errors=True)
    convert.main([*map(str, source or (path / "run",)), str(out), "--to", "hf"])
    return {file.name: file.read_bytes() for file in sorted(out.iterdir())}


def _train_on(run: RunConfig, path: Path) -> object:
    """Trains a third step in a copy of the run; returns everything in the result that a changed model would change."""
    copy = path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path / "run", copy)
    result = train(dataclasses.replace(run, output=str(copy)))
    adapter = copy / "adapter" / "adapter_model.safetensors"
    weights = adapter.read_bytes() if adapter.exists() else _sample_bytes(copy)
    return result.step, [line for line in metrics_of(copy) if line["step"] == 3], weights


def _sample_bytes(copy: Path) -> object:
    return _logits(llama_jax.load(copy))


def outcome(reader: Callable[[Path], object], folder: Path) -> tuple[object, str]:
    """The value of a reader, and its messages: lines, warnings and the error."""
    out, log = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("llama_jax").addHandler(handler)
    value: object = None
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(log),
            warnings.catch_warnings(record=True) as recorded,
        ):
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", ResourceWarning)
            try:
                value = reader(folder)
            except (ValueError, OSError) as error:
                assert "\n" not in str(error), error
                log.write(f"error: {error}\n")
    finally:
        logging.getLogger("llama_jax").removeHandler(handler)
    said = log.getvalue() + "".join(f"{each.message}\n" for each in recorded)
    return value, said + "".join(line for line in out.getvalue().splitlines(True) if "warning" in line)


def files_of(folder: Path) -> list[Path]:
    """The files of the run and of the token cache."""
    return sorted(path for part in ("run", "cache") for path in (folder / part).rglob("*") if path.is_file())


@contextlib.contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """A context in which one bit of the file is flipped. Afterwards the file is restored."""
    data = bytearray(path.read_bytes())
    sound_bytes = bytes(data)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    try:
        yield
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sound_bytes)


def silent_changes(drill: Drill, flips: list[tuple[Path, int]]) -> list[str]:
    """Descriptions of the flips under which a reader returned another value without an error or a warning."""
    whole = {}
    for name, reader in drill.readers.items():
        outcome(reader, drill.folder)  # the first one may announce that it compiles the kernels of a CPU
        whole[name], said = outcome(reader, drill.folder)
        assert whole[name] is not None and not said, (name, said)
    found = []
    for path, bit in flips:
        for name, reader in drill.readers.items():
            with flipped(path, bit):
                try:
                    value, said = outcome(reader, drill.folder)
                except Exception as error:  # a traceback
                    found.append(f"{path} bit {bit}: {name}: {type(error).__name__}: {error}")
                    continue
            if value != whole[name] and not said:
                found.append(f"{path} bit {bit}: {name}: another value, and not a word")
    return found


def sampled(drill: Drill, count: int, seed: int) -> list[tuple[Path, int]]:
    """`count` flips, spread over the files."""
    rng = random.Random(seed)
    files = [path for path in files_of(drill.folder) if path.stat().st_size]
    rng.shuffle(files)
    chosen = [files[i % len(files)] for i in range(count)]
    return [(path, rng.randrange(8 * path.stat().st_size)) for path in chosen]


def main() -> None:
    """The long form of the drill."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("folder", type=Path)
    flags.add_argument("--every", type=int, default=997, help="flip every K-th bit of every file, and at least 3")
    flags.add_argument("--minutes", type=float, default=20)
    options = flags.parse_args()
    base = sound.make_sound(options.folder / "base", "hf")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    end = time.monotonic() + 60 * options.minutes
    for lora in (True, False):
        folder = options.folder / ("lora" if lora else "full")
        folder.mkdir()
        drill = make(folder, base, lora=lora)
        flips = []
        for path in files_of(folder):
            bits = 8 * path.stat().st_size
            flips += [(path, bit) for bit in range(0, bits, max(1, min(options.every, bits // 3)))]
        random.Random(0).shuffle(flips)
        done, found = 0, []
        for start in range(0, len(flips), 20):
            if time.monotonic() > end - (60 * options.minutes / 2 if lora else 0):
                break
            some = silent_changes(drill, flips[start : start + 20])
            done, found = done + len(flips[start : start + 20]), found + some
            print(*some, sep="\n", end="\n" if some else "", flush=True)
        print(f"{folder.name}: {done} of {len(flips)} flips, {len(found)} silent", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
