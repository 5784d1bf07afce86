"""A training run as a frozen record: every key with its default, its bounds and its meaning, checked before any work.

Floor 0: no jax here. `RunConfig.from_dict` takes the nested dict of a config file and refuses what cannot work, naming
the key, what it got, what is allowed and the nearest right key.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from llama_jax.config import SIZES, ConfigError, ModelConfig, nearest


def _key(default: Any, *, low: float | None = None, high: float | None = None, choices: tuple[Any, ...] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "choices": choices})


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it is cut into batches.

    Attributes:
        train: files, folders and glob patterns of .txt, .md, .jsonl and .parquet (README.md has the keys of their
            records: texts, dialogs, completions); or `stdlib:train`.
        weights: of a mixture, one for each of data.train: its share of all rows; empty takes every row equally often.
        validation: the same, for the validation loss; may be empty. `stdlib:validation` goes with `stdlib:train`.
        tokenizer: a tokenizer.model or .json; empty trains one of model.vocab_size on the training text at first use.
        loss_on: the tokens of dialogs and completions that the loss counts: `assistant`, what the assistant says (its
            calls and ends of turns too) and completions, or `all`. Text counts whole.
        sequence_length: tokens a row (T); longer dialogs and completions are left out, longer texts cut.
        batch_size: rows a step over all devices and accumulated parts (B).
        shuffle: rows in a new order each epoch, else in the order of the files.
        seed: of that order.
        cache_dir: where tokenised text is kept between runs.
    """

    train: tuple[str, ...] = _key(())
    weights: tuple[float, ...] = _key(())
    validation: tuple[str, ...] = _key(())
    tokenizer: str = _key("")
    loss_on: str = _key("assistant", choices=("assistant", "all"))
    sequence_length: int = _key(2048, low=2)
    batch_size: int = _key(8, low=1)
    shuffle: bool = _key(True)
    seed: int = _key(0, low=0, high=2**31 - 1)
    cache_dir: str = _key("~/.cache/llama_jax/data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) and its schedule.

    Attributes:
        learning_rate: at the peak.
        schedule: after the warm-up: `cosine` to the end, `constant`, or `wsd` (constant, then linear decay).
        warmup_steps: of linear rise from 0.
        decay_fraction: of all steps that `wsd` decays in, at the end.
        final_fraction: of the peak, that cosine and wsd end at.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, on matrices only; norms have none.
        clip_norm: largest global norm of the gradient; 0 turns clipping off.
    """

    learning_rate: float = _key(3e-4, low=0.0, high=10.0)
    schedule: str = _key("cosine", choices=("cosine", "wsd", "constant"))
    warmup_steps: int = _key(100, low=0)
    decay_fraction: float = _key(0.2, low=0.0, high=1.0)
    final_fraction: float = _key(0.1, low=0.0, high=1.0)
    b1: float = _key(0.9, low=0.0, high=0.999999)
    b2: float = _key(0.95, low=0.0, high=0.999999)
    eps: float = _key(1e-8, low=1e-30, high=1.0)
    weight_decay: float = _key(0.1, low=0.0, high=10.0)
    clip_norm: float = _key(1.0, low=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The step.

    Attributes:
        steps: optimizer steps in all.
        accumulate: parts that a batch is computed in, one after the other, for less memory.
        compute_dtype: of activations and products; master weights and moments are float32. `auto` is bfloat16, and
            float32 on a CPU.
        remat: what a layer keeps for its backward pass: `none` recomputed, `dots` (products kept), `full` recomputed.
        vocab_chunk: rows of the vocabulary whose logits exist at a time, per device; 0 for all.
        z_loss: weight of the squared log-normaliser (PaLM, section 5).
        max_skipped: consecutive steps with a non-finite loss or gradient, which are skipped, before the run stops.
    """

    steps: int = _key(1000, low=1)
    accumulate: int = _key(1, low=1)
    compute_dtype: str = _key("auto", choices=("auto", "float32", "bfloat16"))
    remat: str = _key("full", choices=("none", "dots", "full"))
    vocab_chunk: int = _key(8192, low=0)
    z_loss: float = _key(0.0, low=0.0, high=1.0)
    max_skipped: int = _key(10, low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; one may be -1, for what is left.

    Attributes:
        data: copies of the model, each with its part of the batch.
        fsdp: parts that weights, gradients and moments are stored in; each with its part of the batch.
        stage: pipeline stages. Only 1 for now.
        context: parts of each row (sequence parallelism).
        tensor: parts that heads, the feed-forward and the vocabulary are computed in.
    """

    data: int = _key(1, low=-1)
    fsdp: int = _key(-1, low=-1)
    stage: int = _key(1, low=-1)
    context: int = _key(1, low=-1)
    tensor: int = _key(1, low=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is said, and when. Steps; 0 turns a thing off.

    Attributes:
        every: a line of loss, learning rate, tokens/s and time left.
        eval_every: validation loss.
        eval_batches: of validation, at most.
        sample_every: text sampled from the model as it is. It takes a copy of the weights in train.compute_dtype on
            every device (split by mesh.tensor only); leave it off where that does not fit.
        sample_prompts: what it goes on from.
        sample_tokens: how far.
        tensorboard: event files beside metrics.jsonl.
    """

    every: int = _key(10, low=1)
    eval_every: int = _key(100, low=0)
    eval_batches: int = _key(20, low=1)
    sample_every: int = _key(0, low=0)
    sample_prompts: tuple[str, ...] = _key(("The",))
    sample_tokens: int = _key(64, low=1)
    tensorboard: bool = _key(True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, and how many are kept.

    Attributes:
        every: steps between checkpoints; the last step is always saved.
        keep: newest checkpoints that are kept.
        keep_best: those of the lowest validation loss that are kept besides; 0 for none. Takes a validation loss at
            every checkpoint.
        grace_seconds: after SIGTERM, for the step under way to end; then the run leaves without it. Schedulers often
            kill after 10.
    """

    every: int = _key(500, low=1)
    keep: int = _key(2, low=1)
    keep_best: int = _key(0, low=0)
    grace_seconds: float = _key(8.0, low=0.0, high=86_400.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Several processes. `auto` where the cluster tells jax (TPU pods, Slurm, GKE); else the first process's address.

    Attributes:
        coordinator: empty for one process, `auto`, or HOST:PORT of process 0.
        num_processes: in all; not read under `auto`.
        process_id: of this one; not read under `auto`.
    """

    coordinator: str = _key("")
    num_processes: int = _key(1, low=1)
    process_id: int = _key(0, low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole training run.

    Attributes:
        output: the run folder: config, tokenizer, checkpoints, metrics, pictures.
        seed: of the first weights and of sampling.
        init_from: a model to start from (see `llama_jax.load`); empty starts from random weights.
        model: the shape of the model.
    """

    output: str = _key("")
    seed: int = _key(0, low=0, high=2**31 - 1)
    init_from: str = _key("")
    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    distributed: DistributedConfig = DistributedConfig()

    def __post_init__(self) -> None:
        """The checks that need more than one key; those of the mesh need the devices (`check_mesh`)."""
        data, train, model = self.data, self.train, self.model
        if not self.output:
            raise ConfigError("output is empty: name the run folder, e.g. output='runs/my_run'")
        if not data.train:
            raise ConfigError("data.train is empty: name text files, folders or patterns, or 'stdlib:train'")
        if data.weights and (len(data.weights) != len(data.train) or min(data.weights) <= 0):
            raise ConfigError(
                f"data.weights={data.weights} must be one number above 0 for each of data.train, which are "
                f"{len(data.train)}; leave it empty to take every row equally often"
            )
        for key, folder in (("output", self.output), ("data.cache_dir", data.cache_dir)):
            if "://" in folder:
                raise ConfigError(f"{key}={folder!r} must be a folder: mount the bucket, and name where it is mounted")
        if self.log.sample_every and not self.log.sample_prompts:
            raise ConfigError("log.sample_every needs log.sample_prompts: give at least one, or set log.sample_every=0")
        if data.sequence_length > model.max_seq_len:
            raise ConfigError(
                f"data.sequence_length={data.sequence_length} is more than model.max_seq_len={model.max_seq_len}"
            )
        if data.batch_size % train.accumulate:
            legal = [n for n in range(1, data.batch_size + 1) if data.batch_size % n == 0]
            raise ConfigError(
                f"train.accumulate={train.accumulate} must divide data.batch_size={data.batch_size}: one of {legal}"
            )
        if self.optimizer.warmup_steps > train.steps:
            raise ConfigError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is more than train.steps={train.steps}: "
                "the peak would never be reached"
            )
        if self.checkpoint.keep_best:
            every = self.log.eval_every
            if not data.validation or not every or self.checkpoint.every % every:
                raise ConfigError(
                    f"checkpoint.keep_best={self.checkpoint.keep_best} needs a validation loss at every checkpoint: "
                    f"set data.validation, and checkpoint.every={self.checkpoint.every} to a multiple of "
                    f"log.eval_every={every}"
                )
        if self.mesh.stage != 1:
            raise ConfigError(
                f"mesh.stage={self.mesh.stage}: pipeline stages are not built; set mesh.stage=1 and use fsdp or tensor"
            )
        sizes = dataclasses.asdict(self.mesh)
        if 0 in sizes.values() or list(sizes.values()).count(-1) > 1:
            shape = ", ".join(f"mesh.{axis}={n}" for axis, n in sizes.items() if n < 1)
            raise ConfigError(f"{shape}: every axis must be at least 1, and one of them may be -1 (what is left)")
        connection = self.distributed
        if connection.coordinator not in ("", "auto"):
            host, _, port = connection.coordinator.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ConfigError(
                    f"distributed.coordinator={connection.coordinator!r} must be HOST:PORT of process 0, 'auto', or "
                    "empty for one process"
                )
        if not connection.coordinator and connection.num_processes > 1:
            raise ConfigError(
                f"distributed.num_processes={connection.num_processes} needs distributed.coordinator=HOST:PORT"
            )
        if self.distributed.process_id >= self.distributed.num_processes:
            raise ConfigError(
                f"distributed.process_id={self.distributed.process_id} must be below "
                f"num_processes={self.distributed.num_processes}"
            )

    def check_mesh(self, sizes: Mapping[str, int]) -> None:
        """Refuse a mesh (sizes resolved, no -1) that this model and batch cannot be split over.

        Raises:
            ConfigError: naming the axis and its legal values.
        """
        model, tensor = self.model, sizes["tensor"]
        for name in ("num_kv_heads", "num_heads", "ffn_dim", "vocab_size"):
            if getattr(model, name) % tensor:
                legal = [
                    n for n in range(1, model.num_kv_heads + 1)
                    if not (model.num_kv_heads % n or model.ffn_dim % n or model.vocab_size % n)
                ]  # fmt: skip
                raise ConfigError(
                    f"mesh.tensor={tensor} must divide model.{name}={getattr(model, name)}: one of {legal}"
                )
        if model.embed_dim % sizes["fsdp"]:
            raise ConfigError(f"mesh.fsdp={sizes['fsdp']} must divide model.embed_dim={model.embed_dim}")
        if self.data.sequence_length % sizes["context"]:
            raise ConfigError(
                f"mesh.context={sizes['context']} must divide data.sequence_length={self.data.sequence_length}"
            )
        rows = self.data.batch_size // self.train.accumulate
        split = sizes["data"] * sizes["fsdp"]
        if rows % split:
            raise ConfigError(
                f"mesh data={sizes['data']} x fsdp={sizes['fsdp']} splits a batch into {split} parts, but "
                f"data.batch_size / train.accumulate is {rows}: set data.batch_size to a multiple of "
                f"{split * self.train.accumulate}, or move devices to mesh.tensor"
            )

    def to_dict(self) -> dict[str, Any]:
        """A nested JSON-able dict; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The run of a nested dict. Keys that are absent have their defaults; `model` may be the name of a size.

        Raises:
            ConfigError: unknown keys, wrong types, NaN, values out of bounds, and combinations that cannot work.
        """
        values = dict(values)
        model = values.pop("model", None)
        if isinstance(model, str):
            if model not in SIZES:
                raise ConfigError(f"model={model!r} is no known size{nearest(model, list(SIZES))}")
            model = SIZES[model]
        elif isinstance(model, Mapping):
            model = ModelConfig.from_dict(_plain(model))
        if not isinstance(model, ModelConfig):
            raise ConfigError(f"model must be the name of a size or its fields, got {model!r}: e.g. 'llama3.1-8b'")
        return _build(cls, values, "", model=model)


def default_dict(size: str = "llama3.1-8b") -> dict[str, Any]:
    """Every key of a run with its default, for a config file to change: `model` has the fields of the named size."""
    sections = {f.name: f.default for f in dataclasses.fields(RunConfig) if f.name != "model"}
    plain = {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in sections.items()}
    return {**plain, "model": SIZES[size].to_dict()}


def known_keys() -> list[str]:
    """Every key by its dotted name, e.g. `optimizer.learning_rate`."""
    return list(_flat(default_dict("llama3.1-8b")))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two nested dicts, with both values."""
    a, b = _flat(old), _flat(new)
    plain = lambda v: list(v) if isinstance(v, tuple) else v  # noqa: E731  (JSON has no tuples)
    keys = sorted(a.keys() | b.keys())
    return {k: (a.get(k), b.get(k)) for k in keys if plain(a.get(k)) != plain(b.get(k))}


# What people call these keys elsewhere.
_ALIASES = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "epochs": "steps",
    "num_steps": "steps",
    "seq_len": "sequence_length",
    "max_length": "sequence_length",
    "bs": "batch_size",
    "grad_accum": "accumulate",
    "gradient_accumulation_steps": "accumulate",
    "dtype": "compute_dtype",
    "output_dir": "output",
}


def unknown_key(name: str) -> ConfigError:
    """The error for a dotted key that does not exist, with the nearest that does."""
    known = known_keys()
    section, _, last = name.rpartition(".")
    last = _ALIASES.get(last, last)
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    sections = sorted({k.split(".")[0] for k in known})
    if name in sections:
        return ConfigError(f"{name} is a section: set one of {', '.join(k for k in known if k.startswith(name + '.'))}")
    # The right name in the wrong section, else the nearest in its own section, else the nearest anywhere.
    by_last = {k.rpartition(".")[2]: k for k in (*known, *(sections if not section else ()), *siblings)}
    own = {k.rpartition(".")[2]: k for k in siblings}
    for candidates, cutoff in ((by_last, 1.0), (own, 0.6), (by_last, 0.6)):
        near = difflib.get_close_matches(last, list(candidates), n=1, cutoff=cutoff)
        if near:
            mend = f"did you mean {candidates[near[0]]!r}?"
            break
    else:
        mend = "it has no near relative."
    allowed = siblings if section and siblings else sections
    return ConfigError(f"unknown key {name!r}: {mend} Allowed here: {', '.join(allowed)}")


def _plain(value: Any) -> Any:
    """Mappings (ml_collections' among them) as plain dicts."""
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _build(cls: type, values: Mapping[str, Any], prefix: str, **given: Any) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if name not in fields:
            raise unknown_key(prefix + str(name))
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}{name} is a section, and cannot be set to {value!r}")
            given[name] = _build(hints[name], value, f"{prefix}{name}.")
        else:
            given[name] = _check(prefix + name, value, hints[name], fields[name].metadata)
    return cls(**given)


def _check(name: str, value: Any, kind: Any, bounds: Mapping[str, Any]) -> Any:
    """`value` as the type that the key has, within its bounds."""
    wrong = ConfigError(f"{name} must be {_word(kind)}, got {value!r}")
    if isinstance(kind, types.GenericAlias):  # tuple[str, ...] or tuple[float, ...]
        item = typing.get_args(kind)[0]
        value = value if isinstance(value, (tuple, list)) else (value,)
        if item is str and not all(isinstance(v, str) and v for v in value):
            raise wrong
        return tuple(v if item is str else _check(name, v, item, bounds) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise wrong
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value}")
    if bounds["choices"] and value not in bounds["choices"]:
        raise ConfigError(
            f"{name} must be one of {', '.join(map(repr, bounds['choices']))}, got {value!r}"
            + nearest(str(value), [str(c) for c in bounds["choices"]])
        )
    low, high = bounds["low"], bounds["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
        raise ConfigError(f"{name} must be {limits}, got {value}")
    return value


def _word(kind: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}
    return words.get(kind, "a tuple of non-empty strings")
