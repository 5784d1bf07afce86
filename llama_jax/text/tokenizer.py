"""The tokenizer: text to token ids and back, for any vocabulary.

Control tokens never come from text unless the caller asks for it: by default, `encode` gives the plain tokens of
"<|eot_id|>", and control ids are taken from `special_tokens`.
"""

import codecs
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from llama_jax.errors import Answering, ConfigError, brief, checked_keywords, no_attribute
from llama_jax.files import expanded, write_whole
from llama_jax.text import vocabulary_files
from llama_jax.text.byte_pairs import NUM_SPECIAL, BytePairs, llama3, ranks_file
from llama_jax.text.encoders import encoder_of
from llama_jax.text.formats import meta
from llama_jax.text.piece_vocabulary import PieceVocabulary
from llama_jax.text.vocabulary import Vocabulary

# The names of transformers.
_PEERS = {
    "apply_chat_template": "Llama.encode_dialog(messages), whose ids decode shows as text; chat(messages) answers",
    "chat_template": "Llama.chat_format",
    **dict.fromkeys(("bos_token_id", "bos_token"), "bos_id, and decode([bos_id]) for its text"),
    **dict.fromkeys(("eos_token_id", "eos_token"), "eos_id, and decode([eos_id]) for its text"),
    **dict.fromkeys(("pad_token_id", "pad_token"), "pad_id; prompts of a list need no padding"),
    "padding_side": "not needed: prompts of a list may have any lengths",
    "convert_ids_to_tokens": "decode([id]), or decode_bytes([id])",
    **dict.fromkeys(("batch_encode_plus", "encode_plus", "encode_batch"), "encode(text), for one text at a time"),
    "get_vocab": "vocabulary",
    **dict.fromkeys(
        ("add_special_tokens", "add_tokens"), "special_tokens, to which only the files of a model or an adapter add"
    ),
    "batch_decode": "decode(ids), for one text at a time",
    "tokenize": "encode(text)",
    "convert_tokens_to_ids": "special_tokens[name] for control tokens, and encode(text)",
    "all_special_tokens": "special_tokens",
    "save_pretrained": "save(path)",
    "from_pretrained": "Tokenizer(path), or llama_jax.load(name).tokenizer",
    "from_file": "Tokenizer(path)",
}


class Tokenizer(metaclass=Answering):
    """Text to token ids and back.

    Instances are immutable, safe to share between threads, and picklable (a copy is rebuilt from the vocabulary).

    Attributes:
        path: file that it was read from, or None.
        vocabulary: plain data that it was built from.
        vocab_size: number of ids, special tokens included.
        rows: number of ids that can be encoded: `vocab_size`, or fewer with `for_model`.
        special_tokens: name of each control token, such as "<|eot_id|>", to its id.
        stop_tokens: ids that end a generation (`Vocabulary.stop_ids`).
        bos_id: id that the model expects at the start of a text, or None.
        eos_id: id that ends a text, or None. Llama 3's is end_of_text, even if the files of a chat model name another.
        pad_id: id of padding, or None.
        eot_id: id of "end of turn" (Llama 3), or None.
        eom_id: id of "end of message" (Llama 3), or None.
        fingerprint: sha256 (hex) of everything that ids depend on; in Meta's layout, that of Meta's `tokenizer.model`.
    """

    _peers = _PEERS
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise no_attribute(self, name, _PEERS)

    def __call__(self, *args: object, **options: object) -> NoReturn:
        """Raises a TypeError that names `encode`: other libraries call a tokenizer."""
        raise TypeError("a Tokenizer is not a function: encode(text) gives ids, and models here take texts as they are")

    def __len__(self) -> int:
        """The number of ids, special tokens included."""
        return self.vocab_size

    @checked_keywords
    def __init__(self, path: str | os.PathLike[str], *, expected_vocab_size: int | None = None) -> None:
        """Reads any vocabulary file (see `vocabulary_files.read`).

        Args:
            path: file, or folder of a model.
            expected_vocab_size: vocabulary size of the model, special tokens included. A file in Meta's format that
                lost its last lines is still a well-formed smaller vocabulary; only this number reveals the loss.

        Raises:
            FileNotFoundError: there is no such file.
            ConfigError: no path, or a tokenizer whose ids cannot be reproduced; the message names the part that is the
                reason.
            ValueError: the file is damaged (one line: file, fault, remedy), or its vocabulary is not of the expected
                size.
        """
        self._setup(vocabulary_files.read(path), expanded(path))
        if expected_vocab_size is not None and expected_vocab_size != self.vocab_size:
            raise ValueError(
                f"{path}: holds {self.vocab_size:,} tokens but the model has {expected_vocab_size:,}; the file is cut "
                f"short or belongs to another model: {meta.FETCH_AGAIN}"
            )

    @classmethod
    def from_ranks(cls, ranks: Mapping[bytes, int]) -> "Tokenizer":
        """A tokenizer in Llama 3's layout from ranks by token bytes, as of `train_bpe`; ValueError if invalid."""
        remedy = "pass the ranks of a trained vocabulary"
        return cls.from_vocabulary(llama3(meta.in_rank_order(ranks, source="ranks", remedy=remedy)))

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary, path: Path | None = None) -> "Tokenizer":
        """The tokenizer of any vocabulary; `path` is the file that it was read from."""
        self = cls.__new__(cls)
        self._setup(vocabulary, path)
        return self

    def for_model(self, rows: int) -> "Tokenizer":
        """This tokenizer, for a model that may have fewer rows than it has ids.

        Tokens may have been added to a tokenizer and not to its model. They are harmless until they are used: encoding
        a text that holds one raises ConfigError.

        Raises:
            ConfigError: ids that plain text needs have no row: it is the tokenizer of another model.
        """
        if rows >= self.vocab_size:
            return self
        vocabulary = self.vocabulary
        if vocabulary.plain_size > rows or (vocabulary.bos_id or 0) >= rows:
            raise ConfigError(
                f"the tokenizer has {self.vocab_size:,} ids but the model only {rows:,}: use the tokenizer that it was "
                "trained with"
            )
        other = Tokenizer.__new__(Tokenizer)  # copy.copy would rebuild the encoder
        other.__dict__.update(self.__dict__)
        other.rows = rows
        other.stop_tokens = tuple(i for i in self.stop_tokens if i < rows)
        return other

    def check_rows(self, ids: Sequence[int]) -> None:
        """Refuses ids that the model has no row for, with a ConfigError that names the first of them."""
        if self.rows < self.vocab_size and ids and max(ids) >= self.rows:
            first = next(i for i in ids if i >= self.rows)
            raise ConfigError(
                f"the text holds {self.decode([first])!r} (id {first}), which the model has no row for: its ids are 0 "
                f"to {self.rows - 1}. The token was added to the tokenizer alone; take it out of the text"
            )

    def _setup(self, vocabulary: Vocabulary, path: Path | None) -> None:
        self.path = path
        self.vocabulary = vocabulary
        self.vocab_size = self.rows = vocabulary.size
        self.special_tokens: dict[str, int] = dict(vocabulary.specials)
        self._control = frozenset(self.special_tokens.values())
        self._by_id = vocabulary.by_id
        self._starts_with_space = vocabulary.starts_with_space
        self._encoder = encoder_of(vocabulary)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.pad_id = vocabulary.pad_id
        self.eot_id = self.special_tokens.get("<|eot_id|>")
        self.eom_id = self.special_tokens.get("<|eom_id|>")
        self.stop_tokens = vocabulary.stop_ids
        self.fingerprint = vocabulary.fingerprint

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self.vocabulary, self.path, self.rows)

    def __repr__(self) -> str:
        origin = f"{str(self.path)!r}" if self.path else "from memory"
        return f"Tokenizer({origin}, vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:12]})"

    @checked_keywords
    def encode(self, text: str, *, bos: bool = False, eos: bool = False, special_tokens: bool = False) -> list[int]:
        """Returns the ids of `text`.

        In Llama 3's layout they equal those of Meta's `Tokenizer.encode` on every string, and elsewhere those of the
        library that the vocabulary is made for. Python strings can hold surrogates, which UTF-8 cannot: a pair is
        encoded as the character it stands for and a lone one as U+FFFD, so that such strings do not come back from
        `decode` unchanged.

        Args:
            text: any string.
            bos: True puts `bos_id` first, if there is one.
            eos: True puts `eos_id` last, if there is one.
            special_tokens: True encodes names of control tokens in `text` as control ids. By default they are encoded
                as plain text, which is right for text from users.

        Raises:
            TypeError: `text` is not a str.
            ConfigError: `text` holds a token that the model has no row for (see `for_model`).
            ValueError: outside Llama 3's layout, more white space in a row than can be cut into words.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode takes a str, got {type(text).__name__}; decode bytes, or encode items one by one")
        ids = self._encoder.encode(text, special_tokens)
        if bos and self.bos_id is not None:
            ids = [self.bos_id, *ids]
        if eos and self.eos_id is not None:
            ids.append(self.eos_id)
        self.check_rows(ids)
        return ids

    @checked_keywords
    def decode(self, ids: Iterable[int], *, skip_special: bool = False, continues: bool = False) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD, as in Meta's tokenizer.

        Args:
            ids: integers, or a one-dimensional integer array (numpy, jax).
            skip_special: True leaves control tokens out; otherwise they appear by name.
            continues: True if `ids` continue a text. SentencePiece vocabularies put a space in front of every text,
                which decoding drops; in the middle of a text that space belongs to the text.

        Raises:
            ValueError: an id is outside 0..vocab_size-1.
            TypeError: `ids` is not a sequence of integers.
        """
        data = self.decode_bytes(ids, skip_special=skip_special, continues=continues)
        return data.decode("utf-8", errors="replace")

    @checked_keywords
    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False, continues: bool = False) -> bytes:
        """Returns the bytes of `ids`, which may end within a character; otherwise as `decode`."""
        checked = self._check_ids(ids)
        if skip_special:
            checked = [i for i in checked if i not in self._control]
        data = b"".join([self._by_id[i] for i in checked])
        return data.removeprefix(b" ") if self._starts_with_space and not continues else data

    def _check_ids(self, ids: Iterable[int]) -> list[int]:
        if hasattr(ids, "tolist"):  # one transfer for a numpy or jax array
            ids = ids.tolist()
        try:
            checked = [operator.index(i) for i in ids]
        except TypeError:
            raise TypeError(f"decode takes a flat sequence of integer ids, got {brief(ids)}") from None
        if checked and not (min(checked) >= 0 and max(checked) < self.vocab_size):
            bad = next(i for i in checked if not 0 <= i < self.vocab_size)
            raise ValueError(f"id {bad} is not in this vocabulary; allowed: 0 to {self.vocab_size - 1}")
        return checked

    @checked_keywords
    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the vocabulary as the `tokenizer.model` of Meta's code, atomically.

        That is a SentencePiece model for Llama 2, and ranks for Llama 3. A file of ranks has no names of special
        tokens, so reserved ids get the names of Meta's code.

        Raises:
            ConfigError: the vocabulary is in neither layout.
        """
        if isinstance(self.vocabulary, PieceVocabulary) and self.vocabulary.size == len(self.vocabulary.model.pieces):
            write_whole(path, self.vocabulary.contents)
            return
        if not (isinstance(self.vocabulary, BytePairs) and self.vocabulary.is_llama3):
            raise ConfigError(
                f"{path}: a tokenizer.model in Meta's format can only hold ranks before Meta's {NUM_SPECIAL} special "
                "tokens, and this vocabulary has others; use `save_to`, which writes a tokenizer.json"
            )
        write_whole(path, ranks_file(self.vocabulary.tokens))

    @checked_keywords
    def save_to(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the file of `folder` from which `Tokenizer(folder)` reads this tokenizer again; returns its path."""
        return vocabulary_files.write(self.vocabulary, folder)


def _rebuilt(vocabulary: Vocabulary, path: Path | None, rows: int) -> Tokenizer:
    return Tokenizer.from_vocabulary(vocabulary, path).for_model(rows)


def require_tokenizer(tokenizer: Tokenizer | None, name: str) -> Tokenizer:
    """Returns the tokenizer. If there is none, a ConfigError says that `name` needs one."""
    if tokenizer is None:
        raise ConfigError(f"{name} needs a tokenizer: put tokenizer.model or tokenizer.json in the model's folder")
    return tokenizer


class StreamDecoder:
    """Decodes ids to text one after the other, without splitting a UTF-8 character.

    The joined results of `push` and `flush` equal `tokenizer.decode(ids, skip_special=True, continues=continues)`.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = False) -> None:
        """Makes a decoder without pending bytes; `continues` is that of `Tokenizer.decode`."""
        self._tokenizer = tokenizer
        self._continues = self._began = continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: int | Iterable[int]) -> str:
        """Reads one id or several, and returns the text that they complete. Control tokens give no text."""
        several = isinstance(ids, Iterable) and getattr(ids, "ndim", 1) > 0
        new = list(cast(Iterable[int], ids)) if several else [cast(int, ids)]
        data = self._tokenizer.decode_bytes(new, skip_special=True, continues=True)
        if data and not self._began:
            data = self._tokenizer.decode_bytes(new, skip_special=True)
            self._began = True
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Returns the text of the pending bytes (U+FFFD for an incomplete character), and clears them."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._began = self._continues
        return text
