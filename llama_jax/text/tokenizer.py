"""The tokenizer: text to token ids and back, for any vocabulary.

Control tokens never come from text unless the caller asks for it: by default, `encode` gives the plain tokens of
"<|eot_id|>", and control ids are taken from `special_tokens`.
"""

import codecs
import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import ConfigError, brief
from llama_jax.files import write_whole
from llama_jax.text import vocabulary_files
from llama_jax.text.byte_pairs import NUM_SPECIAL, BytePairs, llama3, ranks_file
from llama_jax.text.encoders import encoder_of
from llama_jax.text.formats import meta
from llama_jax.text.vocabulary import Vocabulary


class Tokenizer:
    """Text to token ids and back.

    Instances are immutable, safe to share between threads, and picklable (a copy is rebuilt from the vocabulary).

    Attributes:
        path: file that it was read from, or None.
        vocabulary: plain data that it was built from.
        vocab_size: number of ids, special tokens included.
        special_tokens: name of each control token, such as "<|eot_id|>", to its id.
        stop_tokens: ids that end a generation (`Vocabulary.stop_ids`).
        bos_id: id that the model expects at the start of a text, or None.
        eos_id: id that ends a text, or None. Llama 3's is end_of_text, even where its files for chat name another.
        pad_id: id of padding, or None.
        eot_id: id of "end of turn" (Llama 3), or None.
        eom_id: id of "end of message" (Llama 3), or None.
        fingerprint: sha256 (hex) of everything that ids depend on; in Meta's layout, that of Meta's `tokenizer.model`.
    """

    def __init__(self, path: str | os.PathLike[str], *, expected_vocab_size: int | None = None) -> None:
        """Reads any vocabulary file (see `vocabulary_files.read`).

        Args:
            path: file, or folder of a model.
            expected_vocab_size: vocabulary size of the model, special tokens included. A file in Meta's format that
                lost its last lines is still a well-formed smaller vocabulary; only this number gives it away.

        Raises:
            FileNotFoundError: there is no such file.
            ConfigError: a tokenizer whose ids cannot be reproduced; the message names the part that is the reason.
            ValueError: the file is damaged (one line: file, fault, remedy), or its vocabulary is not of the expected
                size.
        """
        self._setup(vocabulary_files.read(path), Path(path))
        if expected_vocab_size is not None and expected_vocab_size != self.vocab_size:
            raise ValueError(
                f"{path}: holds {self.vocab_size:,} tokens but the model has {expected_vocab_size:,}; the file is cut "
                f"short or belongs to another model: {meta.FETCH_AGAIN}"
            )

    @classmethod
    def from_ranks(cls, ranks: Mapping[bytes, int]) -> "Tokenizer":
        """The tokenizer in Llama 3's layout of token bytes to rank, as `train_bpe` returns; ValueError if unsound."""
        remedy = "pass the ranks of a trained vocabulary"
        return cls.from_vocabulary(llama3(meta.in_rank_order(ranks, source="ranks", remedy=remedy)))

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary, path: Path | None = None) -> "Tokenizer":
        """The tokenizer of any vocabulary; `path` is the file that it was read from."""
        self = cls.__new__(cls)
        self._setup(vocabulary, path)
        return self

    def _setup(self, vocabulary: Vocabulary, path: Path | None) -> None:
        self.path = path
        self.vocabulary = vocabulary
        self.vocab_size = vocabulary.size
        self.special_tokens: dict[str, int] = dict(vocabulary.specials)
        self._control = frozenset(self.special_tokens.values())
        self._by_id = vocabulary.by_id
        self._encoder = encoder_of(vocabulary)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.pad_id = vocabulary.pad_id
        self.eot_id = self.special_tokens.get("<|eot_id|>")
        self.eom_id = self.special_tokens.get("<|eom_id|>")
        self.stop_tokens = vocabulary.stop_ids
        self.fingerprint = vocabulary.fingerprint

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer.from_vocabulary, (self.vocabulary, self.path)

    def __repr__(self) -> str:
        origin = f"{str(self.path)!r}" if self.path else "from memory"
        return f"Tokenizer({origin}, vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:12]})"

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, special_tokens: bool = False) -> list[int]:
        """Returns the ids of `text`.

        In Llama 3's layout they equal those of Meta's `Tokenizer.encode` on every string, and elsewhere those of
        the library that the vocabulary is made for. Python strings can hold surrogates, which UTF-8 cannot: a pair is
        encoded as the character it stands for and a lone one as U+FFFD, so that such strings do not come back
        from `decode` unchanged.

        Args:
            text: any string.
            bos: put `bos_id` first, if there is one.
            eos: put `eos_id` last, if there is one.
            special_tokens: names of control tokens in `text` become control ids. By default they are encoded as the
                plain text they are, which is right for text from users.

        Raises:
            TypeError: `text` is not a str.
            ValueError: outside Llama 3's layout, more white space in a row than can be cut into words.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode takes a str, got {type(text).__name__}; decode bytes, or encode items one by one")
        ids = self._encoder.encode(text, special_tokens)
        if bos and self.bos_id is not None:
            ids = [self.bos_id, *ids]
        if eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD, as in Meta's tokenizer.

        Args:
            ids: integers, or a one-dimensional integer array (numpy, jax).
            skip_special: leave control tokens out; otherwise they appear by name.

        Raises:
            ValueError: an id is outside 0..vocab_size-1.
            TypeError: `ids` is not a sequence of integers.
        """
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """Returns the bytes of `ids`, which may end within a character; otherwise as `decode`."""
        checked = self._check_ids(ids)
        if skip_special:
            checked = [i for i in checked if i not in self._control]
        return b"".join([self._by_id[i] for i in checked])

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the vocabulary in Meta's format, atomically.

        The file holds no names of special tokens: reserved ids get the names that Meta's code gives them.

        Raises:
            ConfigError: the vocabulary is not in Meta's layout.
        """
        if not (isinstance(self.vocabulary, BytePairs) and self.vocabulary.is_llama3):
            raise ConfigError(
                f"{path}: a tokenizer.model in Meta's format can only hold ranks before Meta's {NUM_SPECIAL} special "
                "tokens, which this vocabulary does not have; use `save_to`, which writes a tokenizer.json"
            )
        write_whole(path, ranks_file(self.vocabulary.tokens))

    def save_to(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the file of `folder` from which `Tokenizer(folder)` reads this tokenizer again; returns its path."""
        return vocabulary_files.write(self.vocabulary, folder)


class StreamDecoder:
    """Turns ids into text as they come, never splitting a UTF-8 character.

    The joined results of `push` and `flush` equal `tokenizer.decode(ids, skip_special=True)`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Starts with no pending bytes."""
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: int | Iterable[int]) -> str:
        """Returns the text that one id, or several, complete; control tokens print nothing."""
        if not hasattr(ids, "__iter__") or getattr(ids, "ndim", 1) == 0:
            ids = [ids]
        return self._utf8.decode(self._tokenizer.decode_bytes(ids, skip_special=True))

    def flush(self) -> str:
        """Returns the pending rest (U+FFFD for a character that never ended) and starts afresh."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
