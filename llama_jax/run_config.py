"""A training run as a frozen record: the keys of `run_keys`, checked by themselves and together before any work.

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

from llama_jax.config import SIZES, ModelConfig
from llama_jax.errors import ConfigError, nearest
from llama_jax.run_keys import (
    LORA_TARGETS,
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    DpoConfig,
    LogConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    bounded,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole training run.

    Attributes:
        output: the run folder: config, tokenizer, checkpoints, metrics, pictures.
        seed: of the first weights and of sampling.
        init_from: a model to start from (see `llama_jax.load`); empty starts from random weights.
        model: the shape of the model.
    """

    output: str = bounded("")
    seed: int = bounded(0, low=0, high=2**31 - 1)
    init_from: str = bounded("")
    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    dpo: DpoConfig = DpoConfig()
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
        self._check_method()
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
                    f"log.eval_every={every}; or set checkpoint.keep_best=0"
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

    def _check_method(self) -> None:
        rates = self.optimizer.group_rates
        trained = {"embed", "unembed"} if self.lora.trained_tokens else set()
        strange = [
            group for group in rates if group.startswith("lora") != bool(self.lora.rank) and group not in trained
        ]
        if strange:
            mend = "LoRA trains only lora_a and lora_b" if self.lora.rank else "set lora.rank to train with LoRA"
            raise ConfigError(f"optimizer.rates: {strange[0]} is not trained in this run: {mend}")
        keys = ("dropout", "rslora", "base", "trained_tokens")
        unused = [key for key in keys if getattr(self.lora, key) not in (0.0, False, "auto", ())]
        if unused and not self.lora.rank:
            raise ConfigError(f"lora.{unused[0]} needs lora.rank, which is 0: set it, e.g. to 16, to train with LoRA")
        if self.lora.targets != LORA_TARGETS and not self.lora.rank:
            raise ConfigError("lora.targets needs lora.rank, which is 0: set it, e.g. to 16, to train with LoRA")
        if len(set(self.lora.targets)) < len(self.lora.targets):
            raise ConfigError(f"lora.targets={self.lora.targets} names a matrix twice: name each once")
        self._check_trained_tokens()
        moved = [f.name for f in dataclasses.fields(self.dpo) if getattr(self.dpo, f.name) != f.default]
        if moved and self.train.objective != "dpo":
            raise ConfigError(f"dpo.{moved[0]} is read by DPO alone: set train.objective='dpo', or leave it as it is")
        if self.train.z_loss and self.train.objective == "dpo":
            raise ConfigError("train.z_loss is not of train.objective='dpo': set it to 0")
        for what, used in (("lora.rank", self.lora.rank), ("train.objective='dpo'", self.train.objective == "dpo")):
            if used and not self.init_from:
                raise ConfigError(f"{what} needs init_from: name the model to start from")
        if self.lora.rank and not self.lora.targets:
            raise ConfigError(f"lora.targets is empty: name some of {', '.join(LORA_TARGETS)}")
        if self.dpo.loss == "ipo" and self.dpo.label_smoothing:
            raise ConfigError("dpo.label_smoothing is not of IPO: set it to 0, or dpo.loss='sigmoid'")

    def _check_trained_tokens(self) -> None:
        ids, targets = self.lora.trained_tokens, {"embed", "unembed"}.intersection(self.lora.targets)
        if ids and targets:
            raise ConfigError(
                f"lora.trained_tokens and lora.targets={sorted(targets)} train the same matrices: leave one of them out"
            )
        if ids and max(ids) >= self.model.vocab_size:
            raise ConfigError(
                f"lora.trained_tokens has id {max(ids)}, but the model has {self.model.vocab_size:,} rows: name ids "
                "below that, such as those of reserved special tokens"
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


def kind_of(key: str) -> str:
    """What a key must be, in words: "a whole number"."""
    return _word(type(_flat(default_dict())[key]))


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
        return tuple(_check(name, v, item, bounds) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise wrong
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value}")
    if bounds["choices"] and value not in bounds["choices"]:
        raise ConfigError(
            f"{name} must be one of {', '.join(map(repr, bounds['choices']))}, got {value!r}"
            + nearest(str(value).removesuffix("_proj"), [str(c) for c in bounds["choices"]])  # peft's q_proj is q
        )
    low, high = bounds["low"], bounds["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
        raise ConfigError(f"{name} must be {limits}, got {value}")
    return value


def _word(kind: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}
    return words.get(kind, "a tuple of whole numbers" if kind == tuple[int, ...] else "a tuple of non-empty strings")
