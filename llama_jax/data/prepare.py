"""A run's data before its first step: sources are checked, a tokenizer is chosen, text is tokenized and packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llama_jax.data.packing import Mixture, Rows, pack
from llama_jax.data.records import BadLine, Encoder, refuse_many_bad
from llama_jax.data.sources import documents_from, hub_files
from llama_jax.data.store import build_store
from llama_jax.errors import ConfigError
from llama_jax.hub import some
from llama_jax.run_config import RunConfig
from llama_jax.run_keys import DataConfig
from llama_jax.text.bpe_training import train_bpe
from llama_jax.text.record_encoder import NameInText
from llama_jax.text.tokenizer import Tokenizer

Say = Callable[..., None]
_OFTEN = 10  # epochs; of dialogs, few runs mean more


def check_sources(data: DataConfig) -> None:
    """Check that the data and the tokenizer of a run exist.

    Raises:
        ConfigError: one of them does not. The message names its key.
    """
    for split, patterns in (("train", data.train), ("validation", data.validation)):
        try:
            documents_from(patterns, split=split) if patterns else None  # resolves the patterns, and reads nothing yet
        except (OSError, ValueError) as error:
            raise ConfigError(f"data.{split}: {error}") from None
    if data.tokenizer and not Path(data.tokenizer).expanduser().exists():
        raise ConfigError(f"data.tokenizer={data.tokenizer!r} does not exist: name a file")


def choose_tokenizer(run: RunConfig, base: Tokenizer | None, say: Say) -> Tokenizer:
    """The tokenizer of a new run: that of data.tokenizer or of `base`, or one trained on the run's text.

    Args:
        run: the run.
        base: the tokenizer of the model in init_from. None if the run has no init_from, or that has no tokenizer.
        say: prints a line.

    Raises:
        ConfigError: init_from has no tokenizer and data.tokenizer is not set, or the two tokenizers differ.
        ValueError: too many lines of the text that a tokenizer is trained on cannot be used.
    """
    if run.data.tokenizer:
        tokenizer = Tokenizer(Path(run.data.tokenizer).expanduser())
        if base is not None and base.fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                f"data.tokenizer={run.data.tokenizer!r} is not the tokenizer of {run.init_from}: unset it"
            )
        return tokenizer
    if run.init_from:
        if base is None:
            raise ConfigError(f"init_from={run.init_from!r} has no tokenizer: set data.tokenizer")
        return base
    say(f"training a tokenizer of {run.model.vocab_size} tokens on {', '.join(run.data.train)}")
    return Tokenizer.from_ranks(train_bpe(_texts(run.data), vocab_size=run.model.vocab_size))


def _texts(data: DataConfig) -> Iterator[str]:
    """The text of all documents; ValueError, and a list, if too many are bad, rather than a vocabulary of the rest."""
    bad: list[BadLine] = []
    good = 0
    for found in documents_from(data.train):
        if isinstance(found, BadLine):
            bad.append(found)
        else:
            good += 1
            yield found.text
    if bad:
        listed = Path(data.cache_dir).expanduser() / "quarantine.jsonl"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("".join(line.to_json() + "\n" for line in bad), encoding="utf-8")
        refuse_many_bad(len(bad), good, bad[0], listed=listed)


def rows(run: RunConfig, tokens: Encoder, say: Say) -> tuple[Mixture, Rows | None]:
    """The training and validation data, tokenised once and made into rows: of one part, or one for each weight.

    Raises:
        ConfigError: preference pairs, and train.objective is another than `dpo`; or the other way round.
        ValueError: too many lines cannot be used; names the key, the first of them and the file that lists them.
    """
    pairs = run.train.objective == "dpo"

    def packed(patterns: Sequence[str], name: str) -> Rows:
        cache, T = Path(run.data.cache_dir).expanduser(), run.data.sequence_length
        try:
            store = build_store(patterns, tokens, cache_dir=cache, max_length=T, split=name, pairs=pairs)
        except NameInText as error:
            raise NameInText(f"data.{name}: {error}") from None
        except ValueError as error:
            raise ValueError(f"data.{name}: {error}") from None
        if store.pairs != pairs:
            found = "preference pairs" if store.pairs else "dialogs or completions" if store.masked else "texts"
            mend = (
                "set train.objective='dpo', or give the chosen answers alone, as 'messages' or as 'prompt' and "
                "'completion'"
                if store.pairs
                else "give records of 'prompt', 'chosen' and 'rejected', or set train.objective='sft'"
            )
            what = f"data.{name}: {', '.join(patterns)} holds {found}"
            raise ConfigError(f"{what}, which train.objective={run.train.objective!r} does not learn from: {mend}")
        if files := hub_files(patterns, split=name):
            say(f"{name}: {some(files)}")
        rows = pack(store, sequence_length=T, loss_on=run.data.loss_on)
        # Nothing else is worth a word of plain text: all of it is targets, and the last row alone is padded.
        targets = f" ({store.num_targets / store.num_tokens:.1%} targets)" if store.masked else ""
        waste = f" ({rows.waste:.1%} padding)" if store.masked else ""
        say(
            f"{name}: {store.num_units:,} {store.unit}s, {store.num_tokens:,} tokens{targets}, "
            f"{len(rows):,} rows{waste}, fingerprint {store.fingerprint[:16]}"
        )
        if store.num_bad:
            total = store.num_bad + store.num_units
            say(f"{name}: left out as bad: {store.num_bad:,} of {total:,} {store.unit}s, listed in {store.quarantine}")
        return rows

    batch = run.data.batch_size
    if run.data.weights:
        train = Mixture(tuple(packed([pattern], "train") for pattern in run.data.train), run.data.weights)
        steps = run.train.steps_for(sum(map(len, train.parts)), batch)
        for pattern, rows, weight in zip(run.data.train, train.parts, train.weights, strict=True):
            share = weight / sum(train.weights)
            drawn = share * steps * batch
            say(f"train: {share:.1%} of rows from {pattern}, each seen {drawn / len(rows):.3g} times in this run")
    else:
        train = Mixture((packed(run.data.train, "train"),), (1.0,))
        seen = run.train.steps_for(len(train.parts[0]), batch) * batch / len(train.parts[0])
        if seen > _OFTEN and run.train.steps:
            say(f"train: each row is seen {seen:,.0f} times in this run: set train.steps lower if that is not meant")
    total = sum(map(len, train.parts))
    one, two, three = (-(-epochs * total // batch) for epochs in (1, 2, 3))
    say(f"train: one, two and three epochs are {one:,}, {two:,} and {three:,} steps")
    return train, packed(run.data.validation, "validation") if run.data.validation else None
