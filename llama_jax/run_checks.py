"""Checks of a run that compare keys of several sections. Each raises a ConfigError that names the keys.

A section checks itself (`run_keys`); `run_config.RunConfig` calls the functions here. Floor 0: this module does not
import jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError
from llama_jax.run_keys import (
    LORA_TARGETS,
    CheckpointConfig,
    DataConfig,
    DpoConfig,
    LogConfig,
    LoraConfig,
    OptimizerConfig,
    TrainConfig,
)


def check_batch(data: DataConfig, train: TrainConfig) -> None:
    """Check that a batch can be split into the accumulated parts."""
    if data.batch_size % train.accumulate:
        allowed = [n for n in range(1, data.batch_size + 1) if data.batch_size % n == 0]
        raise ConfigError(
            f"train.accumulate={train.accumulate} must divide data.batch_size={data.batch_size}: one of {allowed}"
        )


def check_length(data: DataConfig, model: ModelConfig) -> None:
    """Check that the model takes a training row."""
    if data.sequence_length > model.max_seq_len:
        raise ConfigError(
            f"data.sequence_length={data.sequence_length} is more than model.max_seq_len={model.max_seq_len}"
        )


def check_warmup(optimizer: OptimizerConfig, train: TrainConfig, steps: int) -> None:
    """Check that the warmup ends before a run of `steps` does."""
    if optimizer.warmup_steps > steps:
        key = f"train.steps={steps}" if train.steps else f"the {steps} steps of train.epochs={train.epochs:g}"
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} is more than {key}, and the peak would never be reached: "
            f"set optimizer.warmup_steps={steps // 10}, or train for longer"
        )


def check_best(checkpoint: CheckpointConfig, log: LogConfig, data: DataConfig) -> None:
    """Check that every checkpoint has a validation loss if the best ones are kept."""
    if not checkpoint.keep_best:
        return
    if not data.validation or not log.eval_every or checkpoint.every % log.eval_every:
        raise ConfigError(
            f"checkpoint.keep_best={checkpoint.keep_best} needs a validation loss at every checkpoint: set "
            f"data.validation, and checkpoint.every={checkpoint.every} to a multiple of log.eval_every="
            f"{log.eval_every}; or set checkpoint.keep_best=0"
        )


def check_patience(train: TrainConfig, log: LogConfig, data: DataConfig) -> None:
    """Check that there are validation losses for train.patience to compare."""
    if train.patience and not (data.validation and log.eval_every):
        key = "log.eval_every" if data.validation else "data.validation"
        raise ConfigError(f"train.patience={train.patience} needs a validation loss: set {key}, or train.patience=0")


def check_objective(train: TrainConfig, dpo: DpoConfig, init_from: str) -> None:
    """Check that DPO has its reference, and that DPO's keys are set for DPO only."""
    changed = [field.name for field in dataclasses.fields(dpo) if getattr(dpo, field.name) != field.default]
    if changed and train.objective != "dpo":
        raise ConfigError(
            f"dpo.{changed[0]} applies to DPO only: set train.objective='dpo', or leave the key at its default"
        )
    if train.objective == "dpo" and not init_from:
        raise ConfigError("train.objective='dpo' needs init_from: name the model to start from")


def check_lora(lora: LoraConfig, optimizer: OptimizerConfig, init_from: str) -> None:
    """Check that a LoRA run has its base, and that keys and parameter groups of LoRA are set only in such a run."""
    rates = optimizer.group_rates
    rows = {"embed", "unembed"} if lora.trained_tokens else set()
    untrained = [group for group in rates if group.startswith("lora") != bool(lora.rank) and group not in rows]
    if untrained:
        remedy = "LoRA trains only lora_a and lora_b" if lora.rank else "set lora.rank to train with LoRA"
        raise ConfigError(f"optimizer.rates: {untrained[0]} is not trained in this run: {remedy}")
    if lora.rank and not init_from:
        raise ConfigError("lora.rank needs init_from: name the model to start from")
    keys = ("dropout", "rslora", "base", "offload", "trained_tokens")
    unused = [key for key in keys if getattr(lora, key) not in (0.0, False, "auto", ())]
    unused += ["targets"] if lora.targets != LORA_TARGETS else []
    if unused and not lora.rank:
        raise ConfigError(f"lora.{unused[0]} needs lora.rank, which is 0: set it, e.g. to 16, to train with LoRA")


def check_offloaded_base(lora: LoraConfig, train: TrainConfig, log: LogConfig) -> None:
    """Check that nothing copies a base that is in the host's memory to the devices whole."""
    if lora.offload and train.remat == "none":
        raise ConfigError(
            "lora.offload needs the layers to be copied again in the backward pass, but train.remat='none' keeps them "
            "on the devices: set train.remat=full"
        )
    if lora.offload and log.sample_every:
        raise ConfigError(
            f"log.sample_every={log.sample_every} copies the whole model to the devices, and lora.offload keeps its "
            "base in the host's memory: set log.sample_every=0"
        )


def check_trained_tokens(lora: LoraConfig, model: ModelConfig) -> None:
    """Check that the model has rows for the trained tokens."""
    if lora.trained_tokens and max(lora.trained_tokens) >= model.vocab_size:
        raise ConfigError(
            f"lora.trained_tokens has id {max(lora.trained_tokens)}, but the model has {model.vocab_size:,} rows: name "
            "ids below that, such as those of reserved special tokens"
        )


def check_mesh(sizes: Mapping[str, int], model: ModelConfig, data: DataConfig, train: TrainConfig) -> None:
    """Check that the model and a batch can be split over a mesh, whose sizes are resolved (no -1)."""
    tensor, stage = sizes["tensor"], sizes["stage"]
    if not _takes_tensor(model, tensor):
        raise ConfigError(
            f"mesh.tensor={tensor} must divide model.num_heads={model.num_heads}, ffn_dim={model.ffn_dim} and "
            f"vocab_size={model.vocab_size}, and be a divisor or a multiple of num_kv_heads={model.num_kv_heads}: one "
            f"of {[n for n in range(1, model.num_heads + 1) if _takes_tensor(model, n)]}"
        )
    if model.num_layers % stage:
        stages = [n for n in range(1, model.num_layers + 1) if model.num_layers % n == 0]
        raise ConfigError(f"mesh.stage={stage} must divide model.num_layers={model.num_layers}: one of {stages}")
    if model.embed_dim % sizes["fsdp"]:
        allowed = [n for n in range(1, model.embed_dim + 1) if model.embed_dim % n == 0]
        raise ConfigError(
            f"mesh.fsdp={sizes['fsdp']} must divide model.embed_dim={model.embed_dim}: one of {allowed}, and the other "
            "devices along mesh.data or mesh.tensor"
        )
    if data.sequence_length % sizes["context"]:
        raise ConfigError(f"mesh.context={sizes['context']} must divide data.sequence_length={data.sequence_length}")
    rows, parts = data.batch_size // train.accumulate, sizes["data"] * sizes["fsdp"]
    if rows % parts:
        raise ConfigError(
            f"mesh data={sizes['data']} x fsdp={sizes['fsdp']} splits a batch into {parts} parts, but "
            f"data.batch_size / train.accumulate is {rows}: set data.batch_size to a multiple of "
            f"{parts * train.accumulate}, or move devices to mesh.tensor"
        )
    micro = train.microbatches or stage
    if stage > 1 and rows % (parts * micro):
        raise ConfigError(
            f"train.microbatches={micro} must divide the {rows // parts} rows that each part of the mesh has: set "
            f"data.batch_size to a multiple of {parts * micro * train.accumulate}, or train.microbatches"
        )


def check_offload(sizes: Mapping[str, int], optimizer: OptimizerConfig, lora: LoraConfig) -> None:
    """Check that no layers are in the host's memory if pipeline stages share them."""
    for key, offload in (("optimizer", optimizer.offload), ("lora", lora.offload)):
        if offload and sizes["stage"] > 1:
            raise ConfigError(
                f"{key}.offload needs a mesh without stages, but mesh.stage={sizes['stage']}: set {key}.offload=False, "
                "or mesh.stage=1"
            )


def _takes_tensor(model: ModelConfig, n: int) -> bool:
    """True if n devices can share the heads, the feed-forward and the vocabulary."""
    kv = model.num_kv_heads
    whole = not (model.num_heads % n or model.ffn_dim % n or model.vocab_size % n)
    return whole and (kv % n == 0 or n % kv == 0)
