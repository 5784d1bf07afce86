"""Encoders: the engines that turn text into the ids of a vocabulary."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import tiktoken

from llama_jax.errors import ConfigError, brief
from llama_jax.text.byte_pairs import BytePairs, metas_pieces
from llama_jax.text.library_vocabulary import LibraryVocabulary, library_errors, load_library
from llama_jax.text.piece_vocabulary import PieceVocabulary, load_processor
from llama_jax.text.vocabulary import Vocabulary, without_surrogates

# In characters. tiktoken's regex engine keeps a stack of a million steps within white space.
_MAX_SPACE = 800_000


class Encoder(Protocol):
    """The interface of encoders: they turn text into ids, without the ids that begin and end a text."""

    def encode(self, text: str, special_tokens: bool) -> list[int]:
        """The ids of `text`; names of control tokens become their ids only with `special_tokens`."""


def encoder_of(vocabulary: Vocabulary) -> Encoder:
    """The encoder for a vocabulary."""
    if isinstance(vocabulary, BytePairs):
        return TiktokenEncoder(vocabulary)
    if isinstance(vocabulary, LibraryVocabulary):
        return LibraryEncoder(vocabulary)
    if isinstance(vocabulary, PieceVocabulary):
        return PieceEncoder(vocabulary)
    raise TypeError(f"no encoder for {type(vocabulary).__name__}")


class TiktokenEncoder:
    """Byte-level BPE by tiktoken, for vocabularies on which tiktoken's rule gives the right ids (see `merging`)."""

    def __init__(self, vocabulary: BytePairs) -> None:
        self._is_llama3 = vocabulary.is_llama3
        ids = list(vocabulary.tokens.values())
        # tiktoken's ranks are both the order of merging and the ids. A table translates where the two differ.
        self._id_of_rank = None if ids == sorted(ids) else ids
        ranks = vocabulary.tokens if self._id_of_rank is None else {t: i for i, t in enumerate(vocabulary.tokens)}
        self._encoding = tiktoken.Encoding(
            name="llama_jax", pat_str=vocabulary.pattern, mergeable_ranks=dict(ranks), special_tokens={}
        )
        self._rounds = [(_any_of(names), names) for names in vocabulary.found]
        everything = _with_specials(vocabulary.found, vocabulary.specials)
        self._rounds_with_specials = [(_any_of(names), names) for names in everything]

    def encode(self, text: str, special_tokens: bool) -> list[int]:
        """Encodes as `Encoder` says. ValueError for more white space in a row than tiktoken can split into words."""
        parts: list[str | int] = [text]
        for pattern, names in self._rounds_with_specials if special_tokens else self._rounds:
            parts = [x for part in parts for x in (_cut(part, pattern, names) if isinstance(part, str) else [part])]
        ids: list[int] = []
        for part in parts:
            ids += self._encode_words(part) if isinstance(part, str) else [part]
        return ids

    def _encode_words(self, text: str) -> list[int]:
        if self._is_llama3:
            return [i for piece in metas_pieces(text) for i in self._encoding.encode_ordinary(piece)]
        _check_space(text)
        ranks = self._encoding.encode_ordinary(text)
        return ranks if self._id_of_rank is None else [self._id_of_rank[rank] for rank in ranks]


class LibraryEncoder:
    """The `tokenizers` library, for any tokenizer.json."""

    def __init__(self, vocabulary: LibraryVocabulary) -> None:
        self._contents = vocabulary.contents
        self._library = vocabulary.library
        self._with_specials: Any = None  # loaded when it is first needed
        self._control = frozenset(i for name, i in vocabulary.specials.items() if name != vocabulary.unknown)

    def encode(self, text: str, special_tokens: bool) -> list[int]:
        """Encodes as `Encoder` says. ConfigError if the library fails."""
        if special_tokens and self._with_specials is None:
            self._with_specials = load_library(self._contents, special_tokens=True)
        library = self._with_specials if special_tokens else self._library
        with library_errors("the `tokenizers` library cannot encode this text"):
            ids = library.encode(without_surrogates(text), add_special_tokens=False).ids
        if not special_tokens and not self._control.isdisjoint(ids):  # the vocabulary was checked for this
            raise ConfigError(
                f"the text {brief(text)} has the name of a control token that cannot be encoded as plain "
                "text: remove it"
            )
        return ids


class PieceEncoder:
    """The `sentencepiece` library, for SentencePiece models."""

    def __init__(self, vocabulary: PieceVocabulary) -> None:
        self._contents = vocabulary.contents
        self._processor = load_processor(vocabulary.contents)
        self._continuing = self._processor
        if not vocabulary.space_after_special:
            self._continuing = load_processor(vocabulary.contents, space_first=False)
        everything = {**vocabulary.found, **vocabulary.specials}
        self._found = (_any_of(vocabulary.found), vocabulary.found)
        self._found_with_specials = (_any_of(everything), everything)

    def encode(self, text: str, special_tokens: bool) -> list[int]:
        """Encodes as `Encoder` says."""
        pattern, names = self._found_with_specials if special_tokens else self._found
        ids: list[int] = []
        processor = self._processor
        text = without_surrogates(text)
        for part in _cut(text, pattern, names) if names else [text]:
            if isinstance(part, str):
                ids += processor.encode(part) if part else []
            else:
                ids.append(part)
            processor = self._continuing
        return ids


def _with_specials(found: Iterable[Mapping[str, int | None]], specials: Mapping[str, int]) -> list[Mapping[str, int]]:
    """The rounds of names to search for in text if control tokens are encoded too, in the order of `tokenizers`."""

    rounds: list[Mapping[str, int]] = [
        {name: specials[name] if i is None else i for name, i in names.items()} for names in found
    ]
    others = {name: i for name, i in specials.items() if not any(name in names for names in rounds)}
    return [others, *rounds] if others else rounds


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of the names, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def _cut(text: str, pattern: re.Pattern[str], names: Mapping[str, int | None]) -> Iterator[str | int]:
    """The ids of the names in `text`, and the texts between them."""
    begin = 0
    for match in pattern.finditer(text):
        if (i := names[match[0]]) is not None:
            yield text[begin : match.start()]
            yield i
            begin = match.end()
    yield text[begin:]


def _check_space(text: str) -> None:
    if len(text) <= _MAX_SPACE:
        return
    longest = max((run.end() - run.start() for run in re.finditer(r"\s+", text)), default=0)
    if longest > _MAX_SPACE:
        raise ValueError(
            f"the text has {longest:,} characters of white space in a row; this vocabulary takes at most "
            f"{_MAX_SPACE:,}: cut the text there"
        )
