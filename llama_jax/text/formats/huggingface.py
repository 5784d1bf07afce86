"""Hugging Face's `tokenizer.json`, read into a vocabulary and written from one.

A byte-level BPE that tiktoken reproduces exactly is read into `BytePairs`; ids then equal those of the `tokenizers`
library on every text (with its `encode_special_tokens`, since control tokens do not come from text here). Every other
file is run by the library itself. `truncation` and `padding` are not used, as in `transformers`.
"""

import json
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.errors import ConfigError, brief
from llama_jax.files import write_whole
from llama_jax.text import byte_level_json
from llama_jax.text.byte_level_json import cuts_of, pre_tokenizer_of
from llama_jax.text.byte_pairs import BytePairs, from_merges
from llama_jax.text.formats import tokenizer_config
from llama_jax.text.formats.tokenizer_config import AddedToken, TokenizerConfig, looks_like_control, token_of
from llama_jax.text.library_vocabulary import LibraryVocabulary
from llama_jax.text.merging import Merge, every_split
from llama_jax.text.patterns import cuts_by, one_pattern
from llama_jax.text.vocabulary import errors_of, spelled

_MODEL = {  # settings under which a model is plain BPE, and what they may be
    "type": ("BPE", None),
    "dropout": (None, 0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False, None),
    "ignore_merges": (True, False, None),
}
_MODEL_FREE = {"vocab", "merges", "unk_token", "fuse_unk"}  # with a token for every byte, nothing is unknown
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


def read(path: str | os.PathLike[str]) -> BytePairs | LibraryVocabulary:
    """The vocabulary of a `tokenizer.json`, with the settings of the files next to it (see tokenizer_config.py).

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: neither tiktoken nor the library can encode as the file says. The message names the part that is
            the reason.
        ValueError: a damaged file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the path of a tokenizer.json or a tokenizer.model")
    data = tokenizer_config.load(path)
    config = tokenizer_config.read(path.parent)
    with errors_of(str(path)):
        return _vocabulary(_completed(data, config), config)


def write(
    vocabulary: BytePairs | LibraryVocabulary,
    folder: str | os.PathLike[str],
    *,
    model_max_length: int | None = None,
) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` into a folder.

    `transformers.AutoTokenizer` reads them to the same ids.

    Args:
        vocabulary: vocabulary to write.
        folder: existing folder.
        model_max_length: number of positions of the model, if known.

    Raises:
        ConfigError: two of its tokens have the same spelling in such a file.
    """
    folder = Path(folder)
    named = {
        f"{kind}_token": vocabulary.by_id[i].decode()
        for kind, i in (("bos", vocabulary.bos_id), ("eos", vocabulary.eos_id), ("pad", vocabulary.pad_id))
        if i is not None
    }
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= named | ({"model_max_length": model_max_length} if model_max_length else {})
    written = vocabulary.contents if isinstance(vocabulary, LibraryVocabulary) else _text(_contents(vocabulary))
    for name, text in (
        ("tokenizer.json", written),
        (tokenizer_config.NAME, _text(config)),
        ("special_tokens_map.json", _text(named)),
    ):
        write_whole(folder / name, text.encode())


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


# ---- reading -----------------------------------------------------------------------------------------------


def _vocabulary(data: Mapping[str, Any], config: TokenizerConfig) -> BytePairs | LibraryVocabulary:
    """The vocabulary of a parsed file: for tiktoken if that gives the same ids, else for the `tokenizers` library."""
    try:
        return _byte_pairs(data, config)
    except ConfigError:
        return _library_vocabulary(data, config)
    except ValueError as fault:
        try:
            return _library_vocabulary(data, config)
        except ConfigError:
            raise fault from None  # names the place of the damage


def _completed(data: Mapping[str, Any], config: TokenizerConfig) -> Mapping[str, Any]:
    """The contents of the file with the tokens that transformers adds to it from the files next to it.

    A token of the vocabulary keeps its id. Any other token gets the next free id, even if the other files give it
    another id (`add_tokens` in added_vocabulary.rs of `tokenizers`). A token that is a control token in one file
    remains one. An ordinary word with a role, such as "!" for padding, stays a word and does not become a control
    token.
    """
    model, listed = data.get("model"), data.get("added_tokens")
    if not isinstance(model, dict) or not isinstance(vocab := model.get("vocab"), dict | list):
        return data  # damaged, which is reported where it is read
    if not isinstance(listed, list) or not all(map(_has_id, listed)):
        return data
    own = {token["content"]: token for token in listed}
    control = {token.content for token in config.roles} | {name for name in own if own[name].get("special") is True}
    taken = {token["id"] for token in listed} if config.added_yields else ()
    entries = [token_of(own[token.content], "") for token in config.roles if token.content in own]
    wanted = [token for token in entries if token is not None]
    wanted += [token for i, token in sorted(config.added.items()) if i not in taken]
    names = {*own, *(token.content for token in wanted)}
    wanted += [token for token in (*config.roles, *config.more) if token.content not in names]
    wanted = [token._replace(special=token.special or token.content in control) for token in wanted]
    new: dict[str, AddedToken] = {}
    for token in wanted:
        if token.content not in own or token_of(own[token.content], "") != token:
            new[token.content] = token
    if not new:
        return data
    ids = _ids(vocab)
    words = _words(model) if any(name in ids and name not in own for name in new) else ()
    new |= {name: new[name]._replace(special=False) for name in new if name in words and name not in own}
    known = {name: token["id"] for name, token in own.items()}
    last = max(known.values(), default=-1)
    for name in new:
        if name not in known:
            known[name] = ids.get(name, max(last + 1, len(vocab)))
            last = max(last, known[name])
    merged = own | {name: {"id": known[name], **token._asdict()} for name, token in new.items()}
    return {**data, "added_tokens": sorted(merged.values(), key=operator.itemgetter("id"))}


def _ids(vocab: Mapping[str, Any] | Sequence[Any]) -> dict[str, int]:
    """The ids of a model's tokens, without damaged entries."""
    if isinstance(vocab, Mapping):
        return {token: i for token, i in vocab.items() if type(i) is int}
    return {p[0]: i for i, p in enumerate(vocab) if isinstance(p, list) and p and isinstance(p[0], str)}


def _words(model: Mapping[str, Any]) -> set[str]:
    """The tokens that the model can make of ordinary text."""
    vocab, merges = model["vocab"], model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        return {token for token in _ids(vocab) if not looks_like_control(token)}
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    made = {"".join(pair) for pair in pairs if isinstance(pair, list) and all(isinstance(part, str) for part in pair)}
    return made | {token for token in vocab if len(token) == 1}


def _has_id(token: Any) -> bool:
    return isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int


def _library_vocabulary(data: Mapping[str, Any], config: TokenizerConfig) -> LibraryVocabulary:
    return LibraryVocabulary.of(data, lambda ids: _named(config, ids, _bos(data.get("post_processor"), ids)))


def _named(config: TokenizerConfig, ids: Mapping[str, int], bos: str | None) -> dict[str, int | None]:
    """The ids that begin, end and pad a text. `bos` is the name that a post-processor puts in front."""
    if config.add_bos is not None:
        bos = config.bos if config.add_bos else None
    return {
        "bos_id": None if bos is None else ids.get(bos),
        "declared_eos": None if config.eos is None else ids.get(config.eos),
        "declared_pad": None if config.pad is None else ids.get(config.pad),
    }


def _byte_pairs(data: Mapping[str, Any], config: TokenizerConfig) -> BytePairs:
    """The vocabulary for tiktoken; ValueError if it cannot be shown that the ids are equal."""
    if data.get("normalizer") is not None:
        raise ConfigError(f"normalizer {_kind(data['normalizer'])} is not supported, only null")
    if _kind(data.get("decoder")) != "ByteLevel":
        raise ConfigError(f"decoder {_kind(data.get('decoder'))} is not supported, only ByteLevel")
    pattern = _pattern(data.get("pre_tokenizer"))
    model = _object(data.get("model"), "model")
    for key, value in model.items():
        if key not in _MODEL and key not in _MODEL_FREE:
            raise ConfigError(f"model.{key} is not supported; supported: {', '.join((*_MODEL, *sorted(_MODEL_FREE)))}")
        if key in _MODEL and value not in _MODEL[key]:
            raise ConfigError(f"model.{key} must be {_MODEL[key][0]} (byte-level BPE), got {brief(value)}")
    ids = _object(model.get("vocab"), "model.vocab")
    for token, i in ids.items():
        if type(i) is not int or not token:
            raise ValueError(f"model.vocab has {token[:60]!r}: {brief(i)}, which is not a name with a whole number")
    specials, found = _added(data.get("added_tokens"), ids)
    added = {*specials, *(name for names in found for name in names)}
    plain = {token: i for token, i in ids.items() if token not in added} if added else ids
    known = {**ids, **specials, **{name: i for names in found for name, i in names.items() if i is not None}}
    return from_merges(
        plain,
        _merges(model.get("merges")),
        whole_words=bool(model.get("ignore_merges")),
        pattern=pattern,
        specials=specials,
        found=found,
        **_named(config, known, _bos(data.get("post_processor"), specials)),
    )


def _pattern(pre: Any) -> str:
    """The single pattern that splits text as a pre_tokenizer does."""
    cuts = cuts_of(pre)
    pattern = None if cuts is None else one_pattern(*cuts)
    if pattern is None:
        raise ConfigError(f"pre_tokenizer {_kind(pre)} splits text in a way that tiktoken cannot")
    return pattern


def _added(listed: Any, ids: Mapping[str, int]) -> tuple[dict[str, int], tuple[dict[str, int | None], ...]]:
    """The control tokens, and the rounds of names to search for in text (`BytePairs.found`)."""
    if not isinstance(listed, list):
        raise ValueError(f"added_tokens must be a list, got {brief(listed)}")
    specials: dict[str, int] = {}
    rounds: tuple[dict[str, int | None], ...] = ({}, {})  # `tokenizers` looks for those not normalized first
    new = len(ids)
    for token in listed:
        token = _object(token, "an added token")
        name, i = token.get("content"), token.get("id")
        flags = {flag: token.get(flag, flag == "normalized" and not token.get("special")) for flag in _FLAGS}
        if not isinstance(name, str) or type(i) is not int or not all(isinstance(f, bool) for f in flags.values()):
            raise ValueError(f"an added token must have content, id and flags, got {brief(token)}")
        if any(name in names for names in rounds):
            raise ValueError(f"added token {brief(name)} is listed twice")
        if i != ids.get(name, new):
            raise ValueError(
                f"added token {brief(name)} has id {i}, but {'model.vocab says' if name in ids else 'the next is'} "
                f"{ids.get(name, new)}"
            )
        new += name not in ids
        rounds[flags["normalized"]][name] = None if flags["special"] else i
        if flags["special"]:
            specials[name] = i
        if flags["lstrip"] or flags["rstrip"] or flags["single_word"]:
            raise ConfigError(f"added token {brief(name)} has lstrip, rstrip or single_word, which is not supported")
    kept = tuple(names for names in rounds if any(i is not None for i in names.values()))
    if kept == rounds[:1] and rounds[1]:
        raise ConfigError("control tokens that are looked for after other added tokens are not supported")
    return specials, kept


def _merges(listed: Any) -> list[Merge]:
    """The merges as pairs. A file writes each as a pair, or as two tokens with a space between."""
    if not isinstance(listed, list):
        raise ValueError(f"model.merges must be a list, got {brief(listed)}")
    merges = []
    for merge in listed:
        pair = merge.split(" ") if type(merge) is str else merge
        if type(pair) is not list or len(pair) != 2 or type(pair[0]) is not str or type(pair[1]) is not str:
            raise ValueError(f"model.merges has {brief(merge)}, which is not a pair of tokens")
        merges.append((pair[0], pair[1]))
    return merges


def _bos(processor: Any, ids: Mapping[str, int]) -> str | None:
    """The name that a post-processor puts in front of a text. A token that it puts after a text is not used."""
    if processor is None:
        return None
    parts = processor.get("processors") if _kind(processor) == "Sequence" else [processor]
    first: list[str] = []
    for part in parts if isinstance(parts, list) else [parts]:
        if _kind(part) == "TemplateProcessing" and not first:
            first = _before_text(part, ids)
        elif _kind(part) in ("BertProcessing", "RobertaProcessing") and not first:
            first = [part["cls"][0]] if isinstance(part.get("cls"), list) and part["cls"] else []
        elif _kind(part) != "ByteLevel":
            raise ConfigError(f"post_processor {_kind(part)} is not supported in this form")
    return first[0] if first else None


def _before_text(processor: Mapping[str, Any], ids: Mapping[str, int]) -> list[str]:
    single = processor.get("single")
    parts = [_object(part, "a part of the template") for part in single] if isinstance(single, list) else []
    kinds = [next(iter(part), None) for part in parts]
    if kinds.count("Sequence") != 1 or (place := kinds.index("Sequence")) > 1:
        raise ConfigError(
            f"post_processor TemplateProcessing must have at most one special token before the text, got "
            f"{brief(single)}"
        )
    if place == 0:
        return []
    name = _object(parts[0]["SpecialToken"], "a part of the template").get("id")
    given = _object(processor.get("special_tokens"), "special_tokens").get(name) if isinstance(name, str) else None
    if not isinstance(name, str) or name not in ids or _object(given, "a special token").get("ids") != [ids[name]]:
        raise ConfigError(f"post_processor puts {brief(name)} in front of a text, which is not one token of it")
    return [name]


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be an object, got {brief(value)}")
    return value


def _kind(value: Any) -> str:
    """The type of a part of the file, for errors."""
    kind = value.get("type") if isinstance(value, dict) else value
    return kind if isinstance(kind, str) else brief(kind)


# ---- writing -----------------------------------------------------------------------------------------------


def _contents(vocabulary: BytePairs) -> dict[str, Any]:
    """The contents of a tokenizer.json for a vocabulary."""
    plain = {spelled(token): i for token, i in {**vocabulary.tokens, **vocabulary.silent}.items()}
    # `tokenizers` looks first for added tokens that are not normalized. Control tokens in no round come before any.
    flags = {name: (False, True) for name in vocabulary.specials}
    ids = dict(vocabulary.specials)
    for normalized, names in zip((len(vocabulary.found) == 1, True), vocabulary.found, strict=False):
        for name, i in names.items():
            flags[name] = (normalized, i is None)
            ids |= {} if i is None else {name: i}
    if both := plain.keys() & ids.keys():
        raise ConfigError(f"a tokenizer.json cannot hold both the token and the special token spelled {min(both)!r}")
    # Added tokens that the model does not list get the ids after it, so those before its last one are listed in it too.
    last = max(plain.values())
    bos = vocabulary.bos_id
    return byte_level_json.contents(
        vocab=plain | {name: i for name, i in ids.items() if i < last},
        merges=[f"{spelled(left)} {spelled(right)}" for left, right in every_split(list(vocabulary.tokens))],
        added=[(i, name, *flags[name]) for name, i in ids.items()],
        pre_tokenizer=pre_tokenizer_of(*cuts_by(vocabulary.pattern)),
        bos=None if bos is None else (vocabulary.by_id[bos].decode(), bos),
        # Where there are silent tokens, the merges make all others, and would not make a word one of the silent.
        ignore_merges=not vocabulary.silent,
    )
