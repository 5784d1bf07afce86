"""transformers' settings files next to a vocabulary: the tokens that begin, end and pad a text, and added tokens.

The rules are those of transformers 5 (`_from_pretrained` in tokenization_utils_base.py, and `__init__` in
tokenization_utils_tokenizers.py).
"""

import dataclasses
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.errors import brief
from llama_jax.files import read_json
from llama_jax.text.vocabulary import MOST_BYTES, MOST_VALUES

NAME = "tokenizer_config.json"
_ROLES = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))  # in this order
_LISTS = ("extra_special_tokens", "additional_special_tokens")


class AddedToken(NamedTuple):
    """One added token, with the flags of AddedToken in the `tokenizers` library.

    Attributes:
        content: name of the token.
        special: True for a control token.
        normalized: True if it is searched for in the normalized text.
        lstrip: True if white space before it belongs to it.
        rstrip: True if white space after it belongs to it.
        single_word: True if it is found as a whole word only.
    """

    content: str
    special: bool = True
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The settings in `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`.

    Attributes:
        bos: name of the token that begins a text, or None.
        eos: name of the token that ends a text, or None.
        pad: name of the token for padding, or None.
        add_bos: True if a text begins with `bos`; None for tokenizer classes without this setting.
        legacy: True if text after a control token gets a space in front (SentencePiece vocabularies).
        added: added tokens by the id that the files give them.
        added_yields: True if the vocabulary's own token of an id takes precedence over that of `added`.
        roles: control tokens that the files name by their role, such as `eos_token` or `image_token`.
        more: further tokens that the files name without an id. A vocabulary that lacks a token of `roles` or `more`
            gets it, in this order.
    """

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    add_bos: bool | None = None
    legacy: bool = True
    added: Mapping[int, AddedToken] = dataclasses.field(default_factory=dict)
    added_yields: bool = False
    roles: tuple[AddedToken, ...] = ()
    more: tuple[AddedToken, ...] = ()


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
    path = folder / NAME
    config = load(path)
    with_ids = config.get("added_tokens_decoder")
    if with_ids is None:  # files of earlier versions, which are not read where this key exists
        names = load(folder / "special_tokens_map.json")
        if any(isinstance(config.get(key), list) and config[key] for key in _LISTS):
            names.pop("additional_special_tokens", None)
        config |= {key: value for key, value in names.items() if value is not None}
    roles, more = _named(config, path)
    if with_ids is None:
        added = _earlier(folder / "added_tokens.json", {token.content for token in (*roles.values(), *more)})
    else:
        added = _with_ids(with_ids, path)
    bos, eos, pad = (roles[key].content if key in roles else None for key in ("bos_token", "eos_token", "pad_token"))
    heeds = str(config.get("tokenizer_class", "")).startswith("LlamaTokenizer")
    add_bos = config.get("add_bos_token")
    return TokenizerConfig(
        bos=bos,
        eos=eos,
        pad=pad,
        add_bos=add_bos if heeds and isinstance(add_bos, bool) else None,
        legacy=config.get("legacy") is not False,
        added=added,
        added_yields=with_ids is None,
        roles=tuple(roles.values()),
        more=tuple(more),
    )


def token_of(value: Any, where: str) -> AddedToken | None:
    """The token that a file holds as its name, or as an object with flags; None for null or an empty name.

    Raises:
        ValueError: anything else. The message begins with `where`.
    """
    if isinstance(value, dict) and isinstance(name := value.get("content"), str):
        special = value.get("special") is True
        flags = {flag: value.get(flag) is True for flag in ("lstrip", "rstrip", "single_word")}
        normalized = value.get("normalized", not special) is True
        return AddedToken(name, special, normalized, **flags) if name else None
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} must be a name, got {brief(value)}")
    return AddedToken(value) if value else None


def looks_like_control(name: Any) -> bool:
    """True for a name such as "<s>" or "[PAD]", which is not a word of a text."""
    return isinstance(name, str) and len(name) > 2 and name[0] in "<[" and name[-1] in ">]"


def _named(config: Mapping[str, Any], path: Path) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """The tokens that have a role, by its name, and the tokens of the list of others."""
    roles = {key: config.get(key) for key in _ROLES}
    roles |= {key: config[key] for key in config if key.endswith("_token") and isinstance(config[key], str | dict)}
    listed: list[Any] = []
    for key in _LISTS:
        value = config.get(key) or []
        if isinstance(value, dict):  # roles that only this model has
            roles |= value
        elif not isinstance(value, list):
            raise ValueError(f"{path}: {key} must be a list of tokens, got {brief(value)}")
        listed = listed or (value if isinstance(value, list) else [])
    tokens = {key: token_of(value, f"{path}: {key}") for key, value in roles.items()}
    more = [token_of(value, f"{path}: a token of {' or '.join(_LISTS)}") for value in listed]
    return {key: t._replace(special=True) for key, t in tokens.items() if t}, [token for token in more if token]


def _with_ids(listed: Any, path: Path) -> dict[int, AddedToken]:
    """The tokens of added_tokens_decoder, which is an object with ids as keys."""
    if not isinstance(listed, dict):
        raise ValueError(f"{path}: added_tokens_decoder must be an object, got {brief(listed)}")
    added: dict[int, AddedToken] = {}
    for key, value in listed.items():
        token = token_of(value, f"{path}: added_tokens_decoder[{brief(key)}]") if isinstance(value, dict) else None
        if not (key.isascii() and key.isdigit() and len(key) < 10) or token is None:
            raise ValueError(f"{path}: added_tokens_decoder has {brief(key)}: {brief(value)}, not an id and a token")
        added[int(key)] = token
    return added


def _earlier(path: Path, named: Collection[str]) -> dict[int, AddedToken]:
    """The tokens of added_tokens.json, which is an object with names as keys."""
    added: dict[int, AddedToken] = {}
    for name, i in load(path).items():
        if type(i) is not int or i < 0:
            raise ValueError(f"{path}: the id of {brief(name)} must be a whole number from 0, got {brief(i)}")
        added[i] = AddedToken(name, special=name in named, normalized=name not in named)
    return added
