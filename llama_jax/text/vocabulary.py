"""The base class of all vocabularies, and the spelling of bytes that JSON and GGUF files share."""

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from llama_jax.errors import ConfigError

MOST_TOKENS = 500_000
"""Limit on the number of ids: twice the largest vocabulary in use."""

MOST_BYTES = 256 * MOST_TOKENS
"""Limit on the size of a vocabulary's files: Llama 3's tokenizer.json has up to 130 bytes for each id."""

MOST_VALUES = 10 * MOST_TOKENS
"""Limit on the number of JSON values in one: a token, an added token with its flags, or a merge has up to 9."""

# Names that end a turn or a text wherever they are control tokens (Llama 3, and ChatML's end of a turn).
_STOP_NAMES = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary(abc.ABC):
    """The ids of a tokenizer, independent of the file that they came from.

    Each way of encoding text has a subclass with the rest: `BytePairs` for tiktoken, `LibraryVocabulary` for
    `tokenizers`, `PieceVocabulary` for SentencePiece.

    Attributes:
        specials: ids by name of the control tokens. Text is not encoded as one of them unless the caller asks for it.
        bos_id: id that the model expects at the start of a text, or None.
        declared_eos: id that the files name as the end of a text or turn, or None.
        declared_pad: id that the files name for padding, or None.
    """

    specials: Mapping[str, int]
    bos_id: int | None
    declared_eos: int | None
    declared_pad: int | None = None

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """One more than the largest id."""

    @property
    @abc.abstractmethod
    def plain_size(self) -> int:
        """One more than the largest id that text without added tokens can have."""

    @property
    @abc.abstractmethod
    def by_id(self) -> Sequence[bytes]:
        """The bytes of each id, in the order of ids. Control tokens have their names."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A sha256 (hex) of everything that ids depend on."""

    @property
    def starts_with_space(self) -> bool:
        """True if decoding drops the space that a text begins with, because encoding puts one there."""
        return False

    @property
    def is_llama3(self) -> bool:
        """True in Meta's layout: ids in the order of merging, then 256 special tokens."""
        return False

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, or None. Llama 3's is end_of_text, even if a chat model's files name another."""
        return self.specials["<|end_of_text|>"] if self.is_llama3 else self.declared_eos

    @property
    def pad_id(self) -> int | None:
        """The id of padding, or None."""
        return self.specials.get("<|finetune_right_pad_id|>", self.declared_pad)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a generation: `eos_id`, known end-of-turn names, and those that the files name."""
        ids = [self.eos_id, *(self.specials.get(name) for name in _STOP_NAMES), self.declared_eos]
        return tuple(dict.fromkeys(i for i in ids if i is not None))


@contextlib.contextmanager
def errors_of(source: str = "") -> Iterator[None]:
    """A context in which errors begin with `source`, the path of a file.

    A ConfigError, for an unsupported tokenizer, also says that the model can be used with token ids. Another error says
    to take another copy of the file.
    """
    place = f"{source}: " if source else ""
    remedy = "; the file is damaged or was edited: take another copy"
    try:
        yield
    except RecursionError:
        raise ValueError(f"{place}it is nested too deeply{remedy}") from None
    except ConfigError as error:
        raise ConfigError(f"{place}{error}; the model itself can still be used with token ids") from None
    except ValueError as error:
        raise ValueError(f"{place}{error}{remedy}") from None


def byte_chars() -> dict[int, str]:
    """The printable character that represents each byte in JSON and GGUF files (the table of GPT-2).

    Printable Latin-1 represents itself; the other bytes, in order, are represented by the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


# For str.translate. Latin-1 characters that represent no byte are mapped out of Latin-1, so that encoding fails.
_TO_BYTE = {c: 0xFFFF for c in range(256)} | {ord(char): byte for byte, char in byte_chars().items()}
_TO_CHAR = byte_chars()


def spelled(token: bytes) -> str:
    """A token as JSON and GGUF files spell it: one printable character for each byte."""
    return token.decode("latin-1").translate(_TO_CHAR)


def unspelled(text: str) -> bytes:
    """The bytes that `spelled` wrote as `text`; ValueError if a character represents no byte."""
    try:
        return text.translate(_TO_BYTE).encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError(f"token {text[:60]!r} has characters that stand for no byte in byte-level BPE") from None


def without_surrogates(text: str) -> str:
    """A text with each pair of surrogates joined to its character, and U+FFFD for a lone surrogate."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_unicode(text: str) -> bool:
    """True if a string can be encoded as UTF-8, that is, it has no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
