"""A model's own chat template (Jinja) as data: read from a model's folder, chosen by name, and written again.

Facts about the files are those of transformers (`tokenization_utils_base.py`) and llama.cpp. A folder may hold
`chat_template.jinja` and `additional_chat_templates/NAME.jinja`. Where it holds neither, `tokenizer_config.json` may
have `chat_template`, one template or a list of named ones. `rendering` runs templates; this module does not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.errors import ConfigError, brief, nearest
from llama_jax.files import expanded, read_json, read_small, write_json

FILE, FOLDER = "chat_template.jinja", "additional_chat_templates"
DEFAULT, TOOL_USE = "default", "tool_use"
CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"

_CONFIG_BYTES = 64_000_000  # a tokenizer_config.json lists every added token
_MOST_NAMED = 100
_NAME = re.compile(r"\w[\w-]{0,99}")
# The tokens that transformers gives to a template as variables, and those that its Llama classes have by default.
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The chat templates of a model.

    Attributes:
        sources: the Jinja source of each template by its name. Most models have one, called "default".
        tokens: the variables that hold the spelling of a special token, such as `bos_token` and `eos_token`.
    """

    sources: Mapping[str, str]
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def source(self, tools: Sequence[Any] | None) -> str:
        """The template for a dialog: "tool_use" where tools are given and it exists, else "default".

        Raises:
            ConfigError: there are several templates, and none of them is called "default".
        """
        if tools and TOOL_USE in self.sources:
            return self.sources[TOOL_USE]
        if DEFAULT not in self.sources:
            names = ", ".join(self.sources)
            raise ConfigError(
                f"the model has chat templates called {names}, and none called {DEFAULT!r}: choose one with "
                "--chat_format FILE (data.chat_format of a run)"
            )
        return self.sources[DEFAULT]

    @property
    def fingerprint(self) -> str:
        """A sha256 (hex) of the templates and tokens."""
        parts = [sorted(self.sources.items()), sorted(self.tokens.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_folder(folder: str | os.PathLike[str]) -> ChatTemplate | None:
    """The chat template of a Hugging Face folder, or None.

    Raises:
        ValueError: one of the files is damaged or too large.
    """
    folder = Path(folder)
    sources = _template_files(folder)
    config = _config(folder)
    if not sources:
        sources = named(config.get("chat_template"), folder / CONFIG)
    return ChatTemplate(sources, special_tokens(folder)) if sources else None


def read_file(path: str | os.PathLike[str], tokens: Mapping[str, str]) -> ChatTemplate:
    """The template in a file that a user names, with the tokens of the model.

    Raises:
        ConfigError: there is no such file.
        ValueError: the file is too large or not UTF-8.
    """
    if not isinstance(path, (str, os.PathLike)) or not expanded(path).is_file():
        near = nearest(path, ["auto", "llama3"]) if isinstance(path, str) else ""
        raise ConfigError(f"chat format {brief(path)} must be auto, llama3 or the file of a Jinja template{near}")
    return ChatTemplate({DEFAULT: _text(expanded(path))}, tokens)


def named(value: Any, where: object) -> dict[str, str]:
    """The templates that `chat_template` of a tokenizer_config.json holds: a string, or a list of named ones."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    listed = value if isinstance(value, list) else []
    sources = {
        item["name"]: item["template"]
        for item in listed[:_MOST_NAMED]
        if isinstance(item, dict) and _NAME.fullmatch(str(item.get("name"))) and isinstance(item.get("template"), str)
    }
    if not sources or len(sources) != len(listed):
        raise ValueError(
            f"{where}: chat_template must be a string, or a list of names and templates; got {brief(value)}"
        )
    return sources


def special_tokens(folder: str | os.PathLike[str]) -> dict[str, str]:
    """The variables of special tokens, as transformers reads them from the files next to a tokenizer."""
    folder = Path(folder)
    config = _config(folder)
    path = folder / SPECIAL_TOKENS
    if "added_tokens_decoder" not in config and path.is_file():
        config = {**config, **read_json(path)}
    known = [name for name in config if name in _TOKEN_NAMES or name.endswith("_token")]
    values = {name: config[name] for name in known}
    if isinstance(config.get("extra_special_tokens"), dict):
        values |= config["extra_special_tokens"]
    spelled = {k: v.get("content") if isinstance(v, dict) else v for k, v in values.items()}
    defaults = _LLAMA_TOKENS if config.get("tokenizer_class") in _LLAMA_CLASSES else {}
    return {**defaults, **{name: text for name, text in spelled.items() if isinstance(text, str)}}


def config_entries(template: ChatTemplate) -> dict[str, Any]:
    """The entries of a tokenizer_config.json that hold a template, for every version of transformers."""
    if set(template.sources) == {DEFAULT}:
        return {**template.tokens, "chat_template": template.sources[DEFAULT]}
    listed = [{"name": name, "template": source} for name, source in template.sources.items()]
    return {**template.tokens, "chat_template": listed}


def write(template: ChatTemplate | None, folder: str | os.PathLike[str]) -> None:
    """Write a template to a folder's tokenizer_config.json. All templates that the folder had are removed."""
    folder = Path(folder)
    for path in (folder / FILE, *(folder / FOLDER).glob("*.jinja")):
        path.unlink(missing_ok=True)
    config = _config(folder)
    had = config.pop("chat_template", None)
    if template is not None:
        write_json(folder / CONFIG, {**config, **config_entries(template)})
        if (folder / SPECIAL_TOKENS).is_file():  # transformers reads the tokens there first
            write_json(folder / SPECIAL_TOKENS, {**read_json(folder / SPECIAL_TOKENS), **template.tokens})
    elif had is not None:
        write_json(folder / CONFIG, config)


def _template_files(folder: Path) -> dict[str, str]:
    """The templates that are files of their own."""
    paths = {DEFAULT: folder / FILE} if (folder / FILE).is_file() else {}
    for path in sorted((folder / FOLDER).glob("*.jinja"))[:_MOST_NAMED]:
        paths[path.stem] = path
    return {name: _text(path) for name, path in paths.items()}


def _text(path: Path) -> str:
    try:
        return read_small(path).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    return read_json(path, max_bytes=_CONFIG_BYTES) if path.is_file() else {}
