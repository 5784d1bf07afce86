"""Flags of llama.cpp, vLLM and transformers: their names here, those that change no result, and what to write instead.

A flag that means the same is an alias. A flag that only says how or where a result is computed is ignored with a line
that says why, so that a copied command line runs. Any other flag is refused, because a guess would change the result.
Names are written with underscores; hyphens are the same.
"""

from __future__ import annotations

import dataclasses
import os

from llama_jax import peer_arguments

_SWITCH = ("on", "off", "auto", "true", "false", "yes", "no", "0", "1")


@dataclasses.dataclass(frozen=True)
class Ignored:
    """A flag that changes no result.

    Attributes:
        reason: why it does nothing here.
        takes_value: True if the flag needs a value. The others are switches, and may have a value such as on or False.
        chooses_cpu: True if the value 0 chooses the CPU.
    """

    reason: str
    takes_value: bool = False
    chooses_cpu: bool = False

    def takes(self, word: str) -> bool:
        """True if the next argument is this flag's value."""
        return self.takes_value or word.lower() in _SWITCH

    def refusal(self, value: str) -> str:
        """The answer to a value that cannot be ignored, or an empty text."""
        if self.chooses_cpu and value.strip() == "0" and os.environ.get("JAX_PLATFORMS") != "cpu":
            return "set the environment variable JAX_PLATFORMS=cpu to run on the CPU"
        return ""


def _ignored(reason: str, *, switch: str = "", one: str = "", chooses_cpu: bool = False) -> dict[str, Ignored]:
    """The ignored flags of one reason, switches and flags with one value."""
    return dict.fromkeys(switch.split(), Ignored(reason)) | dict.fromkeys(
        one.split(), Ignored(reason, takes_value=True, chooses_cpu=chooses_cpu)
    )


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
        f"all layers run on the accelerator if there is one; {peer_arguments.CPU}",
        switch="-nkvo --no_kv_offload -kvo --kv_offload --no_op_offload",
        one="-ngl --gpu_layers --n_gpu_layers",
        chooses_cpu=True,
    )
    | _ignored("the KV cache is as long as it must be", switch="--swa_full", one="--gpu_memory_utilization")
    | _ignored("a Llama has no experts", switch="-cmoe --cpu_moe", one="-ncmoe --n_cpu_moe")
    | _ignored(
        peer_arguments.CORES,
        one="-t --threads -tb --threads_batch --numa --prio --poll -C --cpu_mask --cpu_range",
    )
    | _ignored(
        "weights are read into memory, and never mapped from the file",
        switch="--mlock --no_mmap --mmap --low_cpu_mem_usage",
    )
    | _ignored(peer_arguments.ATTENTION, switch="-fa --flash_attn", one="--attn_implementation")
    | _ignored("prompts are read in chunks of sizes that are compiled", one="-b -ub --ubatch_size")
    | _ignored(peer_arguments.NO_CODE, switch="--trust_remote_code")
    | _ignored("nothing is computed before the first prompt", switch="--warmup --no_warmup --enforce_eager")
)
# Names of the tokens that a model reads at once, which a measurement takes as the length of its windows.
CONTEXT = ("-c", "--ctx_size", "--n_ctx", "--max_seq_len", "--max_seq_length", "--max_model_len")
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
    "--hf_token": peer_arguments.TOKEN,
    "--offline": peer_arguments.OFFLINE,
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
    "-l": "--logit_bias",
    "-v": "--verbose",
}
INFER_IGNORED = (
    _ignored("--prompt continues a text without a dialog", switch="-no-cnv --no_conversation")
    | _ignored("the KV cache is as long as the prompt and --max_new_tokens need", one=" ".join(CONTEXT))
    | _ignored("output is plain text without colors", switch="--color --simple_io -co")
    | _ignored("times are printed with --verbose only", switch="--no_perf")
    | _ignored("one answer is printed without its prompt", switch="--no_display_prompt")
    | _ignored("--ask and --chat use the chat template", switch="--jinja")
    | _ignored("pasted text may have several lines, and Alt-Enter starts one", switch="-mli --multiline_input")
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
    **dict.fromkeys(
        (
            "--top_nsigma",
            "--top_n_sigma",
            "--no_repeat_ngram_size",
            "--dynatemp_range",
            "--dynatemp_exp",
            "--num_beams",
        ),
        _SAMPLERS,
    ),
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
    "--max_length": "write --max_new_tokens, which does not count the prompt",
    "--log_disable": "write --quiet",
    "--verbose_prompt": "--json has the ids of the prompt as prompt_tokens",
    "--repeat_last_n": "--repetition_penalty counts the whole prompt and text; leave it out",
    "--do_sample": "--temperature 0 is greedy, and a higher one samples; leave it out",
}
