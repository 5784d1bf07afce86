"""Arguments of functions in other libraries (transformers, peft, TRL, vLLM, llama-cpp-python), and what to write here.

Floor 0: this module does not import jax.
"""

from __future__ import annotations

from llama_jax import peer_keys

# Arguments that mean the same, by the names here.
_ALIASES = {
    "source": "pretrained_model_name_or_path model_id model_name",
    "prompts": "prompt text",
    "messages": "conversation dialog",
    "max_new_tokens": "max_tokens n_predict",
    "temperature": "temp",
    "n": "num_return_sequences num_samples",
    "stop": "stop_strings stop_sequences",
    "stop_tokens": "eos_token_id stop_token_ids",
    "min_tokens": "min_new_tokens",
    "repetition_penalty": "repeat_penalty",
    "banned_tokens": "bad_words_ids suppress_tokens",
    "dtype": "torch_dtype",
    "quantize": "quantization quantization_config",
    "adapters": "adapter lora lora_path",
    "records": "train_dataset dataset",
    "validation_records": "eval_dataset",
    "on_metrics": "callbacks callback",
    "resume": "resume_from_checkpoint",
    "loss": "compute_loss_func loss_fn",
    "skip_special": "skip_special_tokens",
}
BY_ALIAS = {alias: name for name, aliases in _ALIASES.items() for alias in aliases.split()}

# Sentences that answer flags and attributes too.
TOKEN = "set the environment variable HF_TOKEN, or run hf auth login"
OFFLINE = "set the environment variable HF_HUB_OFFLINE=1"
CORES = "XLA takes all cores; taskset limits them"
ATTENTION = "the fastest attention of the device is chosen"
NO_CODE = "no code of a model is run"
CPU = "JAX_PLATFORMS=cpu chooses the CPU"
LEAVE = "leave it out"

_SAMPLERS = "sampling is by temperature, top_k, top_p, min_p, typical_p and the penalties"
# Answers for functions of any kind, by arguments that have no equal here.
_OF_ANY = {
    "use_cache": f"it is always on: {LEAVE}",
    **dict.fromkeys(("token", "use_auth_token"), TOKEN),
    "revision": "write owner/name@REVISION as the model",
    "cache_dir": "the environment variable HF_HOME names the folder of downloads",
    "local_files_only": OFFLINE,
    "trust_remote_code": f"{NO_CODE}: {LEAVE}",
    "attn_implementation": f"{ATTENTION}: {LEAVE}",
    **dict.fromkeys(("low_cpu_mem_usage", "use_safetensors", "use_mmap", "use_mlock"), f"it is always so: {LEAVE}"),
    **dict.fromkeys(("device", "device_map", "n_gpu_layers"), f"a mesh chooses devices, and {CPU}"),
    "n_threads": CORES,
    **dict.fromkeys(
        ("n_ctx", "max_model_len", "max_seq_length", "gpu_memory_utilization"),
        f"the KV cache is as long as the prompt and max_new_tokens need: {LEAVE}",
    ),
    "tokenizer": f"the tokenizer is that of the model: {LEAVE}",
}
_OF_GENERATION = {
    **dict.fromkeys(
        ("input_ids", "inputs"), "the first argument is the prompt, a text or token ids, or a list of them"
    ),
    "attention_mask": f"the prompts of a list may have any lengths: {LEAVE}",
    "pad_token_id": f"nothing is padded with a token: {LEAVE}",
    "max_length": "write max_new_tokens, which does not count the prompt",
    "do_sample": "temperature=0 is greedy, and a higher temperature samples",
    **dict.fromkeys(("num_beams", "length_penalty", "early_stopping", "no_repeat_ngram_size"), _SAMPLERS),
    **dict.fromkeys(("penalty_alpha", "diversity_penalty", "logits_processor"), _SAMPLERS),
    **dict.fromkeys(("stopping_criteria", "max_time"), "a loop over stream(prompt) can stop at any piece"),
    **dict.fromkeys(
        ("streamer", "stream"), "stream(prompt) and stream_chat(messages) yield the text in pieces as it is generated"
    ),
    **dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits"),
        "a result has the logprobs of its tokens; top_logprobs=K adds the likeliest K at each position",
    ),
    "generation_config": "give its settings as arguments; the model's own apply by themselves",
    "add_generation_prompt": f"a dialog always ends with the header of the answer: {LEAVE}",
    "model": f"the model is the object whose method this is: {LEAVE}",
}
_OF_LOADING = {
    **dict.fromkeys(("model", "model_path"), "the model is the first argument of llama_jax.load"),
    "load_in_8bit": 'write quantize="int8"',
    "load_in_4bit": 'write quantize="int4"',
    **dict.fromkeys(
        ("device", "device_map", "n_gpu_layers"),
        f'mesh={{"tensor": N}} chooses devices, the first one is the default, and {CPU}',
    ),
    "tensor_parallel_size": 'write mesh={"tensor": N}',
}
_OF_TRAINING = {
    **{name: f"write the key {key} into the run" for name, key in peer_keys.SAME.items()},
    **{name: f"did you mean the run's key {key!r}?" for name, key in peer_keys.SIMILAR.items()},
    **peer_keys.NOTES,
    "model": "the run names the model (init_from)",
    "args": "the first argument is the run, a dict of its keys (docs/reference/config.md)",
    "peft_config": 'write the keys into the run: {"lora": {"rank": 16, "alpha": 32, "targets": ["q_proj"]}}',
    **dict.fromkeys(
        ("tokenizer", "processing_class"), "the tokenizer is that of the run's init_from, or the file data.tokenizer"
    ),
    **dict.fromkeys(
        ("formatting_func", "data_collator"), "give records in one of the forms of docs/reference/records.md"
    ),
    **dict.fromkeys(("device", "device_map"), f"the run's keys of mesh choose devices, and {CPU}"),
}
_OF_TOKENIZER = {
    "add_special_tokens": "bos=True and eos=True add the tokens at the start and at the end",
    **dict.fromkeys(("padding", "truncation", "max_length", "return_tensors"), "encode gives all ids of a text"),
}
# Answers by function. A name that ends with a point stands for all methods of a class.
_OWN = {
    **dict.fromkeys(("load", "Llama"), _OF_LOADING),
    **dict.fromkeys(("Llama.", "generate", "stream", "SamplingParams"), _OF_GENERATION),
    "Tokenizer.": _OF_TOKENIZER,
    "train": _OF_TRAINING,
}


def answer(function: str, name: str) -> str | None:
    """The answer to an argument that a function does not have; None if this module has none.

    Args:
        function: The function by its qualified name, such as "load" or "Llama.generate".
        name: The argument.
    """
    own = _OWN.get(function) or _OWN.get(function.partition(".")[0] + ".") or {}
    return own.get(name, _OF_ANY.get(name))
