"""Flags of llama.cpp, vLLM and transformers: their names here, those that change no result, and what to write instead.

A flag that means the same is an alias. A flag that only says how or where a result is computed is ignored with a line
that says why, so that a copied command line runs. Any other flag is refused, because a guess would change the result.
Names are written with underscores; hyphens are the same.
"""

from __future__ import annotations

import dataclasses

_SWITCH = ("on", "off", "auto", "true", "false", "0", "1")


@dataclasses.dataclass(frozen=True)
class Ignored:
    """A flag that changes no result.

    Attributes:
        reason: why it does nothing here.
        values: "none" for a switch, "one" for a flag with a value, "switch" for a value of on, off or auto that may be
            left out.
    """

    reason: str
    values: str = "none"

    def takes(self, word: str) -> bool:
        """True if the next argument is this flag's value."""
        return self.values == "one" or (self.values == "switch" and word in _SWITCH)


def _ignored(reason: str, *, none: str = "", one: str = "", switch: str = "") -> dict[str, Ignored]:
    """The ignored flags of one reason, by the values that they take."""
    kinds = {"none": none, "one": one, "switch": switch}
    return {flag: Ignored(reason, values) for values, flags in kinds.items() for flag in flags.split()}


MODEL_ALIASES = {
    "-m": "--model",
    "-hf": "--model",
    "-hfr": "--model",
    "--hf_repo": "--model",
    "--lora": "--adapter",
    "--chat_template": "--chat_format",
    "--chat_template_file": "--chat_format",
}
MODEL_IGNORED = (
    _ignored(
        "all layers run on the accelerator if there is one; JAX_PLATFORMS=cpu chooses the CPU",
        none="-nkvo --no_kv_offload -kvo --kv_offload --no_op_offload",
        one="-ngl --gpu_layers --n_gpu_layers",
    )
    | _ignored(
        "the KV cache is as long as the prompt and --max_new_tokens need",
        none="--swa_full",
        one="-c --ctx_size --max_model_len --max_seq_len --gpu_memory_utilization",
    )
    | _ignored(
        "XLA takes all cores; taskset limits them",
        one="-t --threads -tb --threads_batch --numa --prio --poll -C --cpu_mask --cpu_range",
    )
    | _ignored(
        "weights are read into memory, and never mapped from the file",
        none="--mlock --no_mmap --mmap --low_cpu_mem_usage",
    )
    | _ignored("the fastest attention of the device is chosen", one="--attn_implementation", switch="-fa --flash_attn")
    | _ignored("prompts are read in chunks of sizes that are compiled", one="-b -ub --ubatch_size")
    | _ignored("no code of a model is run", switch="--trust_remote_code")
    | _ignored("nothing is computed before the first prompt", none="--warmup --no_warmup --enforce_eager")
)
_KV = "write --kv int8, or leave it out"
_SPLIT = "write --mesh tensor=N"
_CONFIG = "the model's own config says it; leave it out"
_DEVICE = "--mesh chooses devices, JAX_PLATFORMS=cpu the CPU"
_HUB = "name a file that was downloaded, or a hub id (owner/name)"
MODEL_REFUSED = {
    **dict.fromkeys(("--device", "-dev", "--device_map", "-ot", "--override_tensor", "--list_devices"), _DEVICE),
    **dict.fromkeys(("--tensor_parallel_size", "-tp", "-sm", "--split_mode", "-ts", "--tensor_split"), _SPLIT),
    **dict.fromkeys(("--main_gpu", "-mg"), _SPLIT),
    **dict.fromkeys(("-ctk", "-ctv", "--cache_type_k", "--cache_type_v", "--kv_cache_dtype"), _KV),
    **dict.fromkeys(("--rope_scaling", "--rope_freq_base", "--rope_freq_scale", "--rope_theta"), _CONFIG),
    **dict.fromkeys(("-mu", "--model_url", "-hff", "--hf_file"), _HUB),
    "--load_in_8bit": "write --quantize int8",
    "--load_in_4bit": "write --quantize int4",
    "--torch_dtype": "write --dtype float32 or --dtype bfloat16",
    "--lora_scaled": "--adapter applies an adapter at the scale that it was trained with",
    "--hf_token": "set the environment variable HF_TOKEN, or run hf auth login",
    "--offline": "set the environment variable HF_HUB_OFFLINE=1",
    "--revision": "write --model owner/name@REVISION",
}

INFER_ALIASES = {
    "-p": "--prompt",
    "-f": "--file",
    "-sys": "--system",
    "--system_prompt": "--system",
    "-cnv": "--chat",
    "--conversation": "--chat",
    "--interactive": "--chat",
    "-i": "--chat",
    "-v": "--verbose",
}
INFER_IGNORED = (
    _ignored("--prompt continues a text without a dialog", none="-no-cnv --no_conversation")
    | _ignored("output is plain text without colors", none="--color --simple_io -co --no_perf --no_display_prompt")
    | _ignored("the chat template is always used", none="--jinja")
    | _ignored("pasted text may have several lines, and Alt-Enter starts one", none="-mli --multiline_input")
)
_SERVER = "there is no server; --chat is a dialog at a terminal, and --prompt_file with --json answers many prompts"
_SAMPLERS = "sampling is by --temperature, --top_k, --top_p, --min_p, --typical_p and the penalties"
_TEMPLATE = "dialogs are written by the model's chat template, or by that of --chat_format FILE"
_CACHE = "prompts of one call, and turns of one chat, that begin alike are read once; nothing is kept on disk"
_LOOKUP = "write --speculate lookup, or --draft MODEL; the number of guesses is chosen"
_HIDDEN = "llama_jax.load(MODEL).hidden(texts) gives them in Python"
_SYSTEM_FILE = 'write --system "$(cat FILE)"'
_SPECIAL = "control tokens are not printed; --json has the ids of all tokens"
_SPEED = "--verbose prints the time of an answer, and /speed in --chat its tokens/s"
INFER_REFUSED = {
    **dict.fromkeys(("--host", "--port", "--server", "--api_key"), _SERVER),
    **dict.fromkeys(("--mirostat", "--mirostat_lr", "--mirostat_ent", "--samplers", "--sampler_seq"), _SAMPLERS),
    **dict.fromkeys(("--xtc_probability", "--xtc_threshold", "--dry_multiplier", "--dry_base", "--tfs"), _SAMPLERS),
    **dict.fromkeys(("--top_nsigma", "--dynatemp_range", "--dynatemp_exp", "--num_beams"), _SAMPLERS),
    **dict.fromkeys(("--in_prefix", "--in_suffix", "--in_prefix_bos"), _TEMPLATE),
    **dict.fromkeys(("--prompt_cache", "--prompt_cache_all", "--prompt_cache_ro", "--keep"), _CACHE),
    **dict.fromkeys(("--draft_max", "--draft_min", "--draft_n", "--draft_p_min"), _LOOKUP),
    **dict.fromkeys(("--embedding", "--embeddings", "--pooling"), _HIDDEN),
    **dict.fromkeys(("-sysf", "--system_prompt_file"), _SYSTEM_FILE),
    **dict.fromkeys(("--special", "-sp"), _SPECIAL),
    **dict.fromkeys(("--perf", "--timings", "--show_timings"), _SPEED),
    **dict.fromkeys(("-st", "--single_turn"), "write --ask"),
    **dict.fromkeys(("-np", "--parallel"), "write --batch_size N, the prompts that run together"),
    **dict.fromkeys(("-e", "--escape"), "the shell writes line breaks: --prompt $'a\\nb'"),
    "--log_disable": "write --quiet",
    "--verbose_prompt": "--json has the ids of the prompt as prompt_tokens",
    "--repeat_last_n": "--repetition_penalty counts the whole prompt and text; leave it out",
    "--do_sample": "--temperature 0 is greedy, and a higher one samples; leave it out",
}
