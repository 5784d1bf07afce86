"""A byte-level BPE vocabulary as plain data: what every file of a tokenizer is read into, and written from."""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping

from llama_jax.errors import ConfigError, brief

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts text into words before merging bytes; understood alike by tiktoken and `tokenizers`."""

ONE_DIGIT_PATTERN = SPLIT_PATTERN.replace("{1,3}", "")
"""The same with every digit a word of its own (Qwen 2)."""

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How GPT-2 cuts text: `ByteLevel` with its own regex in `tokenizers`."""

# `Digits` asks Rust's standard library what a number is, which knows these from Unicode 17; regex engines are at 16.
_NUMBER = r"\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}"
DIGITS_PATTERN = rf"[{_NUMBER}]|'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?[^\s\p{{L}}{_NUMBER}]+|\s+(?![^\s{_NUMBER}])|\s+"
"""Every digit apart, and GPT-2's cuts in what lies between, which cannot see across a digit (SmolLM)."""

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

# What every Llama 3 calls alike. Its releases reserve different ones of the other places.
_ALIKE = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

# UTF-8 has no use for these, so that no text asks for them.
_NEVER_IN_TEXT = {0xC0, 0xC1, *range(0xF5, 0x100)}

MOST_TOKENS = 500_000  # twice the largest vocabulary in use
_LONGEST = 1024  # bytes of a token; Llama 3's longest has 128
_MAX_FOUND = 2_000  # each is tried at each character


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """Every id of a tokenizer, and how text comes to ids.

    Text is first searched for the names in `found`; what lies between is cut into words by `pattern`. A word that is
    in `tokens` is one id. In any other, the two neighbours whose joint bytes come first in `tokens` are joined, the
    leftmost of equals, until no two neighbours are a token together (tiktoken's rule).

    Attributes:
        tokens: bytes to id, in the order in which they merge.
        specials: name to id of the control tokens; they never come from text.
        pattern: one of the patterns above.
        bos: the id that the model wants in front of a text, or None.
        eos: the id that ends a text, or None.
        silent: bytes to id of tokens that are in the vocabulary but come from no text.
        found: rounds of names that are tokens wherever they stand in a text, each name to its id, the first and
            longest first; with None, a name only keeps others from being found within it.

    Raises:
        ValueError: the ids are not 0 to n - 1, each once, or a name is no text.
        ConfigError: text could need a byte that has no token, or there are too many names to look for.
    """

    tokens: Mapping[bytes, int]
    specials: Mapping[str, int]
    pattern: str
    bos: int | None
    eos: int | None
    silent: Mapping[bytes, int] = dataclasses.field(default_factory=dict)
    found: tuple[Mapping[str, int | None], ...] = ()

    def __post_init__(self) -> None:
        size = self.size
        if size > MOST_TOKENS:
            raise ConfigError(f"the vocabulary has {size:,} ids; at most {MOST_TOKENS:,} are supported")
        if longest := next((token for token, _ in self._every_id() if len(token) > _LONGEST), None):
            raise ConfigError(f"the token {brief(longest)} has {len(longest):,} bytes; {_LONGEST} are supported")
        taken = bytearray(size)
        for token, i in self._every_id():
            if not 0 <= i < size:
                raise ValueError(f"token {token!r} has id {i}; the ids of {size:,} tokens must be 0 to {size - 1}")
            if taken[i]:
                raise ValueError(f"id {i} is used twice, the second time by {token!r}")
            taken[i] = 1
        lacking = [byte for byte in range(256) if bytes([byte]) not in self.tokens and byte not in _NEVER_IN_TEXT]
        if lacking:
            raise ConfigError(
                f"{len(lacking)} of the single bytes that text is made of have no token (the first is "
                f"0x{lacking[0]:02x}), so that some text would have no ids"
            )
        if (count := sum(map(len, self.found))) > _MAX_FOUND:
            raise ConfigError(
                f"{count:,} added tokens would be looked for in text; at most {_MAX_FOUND:,} are supported"
            )
        if b"" in self.tokens or b"" in self.silent:
            raise ValueError("a token without bytes is in the vocabulary")
        for name in (*self.specials, *(name for names in self.found for name in names)):
            if not name or not _is_unicode(name):
                raise ValueError(f"{name!r} cannot be the name of a token: it is empty, or holds a lone surrogate")

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
    def by_id(self) -> list[bytes]:
        """The bytes of each id, in the order of the ids; control tokens have their names."""
        table = [b""] * self.size
        for token, i in self._every_id():
            table[i] = token.encode() if isinstance(token, str) else token
        return table

    @property
    def is_llama3(self) -> bool:
        """Whether this is Meta's layout: ids in the order of merging, then 256 special tokens.

        Names that a release has for reserved places do not matter: the ids are the same.
        """
        start = len(self.tokens)
        return (
            self.pattern == SPLIT_PATTERN
            and not self.silent
            and not self.found
            and list(self.tokens.values()) == list(range(start))
            and sorted(self.specials.values()) == list(range(start, start + NUM_SPECIAL))
            and all(self.specials.get(name) == start + LLAMA3_SPECIALS.index(name) for name in _ALIKE)
            and self.bos == start
            and all(bytes([byte]) in self.tokens for byte in _NEVER_IN_TEXT)
        )

    @property
    def fingerprint(self) -> str:
        """A sha256 (hex) of all that ids depend on; in Meta's layout, that of the file that Meta would write."""
        digest = hashlib.sha256(ranks_file(self.tokens))
        if not self.is_llama3:
            silent = [[token.hex(), i] for token, i in self.silent.items()]
            rest = [list(self.tokens.values()), silent, self.specials, self.pattern, self.bos, self.eos, self.found]
            digest.update(json.dumps(rest, sort_keys=True).encode())
        return digest.hexdigest()


def llama3(tokens: Iterable[bytes]) -> Vocabulary:
    """Meta's layout, from the tokens in order of rank."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    specials = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIALS)}
    return Vocabulary(
        tokens=ranks,
        specials=specials,
        pattern=SPLIT_PATTERN,
        bos=specials["<|begin_of_text|>"],
        eos=specials["<|end_of_text|>"],
    )


def ranks_file(tokens: Iterable[bytes]) -> bytes:
    """The contents of a `tokenizer.model` in Meta's format: a line of base64 and rank for each token."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def byte_chars() -> dict[int, str]:
    """The printable character that stands for each byte in JSON and GGUF files (the table of GPT-2).

    Printable Latin-1 stands for itself; the other bytes, in order, take the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


# For str.translate. Latin-1 characters that stand for no byte are mapped out of Latin-1, so that encoding refuses them.
_TO_BYTE = {c: 0xFFFF for c in range(256)} | {ord(char): byte for byte, char in byte_chars().items()}
_TO_CHAR = byte_chars()


def spelled(token: bytes) -> str:
    """A token as JSON and GGUF files spell it: one printable character a byte."""
    return token.decode("latin-1").translate(_TO_CHAR)


def unspelled(text: str) -> bytes:
    """The bytes that `spelled` gave as `text`; ValueError where a character stands for no byte."""
    try:
        return text.translate(_TO_BYTE).encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError(f"token {text[:60]!r} has characters that stand for no byte in byte-level BPE") from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
