"""Models behind addresses such as gs://BUCKET/FOLDER: the choice of files, and their download."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from llama_jax import manifest, remote_files, storage, stored_run
from llama_jax.errors import ConfigError
from llama_jax.hub import Repo
from llama_jax.storage import Stored
from llama_jax.weights import hub_models

_log = logging.getLogger(__name__)


def download(url: str) -> Path:
    """Download a model unless the cache has it, and return its path.

    The address is a folder of any format, a run folder, or one GGUF file. Only one format of a folder is downloaded, as
    from the hub, and only the newest checkpoint of a run folder. The cache distinguishes versions of files, so that
    another model at the same address is downloaded again. Inside of `remote_files.reading_in_parts`, files of weights
    are not downloaded but read in place. A checkpoint of a run folder is always downloaded.

    Raises:
        ConfigError: there are no files, no access, no package for this store, no disk space, or no supported format.
    """
    files = storage.find(url)
    by_name = {file.name: file for file in files}
    while "config.json" in by_name and (step := max(stored_run.steps(by_name), default=None)):
        try:
            return _download_run(url, step, by_name)
        except ConfigError:
            by_name = storage.Store(url).files()
            if step in stored_run.steps(by_name):
                raise
            # The run has deleted the step meanwhile, and has a newer one.
    folder = storage.cache_folder(url, files, in_place=remote_files.in_parts())
    if len(files) == 1 and files[0].name == url.rpartition("/")[2]:
        _bring(url, files, folder)
        return folder / files[0].name
    storage.download(url, [by_name[name] for name in hub_models.FIRST if name in by_name], folder)
    name = hub_models.Name(Repo("model", url, url, None, "SCHEME://PATH"), None)
    choice = hub_models.choose(name, folder, list(by_name))
    _bring(url, [by_name[file] for file in choice.files], folder)
    return folder / choice.opened


def _download_run(url: str, step: int, files: Mapping[str, Stored]) -> Path:
    """Download the parts of a run folder that a model needs, with the weights of one step."""
    folder = storage.cache_folder(url, list(files.values()))
    storage.download(url, [file for name, file in files.items() if stored_run.is_of_model(name)], folder)
    if remote_files.in_parts() and not (folder / stored_run.CHECKPOINTS / str(step) / manifest.FILE).is_file():
        _log.warning("warning: %s is a run folder, which is not read in place: step %d is downloaded", url, step)
    weights = lambda name: not name.startswith("rest/")  # noqa: E731
    stored_run.fetch_step(url, step, files, folder, wanted=weights, hash_again=False)
    return folder


def _bring(url: str, files: list[Stored], folder: Path) -> None:
    """Download files, but for weights that are read in place."""
    in_place = [file for file in files if remote_files.in_parts() and file.name.endswith(hub_models.WEIGHTS)]
    storage.download(url, [file for file in files if file not in in_place], folder)
    remote_files.stand_in(url, in_place, folder)
