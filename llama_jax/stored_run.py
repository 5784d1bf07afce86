"""Run folders in a store: the steps that they have, and the download of a step or of a part of it.

The manifest of a step is its commit: a step without one does not exist. Files of a step that its manifest does not list
are remains of an interrupted copy, and are never downloaded.

Floor 0: this module does not import jax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from llama_jax import manifest, storage
from llama_jax.errors import ConfigError
from llama_jax.manifest import DamagedError, Manifest
from llama_jax.storage import Store, Stored

CHECKPOINTS = "checkpoints"


def steps(names: Iterable[str]) -> set[int]:
    """The committed steps of a run folder, from the names of its files."""
    parts = (name.split("/") for name in names)
    return {int(p[1]) for p in parts if p[0] == CHECKPOINTS and p[2:] == [manifest.FILE] and p[1].isdecimal()}


def is_of_model(name: str) -> bool:
    """True for a file of a run folder that a model needs besides a checkpoint: config, tokenizer and chat templates.

    The metrics, which a running training changes all the time, are not.
    """
    return name.startswith("additional_chat_templates/") or ("/" not in name and not name.startswith("metrics."))


def read_manifest(url: str, step: int) -> Manifest:
    """The manifest of a step. Raises ConfigError if it is damaged, or cannot be read."""
    try:
        found = manifest.parse(Store(url).read(f"{CHECKPOINTS}/{step}/{manifest.FILE}"))
    except DamagedError as error:
        raise _damaged(url, step, str(error)) from None
    if found.step != step:
        raise _damaged(url, step, f"{manifest.FILE} belongs to step {found.step}")
    return found


def fetch_step(
    url: str,
    step: int,
    files: Mapping[str, Stored],
    folder: Path,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    hash_again: bool = True,
) -> None:
    """Download files of a step, validate them, and write a manifest of the files of the step that are then there.

    Files that are there already and intact are kept, and others are deleted.

    Args:
        url: The run folder in the store.
        step: The step.
        files: The files of the run folder in the store, by name.
        folder: The run folder on this machine.
        wanted: True for the name of a file, below the folder of the step, that is needed.
        hash_again: False hashes no file that an earlier call has left; whoever reads it validates it then.

    Raises:
        ConfigError: a file is missing or damaged in the store, it cannot be read, or there is no room.
    """
    whole = read_manifest(url, step)
    below, target = f"{CHECKPOINTS}/{step}/", folder / CHECKPOINTS / str(step)
    needed = [name for name in whole.files if wanted(name)]
    if not hash_again and _has(target, step, needed):
        return
    try:
        present = manifest.prune_files(target, whole)
    except DamagedError as error:
        raise ConfigError(f"{target}: {error}") from None
    missing = [name for name in needed if name not in present]
    for name in missing:
        if below + name not in files:
            raise _damaged(url, step, f"{name} is missing")
    storage.download(url, [files[below + name] for name in missing], folder)
    manifest.save(target, manifest.part(whole, [*present, *missing]))
    try:
        manifest.check(target, step=step)
    except DamagedError as error:
        (target / manifest.FILE).unlink()
        raise _damaged(url, step, str(error)) from None


def _has(folder: Path, step: int, names: Iterable[str]) -> bool:
    """True if a folder has these files of a step, with the right sizes."""
    try:
        return manifest.read_exact(folder, step=step).files.keys() >= set(names)
    except DamagedError:
        return False


def _damaged(url: str, step: int, why: str) -> ConfigError:
    place = f"{url.rstrip('/')}/{CHECKPOINTS}/{step}"
    return ConfigError(f"{place} is damaged: {why}. Delete {place}/{manifest.FILE} to continue from an older step")
