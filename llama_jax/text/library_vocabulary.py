"""Vocabularies for the `tokenizers` library: the contents of a tokenizer.json, checked before the library runs them."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from llama_jax.errors import ConfigError, brief, one_line
from llama_jax.text import character_map, patterns
from llama_jax.text.vocabulary import MOST_TOKENS, Vocabulary, unspelled

_MAX_GROWTH = 1_000  # characters that a normalizer may make of one
_MOST_PARTS = 200  # of a normalizer, a pre-tokenizer or a decoder; published ones have up to 20
_LONGEST_NAME = 4096  # characters of an added token
_MAX_DECODED_GROWTH = 4  # and a decoder, which is applied to all tokens at once
_MODEL_KEYS = set(
    "type vocab merges dropout unk_token unk_id continuing_subword_prefix end_of_word_suffix fuse_unk byte_fallback "
    "ignore_merges max_input_chars_per_word".split()
)
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Step = Callable[[str | bytes], str | bytes]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LibraryVocabulary(Vocabulary):
    """A vocabulary whose ids come from the `tokenizers` library.

    Attributes:
        contents: contents of a tokenizer.json, normalized so that equivalent files have equal contents.
        decoder: decoder in `contents`.
        unknown: name of the token for characters without a token, or None.
    """

    contents: str
    decoder: Any
    unknown: str | None

    @classmethod
    def of(
        cls, data: Mapping[str, Any], named: Callable[[Mapping[str, int]], Mapping[str, int | None]]
    ) -> LibraryVocabulary:
        """The vocabulary of a parsed tokenizer.json.

        Args:
            data: contents of the file.
            named: function from all tokens (ids by name) to the fields `bos_id`, `declared_eos` and `declared_pad`.

        Raises:
            ConfigError: the library cannot read it, or it is not safe to run (see `check_contents`).
        """
        check_contents(data)
        _decoding_steps(data.get("decoder"))
        contents = json.dumps({**data, "truncation": None, "padding": None}, sort_keys=True)
        library = load_library(contents, special_tokens=False)
        ids = library.get_vocab(with_added_tokens=True)
        if (largest := max(ids.values(), default=0)) >= MOST_TOKENS:
            raise ConfigError(f"the largest id is {largest:,}; at most {MOST_TOKENS:,} ids are supported")
        if len(set(ids.values())) < len(ids):
            raise ConfigError("several tokens have the same id")
        added = library.get_added_tokens_decoder()
        specials = {token.content: i for i, token in added.items() if token.special}
        parts: dict[str, Any] = {"decoder": data.get("decoder"), "unknown": unknown_of(data["model"]), **named(ids)}
        made = cls(contents=contents, specials=specials, **parts)
        made.__dict__["ids"] = ids  # the cached property
        made.__dict__["library"] = _without_controls(library, data, specials)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def library(self) -> Any:
        """The `tokenizers.Tokenizer` that never encodes text as a control token."""
        library = load_library(self.contents, special_tokens=False)
        return _without_controls(library, json.loads(self.contents), self.specials)

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """All tokens, as the file spells them, to their ids."""
        return load_library(self.contents, special_tokens=True).get_vocab(with_added_tokens=True)

    @functools.cached_property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1

    @functools.cached_property
    def plain_size(self) -> int:
        """One more than the largest id of a token that is not an added one."""
        added = {*self.library.get_added_tokens_decoder(), *self.specials.values()}
        return 1 + max((i for i in self.ids.values() if i not in added), default=-1)

    @functools.cached_property
    def by_id(self) -> list[bytes]:
        """The bytes of each id, in the order of ids. Control tokens have their names, unused ids no bytes."""
        added = {*self.library.get_added_tokens_decoder(), *self.specials.values()}
        steps = _decoding_steps(self.decoder)
        table = [b""] * self.size
        for token, i in self.ids.items():
            value: str | bytes = token
            for step in steps:
                value = value if i in added and step is _from_byte_chars else step(value)
            table[i] = value.encode("utf-8", "replace") if isinstance(value, str) else value
        return table

    @property
    def starts_with_space(self) -> bool:
        """True if decoding drops the space that a text begins with."""
        return self.decoder is None or any(
            _drops_first_space(part, before) for part, before in _parts_with_earlier(self.decoder)
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """A sha256 (hex) of everything that ids depend on."""
        rest = json.dumps([dict(self.specials), self.bos_id, self.declared_eos], sort_keys=True)
        return hashlib.sha256((self.contents + rest).encode()).hexdigest()


def load_library(contents: str, *, special_tokens: bool) -> Any:
    """A `tokenizers.Tokenizer`; ConfigError if the library cannot read the contents.

    Args:
        contents: contents of a tokenizer.json.
        special_tokens: True if names of control tokens in text are encoded as these tokens.
    """
    try:
        import tokenizers
    except ImportError:
        raise ConfigError("this vocabulary needs the `tokenizers` package: pip install tokenizers") from None
    with library_errors("the `tokenizers` library cannot read it"):
        library = tokenizers.Tokenizer.from_str(contents)
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = not special_tokens
    return library


def _without_controls(library: Any, data: Mapping[str, Any], specials: Mapping[str, int]) -> Any:
    """A library tokenizer that encodes no text as a control token: `library`, or one with other spellings in its model.

    A Unigram or word-level model may list "<s>" as an ordinary piece, and would encode the text "<s>" as this piece.
    """
    unknown = unknown_of(data["model"])
    control = frozenset(i for name, i in specials.items() if name != unknown)
    names = [name for name in specials if name != unknown and _comes_from_text(library, name, control)]
    if not names:
        return library
    hidden = {name: _NEVER + name for name in names}
    model = dict(data["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(token, token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[hidden.get(piece[0], piece[0]), *piece[1:]] for piece in model["vocab"]]
    added = [token for token in data.get("added_tokens", []) if token["content"] not in hidden]
    try:
        library = load_library(json.dumps({**data, "model": model, "added_tokens": added}), special_tokens=False)
    except ConfigError:
        library = None  # merges make the token
    if library is None or any(_comes_from_text(library, name, control) for name in names):
        raise ConfigError(f"text with the name of control token {brief(names[0])} could not be encoded as plain text")
    return library


def unknown_of(model: Mapping[str, Any]) -> str | None:
    """The name of a model's unknown token, which replaces characters without a token; ordinary text may contain it."""
    place, vocab = model.get("unk_id"), model.get("vocab")
    if isinstance(vocab, list) and isinstance(place, int) and 0 <= place < len(vocab):
        return vocab[place][0]
    return model.get("unk_token")


_NEVER = 8 * "\U0010ffff"  # not a character


def _comes_from_text(library: Any, name: str, control: Collection[int]) -> bool:
    with library_errors("the `tokenizers` library cannot encode with it"):
        ids = [library.encode(text, add_special_tokens=False).ids for text in (name, f"a {name} b")]
    return any(i in control for i in (*ids[0], *ids[1]))


@contextlib.contextmanager
def library_errors(message: str) -> Iterator[None]:
    """A context that turns errors of the library, including panics of its Rust code, into ConfigErrors."""
    try:
        yield
    except ConfigError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ConfigError(f"{message}: {brief(one_line(error), 200)}") from None


def check_contents(data: Mapping[str, Any]) -> None:
    """Refuses contents of a `tokenizer.json` that this package does not support.

    Raises:
        ConfigError: a part makes ids random, or lets a text take unbounded time or memory.
    """
    model = data.get("model")
    if not isinstance(model, dict):
        raise ConfigError(f"model must be an object, got {brief(model)}")
    if unknown := model.keys() - _MODEL_KEYS:
        raise ConfigError(f"model.{min(unknown)[:60]} is not supported; supported: {', '.join(sorted(_MODEL_KEYS))}")
    if model.get("dropout"):
        raise ConfigError(f"model.dropout is {brief(model['dropout'])}, which makes ids random")
    if model.get("type") == "BPE" and model.get("continuing_subword_prefix"):
        raise ConfigError("model.continuing_subword_prefix is not supported in a BPE model")
    listed = data.get("added_tokens")
    for token in listed if isinstance(listed, list) else ():
        if isinstance(token, dict) and len(str(token.get("content"))) > _LONGEST_NAME:
            raise ConfigError(f"an added token has more than {_LONGEST_NAME:,} characters")
    prepended = 0
    for part in _objects([data.get("normalizer"), data.get("pre_tokenizer")]):
        if isinstance(regex := part.get("Regex"), str):
            patterns.check(regex)
        prepended += len(str(part.get("prepend"))) if part.get("type") == "Prepend" else 0
        if prepended > _MAX_GROWTH:
            raise ConfigError(f"the normalizer puts more than {_MAX_GROWTH:,} characters in front of a text")
        if part.get("type") == "Precompiled":
            try:
                compiled = base64.b64decode(part.get("precompiled_charsmap") or "", validate=True)
            except (TypeError, ValueError):
                raise ConfigError("normalizer Precompiled holds no character map") from None
            character_map.check(compiled)
    for name, most in (("normalizer", _MAX_GROWTH), ("pre_tokenizer", _MAX_GROWTH), ("decoder", _MAX_DECODED_GROWTH)):
        if sum(1 for _ in _objects(data.get(name))) > _MOST_PARTS:
            raise ConfigError(f"the {name} has more than {_MOST_PARTS:,} parts")
        if (growth := _growth(data.get(name))) > most:
            raise ConfigError(f"the {name} may make a text {growth:,.0f} times as long; {most:,} is the limit")


def _growth(value: Any) -> float:
    """The number of characters that the replacements of a normalizer or decoder may make of one."""
    growth = 1.0
    for part in _objects(value):
        if part.get("type") == "Replace":
            pattern = part.get("pattern")
            string = pattern.get("String") if isinstance(pattern, dict) else None
            replaced = len(string) if isinstance(string, str) and string else 1
            growth *= max(1.0, len(str(part.get("content"))) / replaced)
    return growth


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every JSON object within a value."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield item
            pending += item.values()
        elif isinstance(item, list):
            pending += item


# ---- decoding ----------------------------------------------------------------------------------------------


def _parts_with_earlier(decoder: Any) -> list[tuple[Mapping[str, Any], list[str]]]:
    """The steps of a decoder, each with the kinds of those before it."""
    parts = decoder.get("decoders") if isinstance(decoder, dict) and decoder.get("type") == "Sequence" else [decoder]
    parts = [part for part in parts or [] if isinstance(part, dict)]
    kinds = [str(part.get("type")) for part in parts]
    return [(part, kinds[:i]) for i, part in enumerate(parts)]


def _drops_first_space(part: Mapping[str, Any], before: list[str]) -> bool:
    if part.get("type") == "Metaspace":
        return part.get("prepend_scheme", "always") != "never" and part.get("add_prefix_space") is not False
    return part.get("type") == "Strip" and "Fuse" in before and part.get("start") == 1


def _decoding_steps(decoder: Any) -> list[Step]:
    """Functions that turn the text of one token into its bytes, one after the other.

    Raises:
        ConfigError: a decoder that does not work token by token, or is not known here.
    """
    if decoder is None:
        return [_after_space]
    steps: list[Step] = []
    for part, before in _parts_with_earlier(decoder):
        kind = part.get("type")
        pattern = part.get("pattern")
        if kind == "ByteLevel":
            steps.append(_from_byte_chars)
        elif kind == "ByteFallback":
            steps.append(_from_byte_name)
        elif kind == "Metaspace":
            steps.append(functools.partial(_replaced, old=str(part.get("replacement")), new=" "))
        elif kind == "Replace" and isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
            steps.append(functools.partial(_replaced, old=pattern["String"], new=str(part.get("content"))))
        elif kind == "Strip" and part.get("content") == " " and part.get("stop") == 0 and "Fuse" in before:
            if part.get("start") not in (0, 1):
                raise ConfigError(f"decoder Strip drops {brief(part.get('start'))} characters; 0 and 1 are supported")
        elif kind != "Fuse":
            raise ConfigError(f"decoder {brief(kind)} is not supported in this form")
    return steps


def _after_space(token: str | bytes) -> str | bytes:
    """The decoding step of a file without a decoder: tokens are joined with spaces."""
    return f" {token}" if isinstance(token, str) else b" " + token


def _from_byte_chars(token: str | bytes) -> str | bytes:
    """The decoding step of ByteLevel: each character represents a byte."""
    try:
        return token if isinstance(token, bytes) else unspelled(token)
    except ValueError:
        return token


def _from_byte_name(token: str | bytes) -> str | bytes:
    """The decoding step of ByteFallback: a token such as "<0x0A>" represents a byte."""
    match = _BYTE.fullmatch(token) if isinstance(token, str) else None
    return bytes([int(match[1], 16)]) if match else token


def _replaced(token: str | bytes, *, old: str, new: str) -> str | bytes:
    return token.replace(old, new) if isinstance(token, str) and old else token
