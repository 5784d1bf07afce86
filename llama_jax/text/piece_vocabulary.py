"""Vocabularies for SentencePiece. Model files are read and written here, without the library.

The format is a protocol buffer (github.com/google/sentencepiece, src/sentencepiece_model.proto): pieces with a text, a
score and a type; how the model was trained; and how text is normalized. The library itself turns text into ids.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from llama_jax.errors import ConfigError, brief, one_line
from llama_jax.text import character_map
from llama_jax.text.vocabulary import MOST_TOKENS, Vocabulary

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
SPACE = "\u2581"
_MOST_IN_PIECE = 16  # fields
_LONGEST = 4096  # characters of a piece
_NO_PREFIX = b"\x1a\x02\x18\x00"  # a second normalizer_spec, which protocol buffers merge: add_dummy_prefix is false


class Piece(NamedTuple):
    """One token of a SentencePiece model.

    Attributes:
        text: spelling of the token, with U+2581 for a space.
        score: priority of the token: BPE joins the pair with the highest score first, and Unigram maximizes the sum of
            scores.
        type: 1 normal, 2 unknown, 3 control, 4 user-defined (recognized anywhere in a text), 5 unused, 6 byte.
    """

    text: str
    score: float
    type: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PieceModel:
    """The parts of a SentencePiece model that decide ids and texts.

    Attributes:
        pieces: tokens by id.
        algorithm: UNIGRAM or BPE.
        byte_fallback: True if characters without a piece become the pieces of their bytes.
        space_first: True if a space is put in front of a text.
        strip_spaces: True if spaces at the ends are dropped and runs of spaces become one.
        character_map: compiled replacements of characters.
        unknown: text of the unknown piece.
        names: names of the pieces that begin a text, end a text, and pad.
    """

    pieces: tuple[Piece, ...]
    algorithm: int = UNIGRAM
    byte_fallback: bool = False
    space_first: bool = True
    strip_spaces: bool = True
    character_map: bytes = b""
    unknown: str = " \u2047 "
    names: tuple[str, str, str] = ("<s>", "</s>", "<pad>")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PieceVocabulary(Vocabulary):
    """A vocabulary whose ids come from SentencePiece.

    Attributes:
        contents: contents of a SentencePiece model file.
        found: ids by name of further tokens that are recognized anywhere in a text.
        space_after_special: True if text after such a token or a control token gets a space in front, like a whole text
            (llama.cpp, and `legacy` tokenizers of transformers).
    """

    contents: bytes
    found: Mapping[str, int] = dataclasses.field(default_factory=dict)
    space_after_special: bool = True

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def model(self) -> PieceModel:
        """The parts of `contents`."""
        return parse_model(self.contents)

    @functools.cached_property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(len(self.model.pieces) - 1, *self.specials.values(), *self.found.values(), 0)

    @property
    def plain_size(self) -> int:
        """One more than the largest id of a token that is not an added one."""
        added = {*self.specials.values(), *self.found.values()}
        return 1 + max((i for i in range(len(self.model.pieces)) if i not in added), default=-1)

    @functools.cached_property
    def by_id(self) -> list[bytes]:
        """The bytes of each id, in the order of ids. Control tokens have their names."""
        table = [b""] * self.size
        for i, piece in enumerate(self.model.pieces):
            if piece.type == BYTE:
                table[i] = bytes([int(piece.text[3:5], 16)])
            elif piece.type == UNKNOWN:
                table[i] = self.model.unknown.encode()
            else:
                table[i] = (piece.text if piece.type == CONTROL else piece.text.replace(SPACE, " ")).encode()
        for name, i in (*self.specials.items(), *self.found.items()):
            table[i] = name.encode("utf-8", "replace")
        return table

    @property
    def starts_with_space(self) -> bool:
        """True if decoding drops the space that a text begins with."""
        return self.model.space_first or self.model.strip_spaces

    @functools.cached_property
    def fingerprint(self) -> str:
        """A sha256 (hex) of everything that ids depend on."""
        rest = [dict(self.specials), dict(self.found), self.bos_id, self.declared_eos, self.space_after_special]
        return hashlib.sha256(self.contents + json.dumps(rest, sort_keys=True).encode()).hexdigest()


def piece_vocabulary(contents: bytes, **fields: Any) -> PieceVocabulary:
    """The vocabulary of a SentencePiece model file. `fields` override values in the file.

    Raises:
        ConfigError: a model that is not supported.
        ValueError: damaged contents.
    """
    model = parse_model(contents)
    controls = {piece.text: i for i, piece in enumerate(model.pieces) if piece.type == CONTROL}
    bos, eos, pad = (controls.get(name) for name in model.names)
    given = {"specials": controls, "bos_id": bos, "declared_eos": eos, "declared_pad": pad} | fields
    made = PieceVocabulary(contents=contents, **given)
    if made.size > MOST_TOKENS:
        raise ConfigError(f"the largest id is {made.size - 1:,}; at most {MOST_TOKENS:,} ids are supported")
    return made


def load_processor(contents: bytes, *, space_first: bool = True) -> Any:
    """A `sentencepiece.SentencePieceProcessor` of a model file's contents.

    Args:
        contents: contents of the model file.
        space_first: False disables the model's setting that puts a space in front of a text.
    """
    try:
        import sentencepiece
    except ImportError:
        raise ConfigError("this vocabulary needs the `sentencepiece` package: pip install sentencepiece") from None
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=contents + (b"" if space_first else _NO_PREFIX))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(f"the `sentencepiece` library cannot read it: {brief(one_line(error), 200)}") from None


# ---- the protocol buffer -----------------------------------------------------------------------------------


def parse_model(data: bytes) -> PieceModel:
    """The parts of a SentencePiece model.

    Raises:
        ConfigError: a model that is not supported.
        ValueError: damaged contents.
    """
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(value, len(pieces)))
        elif number == 2:
            trainer |= dict(_fields(value))
        elif number == 3:
            normalizer |= dict(_fields(value))
    algorithm = trainer.get(3, UNIGRAM)
    if algorithm not in (UNIGRAM, BPE):
        raise ConfigError(f"SentencePiece model type {brief(algorithm)} is not supported, only Unigram (1) and BPE (2)")
    if trainer.get(24):
        raise ConfigError("a SentencePiece model with spaces at the ends of words is not supported")
    if not pieces:
        raise ValueError("the SentencePiece model has no pieces")
    compiled = normalizer.get(2, b"")
    if not isinstance(compiled, bytes):
        raise ValueError("the character map of the normalizer is damaged")
    character_map.check(compiled)
    names = tuple(_text(trainer.get(field, name.encode())) for field, name in _NAMES.items())
    return PieceModel(
        pieces=tuple(pieces),
        algorithm=algorithm,
        byte_fallback=bool(trainer.get(35, 0)),
        space_first=bool(normalizer.get(3, 1)),
        strip_spaces=bool(normalizer.get(4, 1)),
        character_map=compiled,
        unknown=_text(trainer.get(44, " \u2047 ".encode())),
        names=names,  # type: ignore[arg-type]
    )


_NAMES = {46: "<s>", 47: "</s>", 48: "<pad>"}


def model_contents(model: PieceModel) -> bytes:
    """The contents of a SentencePiece model file; `parse_model` reads them back."""
    unknown = next(i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN)
    trainer = [
        _number(3, model.algorithm),
        _number(4, len(model.pieces)),
        _number(35, model.byte_fallback),
        _number(40, unknown),
        _bytes(44, model.unknown.encode()),
        _bytes(45, model.pieces[unknown].text.encode()),
        *(_bytes(field, name.encode()) for field, name in zip(_NAMES, model.names, strict=True)),
    ]
    normalizer = [_bytes(1, b"identity" if not model.character_map else b"user_defined")]
    normalizer += [_bytes(2, model.character_map), _number(3, model.space_first), _number(4, model.strip_spaces)]
    pieces = [
        _bytes(1, _bytes(1, piece.text.encode()) + struct.pack("<Bf", 0x15, piece.score) + _number(3, piece.type))
        for piece in model.pieces
    ]
    return b"".join([*pieces, _bytes(2, b"".join(trainer)), _bytes(3, b"".join(normalizer))])


def _piece(data: Any, number: int) -> Piece:
    values = dict(_fields(data, _MOST_IN_PIECE))
    text, score, kind = _text(values.get(1, b"")), values.get(2, b"\0\0\0\0"), values.get(3, NORMAL)
    if not text or len(text) > _LONGEST:
        raise ValueError(f"piece {number} has {len(text):,} characters; 1 to {_LONGEST:,} are allowed")
    if not isinstance(score, bytes) or len(score) != 4 or not math.isfinite(value := struct.unpack("<f", score)[0]):
        raise ValueError(f"piece {number} ({brief(text)}) has a score that is no finite number")
    if kind not in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE):
        raise ValueError(f"piece {number} ({brief(text)}) has type {brief(kind)}; types are 1 to 6")
    if kind == BYTE and not is_byte_name(text):
        raise ValueError(
            f"piece {number} ({brief(text)}) has the type of a byte, so that its name must be a byte such as <0x0A>"
        )
    return Piece(text, value, kind)


def is_byte_name(text: str) -> bool:
    """True if a piece is spelled as a byte, such as <0x0A>."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">") and set(text[3:5]) <= _HEX


_HEX = set("0123456789ABCDEF")


def _fields(data: Any, most: int = MOST_TOKENS + 100) -> Iterator[tuple[int, int | bytes]]:
    """Yields (number, value) of each field of a protocol-buffer message, at most `most`; a value is an int or bytes."""
    if not isinstance(data, bytes):
        raise ValueError("the file is not a SentencePiece model, or is damaged")
    at, end = 0, len(data)
    for _ in range(most):
        if at == end:
            return
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        else:
            length = {1: 8, 5: 4}.get(kind, end)  # other kinds do not exist
        if length > end - at:
            raise ValueError("the file is not a SentencePiece model, or is cut off")
        yield key >> 3, data[at : at + length]
        at += length
    raise ValueError("the file is not a SentencePiece model, or has too many fields")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A varint (7 bits a byte), and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("the file is not a SentencePiece model, or is cut off")


def _text(value: Any) -> str:
    try:
        return value.decode("utf-8")
    except (AttributeError, UnicodeDecodeError):
        raise ValueError("the file is not a SentencePiece model, or is damaged: a text is not UTF-8") from None


def _number(field: int, value: int) -> bytes:
    return _written_varint(field << 3) + _written_varint(int(value))


def _bytes(field: int, value: bytes) -> bytes:
    return _written_varint(field << 3 | 2) + _written_varint(len(value)) + value


def _written_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
