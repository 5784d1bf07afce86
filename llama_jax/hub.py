"""Repositories of the Hugging Face hub: the files that are needed are downloaded into the hub's cache.

huggingface_hub does the work, and its settings apply: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and so on. This
module turns its failures into one-line errors. weights/hub_models.py and data/hub_datasets.py know which files a model
and a dataset need.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import glob
from collections.abc import Sequence
from pathlib import Path

from llama_jax.errors import ConfigError
from llama_jax.storage import check_room

# The hub's rule for names (huggingface_hub's validate_repo_id), but with an owner. Use it with re.ASCII.
_WORD = r"\w(?:[\w.-]{0,94}\w)?"
ID = f"{_WORD}/{_WORD}"


@dataclasses.dataclass(frozen=True)
class Repo:
    """A repository at a revision.

    Attributes:
        kind: "model" or "dataset".
        text: the id as the user wrote it, for errors.
        name: owner/name.
        revision: a branch, tag or commit; None is main.
        forms: the forms of such ids, for errors.
    """

    kind: str
    text: str
    name: str
    revision: str | None
    forms: str


def fetch(repo: Repo, files: Sequence[str], *, commit: str | None = None) -> Path:
    """Downloads the files that are not cached yet, and returns the folder of the commit in the cache.

    Args:
        repo: the repository.
        files: paths of the files to download; those that the repository lacks are ignored.
        commit: a commit that an earlier call resolved (the name of its folder). It saves a request, and the revision
            cannot change in between.

    Raises:
        ConfigError: the download failed. The message has the reason and the remedy.
    """
    from huggingface_hub import constants, errors, snapshot_download  # a quarter of a second

    page = f"{constants.ENDPOINT}/{'datasets/' if repo.kind == 'dataset' else ''}{repo.name}"
    login = "`hf auth login`, or set HF_TOKEN"
    again = "run it again (complete files are kept)"
    absent = "no such path here, and " if repo.kind == "model" else ""  # whose ids look like paths
    try:
        patterns = [glob.escape(file) for file in files]
        revision = commit or repo.revision
        if commit is not None:
            _check_room(repo, files, commit)
        return Path(snapshot_download(repo.name, repo_type=repo.kind, revision=revision, allow_patterns=patterns))
    except ConfigError:
        raise
    except KeyboardInterrupt:
        why = f"the download was interrupted; {again}"
    except errors.GatedRepoError:
        why = f"it is gated: open {page}, accept the licence, then {login} (of the account that accepted)"
    except errors.RepositoryNotFoundError:
        why = f"{absent}no {repo.kind} {page}: check the spelling; if it is private, {login}"
    except errors.RevisionNotFoundError:
        why = f"no branch, tag or commit {repo.revision!r}: see {page}/commits (ids are {repo.forms})"
    except errors.IncompleteSnapshotError as error:
        return Path(error.snapshot_path)  # offline; the caller checks for the files that it needs
    except errors.LocalEntryNotFoundError as error:
        why = absent + _not_cached("all of it", error.__cause__)
    except Exception as error:  # the transport and Xet raise errors of their own
        text = _flat(error)
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
            why = f"{constants.ENDPOINT} refuses the token: {login} to a valid one"
        elif getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
            why = f"no space left in {constants.HF_HUB_CACHE}: make some, or set HF_HOME to a larger disk; {again}"
        elif isinstance(error, PermissionError):
            why = f"{text}: set HF_HOME to a folder that can be written"
        else:
            why = f"the download failed ({type(error).__name__}: {text}); {again}"
    raise ConfigError(f"{repo.text}: {why}")


def _check_room(repo: Repo, files: Sequence[str], commit: str) -> None:
    """Compare the size of the files that are not cached yet with the free space, if the sizes are known.

    Raises:
        ConfigError: there is less free space than the download needs.
    """
    from huggingface_hub import constants, get_cached_repo_tree, try_to_load_from_cache
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    cache = Path(constants.HF_HUB_CACHE)
    try:
        sizes = {file.path: file.size for file in get_cached_repo_tree(repo.name, repo_type=repo.kind, revision=commit)}
    except CachedRepoTreeNotFoundError:
        return
    cached = functools.partial(try_to_load_from_cache, repo.name, repo_type=repo.kind, revision=commit)
    missing = [file for file in files if file in sizes and not isinstance(cached(file), str)]
    if missing and cache.is_dir():
        check_room(repo.text, sum(sizes[file] or 0 for file in missing), cache, count=len(missing))


def listing(repo: Repo, folder: Path) -> list[str]:
    """All files of the repository at the commit of this snapshot, or those of the snapshot if no list is cached."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return sorted(file.path for file in get_cached_repo_tree(repo.name, repo_type=repo.kind, revision=folder.name))
    except CachedRepoTreeNotFoundError:  # offline, and an older huggingface_hub downloaded it
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def sizes_of(repo: Repo, folder: Path) -> dict[str, int]:
    """The bytes of each file of the repository at the commit of this snapshot.

    Raises:
        ConfigError: the hub was not asked for them, which happens offline.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(repo.name, repo_type=repo.kind, revision=folder.name)
    except CachedRepoTreeNotFoundError:
        raise ConfigError(
            f"{repo.text}: its weights can be read in place only while the hub can be reached: unset HF_HUB_OFFLINE, "
            "or set distributed.download to 'each'"
        ) from None
    return {file.path: file.size for file in tree}


def read_range(repo: Repo, commit: str, file: str, start: int, stop: int) -> bytes:
    """The bytes from `start` to `stop` of a file. Raises the errors of huggingface_hub and of its transport."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(repo.name, file, repo_type=repo.kind, revision=commit)
    headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}"}
    response = get_session().get(url, headers=headers, follow_redirects=True)
    hf_raise_for_status(response)
    if response.status_code != 206:
        raise OSError(f"{url} does not answer with a range of bytes")
    return bytes(response.content)


def check_there(repo: Repo, folder: Path, files: Sequence[str]) -> None:
    """Raises ConfigError if a file is not cached. Offline, a partial snapshot looks like a complete one."""
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ConfigError(f"{repo.text}: {_not_cached(f'{some(missing)} of it', None)}")


def some(files: list[str]) -> str:
    """The names of up to twenty files, for an error."""
    more = f" and {len(files) - 20} more" if len(files) > 20 else ""
    return ", ".join(files[:20]) + more


def _not_cached(what: str, error: BaseException | None) -> str:
    """The message for `what` missing in the cache; `error` is the reason why it could not be downloaded, or None."""
    from huggingface_hub import constants

    reason = f" ({type(error).__name__}: {_flat(error)})" if error else ""
    remedy = (
        f"{constants.ENDPOINT} cannot be reached, or fails{reason}: check the network (and HF_ENDPOINT), and run again"
    )
    if constants.HF_HUB_OFFLINE:
        remedy = "HF_HUB_OFFLINE=1 forbids the network: unset it and run again"
    return f"the cache {constants.HF_HUB_CACHE} does not hold {what}, and {remedy}"


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
