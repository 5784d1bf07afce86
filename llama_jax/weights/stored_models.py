"""Models behind addresses such as gs://BUCKET/FOLDER: the choice of files, and their download."""

from __future__ import annotations

import re
from pathlib import Path

from llama_jax import storage
from llama_jax.hub import Repo
from llama_jax.storage import Stored
from llama_jax.weights import hub_models

_STEP = re.compile(r"checkpoints/(\d+)/manifest\.json")


def download(url: str) -> Path:
    """Download a model unless the cache has it, and return its path.

    The address is a folder of any format, a run folder, or one GGUF file. Only one format of a folder is downloaded, as
    from the hub, and only the newest checkpoint of a run folder. The cache distinguishes versions of files, so that
    another model at the same address is downloaded again.

    Raises:
        ConfigError: there are no files, no access, no package for this store, no disk space, or no supported format.
    """
    files = storage.find(url)
    folder = storage.cache_folder(url, files)
    by_name = {file.name: file for file in files}
    if len(files) == 1 and files[0].name == url.rpartition("/")[2]:
        return storage.download(url, files, folder)[files[0].name]
    if chosen := _of_run(by_name):
        storage.download(url, chosen, folder)
        return folder
    storage.download(url, [by_name[name] for name in hub_models.FIRST if name in by_name], folder)
    name = hub_models.Name(Repo("model", url, url, None, "SCHEME://PATH"), None)
    choice = hub_models.choose(name, folder, list(by_name))
    storage.download(url, [by_name[file] for file in choice.files], folder)
    return folder / choice.opened


def _of_run(files: dict[str, Stored]) -> list[Stored]:
    """The files of a run folder that make up a model: those of its newest checkpoint, and the small ones next to it."""
    steps = [int(match[1]) for name in files if (match := _STEP.fullmatch(name))]
    if not steps or "config.json" not in files:
        return []
    newest = f"checkpoints/{max(steps)}/"
    return [file for name, file in files.items() if name.startswith(newest) or "/" not in name]
