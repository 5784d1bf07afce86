"""Conversion of a tokenizer.json of Llama 2's kind to a SentencePiece model with the same ids."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.errors import ConfigError
from llama_jax.text import piece_vocabulary
from llama_jax.text.library_vocabulary import LibraryVocabulary
from llama_jax.text.piece_vocabulary import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    PieceModel,
    PieceVocabulary,
)

_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}


def to_pieces(original: LibraryVocabulary) -> PieceVocabulary:
    """Converts a vocabulary for the `tokenizers` library to one for SentencePiece that gives the same ids.

    SentencePiece joins the two neighbors that form the piece with the highest score. A list of merges is equivalent if,
    for one piece after another, it lists all pairs of tokens that form the piece. The scores then follow the order of
    the pieces.

    Raises:
        ConfigError: no SentencePiece model gives the same ids.
    """
    data = json.loads(original.contents)
    model = data["model"]
    space_first = _space_first(data)
    if model.get("type") != "BPE" or space_first is None or model.get("ignore_merges") or not original.unknown:
        raise ConfigError(
            "this tokenizer.json is neither byte-level BPE nor BPE in SentencePiece's form, the two that a GGUF file "
            "can describe: export another format"
        )
    vocab = model["vocab"]
    added = {token["id"]: token for token in data["added_tokens"]}
    plain = [text for text, i in vocab.items() if i not in added and not piece_vocabulary.is_byte_name(text)]
    scores = _scores(set(plain), model["merges"])
    texts = {i: text for text, i in vocab.items()} | {i: token["content"] for i, token in added.items()}
    pieces = []
    for i in range(original.size):
        text = texts.get(i, f"[UNUSED_{i}]")
        kind = NORMAL
        if text == original.unknown:
            kind = UNKNOWN
        elif i in added:
            kind = CONTROL if added[i]["special"] else USER_DEFINED
        elif model.get("byte_fallback") and piece_vocabulary.is_byte_name(text):
            kind = BYTE
        pieces.append(Piece(text, scores.get(text, 0.0), kind))
    made = PieceModel(
        pieces=tuple(pieces),
        algorithm=BPE,
        byte_fallback=bool(model.get("byte_fallback")),
        space_first=space_first,
        strip_spaces=False,
    )
    return piece_vocabulary.piece_vocabulary(
        piece_vocabulary.model_contents(made),
        specials={name: i for name, i in original.specials.items() if name != original.unknown},
        bos_id=original.bos_id,
        declared_eos=original.declared_eos,
        declared_pad=original.declared_pad,
    )


def _space_first(data: Mapping[str, Any]) -> bool | None:
    """True if a space is put in front of a text, False if not; None if text is changed or split in other ways."""
    normalizer, pre = data.get("normalizer"), data.get("pre_tokenizer")
    if pre is None and isinstance(normalizer, dict):
        steps = normalizer.get("normalizers") if normalizer.get("type") == "Sequence" else [normalizer]
        return True if steps == [_PREPEND, _REPLACE] else False if steps == [_REPLACE] else None
    if normalizer is None and isinstance(pre, dict) and pre.get("type") == "Metaspace" and pre.get("split") is False:
        return pre.get("prepend_scheme") != "never" if pre.get("replacement") == SPACE else None
    return None


def _scores(plain: set[str], merges: Sequence[Any]) -> dict[str, float]:
    """The score of each token that merges form. ConfigError if no scores are equivalent to the merges."""
    scores: dict[str, float] = {}
    last = ""
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        piece = left + right
        if piece != last and piece in scores:
            raise ConfigError(
                "the merges of a token are not listed together, so that no scores of pieces are equivalent"
            )
        scores.setdefault(piece, -float(len(scores)))
        last = piece
    splits = sum(text[:i] in plain and text[i:] in plain for text in plain for i in range(1, len(text)))
    if len(merges) != splits or not scores.keys() <= plain:
        raise ConfigError(
            "the merges are not all pairs of tokens that form a token, so that no scores of pieces are equivalent"
        )
    return scores
