"""The tokenizer: byte-level BPE over tiktoken, with ids equal to those of Meta's code and of `tokenizers`.

What it holds is a `Vocabulary`, read from Meta's `tokenizer.model`, a `tokenizer.json` or a GGUF file. Llama 3's ids
are the ranks 0..n-1 followed by 256 special tokens, so that the published vocabulary has 128,000 + 256. Special
tokens are never produced from text: `encode` gives the plain tokens of "<|eot_id|>", and control ids come from
`special_tokens` alone.
"""

import codecs
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from llama_jax.errors import ConfigError, brief
from llama_jax.files import write_whole
from llama_jax.text import chat
from llama_jax.text.formats import gguf as gguf_vocabulary
from llama_jax.text.formats import huggingface as huggingface_vocabulary
from llama_jax.text.formats import meta as meta_vocabulary
from llama_jax.text.vocabulary import LLAMA3_SPECIALS, NUM_SPECIAL, Vocabulary, llama3, ranks_file

# Meta's own limits. Tokens never cross these cuts, so they are part of what the ids are.
_MAX_PIECE = 400_000
_MAX_RUN = 25_000

# Other vocabularies have no such cuts, and the regex engine keeps a stack of a million steps within white space.
_MAX_SPACE = 800_000

_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
_FILES = ("tokenizer.model", "tokenizer.json")


class Tokenizer:
    """Text to token ids and back.

    Instances are immutable, safe to share between threads, and picklable (a copy is rebuilt from the vocabulary).

    Attributes:
        path: the file it was read from, or None.
        vocabulary: the plain data it was built from.
        vocab_size: the number of ids, special tokens included.
        special_tokens: the name of each control token, such as "<|eot_id|>", to its id.
        stop_tokens: the ids that end a generation: `eos_id`, those of end_of_text, eom_id and eot_id that exist, and
            what the files name as the end.
        bos_id: the id that the model wants in front of a text, or None.
        eos_id: the id that ends a text, or None. Llama 3's is end_of_text, whatever its files for chat say.
        pad_id, eot_id, eom_id: those of finetune_right_pad_id, "end of turn" and "end of message", or None.
        fingerprint: sha256 (hex) of all that ids depend on; in Meta's layout, that of Meta's `tokenizer.model`.
    """

    def __init__(self, path: str | os.PathLike[str], *, expected_vocab_size: int | None = None) -> None:
        """Read and check a `tokenizer.model` in Meta's format; `open` reads others too.

        Args:
            path: the file.
            expected_vocab_size: the model's vocabulary, specials included. A file cut off between two lines
                is still a well-formed smaller vocabulary; only this number gives it away.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or of another format (one line: file, line number, fault, mend),
                or its vocabulary is not of the expected size.
        """
        self._setup(llama3(meta_vocabulary.read_ranks(Path(path))), Path(path))
        if expected_vocab_size is not None and expected_vocab_size != self.vocab_size:
            raise ValueError(
                f"{path}: holds {self.vocab_size:,} tokens ({len(self.vocabulary.tokens):,} ranks + {NUM_SPECIAL} "
                f"special) but the model has {expected_vocab_size:,}; the file is cut short or belongs to "
                f"another model: {meta_vocabulary.FETCH_AGAIN}"
            )

    @classmethod
    def from_ranks(cls, ranks: Mapping[bytes, int]) -> "Tokenizer":
        """Llama 3's layout from token bytes to rank, as `train_bpe` returns; ValueError if unsound."""
        mend = "pass the ranks of a trained vocabulary"
        return cls.from_vocabulary(llama3(meta_vocabulary.in_rank_order(ranks, source="ranks", mend=mend)))

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary, path: Path | None = None) -> "Tokenizer":
        """The tokenizer of any vocabulary; `path` is where it came from."""
        self = cls.__new__(cls)
        self._setup(vocabulary, path)
        return self

    def _setup(self, vocabulary: Vocabulary, path: Path | None) -> None:
        self.path = path
        self.vocabulary = vocabulary
        self.vocab_size = vocabulary.size
        self.special_tokens: dict[str, int] = dict(vocabulary.specials)
        self._is_llama3 = vocabulary.is_llama3
        self._control = frozenset(self.special_tokens.values())
        self._by_id = vocabulary.by_id
        ids = list(vocabulary.tokens.values())
        # tiktoken's ranks are the order of merging and the ids in one. Where the two differ, a table comes after it.
        self._id_of_rank = None if ids == sorted(ids) else ids
        ranks = vocabulary.tokens if self._id_of_rank is None else {t: i for i, t in enumerate(vocabulary.tokens)}
        self._encoding = tiktoken.Encoding(
            name="llama_jax", pat_str=vocabulary.pattern, mergeable_ranks=dict(ranks), special_tokens={}
        )
        self._found = [(_any_of(names), names) for names in vocabulary.found]
        self.bos_id = vocabulary.bos
        self.eos_id = self.special_tokens["<|end_of_text|>"] if self._is_llama3 else vocabulary.eos
        self.pad_id = self.special_tokens.get("<|finetune_right_pad_id|>")
        self.eot_id = self.special_tokens.get("<|eot_id|>")
        self.eom_id = self.special_tokens.get("<|eom_id|>")
        stops = [self.eos_id, *(self.special_tokens.get(name) for name in _STOPS), vocabulary.eos]
        self.stop_tokens: tuple[int, ...] = tuple(dict.fromkeys(i for i in stops if i is not None))
        self.fingerprint = vocabulary.fingerprint

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the vocabulary."""
        return Tokenizer.from_vocabulary, (self.vocabulary, self.path)

    def __repr__(self) -> str:
        """Name the file, the size and the start of the fingerprint."""
        origin = f"{str(self.path)!r}" if self.path else "from memory"
        return f"Tokenizer({origin}, vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:12]})"

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of `text`.

        In Llama 3's layout they are those of Meta's `Tokenizer.encode` on every string, and elsewhere those of
        `tokenizers`. The names of special tokens inside `text` are encoded as the plain text they are. Python strings
        can hold surrogates, which UTF-8 cannot: a pair is encoded as the character it stands for and a lone one
        as U+FFFD, so such strings, alone, do not come back from `decode` as they were.

        Args:
            text: any string.
            bos: put `bos_id` first, where there is one.
            eos: put `eos_id` last, where there is one.

        Raises:
            TypeError: `text` is not a str.
            ValueError: outside Llama 3's layout, more white space in a row than can be cut into words.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode takes a str, got {type(text).__name__}; decode bytes, or encode items one by one")
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        parts: list[str | int] = [text]
        for pattern, names in self._found:
            parts = [x for part in parts for x in (_cut(part, pattern, names) if isinstance(part, str) else [part])]
        for part in parts:
            ids += self._encode_words(part) if isinstance(part, str) else [part]
        if eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def _encode_words(self, text: str) -> list[int]:
        if self._is_llama3:
            ids: list[int] = []
            for piece in _pieces(text, max_piece=_MAX_PIECE, max_run=_MAX_RUN):
                ids += self._encoding.encode_ordinary(piece)
            return ids
        _check_space(text)
        ranks = self._encoding.encode_ordinary(text)
        return ranks if self._id_of_rank is None else [self._id_of_rank[rank] for rank in ranks]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD, as in Meta's tokenizer.

        Args:
            ids: integers, or a one-dimensional integer array (numpy, jax).
            skip_special: leave control tokens out; otherwise they appear by name.

        Raises:
            ValueError: an id is outside 0..vocab_size-1.
            TypeError: `ids` is not a sequence of integers.
        """
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """Return the bytes of `ids`, of which one may be part of a character; otherwise as `decode`."""
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

    def encode_dialog(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        return_mask: bool = False,
    ) -> list[int] | tuple[list[int], list[bool]]:
        """Return the ids of a dialog, with `return_mask` (ids, mask); see `llama_jax.text.chat`."""
        ids, mask = chat.encode_dialog(self, messages, tools=tools, add_generation_prompt=add_generation_prompt)
        return (ids, mask) if return_mask else ids

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vocabulary in Meta's format, whole or not at all.

        The file holds no names of special tokens: those of reserved places become what Meta's code calls them.

        Raises:
            ConfigError: it is not in Meta's layout.
        """
        if not self._is_llama3:
            raise ConfigError(
                f"{path}: a tokenizer.model can only hold ranks before Meta's {NUM_SPECIAL} special tokens, and this "
                "vocabulary is otherwise; use `save_to`, which writes a tokenizer.json"
            )
        write_whole(path, ranks_file(self.vocabulary.tokens))

    def save_to(self, folder: str | os.PathLike[str]) -> Path:
        """Write the file of `folder` from which `open` reads this tokenizer again, and return its path.

        It is a `tokenizer.model` in Meta's format where that can hold it, else a `tokenizer.json` with what goes
        beside it. The other of the two is removed, so that `find` finds this one.
        """
        folder = Path(folder)
        kept, other = _FILES if self._is_metas else _FILES[::-1]
        if self._is_metas:
            self.save(folder / kept)
        else:
            huggingface_vocabulary.write(self, folder)
        (folder / other).unlink(missing_ok=True)
        return folder / kept

    @property
    def _is_metas(self) -> bool:
        return self._is_llama3 and sorted(self.special_tokens, key=self.special_tokens.get) == list(LLAMA3_SPECIALS)


class StreamDecoder:
    """Turns ids into text as they come, never breaking a UTF-8 character.

    What `push` and `flush` return, joined, is `tokenizer.decode(ids, skip_special=True)`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Start with no pending bytes."""
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: int | Iterable[int]) -> str:
        """Return the text that one id, or several, complete; control tokens print nothing."""
        if not hasattr(ids, "__iter__") or getattr(ids, "ndim", 1) == 0:
            ids = [ids]
        return self._utf8.decode(self._tokenizer.decode_bytes(ids, skip_special=True))

    def flush(self) -> str:
        """Return what is left (U+FFFD for a character that never ended) and start afresh."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def find(folder: str | os.PathLike[str]) -> Path | None:
    """The file of a model's folder that `open` should read, or None.

    Meta's `tokenizer.model` comes first (the folder's own, else the one in `original/`), then `tokenizer.json`. A
    `tokenizer.model` in another format, such as Llama 2's, comes last.
    """
    folder = Path(folder)
    named = [folder / "tokenizer.model", folder / "original" / "tokenizer.model", folder / "tokenizer.json"]
    there = [path for path in named if path.is_file()]
    sound = [path for path in there if path.suffix == ".json" or meta_vocabulary.looks_like_ranks(path)]
    return next(iter([*sound, *there]), None)


def open(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a `tokenizer.json` (by its suffix), or a `tokenizer.model` in Meta's format.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: a tokenizer whose ids cannot be reproduced exactly; says which part of it is the reason.
        ValueError: a damaged file.
    """
    path = Path(path)
    if path.suffix == ".json":
        return Tokenizer.from_vocabulary(huggingface_vocabulary.read(path), path)
    return Tokenizer(path)


def from_gguf(fields: gguf_vocabulary.Fields) -> Tokenizer:
    """The tokenizer that the metadata of a GGUF file describes; errors as in `gguf.vocabulary`."""
    described = {name: value for name, value in fields.items() if name != "chat_template"}
    return Tokenizer.from_vocabulary(gguf_vocabulary.vocabulary(**described))


def _pieces(text: str, *, max_piece: int, max_run: int) -> Iterator[str]:
    """Cut `text` as Meta does: every `max_piece` characters, and inside longer runs of (non-)whitespace.

    A run is consecutive characters that are all whitespace, or all not, within one piece; it is cut each
    `max_run` characters from its start. Both `str.isspace` and `\\s` in `re` mean the same characters.
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
    """Whether some window of half a run is all whitespace or all not, as it must be inside any longer run.

    In ordinary text each search ends within a word, so that a long document costs a few dozen searches.
    """
    window = max(1, max_run // 2)
    for start in range(0, len(piece) - window + 1 if len(piece) > max_run else 0, window):
        other = _NOT_SPACE if piece[start].isspace() else _SPACE
        if other.search(piece, start, start + window) is None:
            return True
    return False


_SPACE, _NOT_SPACE = re.compile(r"\s"), re.compile(r"\S")


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Any of the names, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def _cut(text: str, pattern: re.Pattern[str], names: Mapping[str, int | None]) -> Iterator[str | int]:
    """The ids of the names in `text`, and the texts between them."""
    begin = 0
    for match in pattern.finditer(text):
        if (found := names[match[0]]) is not None:
            yield text[begin : match.start()]
            yield found
            begin = match.end()
    yield text[begin:]


def _check_space(text: str) -> None:
    if len(text) <= _MAX_SPACE:
        return
    longest = max((run.end() - run.start() for run in re.finditer(r"\s+", text)), default=0)
    if longest > _MAX_SPACE:
        raise ValueError(
            f"the text has {longest:,} characters of white space in a row, of which this vocabulary can take "
            f"{_MAX_SPACE:,}; cut the text there"
        )
