"""Opens a model by any name: locates its files, reads them by their format, and validates the tensors.

The formats are tried in the order of READERS. A new format is a module in formats/ with `recognizes` and `read`, a
column in the table of names, and an entry here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from llama_jax.errors import ConfigError, brief, nearest
from llama_jax.weights import packaged_models
from llama_jax.weights.formats import gguf, huggingface, meta, peft
from llama_jax.weights.locate import locate
from llama_jax.weights.model_files import ModelFiles
from llama_jax.weights.source import FileSource, Source
from llama_jax.weights.validate import match_tensors

ALLOWED = (
    "a run folder (config.json and checkpoints/) or one of its checkpoints, a Hugging Face folder (config.json and "
    "*.safetensors, pytorch_model.bin or flax_model.msgpack), Meta's download (params.json and consolidated.*.pth), "
    f"a .gguf file, a hub id (owner/name), or a model in a Python package ({', '.join(packaged_models.PACKAGES)})"
)
# Two functions of each format: `recognizes` returns True for a path of the format, and `read` reads it.
READERS: tuple[tuple[Callable[[Path], bool], Callable[[Path], ModelFiles]], ...] = (
    (huggingface.recognizes, huggingface.read),
    (meta.recognizes, meta.read),
    (gguf.recognizes, gguf.read),
)
_log = logging.getLogger(__name__)


def open_source(name: str | os.PathLike[str]) -> Source:
    """Opens a model. Only headers are read, but a model on the hub is downloaded first.

    Args:
        name: a path, a hub id, or the name of a model in a Python package; ALLOWED lists what can be opened.

    Raises:
        ConfigError: the name is not that of a model. The message lists the allowed names and the contents of the path.
        ValueError: a file is damaged.
    """
    path = locate(name)
    if not path.exists():
        siblings = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else []
        near = nearest(str(name), list(packaged_models.PACKAGES)) or nearest(path.name, siblings)
        if path.is_symlink():
            raise ConfigError(f"model {str(name)!r} is a link to {os.readlink(path)!r}, which does not exist")
        raise ConfigError(f"model {str(name)!r} does not exist{near or ';'} give {ALLOWED}")
    if peft.is_adapter(path):
        raise ConfigError(
            f"{path} is an adapter of {peft.base_of(path)}, not a model: give that as the model, this as its "
            f"adapter (infer.py --model MODEL --adapter {path})"
        )
    run, step = _run_and_step(path)
    if (run / "config.json").is_file() and (run / "checkpoints").is_dir():
        from llama_jax.weights.run_folder import RunSource  # orbax takes half a second to import

        return RunSource(run, step=step, open_base=open_source)
    for recognizes, read in READERS:
        if recognizes(path):
            return _checked(read(path))
    raise ConfigError(f"model {str(name)!r} cannot be opened: it is {_contents(path)}. Give {ALLOWED}")


def _run_and_step(path: Path) -> tuple[Path, int | None]:
    """The run folder and step that a path names: RUN/checkpoints/STEP is one checkpoint, anything else has no step."""
    is_step = path.parent.name == "checkpoints" and path.name.isdecimal() and not (path / "config.json").is_file()
    return (path.parents[1], int(path.name)) if is_step else (path, None)


def _checked(files: ModelFiles) -> FileSource:
    """The source of a model's files. Raises an error if the tensors do not match the config."""
    config, leaves = match_tensors(files.tensors, files.config, format=files.names, source=str(files.path))
    metadata = files.metadata.within(config.vocab_size)
    if metadata != files.metadata:
        _log.warning(
            "warning: %s: of its stop tokens %s only %s are in its vocabulary",
            files.path,
            brief(list(files.metadata.stop_tokens)),
            brief(list(metadata.stop_tokens)),
        )
    return FileSource(files.path, files.description, config, metadata, leaves, files.read_tokenizer)


def _contents(path: Path) -> str:
    """A description of a path that is not a model, with a suggestion if it contains one."""
    if path.is_file():
        return "a file, and of files only .gguf is a whole model: name its folder instead"
    if (path / "checkpoints").is_dir():
        return "a run folder without a checkpoint: the run has not saved one yet"
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs:
        return f"a folder with {len(ggufs)} GGUF files: name one, such as {ggufs[0]}"
    if (path / "original" / "params.json").is_file():
        return f"a folder with Meta's download in {path / 'original'}"
    others = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".h5", ".pth", ".pt", ".msgpack"))
    if others:
        return (
            f"a folder with {', '.join(others[:3])}, without the config that goes with it or in a format that is not "
            "read"
        )
    folders = sorted(p.name for p in path.glob("*/") if any((p / n).is_file() for n in ("config.json", "params.json")))
    return f"a folder with models below it: {', '.join(folders[:5])}" if folders else "none of these"
