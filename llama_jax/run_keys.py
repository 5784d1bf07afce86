"""The sections of a run's config: every key with its default, its bounds and its meaning. `run_config` joins them.

Floor 0: no jax here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from llama_jax.errors import ConfigError, nearest

# Of weights, by where they stand: what optimizer.rates and the gradient's norms go by. The last two are LoRA's.
GROUPS = ("embed", "unembed", "norm", "attention", "ffn", "lora_a", "lora_b")
# What each optimizer's running averages may be kept in.
MOMENTS = {
    "adamw": ("float32", "bfloat16", "int8"),
    "adafactor": ("float32",),
    "lion": ("float32", "bfloat16"),
    "muon": ("float32", "bfloat16"),
}
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
# The other matrices that LoRA may go on, and peft's names of all of them.
_PEFT_TARGETS = {f"{name}_proj": (name,) for name in LORA_TARGETS}
_PEFT_TARGETS |= {"embed_tokens": ("embed",), "lm_head": ("unembed",), "all-linear": LORA_TARGETS}
_MAX_TRAINED_TOKENS = 1024


def bounded(default: Any, *, low: float | None = None, high: float | None = None, choices: tuple[Any, ...] = ()) -> Any:
    """A field of a section with its bounds; those of a tuple are of each of its items."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "choices": choices})


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it is cut into batches.

    Attributes:
        train: files, folders, glob patterns and datasets of the hub (hf://datasets/OWNER/NAME[@REVISION][/PATH]) of
            .txt, .md, .jsonl, .parquet and, where it is named itself, .json (README.md has the keys of their records:
            texts, dialogs, completions, preference pairs); or `stdlib:train`, or `stdlib:chat-train` (questions and
            answers).
        weights: of a mixture, one for each of data.train: its share of all rows; empty takes every row equally often.
        validation: the same, for the validation loss; may be empty. `stdlib:validation` goes with `stdlib:train`,
            `stdlib:chat-validation` with `stdlib:chat-train`.
        tokenizer: a tokenizer.model or .json; empty trains one of model.vocab_size on the training text at first use.
        loss_on: the tokens of dialogs and completions that the loss counts: `assistant`, what the assistant says (its
            calls and ends of turns too) and completions, or `all`, which pairs refuse. Text counts whole.
        sequence_length: tokens a row (T); longer dialogs, completions and pairs (both answers together) are left out,
            longer texts cut.
        batch_size: rows a step over all devices and accumulated parts (B).
        shuffle: rows in a new order each epoch, else always in the order that packing has put them in.
        seed: of that order.
        cache_dir: where tokenised text is kept between runs.
    """

    train: tuple[str, ...] = bounded(())
    weights: tuple[float, ...] = bounded(())
    validation: tuple[str, ...] = bounded(())
    tokenizer: str = bounded("")
    loss_on: str = bounded("assistant", choices=("assistant", "all"))
    sequence_length: int = bounded(2048, low=2)
    batch_size: int = bounded(8, low=1)
    shuffle: bool = bounded(True)
    seed: int = bounded(0, low=0, high=2**31 - 1)
    cache_dir: str = bounded("~/.cache/llama_jax/data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule.

    Attributes:
        name: `adamw` (Loshchilov and Hutter, arXiv:1711.05101), `adafactor` (arXiv:1804.04235), `lion`
            (arXiv:2302.06675) or `muon` (matrices by Muon, the rest by AdamW).
        moments: what running averages are kept in: `float32`, `bfloat16` (not Adafactor's), or `int8` (AdamW's only,
            arXiv:2110.02861).
        rates: of groups of weights, as parts of the learning rate: `GROUP=FACTOR`, where GROUP is one of GROUPS.
        ema_decay: of a running average of the weights, which is then what is evaluated, sampled and saved as the
            model; 0 keeps none.
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

    name: str = bounded("adamw", choices=tuple(MOMENTS))
    moments: str = bounded("float32", choices=MOMENTS["adamw"])
    rates: tuple[str, ...] = bounded(())
    ema_decay: float = bounded(0.0, low=0.0, high=0.999999)
    learning_rate: float = bounded(3e-4, low=0.0, high=10.0)
    schedule: str = bounded("cosine", choices=("cosine", "wsd", "constant"))
    warmup_steps: int = bounded(100, low=0)
    decay_fraction: float = bounded(0.2, low=0.0, high=1.0)
    final_fraction: float = bounded(0.1, low=0.0, high=1.0)
    b1: float = bounded(0.9, low=0.0, high=0.999999)
    b2: float = bounded(0.95, low=0.0, high=0.999999)
    eps: float = bounded(1e-8, low=1e-30, high=1.0)
    weight_decay: float = bounded(0.1, low=0.0, high=10.0)
    clip_norm: float = bounded(1.0, low=0.0)

    def __post_init__(self) -> None:
        allowed = MOMENTS.get(self.name, ())
        if allowed and self.moments not in allowed:
            raise ConfigError(
                f"optimizer.moments={self.moments!r} is not for optimizer.name={self.name!r}: "
                f"set {' or '.join(allowed)}"
            )

    @property
    def group_rates(self) -> dict[str, float]:
        """`rates` by group; ConfigError for what is none."""
        found = {}
        for item in self.rates:
            group, _, factor = item.partition("=")
            try:
                number = float(factor)
            except ValueError:
                number = math.nan
            if group.strip() in found:
                raise ConfigError(f"optimizer.rates={self.rates} has {group.strip()} twice: give each group once")
            found[group.strip()] = number
            if group.strip() not in GROUPS or not 0 <= found[group.strip()] <= 1e4:
                digits = re.search(r"[\d.]+", item)
                near = nearest(item, [f"{group}={digits[0] if digits else 1}" for group in GROUPS])
                raise ConfigError(
                    f"optimizer.rates: {item!r} must be GROUP=FACTOR, a factor from 0 to 10000 and a group of "
                    f"{', '.join(GROUPS)}{near}"
                )
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The step.

    Attributes:
        objective: `sft`, the cross-entropy of targets, or `dpo`, of preference pairs (see `dpo`).
        steps: optimizer steps in all.
        accumulate: parts that a batch is computed in, one after the other, for less memory.
        compute_dtype: of activations and products; master weights and moments are float32. `auto` is bfloat16, and
            float32 on a CPU.
        remat: what a layer keeps for its backward pass: `none` recomputed, `dots` (products kept), `full` recomputed.
        vocab_chunk: rows of the vocabulary whose logits exist at a time, per device; 0 for all.
        z_loss: weight of the squared log-normaliser (PaLM, section 5).
        max_skipped: consecutive steps with a non-finite loss or gradient, which are skipped, before the run stops.
    """

    objective: str = bounded("sft", choices=("sft", "dpo"))
    steps: int = bounded(1000, low=1)
    accumulate: int = bounded(1, low=1)
    compute_dtype: str = bounded("auto", choices=("auto", "float32", "bfloat16"))
    remat: str = bounded("full", choices=("none", "dots", "full"))
    vocab_chunk: int = bounded(8192, low=0)
    z_loss: float = bounded(0.0, low=0.0, high=1.0)
    max_skipped: int = bounded(10, low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA (Hu et al., arXiv:2106.09685): two thin matrices beside each target are trained, the base stays as it is.

    Attributes:
        rank: of the update; 0 trains all weights instead.
        alpha: the update is scaled by alpha / rank.
        dropout: of what meets the update's first matrix, while training.
        targets: the matrices that have one: of every layer, and `embed` and `unembed`. peft's names mean the same:
            q_proj, lm_head, embed_tokens, and all-linear for those of every layer.
        trained_tokens: ids of tokens whose rows of the embedding and the unembedding are trained, for new tokens.
        rslora: scale by alpha / sqrt(rank) instead (arXiv:2312.03732).
        base: what the base is held in: `auto` is train.compute_dtype; `int8` and `int4` (in groups of 32) are QLoRA
            (arXiv:2305.14314), and leave the embedding and the unembedding in train.compute_dtype.
    """

    rank: int = bounded(0, low=0, high=4096)
    alpha: float = bounded(16.0, low=0.0, high=1e6)
    dropout: float = bounded(0.0, low=0.0, high=0.99)
    targets: tuple[str, ...] = bounded(LORA_TARGETS, choices=(*LORA_TARGETS, "embed", "unembed", *_PEFT_TARGETS))
    trained_tokens: tuple[int, ...] = bounded((), low=0)
    rslora: bool = bounded(False)
    base: str = bounded("auto", choices=("auto", "float32", "bfloat16", "int8", "int4"))

    def __post_init__(self) -> None:
        targets = [name for given in self.targets for name in _PEFT_TARGETS.get(given, (given,))]
        object.__setattr__(self, "targets", tuple(targets))
        if len(set(self.trained_tokens)) < len(self.trained_tokens) or len(self.trained_tokens) > _MAX_TRAINED_TOKENS:
            raise ConfigError(f"lora.trained_tokens must be at most {_MAX_TRAINED_TOKENS:,} ids, each of them once")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """Direct preference optimisation (Rafailov et al., arXiv:2305.18290); the reference is the model of init_from.

    Attributes:
        beta: how dearly leaving the reference is paid for.
        loss: `sigmoid`, or `ipo` (Azar et al., arXiv:2310.12036).
        label_smoothing: the part of pairs that are taken to be the wrong way round (conservative DPO); sigmoid only.
    """

    beta: float = bounded(0.1, low=1e-6, high=100.0)
    loss: str = bounded("sigmoid", choices=("sigmoid", "ipo"))
    label_smoothing: float = bounded(0.0, low=0.0, high=0.499999)


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

    data: int = bounded(1, low=-1)
    fsdp: int = bounded(-1, low=-1)
    stage: int = bounded(1, low=-1)
    context: int = bounded(1, low=-1)
    tensor: int = bounded(1, low=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is said, and when. Steps; 0 turns a thing off.

    Attributes:
        every: a line of loss, learning rate, tokens/s and time left.
        eval_every: validation loss.
        eval_batches: of validation, at most.
        sample_every: text sampled from the model as it is. It takes a copy of the weights in train.compute_dtype on
            every device (split by mesh.tensor only); leave it off where that does not fit.
        sample_prompts: what it goes on from, or answers.
        sample_as: whether those are texts to go on from (`text`), or questions of a user (`chat`).
        sample_tokens: how far.
        tensorboard: event files beside metrics.jsonl.
    """

    every: int = bounded(10, low=1)
    eval_every: int = bounded(100, low=0)
    eval_batches: int = bounded(20, low=1)
    sample_every: int = bounded(0, low=0)
    sample_prompts: tuple[str, ...] = bounded(("The",))
    sample_as: str = bounded("text", choices=("text", "chat"))
    sample_tokens: int = bounded(64, low=1)
    tensorboard: bool = bounded(True)


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

    every: int = bounded(500, low=1)
    keep: int = bounded(2, low=1)
    keep_best: int = bounded(0, low=0)
    grace_seconds: float = bounded(8.0, low=0.0, high=86_400.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Several processes. `auto` where the cluster tells jax (TPU pods, Slurm, GKE); else the first process's address.

    Attributes:
        coordinator: empty for one process, `auto`, or HOST:PORT of process 0.
        num_processes: in all; not read under `auto`.
        process_id: of this one; not read under `auto`.
    """

    coordinator: str = bounded("")
    num_processes: int = bounded(1, low=1)
    process_id: int = bounded(0, low=0)
