"""The vocabulary in the metadata of a GGUF file: read into a vocabulary, and made from one.

Facts about the format are llama.cpp's (`llama-vocab.cpp`, and `docs/gguf.md` of ggml). `tokenizer.ggml.model` is "gpt2"
for byte-level BPE, with merges and the name of a pre-tokenizer, and "llama" or "t5" for SentencePiece, with scores.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np

from llama_jax.errors import ConfigError, brief, nearest
from llama_jax.gguf_header import Value, shown
from llama_jax.text import byte_level_json, piece_vocabulary
from llama_jax.text.byte_level_json import cuts_of, pre_tokenizer_of
from llama_jax.text.byte_pairs import BytePairs, from_merges
from llama_jax.text.library_vocabulary import LibraryVocabulary
from llama_jax.text.merging import every_split, in_merge_order
from llama_jax.text.patterns import PRE_TOKENIZERS, Pre, one_pattern
from llama_jax.text.piece_conversion import to_pieces
from llama_jax.text.piece_vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    PieceModel,
    PieceVocabulary,
)
from llama_jax.text.vocabulary import Vocabulary, errors_of, spelled

_ALGORITHMS = {"llama": piece_vocabulary.BPE, "t5": piece_vocabulary.UNIGRAM}


class _Ends(TypedDict):
    bos: int | None
    eos: int | None
    add_bos: bool | None


class Fields(_Ends):
    """The tokenizer metadata of a GGUF file. A field is None if its key is absent.

    Attributes:
        model: tokenizer.ggml.model.
        pre: name of the pre-tokenizer ("gpt2" only).
        tokens: token texts by id.
        token_types: types by id: 1 normal, 2 unknown, 3 control, 4 user-defined (recognized anywhere in a text), 5
            unused, 6 byte.
        merges: pairs of tokens, each written with a space between the two, in order ("gpt2" only).
        bos: id that begins a text.
        eos: id that ends a text.
        add_bos: True if a text begins with `bos`; None leaves it to `model` and `pre`.
        scores: scores by id (SentencePiece only).
        unknown: id of the unknown piece.
        pad: id of padding.
        space_first: True if a space is put in front of a text.
        strip_spaces: True if runs of spaces become one space.
        character_map: compiled replacements of characters.
    """

    model: str
    pre: str | None
    tokens: list[str]
    token_types: Sequence[int] | np.ndarray | None
    merges: list[str]
    scores: NotRequired[Sequence[float] | np.ndarray | None]
    unknown: NotRequired[int | None]
    pad: NotRequired[int | None]
    space_first: NotRequired[bool | None]
    strip_spaces: NotRequired[bool | None]
    character_map: NotRequired[bytes | None]


def fields_of(metadata: Mapping[str, Value], source: str) -> Fields | None:
    """The tokenizer metadata among a file's metadata, or None if it has none.

    Raises:
        ValueError: keys of a wrong type or that do not agree (one line that begins with `source`).
    """
    keys = _Keys(metadata, source)
    model = keys.typed("model", str)
    if model is None or model in ("no_vocab", "none"):
        return None
    tokens = keys.typed("tokens", list)
    if not tokens:
        raise ValueError(f"{source}: tokenizer.ggml.model is {brief(model)}, but tokenizer.ggml.tokens is missing")
    character_map = keys.typed("precompiled_charsmap", np.ndarray)
    return Fields(
        model=model,
        pre=keys.typed("pre", str),
        tokens=tokens,
        token_types=keys.numbers("token_type", "iu", len(tokens)),
        merges=keys.typed("merges", list) or [],
        bos=keys.special("bos"),
        eos=keys.special("eos"),
        add_bos=keys.typed("add_bos_token", bool),
        scores=keys.numbers("scores", "iuf", len(tokens)),
        unknown=keys.special("unknown"),
        pad=keys.special("padding"),
        space_first=keys.typed("add_space_prefix", bool),
        strip_spaces=keys.typed("remove_extra_whitespaces", bool),
        character_map=None if character_map is None else character_map.tobytes(),
    )


class _Keys:
    """The values of keys that begin with tokenizer.ggml, each checked for its type."""

    def __init__(self, metadata: Mapping[str, Value], source: str) -> None:
        self._metadata, self._source = metadata, source

    def typed(self, name: str, kind: type) -> Any:
        """A value of this type, or None if the file has none."""
        value = self._metadata.get(f"tokenizer.ggml.{name}")
        if value is not None and not isinstance(value, kind):
            raise ValueError(
                f"{self._source}: tokenizer.ggml.{name} must be of type {kind.__name__}, got {shown(value)}"
            )
        return value

    def special(self, name: str) -> int | None:
        """The id of a token with a role, or None; llama.cpp writes -1 for none."""
        token = self.typed(f"{name}_token_id", int)
        return token if token is not None and 0 <= token < 1 << 31 else None

    def numbers(self, name: str, kinds: str, count: int) -> np.ndarray | None:
        """An array of one number for each token, of numpy's `kinds`, or None."""
        array = self.typed(name, np.ndarray)
        if array is not None and (array.dtype.kind not in kinds or len(array) != count):
            what = "whole numbers" if kinds == "iu" else "numbers"
            raise ValueError(
                f"{self._source}: tokenizer.ggml.{name} must be {count:,} {what}, one a token, got {len(array):,} of "
                f"{array.dtype}"
            )
        return array


def vocabulary(fields: Fields, source: str = "") -> Vocabulary:
    """The vocabulary that a file's metadata describes.

    Args:
        fields: tokenizer metadata.
        source: path of the file, which errors then begin with.

    Raises:
        ConfigError: the tokenizer's kind is not supported. The message has the reason.
        ValueError: keys of the metadata contradict each other.
    """
    with errors_of(source):
        unknown, pad = fields.get("unknown"), fields.get("pad")
        for name, token in (("bos", fields["bos"]), ("eos", fields["eos"]), ("unknown", unknown), ("pad", pad)):
            if token is not None and not 0 <= token < len(fields["tokens"]):
                raise ValueError(
                    f"tokenizer.ggml.{name}_token_id is {token}, but there are {len(fields['tokens']):,} tokens"
                )
        if fields["model"] == "gpt2":
            return _byte_level(fields)
        if fields["model"] in _ALGORITHMS:
            return _pieces(fields)
        known = ", ".join(("gpt2", *_ALGORITHMS))
        raise ConfigError(f"tokenizer.ggml.model {brief(fields['model'])} is not supported, only {known}")


# ---- byte-level BPE ----------------------------------------------------------------------------------------


def _byte_level(fields: Fields) -> BytePairs | LibraryVocabulary:
    """A byte-level BPE vocabulary: for tiktoken if that gives the same ids, else for the `tokenizers` library."""
    pre = PRE_TOKENIZERS.get(fields["pre"] or "")
    if pre is None:
        near = nearest(str(fields["pre"]), list(PRE_TOKENIZERS))
        raise ConfigError(f"tokenizer.ggml.pre {brief(fields['pre'])} is not supported{near}")
    specials, found, ids = _by_type(fields)
    bos = fields["bos"] if (pre.add_bos if fields["add_bos"] is None else fields["add_bos"]) else None
    named = {"bos_id": bos, "declared_eos": fields["eos"], "declared_pad": fields.get("pad")}
    pairs = [merge.split(" ") for merge in fields["merges"]]
    if wrong := [merge for merge, pair in zip(fields["merges"], pairs, strict=True) if len(pair) != 2]:
        raise ValueError(f"tokenizer.ggml.merges has {wrong[0][:60]!r}, which is not two tokens with a space between")
    pattern = one_pattern(pre.splits, pre.gpt2)
    try:
        if pattern is None:
            raise ConfigError("tiktoken cannot split text as its pre-tokenizer does")
        return from_merges(
            ids,
            [(left, right) for left, right in pairs],
            whole_words=pre.whole_words,
            pattern=pattern,
            specials=specials,
            found=(found,) if found else (),
            **named,
        )
    except ValueError as fault:
        try:
            data = _contents(fields, pre, specials, found, ids, bos)
            return LibraryVocabulary.of(data, lambda _: named)
        except ConfigError as error:
            raise error if isinstance(fault, ConfigError) else fault from None


def _by_type(fields: Fields) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Control tokens, user-defined tokens, and all other tokens, as dicts from name to id."""
    tokens, types = fields["tokens"], fields["token_types"]
    if types is None or len(types) != len(tokens):
        count = 0 if types is None else len(types)
        raise ValueError(f"tokenizer.ggml.token_type has {count:,} types for {len(tokens):,} tokens")
    specials: dict[str, int] = {}
    found: dict[str, int] = {}
    ids: dict[str, int] = {}
    of_type = {NORMAL: ids, CONTROL: specials, UNUSED: specials, UNKNOWN: specials, USER_DEFINED: found}
    for i, (token, kind) in enumerate(zip(tokens, map(int, types), strict=True)):
        if kind not in of_type:
            raise ConfigError(f"tokenizer.ggml.token_type of id {i} is {kind}, which byte-level BPE does not have")
        if token in of_type[kind]:
            raise ValueError(f"tokenizer.ggml.tokens has {token[:60]!r} twice, as ids {of_type[kind][token]} and {i}")
        of_type[kind][token] = i
    return specials, found, ids


def _contents(
    fields: Fields,
    pre: Pre,
    specials: Mapping[str, int],
    found: Mapping[str, int],
    ids: Mapping[str, int],
    bos: int | None,
) -> dict[str, Any]:
    """The contents of a tokenizer.json with the same vocabulary."""
    if both := (ids.keys() & specials.keys()) | (ids.keys() & found.keys()) | (found.keys() & specials.keys()):
        raise ConfigError(f"tokenizer.ggml.tokens has {min(both)[:60]!r} twice")
    added = [(i, name, False, True) for name, i in specials.items()]
    added += [(i, name, False, False) for name, i in found.items()]
    return byte_level_json.contents(
        vocab={**ids, **specials, **found},
        merges=fields["merges"],
        added=added,
        pre_tokenizer=pre_tokenizer_of(pre.splits, pre.gpt2),
        bos=None if bos is None else (fields["tokens"][bos], bos),
        ignore_merges=pre.whole_words,
    )


# ---- SentencePiece -----------------------------------------------------------------------------------------


def _pieces(fields: Fields) -> PieceVocabulary:
    """A vocabulary for SentencePiece, with a model file made from the metadata.

    As in llama.cpp, user-defined tokens are cut out of a text before SentencePiece sees it, and the text after one gets
    a space in front like a whole text.
    """
    is_bpe = fields["model"] == "llama"
    bos, eos, unknown = fields["bos"], fields["eos"], fields.get("unknown")
    size = len(fields["tokens"])
    if is_bpe:  # llama.cpp's defaults
        bos, eos, unknown = (
            default if token is None and default < size else token
            for token, default in ((bos, 1), (eos, 2), (unknown, 0))
        )
    pieces = _typed_pieces(fields, unknown)
    found = {name: i for i, name in enumerate(fields["tokens"]) if _type_of(fields, i) == USER_DEFINED}
    specials = {piece.text: i for i, piece in enumerate(pieces) if piece.type == CONTROL and piece.text not in found}
    space_first, strip_spaces = fields.get("space_first"), fields.get("strip_spaces")
    model = PieceModel(
        pieces=tuple(pieces),
        algorithm=_ALGORITHMS[fields["model"]],
        byte_fallback=sum(piece.type == BYTE for piece in pieces) == 256,
        space_first=True if space_first is None else space_first,
        strip_spaces=bool(strip_spaces),
        character_map=fields.get("character_map") or b"",
    )
    add_bos = is_bpe if fields["add_bos"] is None else fields["add_bos"]
    return piece_vocabulary.piece_vocabulary(
        piece_vocabulary.model_contents(model),
        specials=specials,
        found=found,
        bos_id=bos if add_bos else None,
        declared_eos=eos,
        declared_pad=fields.get("pad"),
    )


def _type_of(fields: Fields, i: int) -> int:
    types = fields["token_types"]
    return NORMAL if types is None else int(types[i])


def _typed_pieces(fields: Fields, unknown: int | None) -> list[Piece]:
    """The pieces by id, with exactly one unknown piece, as SentencePiece needs."""
    tokens, scores = fields["tokens"], fields.get("scores")
    if scores is None or len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores must be {len(tokens):,} numbers, one a token, got none")
    types = [_type_of(fields, i) for i in range(len(tokens))]
    if unknown is None or UNKNOWN in types:
        unknown = types.index(UNKNOWN) if UNKNOWN in types else None
    if unknown is None:
        raise ConfigError("the vocabulary has no unknown token, which SentencePiece needs")
    byte_names = {token for token in tokens if piece_vocabulary.is_byte_name(token)}
    pieces: list[Piece] = []
    seen: dict[str, int] = {}
    for i, (token, score, kind) in enumerate(zip(tokens, map(float, scores), types, strict=True)):
        if i == unknown:
            kind = UNKNOWN
        elif kind == UNKNOWN or kind == USER_DEFINED:
            kind = CONTROL  # which SentencePiece never finds in text
        elif len(byte_names) == 256 and token in byte_names:
            kind = BYTE
        elif kind == 0:
            kind = NORMAL
        text = token or f"[EMPTY_{i}]"  # as in llama.cpp
        if not math.isfinite(score):
            raise ValueError(f"tokenizer.ggml.scores of id {i} is {score}")
        if text in seen:
            raise ValueError(f"tokenizer.ggml.tokens has {text[:60]!r} twice, as ids {seen[text]} and {i}")
        seen[text] = i
        pieces.append(Piece(text, score, kind))
    return pieces


# ---- writing -----------------------------------------------------------------------------------------------


def fields(original: Vocabulary, *, rows: int | None = None) -> Fields:
    """The metadata of a GGUF file with which llama.cpp, and `vocabulary` here, encode text to the same ids.

    Args:
        original: vocabulary to write.
        rows: number of ids that the model has; added tokens beyond them are dropped. None keeps all.

    Raises:
        ConfigError: a GGUF file cannot describe such a vocabulary.
    """
    common: _Ends = {
        "bos": original.bos_id,
        "eos": original.eos_id,
        "add_bos": original.bos_id is not None,
    }
    if isinstance(original, BytePairs):
        made = _fields_of_byte_pairs(original, common)
    elif isinstance(original, LibraryVocabulary):
        made = _fields_of_library(original, common)
    elif isinstance(original, PieceVocabulary):
        made = _fields_of_pieces(original, common)
    else:
        raise TypeError(f"no GGUF metadata for {type(original).__name__}")
    if rows is not None and original.plain_size <= rows < original.size:
        made["tokens"] = made["tokens"][:rows]
        if (types := made["token_types"]) is not None:
            made["token_types"] = types[:rows]
        if (scores := made.get("scores")) is not None:
            made["scores"] = scores[:rows]
        made["bos"], made["eos"], made["pad"] = (
            None if token is None or token >= rows else token for token in (made["bos"], made["eos"], made.get("pad"))
        )
    return made


def _fields_of_byte_pairs(original: BytePairs, common: _Ends) -> Fields:
    pre = next(name for name, pre in PRE_TOKENIZERS.items() if one_pattern(pre.splits, pre.gpt2) == original.pattern)
    whole_words = PRE_TOKENIZERS[pre].whole_words
    plain = {spelled(token): i for token, i in original.tokens.items()}
    merges = [(spelled(left), spelled(right)) for left, right in every_split(list(original.tokens))]
    unmade = [] if whole_words else in_merge_order(plain, merges, whole_words=False)[1]
    if unmade or (whole_words and original.silent):
        raise ConfigError(
            f"llama.cpp's pre-tokenizer {pre!r} {'always' if whole_words else 'never'}encodes a word as a token that "
            "no merges form, unlike this vocabulary, so that a GGUF file cannot describe it: export another format"
        )
    if len(original.found) > 1:
        raise ConfigError(
            "this vocabulary searches a text for added tokens twice, which a GGUF file cannot describe: export another "
            "format"
        )
    kinds = dict.fromkeys(original.specials.values(), CONTROL)
    kinds |= {i: USER_DEFINED for names in original.found for i in names.values() if i is not None}
    return Fields(
        model="gpt2",
        pre=pre,
        tokens=[name.decode() if i in kinds else spelled(name) for i, name in enumerate(original.by_id)],
        token_types=[kinds.get(i, NORMAL) for i in range(original.size)],
        merges=[f"{left} {right}" for left, right in merges],
        **common,
    )


def _fields_of_library(original: LibraryVocabulary, common: _Ends) -> Fields:
    data = json.loads(original.contents)
    model, cuts = data["model"], cuts_of(data.get("pre_tokenizer"))
    is_byte_level = (original.decoder or {}).get("type") == "ByteLevel" and data.get("normalizer") is None
    if model.get("type") != "BPE" or cuts is None or not is_byte_level or model.get("unk_token"):
        return _fields_of_pieces(to_pieces(original), common)
    whole_words = bool(model.get("ignore_merges"))
    names = [n for n, pre in PRE_TOKENIZERS.items() if (pre.splits, pre.gpt2, pre.whole_words) == (*cuts, whole_words)]
    if not names:
        raise ConfigError(
            "llama.cpp has no pre-tokenizer that splits text into words as this vocabulary does: export another format"
        )
    added = {token["id"]: token["content"] for token in data["added_tokens"]}
    texts = {i: token for token, i in original.ids.items()} | added
    kinds = {i: CONTROL if name in original.specials else USER_DEFINED for i, name in added.items()}
    return Fields(
        model="gpt2",
        pre=names[0],
        tokens=[texts.get(i, f"[UNUSED_{i}]") for i in range(original.size)],
        token_types=[kinds.get(i, NORMAL if i in texts else UNUSED) for i in range(original.size)],
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        **common,
    )


def _fields_of_pieces(original: PieceVocabulary, common: _Ends) -> Fields:
    model = original.model
    pieces = {i: piece for i, piece in enumerate(model.pieces)}
    pieces |= {i: Piece(name, 0.0, CONTROL) for name, i in original.specials.items()}
    pieces |= {i: Piece(name, 0.0, USER_DEFINED) for name, i in original.found.items()}
    listed = [pieces.get(i, Piece(f"[UNUSED_{i}]", 0.0, UNUSED)) for i in range(original.size)]
    unknown = next(i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN)
    return Fields(
        model=next(name for name, algorithm in _ALGORITHMS.items() if algorithm == model.algorithm),
        pre="default",
        tokens=[piece.text for piece in listed],
        token_types=[piece.type for piece in listed],
        merges=[],
        scores=[piece.score for piece in listed],
        unknown=unknown,
        pad=original.declared_pad,
        space_first=model.space_first,
        strip_spaces=model.strip_spaces,
        character_map=model.character_map or None,
        **common,
    )


def more_metadata(fields: Fields, padding: int) -> dict[str, Value]:
    """The metadata of a SentencePiece vocabulary beyond what all vocabularies have.

    Args:
        fields: metadata of the vocabulary.
        padding: number of unused tokens that follow its own.
    """
    scores, characters = fields.get("scores"), fields.get("character_map")
    named: dict[str, Value | None] = {
        "scores": None if scores is None else np.pad(np.asarray(scores, np.float32), (0, padding)),
        "unknown_token_id": fields.get("unknown"),
        "padding_token_id": fields.get("pad"),
        "add_space_prefix": fields.get("space_first"),
        "remove_extra_whitespaces": fields.get("strip_spaces"),
        "precompiled_charsmap": np.frombuffer(characters, np.uint8) if characters else None,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in named.items() if value is not None}
