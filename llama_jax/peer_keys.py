"""Names of keys in other trainers (transformers, TRL, peft, torchtitan), and short forms.

Floor 0: this module imports nothing.
"""

# Names whose values mean the same, by the key here. A name with a section means the key only there.
_SAME = {
    "seed": "training.seed debug.seed",
    "init_from": "model_name_or_path base_model initial_load_path",
    "output": "output_dir dump_folder",
    "data.train": "train_file",
    "data.validation": "validation_file",
    "data.tokenizer": "tokenizer_name tokenizer_path",
    "data.sequence_length": "seq_len seq_length max_length max_seq_length sequence_len block_size",
    "data.batch_size": "global_batch_size",
    "optimizer.learning_rate": "lr",
    "optimizer.weight_decay": "wd",
    "optimizer.clip_norm": "max_grad_norm max_norm grad_clip gradient_clipping",
    "optimizer.b1": "beta1 adam_beta1",
    "optimizer.b2": "beta2 adam_beta2",
    "optimizer.eps": "adam_epsilon",
    "optimizer.final_fraction": "lr_scheduler.min_lr_factor",
    "train.epochs": "num_train_epochs num_epochs",
    "train.steps": "num_steps max_steps",
    "train.patience": "early_stopping_patience",
    "lora.rank": "r lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.targets": "target_modules lora_target_modules lora_target",
    "lora.rslora": "use_rslora",
    "dpo.beta": "pref_beta",
    "mesh.tensor": "tensor_parallel_degree tensor_parallel_size tp",
    "mesh.fsdp": "data_parallel_shard_degree dp_shard",
    "mesh.data": "data_parallel_replicate_degree dp_replicate",
    "mesh.context": "context_parallel_degree cp",
    "mesh.stage": "pipeline_parallel_degree pp",
    "log.every": "logging_steps log_freq",
    "log.eval_every": "eval_steps eval_interval validation.freq",
    "log.to": "report_to",
    "checkpoint.every": "save_steps interval",
    "checkpoint.keep": "save_total_limit keep_latest_k",
}
# Names whose values do not mean the same: they are suggested only.
_SIMILAR = {
    "model.name": "flavor",
    "data.train": "dataset dataset_name dataset_path train_dataset",
    "data.validation": "eval_dataset",
    "data.loss_on": "assistant_only_loss completion_only_loss train_on_inputs",
    "data.batch_size": "bs train_batch_size",
    "optimizer.name": "optim",
    "optimizer.schedule": "lr_scheduler lr_scheduler_type decay_type",
    "optimizer.decay_fraction": "decay_ratio",
    "train.compute_dtype": "dtype torch_dtype mixed_precision_param",
    "train.products": "fp8 float8 enable_fp8 converters",
    "lora.rank": "use_peft",
    "lora.base": "load_in_4bit load_in_8bit quantization_config",
    "mesh.fsdp": "deepspeed fsdp_config",
    "log.to": "tensorboard wandb",
    "log.eval_batches": "validation.steps",
    "checkpoint.keep_best": "load_best_model_at_end",
}
# The sections of torchtitan, whose names are in _SAME or end as a key here.
TORCHTITAN = {
    "training": "seq_len global_batch_size max_norm steps",
    "optimizer": "lr beta1 beta2",
    "lr_scheduler": "warmup_steps",
    "parallelism": "data_parallel_shard_degree data_parallel_replicate_degree tensor_parallel_degree "
    "context_parallel_degree pipeline_parallel_degree",
    "checkpoint": "interval keep_latest_k initial_load_path",
    "metrics": "log_freq",
    "job": "dump_folder",
}
SAME, SIMILAR = (
    {alias: key for key, aliases in table.items() for alias in aliases.split()} for table in (_SAME, _SIMILAR)
)
_ROWS = "did you mean 'data.batch_size'? It counts the rows of a step on all devices and in all accumulated parts"
_PARTS = "did you mean 'train.accumulate'? It splits data.batch_size into so many parts, and does not multiply it"
_DTYPE = "did you mean 'train.compute_dtype'? Write train.compute_dtype=bfloat16, its default where devices have it"
_REMAT = "did you mean 'train.remat'? It is none, dots, attention, offload or full (the default)"
_COMPILED = "every step is compiled: leave it out"
_TRACKERS = "did you mean 'log.to'? It lists the trackers: log.to=tensorboard,wandb"
_TRACE = "did you mean 'log.profile'? It names the steps to trace: log.profile=10,12"
_SAVED = (
    "checkpoints are always written, to OUTPUT/checkpoints and in the background; checkpoint.every is their interval"
)
_ANY_FORMAT = "init_from reads every format, and an adapter or a run besides: leave it out"
_CONVERT = "after the run, `llama-jax convert OUTPUT FOLDER --to hf --dtype bfloat16` writes the files"
_INTERVAL = "set the interval itself, log.eval_every or checkpoint.every; 0 evaluates never"
_SCHEDULED = "XLA schedules collectives and products: leave it out"
# Notes on keys that have no equal here, by the name of a key with or without its section.
NOTES = {
    **dict.fromkeys(("per_device_train_batch_size", "local_batch_size", "micro_batch_size"), _ROWS),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum"), _PARTS),
    **dict.fromkeys(("bf16", "fp16"), _DTYPE),
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpoint", "activation_checkpoint.mode"), _REMAT),
    **dict.fromkeys(("compile", "compile.enable", "training.compile", "torch_compile"), _COMPILED),
    **dict.fromkeys(("enable_tensorboard", "enable_wandb"), _TRACKERS),
    **dict.fromkeys(("enable_profiling", "profile_freq", "enable_memory_snapshot"), _TRACE),
    **dict.fromkeys(("checkpoint.enable", "enable_checkpoint", "checkpoint.folder", "async_mode"), _SAVED),
    **dict.fromkeys(("initial_load_in_hf", "initial_load_model_only"), _ANY_FORMAT),
    **dict.fromkeys(("last_save_in_hf", "last_save_model_only", "export_dtype"), _CONVERT),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy", "save_strategy", "logging_strategy"), _INTERVAL),
    **dict.fromkeys(("fsdp_reshard_after_forward", "enable_async_tensor_parallel"), _SCHEDULED),
    "hf_assets_path": "the tokenizer is that of init_from, or of the file data.tokenizer, and the shape that of "
    "init_from or of model=SIZE",
    "load_step": "a run resumes from its newest checkpoint; init_from=RUN/checkpoints/STEP starts from another one",
    "create_seed_checkpoint": "the first weights are a function of seed, the same on every mesh: leave it out",
    "enable_cpu_offload": "did you mean 'optimizer.offload'? It keeps the moments in the host's memory; lora.offload "
    "keeps a frozen base there",
    "warmup_ratio": "did you mean 'optimizer.warmup_steps'? It counts steps",
    "print_config": "--keys prints every key with its value",
    "module": "--config names a recipe or a file, and --config.model=llama3.1-8b a shape",
    "memory_estimation.enabled": "--plan DEVICE prints the memory that a run needs, and does not train",
    "push_to_hub": f"{_CONVERT}, and `hf upload` sends them",
}
