"""Byte-level BPE in a tokenizer.json: how the file splits text into words, and the making of a whole file."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_jax.text.patterns import DIGITS

_SPLIT = {"type": "Split", "pattern": None, "behavior": "Isolated", "invert": False}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_NO_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False}
_DIGITS = {"type": "Digits", "individual_digits": True}


def cuts_of(pre_tokenizer: Any) -> tuple[tuple[str, ...], bool] | None:
    """The split patterns of a tokenizer.json's pre_tokenizer, and whether GPT-2's pattern splits last (see
    `patterns.Pre`).

    Returns None if the pre_tokenizer does anything else.
    """
    sequence = isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "Sequence"
    parts = pre_tokenizer.get("pretokenizers") if sequence else [pre_tokenizer]
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        return None
    last = {"use_regex": True, **parts[-1], "trim_offsets": True}  # offsets do not change ids
    if last not in (_BYTES, _BYTES | {"use_regex": True}):
        return None
    splits = []
    for part in parts[:-1]:
        regex = part["pattern"].get("Regex") if isinstance(part.get("pattern"), dict) else None
        if part == _DIGITS:
            splits.append(DIGITS)
        elif isinstance(regex, str) and part == _SPLIT | {"pattern": {"Regex": regex}}:
            splits.append(regex)
        else:
            return None
    return tuple(splits), last["use_regex"]


def pre_tokenizer_of(splits: Sequence[str], gpt2: bool) -> dict[str, Any]:
    """The pre_tokenizer with these split patterns; the inverse of `cuts_of`."""
    parts = [_DIGITS if split == DIGITS else _SPLIT | {"pattern": {"Regex": split}} for split in splits]
    parts.append(_BYTES | {"use_regex": gpt2})
    return parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}


def contents(
    *,
    vocab: Mapping[str, int],
    merges: Sequence[str],
    added: Iterable[tuple[int, str, bool, bool]],
    pre_tokenizer: Mapping[str, Any],
    bos: tuple[str, int] | None,
    ignore_merges: bool,
) -> dict[str, Any]:
    """The contents of a tokenizer.json for a byte-level BPE vocabulary.

    Args:
        vocab: ids by token; tokens are spelled with one printable character for each byte.
        merges: pairs of tokens, each written with a space between the two, in order.
        added: added tokens, each as (id, name, normalized, special).
        pre_tokenizer: see `pre_tokenizer_of`.
        bos: name and id of the token that begins a text, or None.
        ignore_merges: True if a word that is a token is encoded as that token, whatever the merges.
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **_NO_FLAGS, "normalized": normalized, "special": special}
            for i, name, normalized, special in sorted(added)
        ],
        "normalizer": None,
        "pre_tokenizer": dict(pre_tokenizer),
        "post_processor": _BYTES if bos is None else _bos_first(*bos),
        "decoder": _BYTES | {"add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": list(merges),
        },
    }


def _bos_first(name: str, i: int) -> dict[str, Any]:
    """The post_processor that puts a token in front of a text."""
    bos = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": name, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": bos,
        "pair": bos + second,
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]}},
    }
