"""transformers' settings files next to a vocabulary: the tokens that begin, end and pad a text, and added tokens."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import brief
from llama_jax.files import read_json
from llama_jax.text.vocabulary import MOST_BYTES, MOST_VALUES

NAME = "tokenizer_config.json"


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The settings in `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`.

    Attributes:
        bos: name of the token that begins a text, or None.
        eos: name of the token that ends a text, or None.
        pad: name of the token for padding, or None.
        add_bos: whether a text gets `bos` in front, for tokenizer classes that heed this setting, else None.
        legacy: whether text after a control token gets a space in front (SentencePiece vocabularies).
        added: id to name of the added tokens.
        specials: names of the added tokens that are control tokens.
    """

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    add_bos: bool | None = None
    legacy: bool = True
    added: Mapping[int, str] = dataclasses.field(default_factory=dict)
    specials: frozenset[str] = frozenset()


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file that may list a whole vocabulary; an empty one if there is no such file.

    Raises:
        ValueError: a file is not a JSON object.
    """
    return read_json(path, max_bytes=MOST_BYTES, max_values=MOST_VALUES) if os.path.isfile(path) else {}


def read(folder: Path) -> TokenizerConfig:
    """The settings in a folder.

    Raises:
        ValueError: a damaged file.
    """
    config, names = load(folder / NAME), load(folder / "special_tokens_map.json")
    path = folder / NAME
    bos, eos, pad = (_name(config, names, f"{kind}_token", path) for kind in ("bos", "eos", "pad"))
    added, specials = _added(config, path)
    more = names.get("additional_special_tokens")
    specials |= {_content(token) for token in more} if isinstance(more, list) else set()
    specials |= {_content(value) for value in names.values()} | {bos, eos, pad}
    for name, i in load(folder / "added_tokens.json").items():
        if type(i) is not int or i < 0:
            raise ValueError(f"{folder / 'added_tokens.json'}: {brief(name)} has id {brief(i)}")
        added.setdefault(i, name)
    heeds = str(config.get("tokenizer_class", "")).startswith("LlamaTokenizer")
    add_bos = config.get("add_bos_token")
    return TokenizerConfig(
        bos=bos,
        eos=eos,
        pad=pad,
        add_bos=add_bos if heeds and isinstance(add_bos, bool) else None,
        legacy=config.get("legacy") is not False,
        added=added,
        specials=frozenset(name for name in specials if isinstance(name, str)),
    )


def _content(token: Any) -> Any:
    """The name of a token, which the file has as a string or in an object."""
    return token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else None


def _name(config: Mapping[str, Any], names: Mapping[str, Any], key: str, path: Path) -> str | None:
    token = config.get(key) if config.get(key) is not None else names.get(key)
    name = token.get("content") if isinstance(token, dict) else token
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{path}: {key} must be a name, got {brief(name)}")
    return name


def _added(config: Mapping[str, Any], path: Path) -> tuple[dict[int, str], set[Any]]:
    """The tokens of added_tokens_decoder by id, and the names of those that are control tokens."""
    listed = config.get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        raise ValueError(f"{path}: added_tokens_decoder must be an object, got {brief(listed)}")
    added: dict[int, str] = {}
    specials: set[Any] = set()
    for key, token in listed.items():
        name = _content(token)
        if not (key.isascii() and key.isdigit() and len(key) < 10) or not name:
            raise ValueError(f"{path}: added_tokens_decoder has {brief(key)}: {brief(token)}, not an id and a token")
        added[int(key)] = name
        if isinstance(token, dict) and token.get("special"):
            specials.add(name)
    return added, specials
