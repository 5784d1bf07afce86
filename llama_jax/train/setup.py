"""What a run starts from: a tokenizer, tokenised text, and the first weights."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from llama_jax.data.packing import Mixture, Rows, pack
from llama_jax.data.records import BadLine, refuse_many_bad
from llama_jax.data.sources import documents_from, hub_files
from llama_jax.data.store import build_store
from llama_jax.errors import ConfigError
from llama_jax.hub import some
from llama_jax.params import Params, restack
from llama_jax.run_config import RunConfig, differences
from llama_jax.run_keys import DataConfig
from llama_jax.text import tokenizer as text
from llama_jax.text.bpe_training import train_bpe
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train import trainable
from llama_jax.train.program import Program
from llama_jax.train.state import TrainState, init_state, state_shardings
from llama_jax.weights.locate import is_path
from llama_jax.weights.open import open_source
from llama_jax.weights.source import Source

Say = Callable[..., None]
_OFTEN = 10  # epochs; of dialogs, few runs mean more


def check_paths(run: RunConfig) -> None:
    """Refuse what is not there, or cannot be written to, before any work is done.

    Raises:
        ConfigError: naming the key.
    """
    for key, name in (("output", run.output), ("data.cache_dir", run.data.cache_dir)):
        folder = Path(name).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(0, "not writable")
        except OSError as error:
            raise ConfigError(f"{key}={name!r} is no folder to write to ({error.strerror}): name another") from None
    check_sources(run)


def check_sources(run: RunConfig) -> None:
    """Refuse data, a tokenizer or a first model that is not there; ConfigError, naming the key."""
    for split, patterns in (("train", run.data.train), ("validation", run.data.validation)):
        try:
            documents_from(patterns, split=split) if patterns else None  # resolves the patterns, and reads nothing yet
        except (OSError, ValueError) as error:
            raise ConfigError(f"data.{split}: {error}") from None
    for key, name in (("data.tokenizer", run.data.tokenizer), ("init_from", run.init_from)):
        is_file = key != "init_from" or is_path(name)
        if name and is_file and not Path(name).expanduser().exists():
            mend = "name a model's folder or file, or a hub id (owner/name)" if key == "init_from" else "name a file"
            raise ConfigError(f"{key}={name!r} does not exist: {mend}")


def tokenizer(run: RunConfig, folder: Path, *, resuming: bool, say: Say) -> Tokenizer:
    """The run's tokenizer, kept in its folder: data.tokenizer, that of init_from, or one trained on the text.

    Args:
        run: the run.
        folder: of the run.
        resuming: take the one that is in the folder. A folder without a checkpoint may hold that of another start.
        say: prints.

    Raises:
        ConfigError: it has more tokens than the model.
    """
    path = text.find(folder) if resuming else None
    found = text.open(path or chosen_tokenizer(run, say).save_to(folder))  # by every process: all write the same bytes
    if found.vocab_size > run.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {found.vocab_size} tokens, but model.vocab_size={run.model.vocab_size}: set "
            f"model.vocab_size={found.vocab_size}"
        )
    return found


def chosen_tokenizer(run: RunConfig, say: Say) -> Tokenizer:
    """The tokenizer that a new run has; ConfigError where there is none, or two that differ."""
    known = open_source(run.init_from).tokenizer() if run.init_from else None
    if run.data.tokenizer:
        given = text.open(Path(run.data.tokenizer).expanduser())
        if known is not None and known.fingerprint != given.fingerprint:
            raise ConfigError(
                f"data.tokenizer={run.data.tokenizer!r} is not the tokenizer of {run.init_from}: unset it"
            )
        return given
    if run.init_from:
        if known is None:
            raise ConfigError(f"init_from={run.init_from!r} has no tokenizer: set data.tokenizer")
        return known
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


def rows(run: RunConfig, tokens: Tokenizer, say: Say) -> tuple[Mixture, Rows | None]:
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

    if run.data.weights:
        train = Mixture(tuple(packed([pattern], "train") for pattern in run.data.train), run.data.weights)
        for pattern, rows, weight in zip(run.data.train, train.parts, train.weights, strict=True):
            share = weight / sum(train.weights)
            drawn = share * run.train.steps * run.data.batch_size
            say(f"train: {share:.1%} of rows from {pattern}, each seen {drawn / len(rows):.3g} times in this run")
    else:
        train = Mixture((packed(run.data.train, "train"),), (1.0,))
        seen = run.train.steps * run.data.batch_size / len(train.parts[0])
        if seen > _OFTEN:
            say(f"train: each row is seen {seen:,.0f} times in this run: set train.steps lower if that is not meant")
    return train, packed(run.data.validation, "validation") if run.data.validation else None


def first_state(program: Program) -> TrainState:
    """The state before the first step, straight in its shards: random weights, those of init_from, or new updates.

    Raises:
        ConfigError: init_from is a model of another shape, naming the keys that differ.
    """
    run, shardings = program.run, state_shardings(program.state)
    init = functools.partial(init_state, run, program.optimizer)
    if run.lora.rank or not run.init_from:
        return jax.jit(init, out_shardings=shardings)()
    params = _loaded(_pretrained(run), program, jnp.dtype(jnp.float32), "none")
    return jax.jit(lambda params: init(params=params), out_shardings=shardings, donate_argnums=0)(params)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a run only reads: LoRA's base, or DPO's reference.

    Attributes:
        params: stacked, in their shards; None where nothing is frozen.
        identity: of the model that it is (`Source.identity`), or None.
    """

    params: Params | None
    identity: str | None


def frozen(program: Program) -> Frozen:
    """What is frozen, from init_from, at the start and again whenever a run goes on: checkpoints do not hold it.

    Raises:
        ConfigError: init_from is a model of another shape.
    """
    if program.frozen is None:
        return Frozen(None, None)
    run = program.run
    source = _pretrained(run)
    dtype = trainable.frozen_dtype(run, program.dtype)
    return Frozen(_loaded(source, program, dtype, trainable.frozen_quantize(run)), source.identity())


def _loaded(source: Source, program: Program, dtype: jnp.dtype, quantize: str) -> Params:
    """A model's weights, stacked, in their shards; the updates of a LoRA run are merged into them."""
    return restack(source.load_merged(program.layout, dtype, quantize))


def _pretrained(run: RunConfig) -> Source:
    """The model of init_from, held against the run's."""
    source = open_source(run.init_from)
    # How far positions go is no property of the weights.
    theirs = dataclasses.replace(source.config, max_seq_len=run.model.max_seq_len)
    if theirs != run.model:
        changed = differences(theirs.to_dict(), run.model.to_dict())
        lines = "; ".join(f"model.{key}={old!r} there, {new!r} here" for key, (old, new) in changed.items())
        raise ConfigError(f"init_from={run.init_from!r} is another model: {lines}")
    return source
