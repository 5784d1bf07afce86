"""A run's data before its first step: sources are checked, a tokenizer is chosen, text is tokenized and packed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llama_jax import storage
from llama_jax.data.encoding import Encoder
from llama_jax.data.packing import Mixture, Rows, pack
from llama_jax.data.records import BadLine, is_hopeless, refuse_many_bad
from llama_jax.data.sources import documents_from, hub_files
from llama_jax.data.store import TokenStore, build_store
from llama_jax.errors import ConfigError
from llama_jax.files import expanded
from llama_jax.hub import some
from llama_jax.phases import phase
from llama_jax.progress import progress_bar
from llama_jax.run_config import RunConfig
from llama_jax.run_keys import DataConfig
from llama_jax.text.bpe_training import train_bpe
from llama_jax.text.record_encoder import NameInText
from llama_jax.text.tokenizer import Tokenizer

Say = Callable[..., None]
_MANY_EPOCHS = 10  # a warning is printed above: few runs mean more


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
    if data.tokenizer and not _tokenizer_path(data.tokenizer).exists():
        raise ConfigError(f"data.tokenizer={data.tokenizer!r} does not exist: name a file")


def _tokenizer_path(name: str) -> Path:
    """The path of data.tokenizer; a file behind an address is downloaded."""
    if not storage.is_url(name):
        return expanded(storage.local_path(name) or name)
    files = storage.find(name)
    folder = storage.cache_folder(name, files)
    paths = storage.download(name, files, folder)
    return folder if len(files) > 1 else paths[files[0].name]


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
        tokenizer = Tokenizer(_tokenizer_path(run.data.tokenizer))
        if base is not None and base.fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                f"data.tokenizer={run.data.tokenizer!r} is not the tokenizer of {run.init_from}: unset it"
            )
        return tokenizer
    if run.init_from:
        if base is None:
            raise ConfigError(f"init_from={run.init_from!r} has no tokenizer: set data.tokenizer")
        return base
    with phase(f"training a tokenizer of {run.shape.vocab_size} tokens on {', '.join(run.data.train)}", say):
        return Tokenizer.from_ranks(train_bpe(_texts(run.data), vocab_size=run.shape.vocab_size))


def _texts(data: DataConfig) -> Iterator[str]:
    """The text of all documents, for a tokenizer to be trained on.

    Raises:
        ValueError: too many documents are bad, so that a vocabulary of the rest would be of little use.
    """
    first: BadLine | None = None
    bad = good = 0
    listed = expanded(data.cache_dir) / "quarantine.jsonl"
    with contextlib.ExitStack() as stack:
        for sample in documents_from(data.train):
            if not isinstance(sample, BadLine):
                good += 1
                yield sample.text
                continue
            if first is None:
                first = sample
                listed.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(listed, "w", encoding="utf-8"))
            bad += 1
            file.write(sample.to_json() + "\n")
            if is_hopeless(bad, good, data.max_bad):
                break
    if first is not None:
        refuse_many_bad(bad, good, first, listed=listed, allowed=data.max_bad)


def rows(run: RunConfig, encoder: Encoder, say: Say) -> tuple[Mixture, Rows | None]:
    """The training and validation data as rows: one part, or one for each of data.weights.

    Args:
        run: the run.
        encoder: the run's tokenizer, chat format and reading of control tokens.
        say: prints a line.

    Raises:
        ConfigError: the data are preference pairs and train.objective is not `dpo`, or the other way round.
        ValueError: the data cannot be used, or too many of their records. The message names the key.
    """
    data, batch = run.data, run.data.batch_size
    if data.weights:
        train = Mixture(tuple(_packed(run, [pattern], "train", encoder, say) for pattern in data.train), data.weights)
        steps = run.train.steps_for(sum(map(len, train.parts)), batch)
        for pattern, part, weight in zip(data.train, train.parts, train.weights, strict=True):
            share = weight / sum(train.weights)
            epochs = share * steps * batch / len(part)
            say(f"train: {share:.1%} of rows from {pattern}, each seen {epochs:.3g} times in this run")
    else:
        train = Mixture((_packed(run, data.train, "train", encoder, say),), (1.0,))
        epochs = run.train.steps_for(len(train.parts[0]), batch) * batch / len(train.parts[0])
        if epochs > _MANY_EPOCHS and run.train.steps:
            say(f"train: each row is seen {epochs:,.0f} times in this run: set train.steps lower if that is not meant")
    total = sum(map(len, train.parts))
    one, two, three = (-(-epochs * total // batch) for epochs in (1, 2, 3))
    say(f"train: one, two and three epochs are {one:,}, {two:,} and {three:,} steps")
    return train, _packed(run, data.validation, "validation", encoder, say) if data.validation else None


def _packed(run: RunConfig, patterns: Sequence[str], split: str, encoder: Encoder, say: Say) -> Rows:
    """The rows of one source, whose statistics are printed."""
    data = run.data
    pairs = run.train.objective == "dpo"
    try:
        with progress_bar(None, f"tokenizing data.{split}", unit=" tokens") as bar:
            store = build_store(
                patterns,
                encoder,
                cache_dir=expanded(data.cache_dir),
                max_length=data.sequence_length,
                too_long=data.too_long,
                max_bad=data.max_bad,
                split=split,
                pairs=pairs,
                progress=lambda documents, tokens: bar.update(tokens - bar.n),
            )
    except NameInText as error:
        raise NameInText(f"data.{split}: {error}") from None
    except ValueError as error:
        raise ValueError(f"data.{split}: {error}") from None
    if store.pairs != pairs:
        raise ConfigError(f"data.{split}: {', '.join(patterns)} {_other_objective(run, store)}")
    if files := hub_files(patterns, split=split):
        say(f"{split}: {some(files)}")
    packed = pack(store, sequence_length=data.sequence_length, loss_on=data.loss_on)
    for line in describe(packed, data):
        say(f"{split}: {line}")
    return packed


def _other_objective(run: RunConfig, store: TokenStore) -> str:
    """The reason why a store is not for the run's objective, and the remedy."""
    if store.pairs:
        kind = "preference pairs"
        remedy = (
            "set train.objective='dpo', or give the chosen answers alone, as 'messages' or as 'prompt' and 'completion'"
        )
    else:
        kind = "dialogs or completions" if store.masked else "texts"
        remedy = "give records of 'prompt', 'chosen' and 'rejected', or set train.objective='sft'"
    return f"holds {kind}, which train.objective={run.train.objective!r} does not learn from: {remedy}"


def describe(packed: Rows, data: DataConfig) -> Iterator[str]:
    """Statistics of a source in lines: its documents and tokens, and the records that were rejected or cut."""
    store = packed.store
    kind, total = f"{store.record_kind}s", store.num_records + store.num_bad + store.num_too_long
    # For plain text nothing else is of interest: all of it is targets, and only the last row has padding.
    targets = f" ({store.num_targets / store.num_tokens:.1%} targets)" if store.masked else ""
    padding = f" ({packed.padding_fraction:.1%} padding)" if store.masked else ""
    yield (
        f"{store.num_records:,} {kind}, {store.num_tokens:,} tokens{targets}, {len(packed):,} rows{padding}, "
        f"fingerprint {store.fingerprint[:16]}"
    )
    if store.num_bad:
        first = "" if store.first_bad is None else f"the first: {store.first_bad.name}: {store.first_bad.reason}; "
        yield f"left out as bad: {store.num_bad:,} of {total:,} {kind}, {first}listed in {store.quarantine}"
    if store.num_too_long:
        yield (
            f"left out as longer than data.sequence_length={data.sequence_length}: {store.num_too_long:,} of {total:,} "
            f"{kind}, listed in {store.quarantine}"
        )
    if store.num_cut:
        yield f"cut to data.sequence_length={data.sequence_length} tokens: {store.num_cut:,} of {total:,} {kind}"
