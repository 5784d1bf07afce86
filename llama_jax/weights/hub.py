"""Models named by their id on the Hugging Face hub: what is needed of one is downloaded, and kept in the hub's cache.

huggingface_hub does the work, and its settings hold: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and so on. What is
decided here is which files are needed, in one format of weights only, and what is said when it cannot be done.
"""

from __future__ import annotations

import dataclasses
import errno
import glob
import re
from collections.abc import Sequence
from pathlib import Path

from llama_jax.config import ConfigError, nearest
from llama_jax.jsonfile import brief, read_json
from llama_jax.weights.huggingface import read_config

FORMS = "owner/name, owner/name@revision or owner/name/FILE.gguf@revision"

# The hub's rule for names (huggingface_hub's validate_repo_id), less names without an owner.
_WORD = r"\w(?:[\w.-]{0,94}\w)?"
_ID = re.compile(rf"({_WORD}/{_WORD})(?:/([^@\s]+\.gguf))?(?:@(\w[\w.+/-]*))?", re.ASCII)
_SPLIT = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")  # llama.cpp's gguf-split

_SAFETENSORS, _FLAX = "model.safetensors", "flax_model.msgpack"
_INDEX = ".index.json"
# What the choice is made by. The hub makes .gitattributes in every repo, and its library warns where no file matches.
_FIRST = (".gitattributes", "config.json", _SAFETENSORS + _INDEX, _FLAX + _INDEX)
_BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "original/tokenizer.model",
)
_WEIGHTS = (".safetensors", ".msgpack", ".gguf", ".pth", ".pt", ".bin", ".h5", ".onnx")


@dataclasses.dataclass(frozen=True)
class _Name:
    """The parts of an id. `file` is one of the repo's GGUF files, or None for the repo; a revision of None is main."""

    text: str
    repo: str
    file: str | None
    revision: str | None


@dataclasses.dataclass(frozen=True)
class _Choice:
    """The files to download, and which path among them names the model; "" is the folder of them all."""

    files: tuple[str, ...]
    opened: str


def is_hub_id(text: str) -> bool:
    """Whether this names a model on the hub, rather than a path: one that exists, or whose first folder does."""
    return _parse(text) is not None and not Path(Path(text).parts[0]).exists()


def download(repo_id: str) -> Path:
    """Fetch a model that is not in the cache yet, and say where it is.

    Only one format is fetched: safetensors, else Meta's original files, else the old Flax ones, else the one GGUF file
    there is. A config that is not supported is refused before its weights come.

    Args:
        repo_id: owner/name, or owner/name/FILE.gguf for one file or split set of a repo; with @revision for a branch,
            a tag or a commit other than main.

    Returns:
        The folder of config.json or of params.json, or the GGUF file (of a split set, the first).

    Raises:
        ConfigError: no such model, no right to it, no network, no space, nothing in it that can be read.
    """
    name = _parse(repo_id)
    if name is None:
        raise ConfigError(f"{repo_id!r} is not the id of a model on the Hugging Face hub: write {FORMS}")
    folder = _fetch(name, name.revision, _FIRST)
    choice = _choose(name, folder, _listing(name, folder))
    _fetch(name, folder.name, choice.files)  # of the same commit, which need not be asked for again
    _check_there(name, folder, choice.files)
    return folder / choice.opened


def _parse(text: str) -> _Name | None:
    found = _ID.fullmatch(text)
    if found is None or ".." in text or "--" in found[1] or found[1].endswith(".git"):
        return None
    return _Name(text, *found.groups())


def _listing(name: _Name, folder: Path) -> list[str]:
    """Every file of the repo at the commit of this snapshot; those of the snapshot, where the cache has no list."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return sorted(file.path for file in get_cached_repo_tree(name.repo, revision=folder.name))
    except CachedRepoTreeNotFoundError:  # offline, and downloaded by an older huggingface_hub
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _choose(name: _Name, folder: Path, files: list[str]) -> _Choice:
    """What to download of a repo, whose `_FIRST` files are in `folder`."""
    ggufs = [file for file in files if file.endswith(".gguf")]
    if name.file is not None:
        if name.file not in ggufs:
            there = f"its GGUF files: {_some(ggufs)}" if ggufs else "it has no GGUF files"
            raise ConfigError(f"{name.repo} has no {name.file}{nearest(name.file, ggufs)}; {there}")
        return _gguf(name, name.file, files)
    beside = [file for file in _BESIDE if file in files]
    if weights := _safetensors(name, folder, files):
        return _checked(name, folder, beside, weights)
    for base in ("original/", ""):
        weights = [file for file in files if re.fullmatch(re.escape(base) + r"consolidated\.\d+\.pth", file)]
        if weights and base + "params.json" in files:
            tokenizer = [file for file in files if file == base + "tokenizer.model"]
            return _Choice((base + "params.json", *tokenizer, *weights), base)
    if weights := _indexed(_FLAX, name, folder, files):
        return _checked(name, folder, beside, weights)
    firsts = sorted({_SPLIT.sub(r"\1-00001-of-\2.gguf", file) for file in ggufs})
    if len(firsts) > 1:
        one = f"{name.repo}/{firsts[0]}" + (f"@{name.revision}" if name.revision else "")
        raise ConfigError(f"{name.repo} has {len(firsts)} GGUF models; name one, e.g. {one}, of: {_some(firsts)}")
    if firsts:
        return _gguf(name, firsts[0], files)
    there = [file for file in files if file.endswith(_WEIGHTS)] or files
    raise ConfigError(
        f"{name.repo} has no weights that can be read: wanted are config.json with *.safetensors, params.json with "
        f"consolidated.*.pth, config.json with {_FLAX}, or *.gguf; it has {_some(there) or 'no files'}"
    )


def _checked(name: _Name, folder: Path, beside: list[str], weights: list[str]) -> _Choice:
    """The choice of a folder with config.json, which is read first: weights may take hours."""
    _check_there(name, folder, ("config.json",))
    read_config(folder)
    return _Choice((*beside, *weights), "")


def _safetensors(name: _Name, folder: Path, files: list[str]) -> list[str]:
    """The safetensors that the reader would open, with their index; other copies of the weights stay where they are."""
    alone = [f for f in files if f.endswith(".safetensors") and "/" not in f and not f.startswith("consolidated")]
    single = alone if len(alone) == 1 and "config.json" in files else []
    return _indexed(_SAFETENSORS, name, folder, files) or single


def _indexed(whole: str, name: _Name, folder: Path, files: list[str]) -> list[str]:
    """`whole`, else its index and the shards that this lists, else nothing."""
    if "config.json" not in files:
        return []
    if whole in files:
        return [whole]
    if whole + _INDEX not in files:
        return []
    _check_there(name, folder, (whole + _INDEX,))
    places = read_json(folder / (whole + _INDEX)).get("weight_map")
    shards = list(dict.fromkeys(places.values())) if isinstance(places, dict) else []
    suffix = Path(whole).suffix
    if not shards or not all(isinstance(s, str) and s.endswith(suffix) and not set(s) & set("/\\:\0") for s in shards):
        raise ConfigError(f"{folder / whole}{_INDEX}: weight_map must name {suffix} files, got {brief(places)}")
    return [whole + _INDEX, *shards]


def _gguf(name: _Name, file: str, files: list[str]) -> _Choice:
    """A GGUF file, or the whole split set that it belongs to."""
    split = _SPLIT.fullmatch(file)
    if split is None:
        return _Choice((file,), file)
    parts = tuple(f"{split[1]}-{i:05}-of-{split[2]}.gguf" for i in range(1, int(split[2]) + 1))
    missing = [part for part in parts if part not in files]
    if missing or not parts:
        raise ConfigError(f"{name.repo} has not all of the split set of {file}, lacking {_some(missing)}: name another")
    return _Choice(parts, parts[0])


def _some(files: list[str]) -> str:
    more = f" and {len(files) - 20} more" if len(files) > 20 else ""
    return ", ".join(files[:20]) + more


def _check_there(name: _Name, folder: Path, files: Sequence[str]) -> None:
    """Raise ConfigError where a file is not in the cache: without the hub, a part of a snapshot looks like a whole."""
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ConfigError(f"{name.text}: {_not_cached(f'{_some(missing)} of it', None)}")


def _not_cached(what: str, error: BaseException | None) -> str:
    """What to say where the cache has not `what`, and `error` kept it from coming."""
    from huggingface_hub import constants

    reason = f" ({type(error).__name__}: {_flat(error)})" if error else ""
    mend = (
        f"{constants.ENDPOINT} cannot be reached, or fails{reason}: check the network (and HF_ENDPOINT), and run again"
    )
    if constants.HF_HUB_OFFLINE:
        mend = "HF_HUB_OFFLINE=1 forbids the network: unset it and run again"
    return f"the cache {constants.HF_HUB_CACHE} does not hold {what}, and {mend}"


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _fetch(name: _Name, revision: str | None, files: Sequence[str]) -> Path:
    """Download those of `files` that the repo has and the cache has not; the folder of this commit in the cache.

    Raises ConfigError for whatever the hub's library raises.
    """
    from huggingface_hub import constants, errors, snapshot_download  # a quarter of a second

    page = f"{constants.ENDPOINT}/{name.repo}"
    login = "`hf auth login`, or set HF_TOKEN"
    again = "run it again (the files that came whole are kept)"
    try:
        return Path(
            snapshot_download(name.repo, revision=revision, allow_patterns=[glob.escape(file) for file in files])
        )
    except KeyboardInterrupt:
        why = f"the download was interrupted; {again}"
    except errors.GatedRepoError:
        why = f"it is gated: open {page}, accept the licence, then {login} (of the account that accepted)"
    except errors.RepositoryNotFoundError:
        why = f"no such path here, and no model {page}: check the spelling; if it is private, {login}"
    except errors.RevisionNotFoundError:
        why = f"no branch, tag or commit {name.revision!r}: see {page}/commits (ids are {FORMS})"
    except errors.IncompleteSnapshotError as error:
        return Path(error.snapshot_path)  # offline; what is needed of it is looked for afterwards
    except errors.LocalEntryNotFoundError as error:
        why = _not_cached("all of it", error.__cause__)
    except Exception as error:  # the transport has errors of its own, and so has Xet
        text = _flat(error)
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
            why = f"{constants.ENDPOINT} refuses the token: {login} to a valid one"
        elif getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
            why = f"no space left in {constants.HF_HUB_CACHE}: make some, or set HF_HOME to a larger disk; {again}"
        elif isinstance(error, PermissionError):
            why = f"{text}: set HF_HOME to a folder that can be written"
        else:
            why = f"the download failed ({type(error).__name__}: {text}); {again}"
    raise ConfigError(f"{name.text}: {why}")
