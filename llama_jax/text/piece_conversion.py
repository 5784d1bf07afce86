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
    """A vocabulary of pieces with the same ids.

    SentencePiece joins the two neighbours whose piece has the highest score. A list of merges means the same if it
    lists, piece after piece, every pair of tokens that makes the piece; the scores are then the order of the pieces.

    Raises:
        ConfigError: a vocabulary of another kind.
    """
    data = json.loads(original.contents)
    model = data["model"]
    space_first = _space_first(data)
    if model.get("type") != "BPE" or space_first is None or model.get("ignore_merges") or not original.unknown:
        raise ConfigError("its way from text to ids is neither byte-level BPE nor SentencePiece's")
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
    """True if a space is put in front of a text, False if not; None if the text is changed or cut in any other way."""
    normalizer, pre = data.get("normalizer"), data.get("pre_tokenizer")
    if pre is None and isinstance(normalizer, dict):
        steps = normalizer.get("normalizers") if normalizer.get("type") == "Sequence" else [normalizer]
        return True if steps == [_PREPEND, _REPLACE] else False if steps == [_REPLACE] else None
    if normalizer is None and isinstance(pre, dict) and pre.get("type") == "Metaspace" and pre.get("split") is False:
        return pre.get("prepend_scheme") != "never" if pre.get("replacement") == SPACE else None
    return None


def _scores(plain: set[str], merges: Sequence[Any]) -> dict[str, float]:
    """A score for each token that merges form. ConfigError unless the list has all its merges, token after token."""
    scores: dict[str, float] = {}
    last = ""
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        piece = left + right
        if piece != last and piece in scores:
            raise ConfigError("its merges are in an order that no scores of pieces have")
        scores.setdefault(piece, -float(len(scores)))
        last = piece
    splits = sum(text[:i] in plain and text[i:] in plain for text in plain for i in range(1, len(text)))
    if len(merges) != splits or not scores.keys() <= plain:
        raise ConfigError("its merges are not all pairs of tokens that make a token, as scores of pieces mean")
    return scores
