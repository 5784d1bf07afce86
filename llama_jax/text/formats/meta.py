"""Meta's `tokenizer.model`: one `base64(token) SPACE rank` per line, and nothing about the 256 special tokens."""

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path

from llama_jax.errors import brief
from llama_jax.files import read_small
from llama_jax.text.byte_pairs import BytePairs, llama3
from llama_jax.text.vocabulary import MOST_BYTES, MOST_TOKENS

FETCH_AGAIN = "copy the file again from the checkpoint (Meta's `tokenizer.model`, `original/tokenizer.model` on HF)"
_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*")


def looks_like_ranks(path: Path) -> bool:
    """True if a file begins as one in Meta's format does. Llama 2's `tokenizer.model` is a SentencePiece model."""
    with open(path, "rb") as file:
        return _LINE.fullmatch(file.readline(4096)) is not None


def read(path: Path) -> BytePairs:
    """The vocabulary in a `tokenizer.model`, in Llama 3's layout; raises what `read_ranks` raises."""
    return llama3(read_ranks(path))


def read_ranks(path: Path) -> list[bytes]:
    """The tokens of a `tokenizer.model` in order of rank.

    Raises:
        ValueError: the file is damaged or of another format. The message names the line and the remedy.
    """
    data = read_small(path, max_bytes=MOST_BYTES)
    if data.count(b"\n") > MOST_TOKENS:
        raise ValueError(f"{path}: over {MOST_TOKENS:,} lines, more than any vocabulary has; {FETCH_AGAIN}")
    lines = data.split(b"\n")
    first_line: dict[bytes, int] = {}
    ranks: dict[bytes, int] = {}
    rank_line: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        cut = " (the last line: the file seems cut short)" if number == len(lines) else ""
        try:
            token, rank = _token_and_rank(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}{cut}; {_remedy_for(data)}") from None
        if token in first_line:
            fault = f"token {token!r} is on line {first_line[token]} already"
            raise ValueError(f"{path}: line {number}: {fault}; {FETCH_AGAIN}")
        if rank in rank_line:
            fault = f"rank {rank} is on line {rank_line[rank]} already{cut}"
            raise ValueError(f"{path}: line {number}: {fault}; {FETCH_AGAIN}")
        first_line[token], ranks[token], rank_line[rank] = number, rank, number
    if not ranks:
        raise ValueError(f"{path}: line 1: the file is empty; {FETCH_AGAIN}")
    return in_rank_order(ranks, source=str(path), remedy=FETCH_AGAIN, lines=first_line)


def _token_and_rank(line: bytes) -> tuple[bytes, int]:
    """The contents of one line. ValueError names the fault."""
    fields = line.split()
    if len(fields) != 2:
        raise ValueError(f"expected `base64 rank`, got {brief(line)}")
    try:
        token = base64.b64decode(fields[0], validate=True)
    except binascii.Error:
        raise ValueError(f"{brief(fields[0])} is not base64") from None
    if not token:
        raise ValueError("the token is empty")
    if not fields[1].isdigit() or len(fields[1]) > 9:
        raise ValueError(f"rank {brief(fields[1])} is not a whole number")
    return token, int(fields[1])


def in_rank_order(
    ranks: Mapping[bytes, int], *, source: str, remedy: str, lines: Mapping[bytes, int] | None = None
) -> list[bytes]:
    """The tokens in order of rank. ValueError (`source: ...; remedy`) unless ranks are 0 to n - 1 with every byte."""
    for token, rank in ranks.items():
        if not isinstance(token, bytes) or not token or not isinstance(rank, int):
            raise ValueError(f"{source}: {token!r}: {rank!r} must be non-empty bytes with an int as its rank; {remedy}")
    tokens = sorted(ranks, key=ranks.__getitem__)
    for rank, token in enumerate(tokens):
        if ranks[token] != rank:
            line = f"line {lines[token]}: " if lines else ""
            raise ValueError(
                f"{source}: {line}token {token!r} has rank {ranks[token]} where rank {rank} should be; the "
                f"ranks of {len(tokens):,} tokens must be 0 to {len(tokens) - 1}, each once; {remedy}"
            )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} of the 256 single bytes have no token on any line "
            f"(the first is 0x{missing[0]:02x}); {remedy}"
        )
    return tokens


def _remedy_for(data: bytes) -> str:
    """The advice in the error about an unreadable file. A Git LFS pointer gets different advice."""
    if data.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer: run `git lfs pull` to fetch the file itself"
    return FETCH_AGAIN
