"""The Llama 3 tokenizer: byte-level BPE over tiktoken, with ids equal to Meta's on every string.

The file format is Meta's `tokenizer.model`: one `base64(token) SPACE rank` per line. The ids are the ranks
0..n-1 followed by 256 special tokens, so the published vocabulary has 128,000 + 256 ids. Special tokens are
never produced from text: `encode` gives the plain tokens of "<|eot_id|>", and control ids come from
`special_tokens` alone.
"""

import base64
import binascii
import codecs
import hashlib
import operator
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from llama_jax.text import chat

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts text into words before merging bytes; understood alike by tiktoken and `tokenizers`."""

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

# Meta's own limits. Tokens never cross these cuts, so they are part of what the ids are.
_MAX_PIECE = 400_000
_MAX_RUN = 25_000

_FETCH_AGAIN = "copy the file again from the checkpoint (Meta's `tokenizer.model`, `original/tokenizer.model` on HF)"


class Tokenizer:
    """Text to token ids and back, from a `tokenizer.model` in Meta's format.

    Instances are immutable, safe to share between threads, and picklable (a copy is rebuilt from the ranks).

    Attributes:
        path: the file it was read from, or None after `from_ranks`.
        special_tokens: the name of each control token, such as "<|eot_id|>", to its id.
        stop_tokens: the ids that end a generation: end_of_text, eom_id, eot_id.
        bos_id, eos_id, pad_id: the ids of begin_of_text, end_of_text and finetune_right_pad_id.
        eot_id, eom_id: the ids of "end of turn" and "end of message".
        fingerprint: sha256 (hex) of the ranks as `save` writes them; for Meta's file, the sha256 of the file.
    """

    def __init__(self, path: str | os.PathLike[str], *, expected_vocab_size: int | None = None) -> None:
        """Read and check a `tokenizer.model`.

        Args:
            path: the file.
            expected_vocab_size: the model's vocabulary, specials included. A file cut off between two lines
                is still a well-formed smaller vocabulary; only this number gives it away.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or of another format (one line: file, line number, fault, mend),
                or its vocabulary is not of the expected size.
        """
        self._setup(_read_ranks(Path(path)), Path(path))
        if expected_vocab_size is not None and expected_vocab_size != self.vocab_size:
            raise ValueError(
                f"{path}: holds {self.vocab_size:,} tokens ({len(self._tokens):,} ranks + {NUM_SPECIAL} "
                f"special) but the model has {expected_vocab_size:,}; the file is cut short or belongs to "
                f"another model: {_FETCH_AGAIN}"
            )

    @classmethod
    def from_ranks(cls, ranks: Mapping[bytes, int]) -> "Tokenizer":
        """Build a tokenizer from token bytes to rank, as `train_bpe` returns; ValueError if unsound."""
        self = cls.__new__(cls)
        self._setup(_in_rank_order(ranks, source="ranks", mend="pass the ranks of a trained vocabulary"), None)
        return self

    def _setup(self, tokens: list[bytes], path: Path | None) -> None:
        names = [*_NAMED_SPECIAL]
        names += [f"reserved_special_token_{i}" for i in range(2, NUM_SPECIAL - len(names) + 2)]
        self.path = path
        self.special_tokens: dict[str, int] = {f"<|{n}|>": len(tokens) + i for i, n in enumerate(names)}
        self._tokens = tokens
        self._encoding = tiktoken.Encoding(
            name="llama3",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens=self.special_tokens,
        )
        self.bos_id = self.special_tokens["<|begin_of_text|>"]
        self.eos_id = self.special_tokens["<|end_of_text|>"]
        self.pad_id = self.special_tokens["<|finetune_right_pad_id|>"]
        self.eot_id = self.special_tokens["<|eot_id|>"]
        self.eom_id = self.special_tokens["<|eom_id|>"]
        self.stop_tokens: tuple[int, ...] = (self.eos_id, self.eom_id, self.eot_id)
        self.fingerprint = hashlib.sha256(_file_bytes(tokens)).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the tokens in order of rank: 1.2 MB and 0.2 s for Meta's vocabulary."""
        return _rebuild, (self._tokens, self.path)

    def __repr__(self) -> str:
        """Name the file, the size and the start of the fingerprint."""
        origin = f"{str(self.path)!r}" if self.path else "from ranks"
        return f"Tokenizer({origin}, vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:12]})"

    @property
    def vocab_size(self) -> int:
        """The number of ids, special tokens included."""
        return len(self._tokens) + NUM_SPECIAL

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of `text`, equal to Meta's `Tokenizer.encode` on every string.

        The names of special tokens inside `text` are encoded as the plain text they are. Python strings can
        hold surrogates, which UTF-8 cannot: a pair is encoded as the character it stands for and a lone one
        as U+FFFD, so such strings, alone, do not come back from `decode` as they were.

        Args:
            text: any string.
            bos: put begin_of_text first.
            eos: put end_of_text last.

        Raises:
            TypeError: `text` is not a str.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode takes a str, got {type(text).__name__}; decode bytes, or encode items one by one")
        ids = [self.bos_id] if bos else []
        for piece in _pieces(text, max_piece=_MAX_PIECE, max_run=_MAX_RUN):
            ids += self._encoding.encode_ordinary(piece)
        if eos:
            ids.append(self.eos_id)
        return ids

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
            checked = [i for i in checked if i < len(self._tokens)]
        return self._encoding.decode_bytes(checked)

    def _check_ids(self, ids: Iterable[int]) -> list[int]:
        if hasattr(ids, "tolist"):  # one transfer for a numpy or jax array
            ids = ids.tolist()
        try:
            checked = [operator.index(i) for i in ids]
        except TypeError:
            raise TypeError(f"decode takes a flat sequence of integer ids, got {_short(ids)}") from None
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
        """Write the vocabulary in Meta's format, whole or not at all."""
        path = Path(path)
        # Several processes may save into one shared folder: each has a side file of its own, and renaming is atomic.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as partial:
            partial.write(_file_bytes(self._tokens))
        os.chmod(partial.name, 0o644)  # as any other file; temporary ones are private
        os.replace(partial.name, path)


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


def _rebuild(tokens: list[bytes], path: Path | None) -> Tokenizer:
    self = Tokenizer.__new__(Tokenizer)
    self._setup(tokens, path)
    return self


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


def _file_bytes(tokens: Iterable[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def _read_ranks(path: Path) -> list[bytes]:
    """Return the tokens of a `tokenizer.model` in order of rank, or raise with the line and the mend."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name the file in it, such as {path / 'tokenizer.model'}")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file; give the path of Meta's `tokenizer.model` "
            "(in a Hugging Face checkpoint it lies under `original/`)"
        ) from None
    lines = data.split(b"\n")
    first_line: dict[bytes, int] = {}
    ranks: dict[bytes, int] = {}
    rank_line: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        where = f"{path}: line {number}"
        cut = " (the last line: the file seems cut short)" if number == len(lines) else ""
        if len(fields) != 2:
            fault = f"expected `base64 rank`, got {_short(line)}{cut}"
            raise ValueError(f"{where}: {fault}; {_mend_for(data)}")
        try:
            token = base64.b64decode(fields[0], validate=True)
        except binascii.Error:
            raise ValueError(f"{where}: {_short(fields[0])} is not base64{cut}; {_mend_for(data)}") from None
        if not token:
            raise ValueError(f"{where}: the token is empty{cut}; {_FETCH_AGAIN}")
        if not fields[1].isdigit():
            raise ValueError(f"{where}: rank {_short(fields[1])} is not a whole number{cut}; {_mend_for(data)}")
        rank = int(fields[1])
        if token in first_line:
            raise ValueError(f"{where}: token {token!r} is on line {first_line[token]} already; {_FETCH_AGAIN}")
        if rank in rank_line:
            raise ValueError(f"{where}: rank {rank} is on line {rank_line[rank]} already{cut}; {_FETCH_AGAIN}")
        first_line[token], ranks[token], rank_line[rank] = number, rank, number
    if not ranks:
        raise ValueError(f"{path}: line 1: the file is empty; {_FETCH_AGAIN}")
    return _in_rank_order(ranks, source=str(path), mend=_FETCH_AGAIN, lines=first_line)


def _in_rank_order(
    ranks: Mapping[bytes, int], *, source: str, mend: str, lines: Mapping[bytes, int] | None = None
) -> list[bytes]:
    for token, rank in ranks.items():
        if not isinstance(token, bytes) or not token or not isinstance(rank, int):
            raise ValueError(f"{source}: {token!r}: {rank!r} is not non-empty bytes to an int; {mend}")
    tokens = sorted(ranks, key=ranks.__getitem__)
    for rank, token in enumerate(tokens):
        if ranks[token] != rank:
            line = f"line {lines[token]}: " if lines else ""
            raise ValueError(
                f"{source}: {line}token {token!r} has rank {ranks[token]} where rank {rank} is due; the "
                f"ranks of {len(tokens):,} tokens must be 0 to {len(tokens) - 1}, each once; {mend}"
            )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} of the 256 single bytes have no token on any line "
            f"(the first is 0x{missing[0]:02x}); {mend}"
        )
    return tokens


def _mend_for(data: bytes) -> str:
    """Name the file that was probably given in place of a `tokenizer.model`."""
    if data.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer: run `git lfs pull` to fetch the file itself"
    if data.lstrip()[:1] == b"{":
        return "this looks like a `tokenizer.json`: give Llama 3's `tokenizer.model`, under `original/` on HF"
    if b"\x00" in data[:4096] or b"<unk>" in data[:64]:
        return "this looks like a SentencePiece model (Llama 2): give the `tokenizer.model` of Llama 3"
    return _FETCH_AGAIN


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
