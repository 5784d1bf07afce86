"""Byte-level BPE for tiktoken: the vocabulary as plain data, and Llama 3's special tokens and split pattern."""

import base64
import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from llama_jax.errors import ConfigError, brief
from llama_jax.text.merging import Merge, in_merge_order
from llama_jax.text.patterns import SPLIT_PATTERN
from llama_jax.text.vocabulary import MOST_TOKENS, Vocabulary, is_unicode, spelled, unspelled

NUM_SPECIAL = 256
_NAMED_SPECIAL = (
    "begin_of_text",
    "end_of_text",
    "reserved_special_token_0",
    "reserved_special_token_1",
    "finetune_right_pad_id",
    "step_id",
    "start_header_id",
    "end_header_id",
    "eom_id",
    "eot_id",
    "python_tag",
    "image",
)
LLAMA3_SPECIALS = tuple(
    f"<|{name}|>"
    for name in (
        *_NAMED_SPECIAL,
        *(f"reserved_special_token_{i}" for i in range(2, NUM_SPECIAL - len(_NAMED_SPECIAL) + 2)),
    )
)
"""The names that Meta's code gives to the 256 ids after the ranks, in order."""

# Names that all releases of Llama 3 share. Releases differ in which of the other ids they reserve.
_SHARED_NAMES = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

# Bytes that UTF-8 never uses, so that no text needs them.
_NEVER_IN_TEXT = {0xC0, 0xC1, *range(0xF5, 0x100)}

_LONGEST = 1024  # bytes of a token; Llama 3's longest has 128
_MAX_FOUND = 2_000  # names, each of which is tried at each character

# Meta's own limits, in characters. Tokens never cross these cuts, so that ids depend on them.
_MAX_PIECE = 400_000
_MAX_RUN = 25_000


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BytePairs(Vocabulary):
    """A byte-level BPE vocabulary whose ids tiktoken reproduces exactly.

    Text is first searched for the names in `found`; the text between them is cut into words by `pattern`. A word that
    is in `tokens` is one id. In any other word, the two neighbors whose joint bytes come first in `tokens` are joined
    (the leftmost of equals), until no two neighbors form a token. This is tiktoken's rule.

    Attributes:
        tokens: ids by bytes, in the order in which they merge.
        pattern: split pattern (see patterns.py).
        silent: ids by bytes of tokens that are in the vocabulary, but that no text is encoded to.
        found: rounds of searches for names that are tokens anywhere in a text. Each round is a dict from name to id;
            the first and longest match counts. A name with None is no token, and only prevents matches within it.

    Raises:
        ValueError: the ids are not 0 to n - 1, each once, or a name is not a valid text.
        ConfigError: text could need a byte that has no token, or there are too many names to look for.
    """

    tokens: Mapping[bytes, int]
    pattern: str
    silent: Mapping[bytes, int] = dataclasses.field(default_factory=dict)
    found: tuple[Mapping[str, int | None], ...] = ()

    def __post_init__(self) -> None:
        size = self.size
        if size > MOST_TOKENS:
            raise ConfigError(f"the vocabulary has {size:,} ids; at most {MOST_TOKENS:,} are supported")
        if longest := next((token for token, _ in self._every_id() if len(token) > _LONGEST), None):
            raise ConfigError(f"the token {brief(longest)} has {len(longest):,} bytes; {_LONGEST:,} is the limit")
        self._check_ids(size)
        _check_bytes({spelled(token) for token in self.tokens if len(token) == 1})
        if (count := sum(map(len, self.found))) > _MAX_FOUND:
            raise ConfigError(
                f"the vocabulary has {count:,} added tokens to search for in text; at most {_MAX_FOUND:,} are supported"
            )
        if b"" in self.tokens or b"" in self.silent:
            raise ValueError("a token without bytes is in the vocabulary")
        for name in (*self.specials, *(name for names in self.found for name in names)):
            if not name or not is_unicode(name):
                raise ValueError(f"{name!r} cannot be the name of a token: it is empty, or holds a lone surrogate")

    def _check_ids(self, size: int) -> None:
        """Refuse ids other than 0 to size - 1, each used once."""
        taken = bytearray(size)
        for token, i in self._every_id():
            if not 0 <= i < size:
                raise ValueError(f"token {token!r} has id {i}; the ids of {size:,} tokens must be 0 to {size - 1}")
            if taken[i]:
                raise ValueError(f"id {i} is used twice, the second time by {token!r}")
            taken[i] = 1

    def _every_id(self) -> Iterable[tuple[bytes | str, int]]:
        yield from self.tokens.items()
        yield from self.silent.items()
        yield from self.specials.items()
        for names in self.found:
            yield from ((name, i) for name, i in names.items() if i is not None)

    @property
    def size(self) -> int:
        """The number of ids."""
        found = sum(i is not None for names in self.found for i in names.values())
        return len(self.tokens) + len(self.silent) + len(self.specials) + found

    @property
    def plain_size(self) -> int:
        """One more than the largest id of a token that is not an added one."""
        return 1 + max((*self.tokens.values(), *self.silent.values()))

    @property
    def by_id(self) -> list[bytes]:
        """The bytes of each id, in the order of ids. Control tokens have their names."""
        table = [b""] * self.size
        for token, i in self._every_id():
            table[i] = token.encode() if isinstance(token, str) else token
        return table

    @property
    def is_llama3(self) -> bool:
        """True in Meta's layout: ids in the order of merging, then 256 special tokens.

        The names of reserved ids, which differ between releases, are not compared.
        """
        start = len(self.tokens)
        return (
            self.pattern == SPLIT_PATTERN
            and not self.silent
            and not self.found
            and list(self.tokens.values()) == list(range(start))
            and sorted(self.specials.values()) == list(range(start, start + NUM_SPECIAL))
            and all(self.specials.get(name) == start + LLAMA3_SPECIALS.index(name) for name in _SHARED_NAMES)
            and self.bos_id == start
            and all(bytes([byte]) in self.tokens for byte in _NEVER_IN_TEXT)
        )

    @property
    def is_metas(self) -> bool:
        """True if a `tokenizer.model` of Meta's can store all of the vocabulary: Meta's layout with Meta's names."""
        return self.is_llama3 and sorted(self.specials, key=self.specials.__getitem__) == list(LLAMA3_SPECIALS)

    @property
    def fingerprint(self) -> str:
        """A sha256 (hex) of everything that ids depend on. In Meta's layout it is the sha256 of Meta's file."""
        digest = hashlib.sha256(ranks_file(self.tokens))
        if not self.is_llama3:
            silent = [[token.hex(), i] for token, i in self.silent.items()]
            ids = list(self.tokens.values())
            rest = [ids, silent, self.specials, self.pattern, self.bos_id, self.declared_eos, self.found]
            digest.update(json.dumps(rest, sort_keys=True).encode())
        return digest.hexdigest()


def from_merges(
    ids: Mapping[str, int], merges: Sequence[Merge], *, whole_words: bool, pattern: str, **fields: Any
) -> BytePairs:
    """The vocabulary that gives the same ids as a list of merges.

    Args:
        ids: ids of the tokens that text may become, by the token's spelling in files (one character a byte).
        merges: pairs of tokens, the first merge first.
        whole_words: True if a word that is a token is encoded as it, even without merges that form it.
        pattern: split pattern.
        fields: the other fields of `BytePairs`.

    Raises:
        ValueError: a token is not spelled in bytes, or the merges do not agree with the tokens.
        ConfigError: tiktoken cannot give the same ids.
    """
    _check_bytes({token for token in ids if len(token) == 1})
    as_bytes = {token: unspelled(token) for token in ids}
    order, silent = in_merge_order(ids, merges, whole_words=whole_words)
    return BytePairs(
        tokens={as_bytes[token]: ids[token] for token in order},
        silent={as_bytes[token]: ids[token] for token in silent},
        pattern=pattern,
        **fields,
    )


def _check_bytes(chars: Collection[str]) -> None:
    """Raises ConfigError unless every byte of UTF-8 text has a token; `chars` spells the tokens of one byte."""
    lacking = [byte for byte in range(256) if spelled(bytes([byte])) not in chars and byte not in _NEVER_IN_TEXT]
    if lacking:
        raise ConfigError(
            f"{len(lacking)} of the single bytes that text is made of have no token (the first is "
            f"0x{lacking[0]:02x}), which tiktoken needs"
        )


def llama3(tokens: Iterable[bytes]) -> BytePairs:
    """Meta's layout, from the tokens in order of rank."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    specials = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIALS)}
    return BytePairs(
        tokens=ranks,
        specials=specials,
        pattern=SPLIT_PATTERN,
        bos_id=specials["<|begin_of_text|>"],
        declared_eos=specials["<|end_of_text|>"],
    )


def ranks_file(tokens: Iterable[bytes]) -> bytes:
    """The contents of a `tokenizer.model` in Meta's format: a line of base64 and rank for each token."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def metas_pieces(text: str, *, max_piece: int = _MAX_PIECE, max_run: int = _MAX_RUN) -> Iterator[str]:
    """Cuts `text` as Meta's code does: every `max_piece` characters, and inside longer runs of (non-)whitespace.

    A run is consecutive characters that are all whitespace, or all not, within one piece. It is cut every `max_run`
    characters from its start. Both `str.isspace` and `\\s` in `re` mean the same characters.
    """
    for start in range(0, len(text), max_piece):
        piece = text[start : start + max_piece]
        if not _may_hold_long_run(piece, max_run):
            yield piece
            continue
        begin = 0
        for run in re.finditer(r"\s+|\S+", piece):
            for cut in range(run.start() + max_run, run.end(), max_run):
                yield piece[begin:cut]
                begin = cut
        yield piece[begin:]


def _may_hold_long_run(piece: str, max_run: int) -> bool:
    """True if some window of max_run / 2 characters is all whitespace or has none. Every longer run has such a window.

    In ordinary text each search ends within a word, so that a long document costs a few dozen searches.
    """
    window = max(1, max_run // 2)
    for start in range(0, len(piece) - window + 1 if len(piece) > max_run else 0, window):
        other = _NOT_SPACE if piece[start].isspace() else _SPACE
        if other.search(piece, start, start + window) is None:
            return True
    return False


_SPACE, _NOT_SPACE = re.compile(r"\s"), re.compile(r"\S")
