"""The start of a run: checks its paths, and makes or loads its tokenizer, data and first weights."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from llama_jax import parallel
from llama_jax.data import prepare
from llama_jax.data.loader import Loader
from llama_jax.data.packing import Rows
from llama_jax.data.prepare import Say
from llama_jax.errors import ConfigError
from llama_jax.files import expanded
from llama_jax.hub import some
from llama_jax.parallel import processes
from llama_jax.params import Params, restack
from llama_jax.phases import phase
from llama_jax.run_config import RunConfig
from llama_jax.storage import local_path, work_folder
from llama_jax.text import chat_template, vocabulary_files
from llama_jax.text.chat_format import AUTO, ChatFormat, choose
from llama_jax.text.chat_template import ChatTemplate
from llama_jax.text.record_encoder import RecordEncoder
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train import trainable
from llama_jax.train.metrics import say
from llama_jax.train.program import Program
from llama_jax.train.state import TrainState, init_state, state_shardings
from llama_jax.weights import hub_models
from llama_jax.weights.formats import huggingface
from llama_jax.weights.locate import is_path
from llama_jax.weights.open import open_source
from llama_jax.weights.quantize import layers_only
from llama_jax.weights.source import Source

Outcome = TypeVar("Outcome")
_DOWNLOAD_TIMEOUT_MS = 24 * 3600 * 1000
_downloads = itertools.count()  # all processes reach the barriers in the same order


def check_paths(run: RunConfig) -> None:
    """Make the folders that a run writes to, and check that its inputs exist, before any work is done.

    Raises:
        ConfigError: a folder cannot be written to, or a file does not exist. The message names the key.
    """
    for key, name in (("output", run.output), ("data.cache_dir", run.data.cache_dir)):
        try:
            folder = work_folder(name, processes.number()) if key == "output" else expanded(name)
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(0, "not writable")
        except OSError as error:
            raise ConfigError(f"{key}={name!r} is not a writable folder ({error.strerror}): name another") from None
    in_turn(run, lambda: check_sources(run))


def in_turn(run: RunConfig, action: Callable[[], Outcome]) -> Outcome:
    """Performs an action that may download, and returns its result. With distributed.download='first', process 0 goes
    first.

    All processes must call it. The other processes start once it is done, and then find its files.
    """
    if jax.process_count() == 1 or run.distributed.download != "first":
        return action()
    wait = functools.partial(ocp.multihost.get_barrier_sync_fn(), timeout_ms=_DOWNLOAD_TIMEOUT_MS)
    key = f"llama_jax download {next(_downloads)}"
    if jax.process_index() > 0:
        wait(key=key)
        return action()
    try:
        return action()
    finally:
        wait(key=key)  # after an error too: the others then meet it themselves


def check_sources(run: RunConfig) -> None:
    """Check that the data, the tokenizer and the first model of a run exist; ConfigError names the key."""
    prepare.check_sources(run.data)
    name = run.init_from
    if name and is_path(name) and not expanded(local_path(name) or name).exists():
        raise ConfigError(f"init_from={name!r} does not exist: name a model's folder or file, or a hub id (owner/name)")


def shaped(run: RunConfig, mesh: jax.sharding.Mesh) -> RunConfig:
    """The run with the shape of the model of init_from, before data are prepared.

    A model on the hub is compared by its config.json before its weights are downloaded.

    Raises:
        ConfigError: keys of the section model contradict the model, the mesh does not fit it, or it cannot be opened.
    """
    if not run.init_from:
        return run
    if hub_models.is_hub_id(run.init_from):
        config = hub_models.read_shape(run.init_from)
        if config is not None:
            run.with_shape(config).check_mesh(dict(mesh.shape))
    return run.with_shape(in_turn(run, lambda: open_source(run.init_from)).config)


@dataclasses.dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
        tokenizer: The tokenizer, which is also in the run folder.
        loader: The training batches of this host, from the first step on.
        validation: The validation rows, or None.
        rows: The number of training rows in an epoch.
        dialogs: True if the loss counts answers: the data are dialogs, completions or preference pairs.
    """

    tokenizer: Tokenizer
    loader: Loader
    validation: Rows | None
    rows: int
    dialogs: bool


def load_data(program: Program, folder: Path, *, resuming: bool) -> Data:
    """Choose the tokenizer of a run, and tokenize and pack its data.

    Args:
        program: The program of the run.
        folder: The run folder.
        resuming: True takes the tokenizer that is in the folder.

    Raises:
        ConfigError: data, tokenizer and model do not fit one another.
        ValueError: too much of the data cannot be used.
    """
    run = program.run
    tokens = tokenizer(run, folder, resuming=resuming, say=say)
    chat = chat_format(run, folder, tokens, resuming=resuming)
    if run.init_from and not resuming:  # the model keeps the stop tokens and the sampling defaults of its base
        huggingface.write_generation_config(folder, open_source(run.init_from).metadata)
    train, validation = prepare.rows(run, RecordEncoder(tokens, chat, run.data.parse_special), say)
    loader = Loader(
        train,
        batch_size=run.data.batch_size,
        seed=run.data.seed,
        shuffle=run.data.shuffle,
        rows_of_host=program.rows_of_host,
    )
    stores = [part.store for part in train.parts]
    dialogs = any(store.masked or store.pairs for store in stores)
    return Data(tokens, loader, validation, sum(map(len, train.parts)), dialogs)


def tokenizer(run: RunConfig, folder: Path, *, resuming: bool, say: Say) -> Tokenizer:
    """The tokenizer of a run: of data.tokenizer or init_from, or trained on the text. It is kept in the run folder.

    Args:
        run: The run.
        folder: The run folder.
        resuming: True takes the tokenizer in the folder. False chooses it again: without a checkpoint, the one in the
            folder may come from an earlier start with other settings.
        say: Prints a line.

    Raises:
        ConfigError: the tokenizer has more tokens than the model.
    """
    path = vocabulary_files.find(folder) if resuming else None
    chosen = Tokenizer(path or chosen_tokenizer(run, say).save_to(folder))  # every process writes the same bytes
    try:
        return chosen.for_model(run.shape.vocab_size)
    except ConfigError:
        raise ConfigError(
            f"the tokenizer has {chosen.vocab_size} tokens, but model.vocab_size={run.shape.vocab_size}: set "
            f"model.vocab_size={chosen.vocab_size}"
        ) from None


def chat_format(run: RunConfig, folder: Path, tokens: Tokenizer, *, resuming: bool) -> ChatFormat:
    """The chat format of a run. Its template is saved in the run folder, and later with exported models and adapters.

    Args:
        run: The run.
        folder: The run folder.
        tokens: The tokenizer of the run.
        resuming: True takes the template in the folder. A run without a template there uses Meta's reference format.

    Raises:
        ConfigError: data.chat_format is neither a name nor a file.
        ValueError: the template's file is damaged.
    """
    if resuming:
        return _in_date(run, tokens, chat_template.read_folder(folder), AUTO)
    chosen = chosen_chat_format(run, tokens)
    chat_template.write(chosen.template, folder)  # every process writes the same bytes
    return chosen


def chosen_chat_format(run: RunConfig, tokens: Tokenizer) -> ChatFormat:
    """The chat format that data.chat_format names for a new run."""
    base = open_source(run.init_from).metadata.chat_template if run.init_from else None
    try:
        return _in_date(run, tokens, base, run.data.chat_format)
    except ConfigError as error:
        raise ConfigError(f"data.chat_format: {error}") from None


def _in_date(run: RunConfig, tokens: Tokenizer, own: ChatTemplate | None, setting: str) -> ChatFormat:
    day = datetime.date.fromisoformat(run.data.chat_date)
    return choose(tokens, own, setting, date=(day.year, day.month, day.day))


def chosen_tokenizer(run: RunConfig, say: Say) -> Tokenizer:
    """The tokenizer of a new run; ConfigError if there is none, or if data.tokenizer and init_from differ."""
    base = open_source(run.init_from).tokenizer() if run.init_from else None
    return prepare.choose_tokenizer(run, base, say)


def chosen_encoder(run: RunConfig, say: Say) -> RecordEncoder:
    """The encoder of a new run's records: its tokenizer, its chat format and its rule for names of control tokens."""
    tokens = chosen_tokenizer(run, say)
    return RecordEncoder(tokens, chosen_chat_format(run, tokens), run.data.parse_special)


def first_state(program: Program) -> TrainState:
    """The sharded state before the first step, with random weights, the weights of init_from or new LoRA matrices.

    Raises:
        ConfigError: init_from is a model of another shape. The message names the keys that differ.
    """
    run, shardings = program.run, state_shardings(program.state)
    init = functools.partial(init_state, run, program.optimizer)
    if run.lora.rank or not run.init_from:
        return jax.jit(init, out_shardings=shardings)()
    with phase(f"loading {run.init_from}", say):
        params = _loaded(_pretrained(run), program, jnp.dtype(jnp.float32), "none")
    return jax.jit(lambda params: init(params=params), out_shardings=shardings, donate_argnums=0)(params)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The frozen model of a run: LoRA's base or DPO's reference.

    Attributes:
        params: Stacked and sharded params; None if nothing is frozen.
        identity: Identity of the model (`Source.identity`), or None.
    """

    params: Params | None
    identity: str | None


def frozen(program: Program) -> Frozen:
    """The frozen model, loaded from init_from at every start of a run: checkpoints do not contain it.

    Raises:
        ConfigError: init_from is a model of another shape.
    """
    if program.frozen is None:
        return Frozen(None, None)
    run = program.run
    source = _pretrained(run)
    dtype = trainable.frozen_dtype(run, program.dtype)
    with phase(f"loading {run.init_from}", say):
        quantize = layers_only(trainable.frozen_quantize(run))
        layout = dataclasses.replace(program.layout, memory=parallel.HOST if run.lora.offload else None)
        return Frozen(_loaded(source, program, dtype, quantize, layout), source.identity())


def _loaded(
    source: Source, program: Program, dtype: jnp.dtype, quantize: str, layout: parallel.Layout | None = None
) -> Params:
    """The weights of a model, stacked and sharded, with the updates of a LoRA run merged into them.

    Raises:
        ConfigError: a weight is not finite.
    """
    params = restack(source.load_merged(layout or program.layout, dtype, quantize))
    processes.meet("weights are loaded")
    floats = [(k, a) for k, a in jax.tree_util.tree_leaves_with_path(params) if jnp.issubdtype(a.dtype, jnp.floating)]
    check = jax.jit(lambda arrays: [jnp.isfinite(a).all() for a in parallel.on_device(arrays)])
    parts = [[a] for _, a in floats] if program.run.lora.offload else [[a for _, a in floats]]  # a leaf fits a device
    finite = [ok for part in parts for ok in jax.device_get(check(part))]
    bad = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for (path, _), ok in zip(floats, finite, strict=True)
        if not ok
    ]
    if bad:
        raise ConfigError(
            f"init_from={program.run.init_from!r} holds weights that are not finite (NaN or infinity), in "
            f"{some(bad)}: take another copy of the model"
        )
    return params


def _pretrained(run: RunConfig) -> Source:
    """The model of init_from; ConfigError if its shape is not the run's."""
    source = open_source(run.init_from)
    run.with_shape(source.config)
    return source
