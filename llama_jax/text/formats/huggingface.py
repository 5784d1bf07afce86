"""Hugging Face's `tokenizer.json`, read into a `Vocabulary` and written from one.

Read are byte-level BPEs whose way of cutting text is known here by name; then ids equal those of the `tokenizers`
library on every text (with its `encode_special_tokens`, since control tokens never come from text here). Whatever else
would change ids is refused by its name. `truncation` and `padding` are not read, as in `transformers`.

Other patterns than those known are refused too: a pattern is a program that comes with a file. The engines read some of
it differently (\\w, $, possessive intervals), and it may take for ever, or miss characters, which tiktoken would drop.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import ConfigError, brief
from llama_jax.files import read_json, write_whole
from llama_jax.text.byte_pairs import BytePairs
from llama_jax.text.merging import Merge, every_split, in_merge_order
from llama_jax.text.patterns import DIGITS_PATTERN, GPT2_PATTERN, ONE_DIGIT_PATTERN, SPLIT_PATTERN
from llama_jax.text.vocabulary import spelled, unspelled

_MAX_BYTES = 32_000_000  # Llama 3's has 7 to 17 million
_BY_IDS = "the model itself can still be used with token ids"

_SPLIT = {"type": "Split", "pattern": None, "behavior": "Isolated", "invert": False}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = _BYTES | {"use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
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


def read(path: str | os.PathLike[str]) -> BytePairs:
    """The vocabulary of a `tokenizer.json`, with the end of text that the files beside it name.

    Those are `tokenizer_config.json` and, where that names none, `special_tokens_map.json`. What stands in front of a
    text is for the post-processor to say.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: its ids cannot be reproduced exactly; names the part of the file that is the reason.
        ValueError: a damaged file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the path of a tokenizer.json or a tokenizer.model")
    data = read_json(path, max_bytes=_MAX_BYTES)
    eos = _end_of_text(path.parent)
    try:
        return _vocabulary(data, eos)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; {_BY_IDS}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write(
    vocabulary: BytePairs,
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
        ConfigError: two of its tokens are spelled alike in such a file.
    """
    folder = Path(folder)
    named = {
        f"{kind}_token": vocabulary.by_id[i].decode()
        for kind, i in (("bos", vocabulary.bos_id), ("eos", vocabulary.eos_id), ("pad", vocabulary.pad_id))
        if i is not None
    }
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= named | ({"model_max_length": model_max_length} if model_max_length else {})
    for name, value in (
        ("tokenizer.json", _contents(vocabulary)),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", named),
    ):
        write_whole(folder / name, (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())


# ---- reading -----------------------------------------------------------------------------------------------


def _vocabulary(data: Mapping[str, Any], eos: str | None) -> BytePairs:
    if data.get("normalizer") is not None:
        raise ConfigError(f"normalizer {_kind(data['normalizer'])} is not supported, only null")
    if _kind(data.get("decoder")) != "ByteLevel":
        raise ConfigError(f"decoder {_kind(data.get('decoder'))} is not supported, only ByteLevel")
    pattern = _pattern(data.get("pre_tokenizer"))
    model = _object(data.get("model"), "model")
    for key, value in model.items():
        if key not in _MODEL and key not in _MODEL_FREE:
            raise ConfigError(f"model.{key} is not known here; known: {', '.join((*_MODEL, *sorted(_MODEL_FREE)))}")
        if key in _MODEL and value not in _MODEL[key]:
            raise ConfigError(f"model.{key} must be {_MODEL[key][0]} (byte-level BPE), got {brief(value)}")
    ids = _object(model.get("vocab"), "model.vocab")
    for token, i in ids.items():
        if type(i) is not int or not token:
            raise ValueError(f"model.vocab has {token[:60]!r}: {brief(i)}, which is not a name with a whole number")
    specials, found = _added(data.get("added_tokens"), ids)
    added = {*specials, *(name for names in found for name in names)}
    plain = {token: i for token, i in ids.items() if token not in added} if added else ids
    as_bytes = {token: unspelled(token) for token in plain}
    order, silent = in_merge_order(plain, _merges(model.get("merges")), whole_words=bool(model.get("ignore_merges")))
    known = specials | {name: i for names in found for name, i in names.items() if i is not None}
    if eos is not None and eos not in known:
        raise ValueError(f"eos_token {eos[:60]!r}, in the files beside it, is none of its added tokens")
    return BytePairs(
        tokens={as_bytes[token]: ids[token] for token in order},
        specials=specials,
        pattern=pattern,
        bos_id=_bos(data.get("post_processor"), specials),
        declared_eos=None if eos is None else known[eos],
        silent={as_bytes[token]: ids[token] for token in silent},
        found=found,
    )


def _pattern(pre: Any) -> str:
    """The one pattern that cuts text as a pre_tokenizer does."""
    listed = pre.get("pretokenizers") if _kind(pre) == "Sequence" else [pre]
    parts = listed if isinstance(listed, list) and all(isinstance(part, dict) for part in listed) else []
    kinds = [_kind(part) for part in parts]
    bare = [{"use_regex": True} | part for part in parts]
    if kinds and kinds[-1] == "ByteLevel":
        last = {key: bare[-1].get(key) for key in _BYTES if key != "trim_offsets"}  # which is not about ids
        if last["add_prefix_space"] is not False:
            raise ConfigError("pre_tokenizer ByteLevel has add_prefix_space, which is not supported")
        if kinds == ["ByteLevel"] and last["use_regex"] is True:
            return GPT2_PATTERN
        if parts[:-1] == [_DIGITS] and last["use_regex"] is True:
            return DIGITS_PATTERN
        if kinds == ["Split", "ByteLevel"] and last["use_regex"] is False and _SPLIT == parts[0] | {"pattern": None}:
            pattern = parts[0].get("pattern")
            known = (SPLIT_PATTERN, ONE_DIGIT_PATTERN, GPT2_PATTERN)
            if pattern in [{"Regex": regex} for regex in known]:
                return pattern["Regex"]
            raise ConfigError(
                f"pre_tokenizer Split has the pattern {brief(pattern)}, not that of Llama 3, Qwen 2 or GPT-2"
            )
    raise ConfigError(
        f"pre_tokenizer {' + '.join(kinds) or brief(pre)} is not supported in this form, only ByteLevel with use_regex "
        "(and individual Digits before it), or Split (Regex, Isolated) before ByteLevel without use_regex"
    )


def _added(listed: Any, ids: Mapping[str, int]) -> tuple[dict[str, int], tuple[dict[str, int | None], ...]]:
    """The control tokens, and what is found in text (`Vocabulary.found`)."""
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
        elif flags["lstrip"] or flags["rstrip"] or flags["single_word"]:
            raise ConfigError(f"added token {brief(name)} has lstrip, rstrip or single_word, which is not supported")
    return specials, tuple(names for names in rounds if any(i is not None for i in names.values()))


def _merges(listed: Any) -> list[Merge]:
    """Pairs, from pairs or from two tokens with a space between."""
    if not isinstance(listed, list):
        raise ValueError(f"model.merges must be a list, got {brief(listed)}")
    merges = []
    for merge in listed:
        pair = merge.split(" ") if type(merge) is str else merge
        if type(pair) is not list or len(pair) != 2 or type(pair[0]) is not str or type(pair[1]) is not str:
            raise ValueError(f"model.merges has {brief(merge)}, which is not a pair of tokens")
        merges.append((pair[0], pair[1]))
    return merges


def _bos(processor: Any, specials: Mapping[str, int]) -> int | None:
    """What a post-processor puts in front of a text."""
    parts = processor.get("processors") if _kind(processor) == "Sequence" else [processor]
    if processor is None:
        return None
    first: list[str] = []
    for part in parts if isinstance(parts, list) else [parts]:
        if _kind(part) == "TemplateProcessing" and not first:
            first = _before_text(part, specials)
        elif _kind(part) != "ByteLevel":
            raise ConfigError(
                f"post_processor {_kind(part)} is not supported, only ByteLevel and one TemplateProcessing"
            )
    return specials[first[0]] if first else None


def _before_text(processor: Mapping[str, Any], specials: Mapping[str, int]) -> list[str]:
    single = processor.get("single")
    parts = [_object(part, "a part of the template") for part in single] if isinstance(single, list) else []
    kinds = [list(part) for part in parts]
    if kinds not in ([["Sequence"]], [["SpecialToken"], ["Sequence"]]):
        raise ConfigError(
            f"post_processor TemplateProcessing must be one special token, then the text, got {brief(single)}"
        )
    if len(parts) == 1:
        return []
    name = _object(parts[0]["SpecialToken"], "a part of the template").get("id")
    if not isinstance(name, str) or name not in specials:
        raise ConfigError(f"post_processor puts {brief(name)} in front of a text, which is not a special token")
    given = _object(processor.get("special_tokens"), "special_tokens").get(name)
    if _object(given, "a special token").get("ids") != [specials[name]]:
        raise ConfigError(f"post_processor says that {name!r} is {brief(given)}, but its id is {specials[name]}")
    return [name]


def _end_of_text(folder: Path) -> str | None:
    """The eos_token that the files beside a tokenizer.json name."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (folder / name).is_file():
            continue
        token = read_json(folder / name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
        if token is not None:
            raise ValueError(f"{folder / name}: eos_token must be a name, got {brief(token)}")
    return None


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be an object, got {brief(value)}")
    return value


def _kind(value: Any) -> str:
    """What a part of the file is called in errors: its type."""
    kind = value.get("type") if isinstance(value, dict) else value
    return kind if isinstance(kind, str) else brief(kind)


# ---- writing -----------------------------------------------------------------------------------------------


def _contents(vocabulary: BytePairs) -> dict[str, Any]:
    """The whole of a tokenizer.json."""
    plain = {spelled(token): i for token, i in (vocabulary.tokens | vocabulary.silent).items()}
    # `tokenizers` looks first for added tokens that are not normalized. Those in no round must be in none that matters.
    flags = {name: {"normalized": len(vocabulary.found) == 1, "special": True} for name in vocabulary.specials}
    ids = dict(vocabulary.specials)
    for normalized, names in zip((False, True), vocabulary.found, strict=False):
        for name, i in names.items():
            flags[name] = {"normalized": normalized, "special": i is None}
            ids |= {} if i is None else {name: i}
    if both := plain.keys() & ids.keys():
        raise ConfigError(f"a tokenizer.json cannot hold both the token and the special token spelled {min(both)!r}")
    # Added tokens that the model does not list get the ids after it, so those before its last one are listed in it too.
    last = max(plain.values())
    vocab = plain | {name: i for name, i in ids.items() if i < last}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, **flags[name]}
            for name, i in sorted(ids.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(vocabulary.pattern),
        "post_processor": _post_processor(vocabulary),
        "decoder": _BYTES | {"add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # Where there are silent tokens, the merges make all others, and would not make a word one of the silent.
            "ignore_merges": not vocabulary.silent,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [f"{spelled(left)} {spelled(right)}" for left, right in every_split(list(vocabulary.tokens))],
        },
    }


def _pre_tokenizer(pattern: str) -> dict[str, Any]:
    if pattern == GPT2_PATTERN:
        return _GPT2
    parts = [_DIGITS, _GPT2] if pattern == DIGITS_PATTERN else [_SPLIT | {"pattern": {"Regex": pattern}}, _BYTES]
    return {"type": "Sequence", "pretokenizers": parts}


def _post_processor(vocabulary: BytePairs) -> dict[str, Any]:
    if vocabulary.bos_id is None:
        return _BYTES
    name = vocabulary.by_id[vocabulary.bos_id].decode()
    bos = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": name, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": bos,
        "pair": bos + second,
        "special_tokens": {name: {"id": name, "ids": [vocabulary.bos_id], "tokens": [name]}},
    }
