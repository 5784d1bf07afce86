"""The `inspect data` command: statistics of a run's data, and a preview of the rows of its first step."""

from __future__ import annotations

import collections
import itertools
import re
import shutil
import unicodedata
from collections.abc import Iterator

import numpy as np

from llama_jax.data import prepare
from llama_jax.data.loader import Batch, Loader
from llama_jax.data.packing import Mixture, Rows
from llama_jax.data.records import BadLine
from llama_jax.data.store import TokenStore
from llama_jax.run_config import RunConfig
from llama_jax.text import control_tokens
from llama_jax.text.control_tokens import AS_TEXT
from llama_jax.text.record_encoder import NO, NameInText, RecordEncoder
from llama_jax.text.tokenizer import Tokenizer

_PAGE = (100, 60)  # columns and lines, where the output is no terminal
_ROWS = 2  # rows that are shown by default
_LEAST_LINES = 6  # lines that a row has even on a small screen
_REASONS = 3  # kinds of reasons that are shown
_MOST_READ = 10_000  # left-out records that are read for their reasons
_COLORS = {"target": "\x1b[32m", "other": "\x1b[2m", "border": "\x1b[1;36m"}
_OFF = "\x1b[0m"
_MORE = "... (--full shows whole rows, --rows more of them)"

# Control characters, which would move the cursor or change colors, are shown as the pictures that Unicode has for them.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421, 0x9B: 0x241B}

_Fragment = tuple[str, str]  # text, and a key of _COLORS


def show(run: RunConfig, encoder: RecordEncoder, *, color: bool, rows: int | None = None, full: bool = False) -> None:
    """Print statistics of a run's data and a preview of its first step, which together fit a screen.

    Targets, the tokens that the loss counts, are green, or in ⟦brackets⟧ without color.

    Args:
        run: the run.
        encoder: the run's tokenizer, chat format and reading of control tokens.
        color: True if the output supports ANSI colors.
        rows: rows of the preview. None: two, or one on a small screen.
        full: show whole rows, even if they do not fit the screen.

    Raises:
        ValueError: the data cannot be used, or too many of their records.
    """
    width, height = shutil.get_terminal_size(_PAGE)
    used = 1  # a line may have been printed before, that a tokenizer is trained

    def say(line: str) -> None:
        nonlocal used
        used += -(-max(len(line), 1) // width)
        print(line)

    def cut(line: str) -> str:
        return line if full or len(line) <= width else f"{line[: width - 3]}..."

    train, validation, encoder = _describe(run, encoder, say)
    named = [("train", part.store) for part in train.parts]
    if validation is not None and validation.store.path not in {store.path for _, store in named}:
        named.append(("validation", validation.store))
    for name, store in named:
        for line in reasons(store):
            say(cut(f"  {name}: {line}"))
    data = run.data
    left = height - used - 2
    wanted = rows if rows is not None else _ROWS if left >= _ROWS * (_LEAST_LINES + 2) else 1
    shown = min(wanted, data.batch_size)
    lines = None if full else max(_LEAST_LINES, left // max(shown, 1) - 2)
    loader = Loader(train, batch_size=data.batch_size, seed=data.seed, shuffle=data.shuffle, prefetch=0)
    batch = next(loader)
    marks = "green: what the loss counts" if color else "in ⟦ ⟧: what the loss counts"
    pairs = train.parts[0].store.pairs
    for number in range(shown):
        print(f"\nrow {number + 1} of {data.batch_size} of the first step ({marks})")
        row = {name: array[number] for name, array in batch.items()}
        for line in render(
            row, encoder.tokenizer, color=color, pairs=pairs, width=None if full else width, lines=lines
        ):
            print(line)


def _describe(run: RunConfig, encoder: RecordEncoder, say: prepare.Say) -> tuple[Mixture, Rows | None, RecordEncoder]:
    """Print the statistics. Returns the rows and their encoder."""
    try:
        train, validation = prepare.rows(run, encoder, say)
    except NameInText as error:
        say(f"training would stop: {error}")
        say(f"here such names are shown as plain text, with {AS_TEXT} after them")
        encoder = RecordEncoder(encoder.tokenizer, encoder.chat_format, NO)
        train, validation = prepare.rows(run, encoder, say)
    for part in train.parts:
        say(f"train: {_lengths(part)}")
    if validation is not None:
        say(f"validation: {_lengths(validation)}")
    return train, validation, encoder


def _lengths(rows: Rows) -> str:
    """The distribution of lengths in one line."""
    store = rows.store
    lengths = np.diff(store.offsets[:: 2 if store.pairs else 1])
    least, middle, most, longest = (int(x) for x in np.quantile(lengths, (0, 0.5, 0.95, 1), method="higher"))
    return (
        f"tokens a {store.record_kind}: {least:,} to {longest:,}, mean {lengths.mean():,.0f}, median {middle:,}, 95 % "
        f"of them up to {most:,}; {len(lengths) / len(rows):.1f} {store.record_kind}s a row"
    )


def reasons(store: TokenStore) -> Iterator[str]:
    """The most frequent reasons why records cannot be used, each with its count and its first record.

    Reasons that differ only in numbers and in quoted values count as one.
    """
    counts: collections.Counter[str] = collections.Counter()
    first: dict[str, BadLine] = {}
    for bad in itertools.islice(store.rejected(), _MOST_READ):
        kind = re.sub(r"'[^']*'|\d[\d,.]*", "#", bad.reason)
        counts[kind] += 1
        first.setdefault(kind, bad)
    for kind, count in counts.most_common(_REASONS):
        yield f"left out, {count:,} like {first[kind].name.rpartition('/')[2]}: {first[kind].reason}"
    if len(counts) > _REASONS:
        yield f"left out for {len(counts) - _REASONS} other kinds of reasons: see {store.quarantine}"


def render(
    row: Batch,
    tokenizer: Tokenizer,
    *,
    color: bool,
    pairs: bool = False,
    width: int | None = None,
    lines: int | None = None,
) -> Iterator[str]:
    """One row as lines of text: a line at each document's border, and its targets marked.

    Args:
        row: a row, arrays (T,).
        tokenizer: the run's tokenizer.
        color: mark with ANSI colors, otherwise with ⟦ ⟧.
        pairs: True if the documents are preference pairs: the chosen, then the rejected answer of each.
        width: columns of the screen, at which lines are broken. None breaks no lines.
        lines: the most lines. The last one says if there is more. None: all.
    """
    visual = _visual_lines(_fragments(row, tokenizer, pairs=pairs, color=color), width)
    first = list(visual if lines is None else itertools.islice(visual, lines + 1))
    if lines is not None and len(first) > lines:
        first[lines - 1 :] = [[(_MORE, "border")]]
    for line in first:
        yield "".join(f"{_COLORS[style]}{text}{_OFF}" if color else text for text, style in line)


def _fragments(row: Batch, tokenizer: Tokenizer, *, pairs: bool, color: bool) -> Iterator[_Fragment]:
    """The text of a row in pieces of one color. Each document begins with a line of its own.

    The weight at a position is that of the token after it, so that a token is marked by the position before.
    """
    tokens, segments = row["tokens"], row["segments"]
    targets = np.concatenate([[False], row["weights"][:-1] > 0]) & (segments > 0)
    for segment in range(1, int(segments.max()) + 1):
        (positions,) = np.nonzero(segments == segment)
        counted = int(targets[positions].sum())
        continued = " (continued from another row)" if tokens[positions[0]] != tokenizer.bos_id else ""
        number = f"document {segment}"
        if pairs:
            number = f"pair {(segment + 1) // 2}, {'chosen' if segment % 2 else 'rejected'}"
        yield f"── {number}: {len(positions):,} tokens, {counted:,} counted{continued} ──\n", "border"
        for span in np.split(positions, np.flatnonzero(np.diff(targets[positions])) + 1):
            text = control_tokens.shown(tokenizer, tokens[span]).translate(_PICTURES)
            if targets[span[0]]:
                yield (text if color else f"⟦{text}⟧"), "target"
            else:
                yield text, "other"
        yield "\n", "border"
    if padding := int((segments == 0).sum()):
        yield f"── {padding:,} positions of padding ──\n", "border"


def _visual_lines(fragments: Iterator[_Fragment], width: int | None) -> Iterator[list[_Fragment]]:
    """Lines of fragments, broken at line breaks and after `width` columns."""
    line: list[_Fragment] = []
    used = 0
    for text, style in fragments:
        for number, part in enumerate(text.split("\n")):
            if number:
                yield line
                line, used = [], 0
            while part:
                fitting = len(part) if width is None else _fitting(part, width - used)
                if fitting == 0 and line:
                    yield line
                    line, used = [], 0
                    continue
                fitting = max(fitting, 1)
                line.append((part[:fitting], style))
                used += 0 if width is None else sum(map(_columns, part[:fitting]))
                part = part[fitting:]
    if line:
        yield line


def _fitting(text: str, columns: int) -> int:
    """The number of characters of a text that fit into a number of terminal columns."""
    for number, character in enumerate(text):
        columns -= _columns(character)
        if columns < 0:
            return number
    return len(text)


def _columns(character: str) -> int:
    """The columns that a terminal gives a character."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
