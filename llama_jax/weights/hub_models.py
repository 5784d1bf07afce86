"""Models on the Hugging Face hub: their ids, and the choice of files to download, with weights in one format only."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path

from llama_jax import remote_files
from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError, brief, nearest
from llama_jax.files import read_json, write_whole
from llama_jax.hub import ID, Repo, check_there, fetch, listing, read_range, sizes_of, some
from llama_jax.storage import Stored, cache_folder
from llama_jax.weights.formats.huggingface import TOKENIZER_FILES
from llama_jax.weights.formats.huggingface_config import read_config

FORMS = "owner/name, owner/name@revision, owner/name/FILE.gguf or owner/name:Q4_K_M"

_ID = re.compile(rf"({ID})(?:/([^@\s]+\.gguf)|:(\w+))?(?:@(\w[\w.+/-]*))?", re.ASCII)
_SPLIT = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")  # llama.cpp's gguf-split

_SAFETENSORS, _TORCH, _FLAX = "model.safetensors", "pytorch_model.bin", "flax_model.msgpack"
_INDEX = ".index.json"
# Files that decide the choice. Every repo has a .gitattributes; the hub's library warns if no file matches.
FIRST = (".gitattributes", "config.json", *(whole + _INDEX for whole in (_SAFETENSORS, _TORCH, _FLAX)))
# Files that are downloaded with the weights of a Hugging Face folder.
_SETTINGS = ("config.json", "generation_config.json", *TOKENIZER_FILES, "original/tokenizer.model")
_TEMPLATES = re.compile(r"additional_chat_templates/[^/]+\.jinja")
WEIGHTS = (".safetensors", ".msgpack", ".gguf", ".pth", ".pt", ".bin", ".h5", ".onnx")


@dataclasses.dataclass(frozen=True)
class Name:
    """The parts of an id.

    Attributes:
        repo: the repo and its revision.
        file: one of the repo's GGUF files, or None.
        kind: the type of weights in the name of one of its GGUF files, as llama.cpp's -hf takes it, or None.
    """

    repo: Repo
    file: str | None
    kind: str | None = None


@dataclasses.dataclass(frozen=True)
class _Choice:
    """The files to download.

    Attributes:
        files: their paths in the repo.
        opened: path of the model within the repo: a GGUF file or a folder; "" is the repo's own folder.
    """

    files: tuple[str, ...]
    opened: str


def is_hub_id(text: str) -> bool:
    """True if the text names a model on the hub. A path has precedence if it, or its first folder, exists."""
    return _parse(text) is not None and not Path(Path(text).parts[0]).exists()


def download(repo_id: str) -> Path:
    """Downloads a model unless the cache has it, and returns its path.

    Inside of `remote_files.reading_in_parts`, files of weights are not downloaded but read in place.

    Only one format is downloaded: safetensors, else Meta's original files, else torch's, else the old Flax ones, else
    the only GGUF file. A config that is not supported is refused before its weights are downloaded.

    Args:
        repo_id: owner/name, or owner/name/FILE.gguf or owner/name:TYPE for one file or split set of a repo; with
            @revision for a branch, a tag or a commit other than main.

    Returns:
        The folder of config.json or of params.json, or the GGUF file (of a split set, the first).

    Raises:
        ConfigError: the model does not exist, is not accessible or has no supported format; or there is no network, or
            no space on the disk.
    """
    name = _parse(repo_id)
    if name is None:
        raise ConfigError(f"{repo_id!r} is not the id of a model on the Hugging Face hub: write {FORMS}")
    folder = fetch(name.repo, FIRST)
    choice = choose(name, folder, listing(name.repo, folder))
    if remote_files.in_parts():
        return _in_place(name.repo, folder, choice)
    fetch(name.repo, choice.files, commit=folder.name)
    check_there(name.repo, folder, choice.files)
    return folder / choice.opened


def _in_place(repo: Repo, folder: Path, choice: _Choice) -> Path:
    """The path of a model in a folder of the cache, in which stand-ins take the place of the files of weights."""
    sizes, commit = sizes_of(repo, folder), folder.name
    weights = [file for file in choice.files if file.endswith(WEIGHTS)]
    small = [file for file in choice.files if file not in weights]
    fetch(repo, small or FIRST, commit=commit)
    check_there(repo, folder, small)
    stored = [Stored(file, sizes[file], commit, file) for file in weights]
    target = cache_folder(f"hf://{repo.name}", stored, in_place=True)
    for file in small:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        write_whole(target / file, (folder / file).read_bytes())
    remote_files.stand_in(repo.text, stored, target, read=functools.partial(read_range, repo, commit))
    return target / choice.opened


def read_shape(repo_id: str) -> ModelConfig | None:
    """The shape of a model from its config.json, without its weights; None if the repo has no such file.

    Raises:
        ConfigError: as in `download`.
    """
    name = _parse(repo_id)
    if name is None or name.file or name.kind:
        return None
    folder = fetch(name.repo, FIRST)
    return read_config(folder) if (folder / "config.json").is_file() else None


def download_adapter(repo_id: str, config: str, weights: Sequence[str]) -> Path:
    """Downloads a LoRA adapter with its tokenizer files and chat templates unless the cache has them.

    Args:
        repo_id: owner/name, with @revision for a branch, a tag or a commit other than main.
        config: the file that an adapter must have.
        weights: names of weight files. The first of them that the repo has is downloaded.

    Returns:
        The folder of these files.

    Raises:
        ConfigError: as in `download`, or the repo has no config or no weights.
    """
    name = _parse(repo_id)
    if name is None or name.file or name.kind:
        raise ConfigError(f"{repo_id!r} is not the id of an adapter: write owner/name or owner/name@revision")
    folder = fetch(name.repo, (".gitattributes", config, *TOKENIZER_FILES))
    files = listing(name.repo, folder)
    chosen = [file for file in weights if file in files][:1]
    if missing := [file for file in (config, *(chosen or weights[:1])) if file not in files]:
        raise ConfigError(
            f"{name.repo.name} is not a LoRA adapter in peft's format: it has no {some(missing)}; it has "
            f"{some(files) or 'no files'}"
        )
    chosen += [file for file in files if _TEMPLATES.fullmatch(file)]
    fetch(name.repo, chosen, commit=folder.name)
    check_there(name.repo, folder, (config, *chosen))
    return folder


def _parse(text: str) -> Name | None:
    found = _ID.fullmatch(text)
    if found is None or ".." in text or "--" in found[1] or found[1].endswith((".git", *WEIGHTS)):
        return None
    name, file, kind, revision = found.groups()
    return Name(Repo("model", text, name, revision, FORMS), file, kind)


def choose(name: Name, folder: Path, files: list[str]) -> _Choice:
    """Chooses the files of a repo to download.

    Args:
        name: the id.
        folder: the snapshot in the cache, which has the files of FIRST that the repo has.
        files: paths of all files in the repo.
    """
    ggufs = [file for file in files if file.endswith(".gguf")]
    if name.file is not None:
        if name.file not in ggufs:
            there = f"its GGUF files: {some(ggufs)}" if ggufs else "it has no GGUF files"
            raise ConfigError(f"{name.repo.name} has no {name.file}{nearest(name.file, ggufs)}; {there}")
        return _gguf(name, name.file, files)
    firsts = sorted({_SPLIT.sub(r"\1-00001-of-\2.gguf", file) for file in ggufs})
    if name.kind is not None:
        return _gguf(name, _of_kind(name, firsts), files)
    settings = [file for file in _SETTINGS if file in files] + [file for file in files if _TEMPLATES.fullmatch(file)]
    if weights := _safetensors(name, folder, files):
        return _checked(name, folder, settings, weights)
    for base in ("original/", ""):
        weights = [file for file in files if re.fullmatch(re.escape(base) + r"consolidated\.\d+\.pth", file)]
        if weights and base + "params.json" in files:
            tokenizer = [file for file in files if file == base + "tokenizer.model"]
            return _Choice((base + "params.json", *tokenizer, *weights), base)
    if weights := _indexed(_TORCH, name, folder, files) or _indexed(_FLAX, name, folder, files):
        return _checked(name, folder, settings, weights)
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
    others = [file for file in files if file.endswith(WEIGHTS)] or files
    raise ConfigError(
        f"{name.repo.name} has no supported weights: they are config.json with *.safetensors, params.json "
        f"with consolidated.*.pth, config.json with {_TORCH} or {_FLAX}, or *.gguf; it has "
        f"{some(others) or 'no files'}"
    )


def _of_kind(name: Name, ggufs: list[str]) -> str:
    """The GGUF file whose name has the type of weights that was asked for. llama.cpp ignores case, too."""
    found = [file for file in ggufs if name.kind and name.kind.lower() in re.split(r"[-./]", file.lower())]
    if len(found) == 1:
        return found[0]
    number = len(found) or "no"
    raise ConfigError(
        f"{name.repo.name} has {number} GGUF files of type {name.kind}: name one, e.g. {name.repo.name}/FILE.gguf, of "
        f"{some(found or ggufs) or 'none'}"
    )


def _checked(name: Name, folder: Path, settings: list[str], weights: list[str]) -> _Choice:
    """The choice for a Hugging Face folder. Its config is checked first, since weights may take hours to download."""
    check_there(name.repo, folder, ("config.json",))
    read_config(folder)
    return _Choice((*settings, *weights), "")


def _safetensors(name: Name, folder: Path, files: list[str]) -> list[str]:
    """The safetensors files that the reader opens, with their index, without other copies of the weights."""
    alone = [f for f in files if f.endswith(".safetensors") and "/" not in f and not f.startswith("consolidated")]
    single = alone if len(alone) == 1 and "config.json" in files else []
    return _indexed(_SAFETENSORS, name, folder, files) or single


def _indexed(whole: str, name: Name, folder: Path, files: list[str]) -> list[str]:
    """The file `whole`, or else its index and the shards that the index lists, or else nothing."""
    if "config.json" not in files:
        return []
    if whole in files:
        return [whole]
    if whole + _INDEX not in files:
        return []
    check_there(name.repo, folder, (whole + _INDEX,))
    weight_map = read_json(folder / (whole + _INDEX)).get("weight_map")
    shards = list(dict.fromkeys(weight_map.values())) if isinstance(weight_map, dict) else []
    suffix = Path(whole).suffix
    if not shards or not all(isinstance(s, str) and s.endswith(suffix) and not set(s) & set("/\\:\0") for s in shards):
        raise ConfigError(f"{folder / whole}{_INDEX}: weight_map must name {suffix} files, got {brief(weight_map)}")
    return [whole + _INDEX, *shards]


def _gguf(name: Name, file: str, files: list[str]) -> _Choice:
    """The choice of a GGUF file, or of all parts of the split one that it belongs to."""
    split = _SPLIT.fullmatch(file)
    if split is None:
        return _Choice((file,), file)
    parts = tuple(f"{split[1]}-{i:05}-of-{split[2]}.gguf" for i in range(1, int(split[2]) + 1))
    missing = [part for part in parts if part not in files]
    if missing or not parts:
        raise ConfigError(
            f"the split file {file} of {name.repo.name} is incomplete, it lacks {some(missing)}: name another file"
        )
    return _Choice(parts, parts[0])
