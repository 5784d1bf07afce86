"""What a run starts from: a tokenizer, tokenised text, and the first weights."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp

from llama_jax import model
from llama_jax.data import prepare
from llama_jax.data.prepare import Say
from llama_jax.errors import ConfigError
from llama_jax.params import restack
from llama_jax.run_config import RunConfig, differences
from llama_jax.text import vocabulary_files
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train import trainable
from llama_jax.train.program import Program
from llama_jax.train.state import TrainState, init_state, state_shardings
from llama_jax.weights.locate import is_path
from llama_jax.weights.open import open_source
from llama_jax.weights.source import Source


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
    prepare.check_sources(run.data)
    name = run.init_from
    if name and is_path(name) and not Path(name).expanduser().exists():
        raise ConfigError(f"init_from={name!r} does not exist: name a model's folder or file, or a hub id (owner/name)")


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
    path = vocabulary_files.find(folder) if resuming else None
    found = Tokenizer(path or chosen_tokenizer(run, say).save_to(folder))  # by every process: all write the same bytes
    if found.vocab_size > run.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {found.vocab_size} tokens, but model.vocab_size={run.model.vocab_size}: set "
            f"model.vocab_size={found.vocab_size}"
        )
    return found


def chosen_tokenizer(run: RunConfig, say: Say) -> Tokenizer:
    """The tokenizer that a new run has; ConfigError where there is none, or two that differ."""
    base = open_source(run.init_from).tokenizer() if run.init_from else None
    return prepare.choose_tokenizer(run, base, say)


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

    params: model.Params | None
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


def _loaded(source: Source, program: Program, dtype: jnp.dtype, quantize: str) -> model.Params:
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
