"""Models named by their id on the Hugging Face hub: which files are needed of one, in one format of weights only."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from llama_jax.errors import ConfigError, brief, nearest
from llama_jax.files import read_json
from llama_jax.hub import ID, Repo, check_there, fetch, listing, some
from llama_jax.weights.formats.huggingface import read_config

FORMS = "owner/name, owner/name@revision or owner/name/FILE.gguf@revision"

_ID = re.compile(rf"({ID})(?:/([^@\s]+\.gguf))?(?:@(\w[\w.+/-]*))?", re.ASCII)
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
    """The parts of an id. `file` is one of the repo's GGUF files, or None for all that it takes."""

    repo: Repo
    file: str | None


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
    folder = fetch(name.repo, _FIRST)
    choice = _choose(name, folder, listing(name.repo, folder))
    fetch(name.repo, choice.files, commit=folder.name)
    check_there(name.repo, folder, choice.files)
    return folder / choice.opened


def download_adapter(repo_id: str, config: str, weights: Sequence[str], optional: Sequence[str]) -> Path:
    """The folder of a LoRA adapter named by its id, downloaded as `download` does.

    Args:
        repo_id: owner/name, with @revision for a branch, a tag or a commit other than main.
        config: the file that an adapter must have.
        weights: files of weights, of which the first that is there is downloaded.
        optional: files that are downloaded if they are there.

    Raises:
        ConfigError: what `download` raises, or the repo has no config or no weights.
    """
    name = _parse(repo_id)
    if name is None or name.file is not None:
        raise ConfigError(f"{repo_id!r} is not the id of an adapter: write owner/name or owner/name@revision")
    folder = fetch(name.repo, (".gitattributes", config, *optional))
    files = listing(name.repo, folder)
    chosen = [file for file in weights if file in files][:1]
    if missing := [file for file in (config, *(chosen or weights[:1])) if file not in files]:
        raise ConfigError(
            f"{name.repo.name} is no LoRA adapter as peft writes it: it has no {some(missing)}; it has "
            f"{some(files) or 'no files'}"
        )
    fetch(name.repo, chosen, commit=folder.name)
    check_there(name.repo, folder, (config, *chosen))
    return folder


def _parse(text: str) -> _Name | None:
    found = _ID.fullmatch(text)
    if found is None or ".." in text or "--" in found[1] or found[1].endswith(".git"):
        return None
    name, file, revision = found.groups()
    return _Name(Repo("model", text, name, revision, FORMS), file)


def _choose(name: _Name, folder: Path, files: list[str]) -> _Choice:
    """What to download of a repo, whose `_FIRST` files are in `folder`."""
    ggufs = [file for file in files if file.endswith(".gguf")]
    if name.file is not None:
        if name.file not in ggufs:
            there = f"its GGUF files: {some(ggufs)}" if ggufs else "it has no GGUF files"
            raise ConfigError(f"{name.repo.name} has no {name.file}{nearest(name.file, ggufs)}; {there}")
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
        one = f"{name.repo.name}/{firsts[0]}" + (f"@{name.repo.revision}" if name.repo.revision else "")
        raise ConfigError(f"{name.repo.name} has {len(firsts)} GGUF models; name one, e.g. {one}, of: {some(firsts)}")
    if firsts:
        return _gguf(name, firsts[0], files)
    if "adapter_config.json" in files:
        raise ConfigError(
            f"{name.repo.name} is a LoRA adapter, not a model: give the model that it belongs to, and with it "
            f"--adapter {name.repo.text} (load(..., adapters=...))"
        )
    there = [file for file in files if file.endswith(_WEIGHTS)] or files
    raise ConfigError(
        f"{name.repo.name} has no weights that can be read: wanted are config.json with *.safetensors, params.json "
        f"with consolidated.*.pth, config.json with {_FLAX}, or *.gguf; it has {some(there) or 'no files'}"
    )


def _checked(name: _Name, folder: Path, beside: list[str], weights: list[str]) -> _Choice:
    """The choice of a folder with config.json, which is read first: weights may take hours."""
    check_there(name.repo, folder, ("config.json",))
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
    check_there(name.repo, folder, (whole + _INDEX,))
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
        raise ConfigError(
            f"{name.repo.name} has not all of the split set of {file}, lacking {some(missing)}: name another"
        )
    return _Choice(parts, parts[0])
