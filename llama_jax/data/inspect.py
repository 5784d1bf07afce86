"""What a run's data looks like to the model: lengths, waste, and rows with their targets and borders to be seen."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llama_jax.data import prepare
from llama_jax.data.loader import Batch, Loader
from llama_jax.data.packing import Rows
from llama_jax.run_config import RunConfig
from llama_jax.text import control_tokens
from llama_jax.text.control_tokens import AS_TEXT
from llama_jax.text.record_encoder import NO, NameInText, RecordEncoder
from llama_jax.text.tokenizer import Tokenizer

_ROWS = 2  # that are shown of the first batch
_TOKENS = 1500  # that are shown of a row
_COLOURS = {"target": "\x1b[32m", "other": "\x1b[2m", "border": "\x1b[1;36m"}
_OFF = "\x1b[0m"

# What would move the cursor or change colours of its own is shown as the picture of its character.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421, 0x9B: 0x241B}


def show(run: RunConfig, encoder: RecordEncoder, *, colour: bool) -> None:
    """Print the statistics of a run's data, and the first rows of its first step.

    Targets, the tokens that the loss counts, are green, or stand in ⟦these⟧ without colour.

    Raises:
        ValueError: too many lines cannot be used.
    """
    try:
        train, validation = prepare.rows(run, encoder, print)
    except NameInText as error:
        print(f"training would stop: {error}\nhere such names are shown as plain text, with {AS_TEXT} after them")
        encoder = RecordEncoder(encoder.tokenizer, encoder.chat_format, NO)
        train, validation = prepare.rows(run, encoder, print)
    for rows in train.parts:
        print(f"train: {_lengths(rows)}")
    if validation is not None:
        print(f"validation: {_lengths(validation)}")
    data = run.data
    loader = Loader(train, batch_size=data.batch_size, seed=data.seed, shuffle=data.shuffle, prefetch=0)
    batch = next(loader)
    marks = "green: what the loss counts" if colour else "in ⟦ ⟧: what the loss counts"
    shown = min(_ROWS, data.batch_size)
    for number in range(shown):
        print(f"\nrow {number + 1} of {data.batch_size} of the first step ({marks})")
        row = {name: array[number] for name, array in batch.items()}
        for line in render(row, encoder.tokenizer, colour=colour, pairs=train.parts[0].store.pairs):
            print(line)


def _lengths(rows: Rows) -> str:
    store = rows.store
    lengths = np.diff(store.offsets[:: 2 if store.pairs else 1])
    least, middle, most, longest = (int(x) for x in np.quantile(lengths, (0, 0.5, 0.95, 1), method="higher"))
    return (
        f"tokens a {store.record_kind}: {least:,} to {longest:,}, mean {lengths.mean():,.0f}, median {middle:,}, 95 % "
        f"of them up to {most:,}; {len(lengths) / len(rows):.1f} {store.record_kind}s a row"
    )


def render(row: Batch, tokenizer: Tokenizer, *, colour: bool, pairs: bool = False) -> Iterator[str]:
    """One row, arrays (T,), as text: a line at each document's border, and its targets marked.

    `pairs`: the documents are the chosen and the rejected answer of one preference pair after the other.

    A place's weight is that of the token after it, so that a token is marked by the place before.
    """
    tokens, segments = row["tokens"], row["segments"]
    targets = np.concatenate([[False], row["weights"][:-1] > 0]) & (segments > 0)
    for segment in range(1, int(segments.max()) + 1):
        (places,) = np.nonzero(segments == segment)
        counted = int(targets[places].sum())
        continued = " (goes on from another row)" if tokens[places[0]] != tokenizer.bos_id else ""
        number = f"document {segment}"
        if pairs:
            number = f"pair {(segment + 1) // 2}, {'chosen' if segment % 2 else 'rejected'}"
        yield _paint(f"── {number}: {len(places):,} tokens, {counted:,} counted{continued} ──", "border", colour)
        places = places[: max(0, _TOKENS - int(places[0]))]
        if len(places) == 0:
            yield "..."
            continue
        cuts = np.flatnonzero(np.diff(targets[places])) + 1
        texts = [control_tokens.shown(tokenizer, tokens[span]).translate(_PICTURES) for span in np.split(places, cuts)]
        kinds = ["target" if targets[span[0]] else "other" for span in np.split(places, cuts)]
        yield "".join(_paint(text, kind, colour) for text, kind in zip(texts, kinds, strict=True))
    if padding := int((segments == 0).sum()):
        yield _paint(f"── {padding:,} places of padding ──", "border", colour)


def _paint(text: str, kind: str, colour: bool) -> str:
    if colour:
        return f"{_COLOURS[kind]}{text}{_OFF}"
    return f"⟦{text}⟧" if kind == "target" else text
