"""The sections of a run's config: every key with its default, its bounds and its meaning. `run_config` joins them.

The Attributes of each section are the reference of its keys: `run_config.describe` reads them. A section checks the
keys that depend on one another inside it; `run_checks` has the checks between sections.

Floor 0: this module does not import jax.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from typing import Any

from llama_jax.errors import ConfigError, checked_fields, nearest

# Parameter groups: optimizer.rates and the metrics grad_norm/GROUP use these names. The last two are LoRA's matrices.
GROUPS = ("embed", "unembed", "norm", "attention", "ffn", "lora_a", "lora_b")
# The dtypes that each optimizer can keep its moments in.
MOMENTS = {
    "adamw": ("float32", "bfloat16", "int8"),
    "adafactor": ("float32",),
    "lion": ("float32", "bfloat16"),
    "muon": ("float32", "bfloat16"),
}
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
# peft's names of these, and of the other two matrices that LoRA may go on.
_PEFT_TARGETS: dict[str, tuple[str, ...]] = {
    **{f"{name}_proj": (name,) for name in LORA_TARGETS},
    "embed_tokens": ("embed",),
    "lm_head": ("unembed",),
    "all-linear": LORA_TARGETS,
}
_MAX_TRAINED_TOKENS = 1024


def bounded(default: Any, *, low: float | None = None, high: float | None = None, choices: tuple[Any, ...] = ()) -> Any:
    """A field of a section with its bounds. The bounds of a tuple apply to each of its items."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "choices": choices})


@checked_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training and validation data, and how they are cut into batches.

    Attributes:
        train: Training data: files, folders and glob patterns of .txt, .md, .jsonl, .parquet and .json, and datasets of
            the hub as hf://datasets/OWNER/NAME[@REVISION][/PATH]. A .json file is read only if its own name is given,
            not as a part of a folder. `stdlib:train` is the documentation of the installed Python; `stdlib:chat-train`
            is questions and answers made from it.
        weights: Mixture weights, one number above 0 for each item of data.train: the share of all rows that the item
            contributes. Empty takes every row equally often.
        validation: Validation data, in the forms of data.train; empty computes no validation loss. Use
            `stdlib:validation` with `stdlib:train`, and `stdlib:chat-validation` with `stdlib:chat-train`.
        tokenizer: The tokenizer's file, tokenizer.model or tokenizer.json. Empty takes the tokenizer of init_from; a
            run without init_from then trains a tokenizer of model.vocab_size tokens on the training text.
        chat_format: Format of dialogs. `auto` is the chat template of init_from, and Meta's reference format if it has
            none; `llama3` is the reference format; anything else is the file of a Jinja template.
        chat_date: The day that a chat template sees as today (YYYY-MM-DD), so that the same data become the same tokens
            on any day. The default is the one that Llama 3.1's own template has.
        parse_special: Treatment of names of control tokens, such as <|eot_id|>, in texts and completions. `yes` reads
            them as these tokens, for texts that were rendered with a chat template; `no` reads them as plain text;
            `stop` refuses texts that hold one. Messages of dialogs are always plain text.
        loss_on: The tokens of dialogs and completions that the loss counts. `assistant` counts what the assistant says
            (its tool calls and its end-of-turn tokens too) and completions; `all` counts every token and is not
            available for preference pairs. Plain text always counts whole.
        sequence_length: Length of a training row in tokens (T). Longer texts are split; too_long says what happens to
            longer dialogs, completions and pairs (both answers together).
        too_long: The treatment of dialogs, completions and pairs that are longer than a row. `drop` leaves them out;
            `cut` keeps the first sequence_length tokens of dialogs and completions and leaves out pairs; `refuse` ends
            the run at the first of them.
        max_bad: The largest fraction of all documents that may be unusable. Those that are too long do not count.
        batch_size: Rows in one optimizer step (B), over all devices and all accumulated parts.
        shuffle: Draw a new order of the rows in every epoch. False keeps the order that packing made.
        seed: Seed of the row order.
        cache_dir: Folder that keeps tokenized data between runs.
    """

    train: tuple[str, ...] = bounded(())
    weights: tuple[float, ...] = bounded(())
    validation: tuple[str, ...] = bounded(())
    tokenizer: str = bounded("")
    chat_format: str = bounded("auto")
    chat_date: str = bounded("2024-07-26")
    parse_special: str = bounded("stop", choices=("stop", "yes", "no"))
    loss_on: str = bounded("assistant", choices=("assistant", "all"))
    sequence_length: int = bounded(2048, low=2)
    too_long: str = bounded("drop", choices=("drop", "cut", "refuse"))
    max_bad: float = bounded(0.05, low=0.0, high=1.0)
    batch_size: int = bounded(8, low=1)
    shuffle: bool = bounded(True)
    seed: int = bounded(0, low=0, high=2**31 - 1)
    cache_dir: str = bounded("~/.cache/llama_jax/data")

    def __post_init__(self) -> None:
        if self.weights and (len(self.weights) != len(self.train) or min(self.weights) <= 0):
            raise ConfigError(
                f"data.weights={self.weights} must be one number above 0 for each of data.train, which are "
                f"{len(self.train)}; leave it empty to take every row equally often"
            )
        try:
            datetime.date.fromisoformat(self.chat_date)
        except ValueError:
            raise ConfigError(f"data.chat_date={self.chat_date!r} must be a day such as 2024-07-26") from None
        if "://" in self.cache_dir:
            raise ConfigError(
                f"data.cache_dir={self.cache_dir!r} must be a folder: mount the bucket, and name the folder where it "
                "is mounted"
            )


@checked_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule.

    Attributes:
        name: The optimizer: `adamw` (Loshchilov and Hutter, arXiv:1711.05101), `adafactor` (arXiv:1804.04235), `lion`
            (arXiv:2302.06675), or `muon` (Muon for matrices, AdamW for the embedding, the unembedding and norms).
        moments: Dtype of the optimizer's moments: `float32`; `bfloat16`, except with Adafactor; or `int8`, with AdamW
            only (arXiv:2110.02861).
        offload: Keep the moments of the layers' matrices in the host's memory, and copy them to the devices and back
            one layer at a time in each step. It needs name='adamw', and a mesh without stages.
        rates: Learning-rate multipliers of parameter groups, each written GROUP=FACTOR. The groups are embed, unembed,
            norm, attention, ffn, lora_a and lora_b; the factor is from 0 to 10,000. Groups without a multiplier have 1.
        ema_decay: Decay of an exponential moving average of the weights. If it is set, the average is what is
            evaluated, sampled and saved as the model. 0 keeps no average.
        learning_rate: Peak learning rate.
        schedule: Learning rate after the warmup: `cosine` and `linear` fall until the last step, `wsd` is constant and
            falls linearly over the last part of the run (arXiv:2404.06395), `constant` does not fall.
        warmup_steps: Steps of linear warmup from 0 to the peak. At most the steps of the run.
        decay_fraction: Fraction of all steps, at the end, in which `wsd` decays.
        final_fraction: Final learning rate as a fraction of the peak, for `cosine`, `linear` and `wsd`.
        b1: Decay of the first moment; for Muon, its momentum. Adafactor has no first moment.
        b2: Decay of the second moment; for Lion, of its momentum. Adafactor computes its own decay.
        eps: Number added to the root of the second moment.
        weight_decay: Decoupled weight decay. It applies to matrices; the weights of norms have none.
        clip_norm: Largest global norm of the gradient; a larger gradient is scaled down to it. 0 turns clipping off.
    """

    name: str = bounded("adamw", choices=tuple(MOMENTS))
    moments: str = bounded("float32", choices=MOMENTS["adamw"])
    offload: bool = bounded(False)
    rates: tuple[str, ...] = bounded(())
    ema_decay: float = bounded(0.0, low=0.0, high=0.999999)
    learning_rate: float = bounded(3e-4, low=0.0, high=10.0)
    schedule: str = bounded("cosine", choices=("cosine", "linear", "wsd", "constant"))
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
                f"optimizer.moments={self.moments!r} is not available for optimizer.name={self.name!r}: "
                f"set {' or '.join(allowed)}"
            )
        if self.offload and self.name != "adamw":
            raise ConfigError(f"optimizer.offload is not available for optimizer.name={self.name!r}: set it to adamw")

    @property
    def group_rates(self) -> dict[str, float]:
        """The multipliers in `rates` by group; ConfigError for an item that is not GROUP=FACTOR."""
        factors: dict[str, float] = {}
        for item in self.rates:
            group, _, text = item.partition("=")
            group = group.strip()
            try:
                factor = float(text)
            except ValueError:
                factor = math.nan
            if group in factors:
                raise ConfigError(f"optimizer.rates={self.rates} has {group} twice: give each group once")
            if group not in GROUPS or not 0 <= factor <= 1e4:
                digits = re.search(r"[\d.]+", item)
                near = nearest(item, [f"{known}={digits[0] if digits else 1}" for known in GROUPS])
                raise ConfigError(
                    f"optimizer.rates: {item!r} must be GROUP=FACTOR, a factor from 0 to 10000 and a group of "
                    f"{', '.join(GROUPS)}{near}"
                )
            factors[group] = factor
        return factors


@checked_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training step, and how many of them.

    Attributes:
        objective: The loss: `sft` is the cross-entropy of the target tokens, `dpo` is direct preference optimization
            on pairs of answers (see the section dpo).
        steps: Optimizer steps of the whole run; 0 takes train.epochs. Set one of the two.
        epochs: Passes over the training rows, from which the steps are computed; a fraction is allowed, and 0 takes
            train.steps. With data.weights, one pass is as many rows as all items of data.train have together.
        patience: Evaluations in a row without a new lowest validation loss after which the run ends early; 0 never
            ends it early. It needs data.validation and log.eval_every.
        accumulate: Parts that a batch is split into and computed one after the other, which lowers memory. It must
            divide data.batch_size.
        compute_dtype: Dtype of activations and matrix products; master weights are float32. `auto` is bfloat16 on
            devices that multiply it, and float32 on others. CPUs with avx512_bf16 or AMX multiply it; those of several
            processes may differ, and have float32.
        products: Operands of the matrix products of layers in training steps. `compute` is train.compute_dtype. `fp8`
            rounds them to 8 bits with a scale for each (arXiv:2209.05433), for NVIDIA GPUs of compute capability 8.9
            and above, such as H100; it changes the losses. Frozen quantized weights, LoRA's own matrices, the
            unembedding and evaluation are not rounded.
        microbatches: Parts of a batch that follow one another through pipeline stages; 0 makes as many as there are
            stages. More of them leave the stages idle for a smaller part of a step. They must divide data.batch_size /
            train.accumulate. Without stages it has no effect.
        remat: Rematerialization in the backward pass: `none` keeps every activation of a layer, `dots` keeps the
            results of its matrix products and of attention, `attention` keeps the result of attention, `offload` keeps
            it in the host's memory, `full` keeps only the layer's input.
        vocab_chunk: Rows of the vocabulary whose logits exist at one time on a device; 0 computes all at once.
        z_loss: Weight of the squared log-normalizer in the loss (PaLM, arXiv:2204.02311, section 5).
        max_skipped: Consecutive steps with a non-finite loss or gradient after which the run stops. Such a step is
            skipped: it changes no weight.
    """

    objective: str = bounded("sft", choices=("sft", "dpo"))
    steps: int = bounded(1000, low=0)
    epochs: float = bounded(0.0, low=0.0, high=1e6)
    patience: int = bounded(0, low=0)
    accumulate: int = bounded(1, low=1)
    compute_dtype: str = bounded("auto", choices=("auto", "float32", "bfloat16"))
    products: str = bounded("compute", choices=("compute", "fp8"))
    microbatches: int = bounded(0, low=0)
    remat: str = bounded("full", choices=("none", "dots", "attention", "offload", "full"))
    vocab_chunk: int = bounded(8192, low=0)
    z_loss: float = bounded(0.0, low=0.0, high=1.0)
    max_skipped: int = bounded(10, low=1)

    def __post_init__(self) -> None:
        if self.z_loss and self.objective == "dpo":
            raise ConfigError("train.z_loss does not apply to train.objective='dpo': set it to 0")
        if not self.steps and not self.epochs:
            raise ConfigError("train.steps and train.epochs are both 0: set one of them, e.g. train.epochs=3")
        if self.steps and self.epochs:
            raise ConfigError(
                f"train.steps={self.steps} and train.epochs={self.epochs:g} are both set: set train.steps=0 to train "
                "for epochs, or train.epochs=0 to train for steps"
            )

    def steps_for(self, rows: int, batch_size: int, *, step: int = 0, position: int = 0) -> int:
        """The number of optimizer steps of a run. With train.epochs it is rounded up, so that the last batch is full.

        Args:
            rows: number of training rows.
            batch_size: rows in one optimizer step.
            step: steps that are done, perhaps with other batch sizes.
            position: rows that they took.
        """
        return self.steps or max(1, step + math.ceil((self.epochs * rows - position) / batch_size))


@checked_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA (Hu et al., arXiv:2106.09685): two thin matrices are trained for each target, and the base stays frozen.

    Attributes:
        rank: Rank of the update. 0 trains all weights instead.
        alpha: Numerator of the update's scale, which is alpha / rank.
        dropout: Dropout probability of the input of the update's first matrix, in training only.
        targets: Matrices that get an update: those of every layer, `embed` and `unembed`. peft's names mean the same:
            q_proj and the like, embed_tokens, lm_head, and all-linear for the matrices of every layer.
        trained_tokens: Token ids whose rows of the embedding and the unembedding are trained, for new tokens.
        rslora: Scale the update by alpha / sqrt(rank) instead (arXiv:2312.03732).
        base: Dtype of the frozen base. `auto` is train.compute_dtype. `int8` and `int4` quantize its layers in groups
            of 32 (QLoRA, arXiv:2305.14314) and leave the embedding and the unembedding in train.compute_dtype.
        offload: Keep the layers of the frozen base in the host's memory, and copy them to the devices one layer at a
            time, in the forward and in the backward pass. It needs a mesh without stages.
    """

    rank: int = bounded(0, low=0, high=4096)
    alpha: float = bounded(16.0, low=0.0, high=1e6)
    dropout: float = bounded(0.0, low=0.0, high=0.99)
    targets: tuple[str, ...] = bounded(LORA_TARGETS, choices=(*LORA_TARGETS, "embed", "unembed", *_PEFT_TARGETS))
    trained_tokens: tuple[int, ...] = bounded((), low=0)
    rslora: bool = bounded(False)
    base: str = bounded("auto", choices=("auto", "float32", "bfloat16", "int8", "int4"))
    offload: bool = bounded(False)

    def __post_init__(self) -> None:
        targets = [name for given in self.targets for name in _PEFT_TARGETS.get(given, (given,))]
        object.__setattr__(self, "targets", tuple(targets))
        if len(set(self.targets)) < len(self.targets):
            raise ConfigError(f"lora.targets={self.targets} names a matrix twice: name each once")
        if self.rank and not self.targets:
            raise ConfigError(f"lora.targets is empty: name some of {', '.join(LORA_TARGETS)}")
        ids, alike = self.trained_tokens, sorted({"embed", "unembed"}.intersection(self.targets))
        if twice := sorted({token for token in ids if ids.count(token) > 1} if len(set(ids)) < len(ids) else ()):
            raise ConfigError(f"lora.trained_tokens names id {twice[0]} twice: name each id once")
        if len(ids) > _MAX_TRAINED_TOKENS:
            raise ConfigError(
                f"lora.trained_tokens names {len(ids):,} ids, and at most {_MAX_TRAINED_TOKENS:,} are allowed: to "
                "train more, add embed to lora.targets"
            )
        if ids and alike:
            raise ConfigError(
                f"lora.trained_tokens and lora.targets={alike} train the same matrices: leave one of them out"
            )


@checked_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """Direct preference optimization (Rafailov et al., arXiv:2305.18290); its reference is the model of init_from.

    Attributes:
        beta: Strength of the penalty for moving away from the reference.
        loss: The loss of a pair: `sigmoid` (DPO) or `ipo` (Azar et al., arXiv:2310.12036).
        label_smoothing: Assumed fraction of pairs whose answers are in the wrong order (conservative DPO). It applies
            to `sigmoid` only.
    """

    beta: float = bounded(0.1, low=1e-6, high=100.0)
    loss: str = bounded("sigmoid", choices=("sigmoid", "ipo"))
    label_smoothing: float = bounded(0.0, low=0.0, high=0.499999)

    def __post_init__(self) -> None:
        if self.loss == "ipo" and self.label_smoothing:
            raise ConfigError("dpo.label_smoothing does not apply to IPO: set it to 0, or dpo.loss='sigmoid'")


@checked_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The number of devices along each axis of the mesh. One axis may be -1, which takes the devices that are left.

    Attributes:
        data: Copies of the model; each computes its part of the batch.
        fsdp: Shards of weights, gradients and moments; each computes its part of the batch.
        stage: Pipeline stages. It must divide model.num_layers; train.microbatches parts of a batch follow one another
            through them.
        context: Parts of each row along its length (sequence parallelism). It must divide data.sequence_length.
        tensor: Parts of the heads, the feed-forward and the vocabulary. It must divide model.num_heads, model.ffn_dim
            and model.vocab_size, and be a divisor or a multiple of model.num_kv_heads.
    """

    data: int = bounded(1, low=-1)
    fsdp: int = bounded(-1, low=-1)
    stage: int = bounded(1, low=-1)
    context: int = bounded(1, low=-1)
    tensor: int = bounded(1, low=-1)

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        if 0 in sizes.values() or list(sizes.values()).count(-1) > 1:
            shape = ", ".join(f"mesh.{axis}={n}" for axis, n in sizes.items() if n < 1)
            raise ConfigError(f"{shape}: every axis must be at least 1, and one of them may be -1 (what is left)")


@checked_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Logging, evaluation and sampling intervals in steps; 0 turns evaluation or sampling off.

    Attributes:
        every: Steps between printed lines of loss, learning rate, tokens/s and time left. metrics.jsonl has every step.
        eval_every: Steps between evaluations of the validation loss; 0 never evaluates. A new run is also evaluated
            before its first step.
        eval_batches: Largest number of validation batches in one evaluation.
        sample_every: Steps between samples from the model in training; 0 samples never. Sampling takes a copy of the
            weights in train.compute_dtype on every device (split by mesh.tensor only): leave it 0 where that does not
            fit.
        sample_prompts: Prompts of the samples.
        sample_as: Kind of the prompts: `text` continues them, `chat` answers them as questions of a user, greedily.
        sample_tokens: New tokens in each sample, at most.
        to: Trackers that get every metric of metrics.jsonl, the keys of the run and its samples: `tensorboard` writes
            event files to OUTPUT/tensorboard; `wandb` needs the package wandb and reads its own settings, such as
            WANDB_PROJECT and WANDB_MODE. Empty writes metrics.jsonl alone.
        profile: First and last step that the profiler traces, e.g. 10,12; empty traces none. The trace is in
            OUTPUT/profile, for xprof, TensorBoard and Perfetto.
    """

    every: int = bounded(10, low=1)
    eval_every: int = bounded(100, low=0)
    eval_batches: int = bounded(20, low=1)
    sample_every: int = bounded(0, low=0)
    sample_prompts: tuple[str, ...] = bounded(("The",))
    sample_as: str = bounded("text", choices=("text", "chat"))
    sample_tokens: int = bounded(64, low=1)
    to: tuple[str, ...] = bounded(("tensorboard",), choices=("tensorboard", "wandb"))
    profile: tuple[int, ...] = bounded((), low=1)

    def __post_init__(self) -> None:
        if len(set(self.to)) < len(self.to):
            raise ConfigError(f"log.to={self.to} names a tracker twice: name each once")
        if self.profile and (len(self.profile) != 2 or self.profile[0] > self.profile[1]):
            raise ConfigError(
                f"log.profile={self.profile} must be the first and the last step to trace, e.g. log.profile=10,12"
            )
        if self.sample_every and not self.sample_prompts:
            raise ConfigError("log.sample_every needs log.sample_prompts: give at least one, or set log.sample_every=0")


@checked_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints: when they are saved, and how many are kept.

    Attributes:
        every: Steps between checkpoints. The last step is always saved.
        keep: Number of newest checkpoints that are kept.
        keep_best: Number of checkpoints with the lowest validation loss that are kept in addition; 0 keeps none. It
            needs a validation loss at every checkpoint.
        grace_seconds: Seconds that the running step has to end after SIGTERM; after them the process exits without
            saving it. Schedulers often kill after 10.
    """

    every: int = bounded(500, low=1)
    keep: int = bounded(2, low=1)
    keep_best: int = bounded(0, low=0)
    grace_seconds: float = bounded(8.0, low=0.0, high=86_400.0)


@checked_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """The connection of several processes, one on each host.

    Attributes:
        coordinator: Address of process 0 as HOST:PORT. `auto` takes it from the cluster (TPU pods, Slurm, GKE); empty
            runs one process.
        num_processes: Number of processes. Not read with `auto`.
        process_id: Number of this process, from 0. Not read with `auto`.
        download: Who downloads data and models of stores and of the hub: `each` process for itself, for hosts with
            disks of their own; the `first` only, before the others start to read, for caches on a disk that all share;
            or, as `part`, each process reads its part of the weights of init_from in place and keeps them on no disk.
            A run folder in a store is downloaded with `part` too, by each process.
        timeout_seconds: Seconds to wait for the other processes at the start.
    """

    coordinator: str = bounded("")
    num_processes: int = bounded(1, low=1)
    process_id: int = bounded(0, low=0)
    download: str = bounded("each", choices=("each", "first", "part"))
    timeout_seconds: float = bounded(300.0, low=1.0, high=86_400.0)

    def __post_init__(self) -> None:
        if self.coordinator not in ("", "auto"):
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ConfigError(
                    f"distributed.coordinator={self.coordinator!r} must be HOST:PORT of process 0, 'auto', or empty "
                    "for one process"
                )
        if not self.coordinator and self.num_processes > 1:
            raise ConfigError(f"distributed.num_processes={self.num_processes} needs distributed.coordinator=HOST:PORT")
        if self.process_id >= self.num_processes:
            raise ConfigError(
                f"distributed.process_id={self.process_id} must be below num_processes={self.num_processes}"
            )
