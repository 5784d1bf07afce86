"""Error messages: the exception for settings, suggestions of near names, and values shortened to one line.

Floor 0: this module does not import jax.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class")

TRY_AGAIN = 75  # exit status of a process whose command may succeed when it is repeated (EX_TEMPFAIL of sysexits.h)

# Names that other programs have for dtypes.
DTYPE_ALIASES = {
    **dict.fromkeys(("bf16", "torch.bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "f16", "half", "torch.float16"), "float16"),
    **dict.fromkeys(("fp32", "f32", "float", "torch.float32"), "float32"),
}

_LONGEST_NAME, _MOST_NAMES = 100, 1500
_LONGEST_PATH = 300
_REPR = reprlib.Repr()
# Arguments of functions, with the names that they have in transformers, peft, TRL, vLLM and llama.cpp.
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
# What to do instead, by names of arguments that have no equal here.
_SAMPLERS = "sampling is by temperature, top_k, top_p, min_p, typical_p and the penalties"
_LEAVE = "leave it out"
_ANSWERS = {
    **dict.fromkeys(
        ("input_ids", "inputs"), "the first argument is the prompt, a text or token ids, or a list of them"
    ),
    "attention_mask": f"the prompts of a list may have any lengths: {_LEAVE}",
    "pad_token_id": f"nothing is padded with a token: {_LEAVE}",
    "max_length": "write max_new_tokens, which does not count the prompt",
    "do_sample": "temperature=0 is greedy, and a higher temperature samples",
    **dict.fromkeys(("num_beams", "length_penalty", "early_stopping", "no_repeat_ngram_size"), _SAMPLERS),
    **dict.fromkeys(("penalty_alpha", "diversity_penalty", "logits_processor"), _SAMPLERS),
    **dict.fromkeys(("stopping_criteria", "max_time"), "a loop over stream(prompt) can stop at any piece"),
    **dict.fromkeys(
        ("streamer", "stream"), "stream(prompt) and stream_chat(messages) yield the text in pieces as it is generated"
    ),
    "add_special_tokens": "bos=True and eos=True add the tokens at the start and at the end",
    "model_path": "the model is the first argument of llama_jax.load",
    **dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits"),
        "a result has the logprobs of its tokens; top_logprobs=K adds the likeliest K at each position",
    ),
    "use_cache": f"it is always on: {_LEAVE}",
    "generation_config": "give its settings as arguments; the model's own apply by themselves",
    "add_generation_prompt": f"a dialog always ends with the header of the answer: {_LEAVE}",
    **dict.fromkeys(("token", "use_auth_token"), "set the environment variable HF_TOKEN, or run hf auth login"),
    "revision": "write owner/name@REVISION as the model",
    "cache_dir": "the environment variable HF_HOME names the folder of downloads",
    "local_files_only": "set the environment variable HF_HUB_OFFLINE=1",
    "trust_remote_code": f"no code of a model is run: {_LEAVE}",
    "attn_implementation": f"the fastest attention of the device is chosen: {_LEAVE}",
    **dict.fromkeys(("low_cpu_mem_usage", "use_safetensors", "use_mmap", "use_mlock"), f"it is always so: {_LEAVE}"),
    **dict.fromkeys(
        ("n_ctx", "max_model_len", "max_seq_length", "gpu_memory_utilization"),
        f"the KV cache is as long as the prompt and max_new_tokens need: {_LEAVE}",
    ),
    "load_in_8bit": 'write quantize="int8"',
    "load_in_4bit": 'write quantize="int4"',
    **dict.fromkeys(
        ("device", "device_map", "n_gpu_layers"),
        'mesh={"tensor": N} chooses devices, the first one is the default, and JAX_PLATFORMS=cpu chooses the CPU',
    ),
    "tensor_parallel_size": 'write mesh={"tensor": N}',
    "n_threads": "XLA takes all cores; taskset limits them",
    "model": "a model is named in the run (init_from), and is the first argument of load",
    "args": "the first argument is the run, a dict of its keys (docs/reference/config.md)",
    "peft_config": 'write the keys into the run: {"lora": {"rank": 16, "alpha": 32, "targets": ["q_proj"]}}',
    **dict.fromkeys(
        ("tokenizer", "processing_class"), "the tokenizer is that of the run's init_from, or the file data.tokenizer"
    ),
    **dict.fromkeys(
        ("formatting_func", "data_collator"), "give records in one of the forms of docs/reference/records.md"
    ),
}
_BY_ALIAS = {alias: name for name, aliases in _ALIASES.items() for alias in aliases.split()}


class ConfigError(ValueError):
    """A setting that cannot work. The message says what was given, what is allowed and how to fix it."""


def nearest(word: str, known: Sequence[str], *, cutoff: float = 0.5) -> str:
    """A `; did you mean ...?` clause for `word`, or an empty string when no known name is near.

    Names are near when difflib's ratio (from 0 to 1) reaches `cutoff`.

    Names from files may be many and long, and a search among them would take minutes. Names over 100 characters get
    no suggestion, and only the first 1,500 known names are searched.
    """
    if len(str(word)) > _LONGEST_NAME:
        return ""
    candidates = [name for name in known[:_MOST_NAMES] if len(name) <= _LONGEST_NAME]
    matches = difflib.get_close_matches(str(word), candidates, n=1, cutoff=cutoff)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def one_line(message: object) -> str:
    """The message without line breaks and terminal control codes, which names from files may contain.

    An operating system error becomes its file and reason. If the file does not exist, the nearest existing name is
    added.
    """
    if isinstance(message, OSError) and message.filename and message.strerror:
        name = os.fsdecode(message.filename)
        folder, last = os.path.split(name)
        missing = isinstance(message, FileNotFoundError) and os.path.isdir(folder or ".")
        name = name if len(name) <= _LONGEST_PATH else f"{name[:100]}...{name[-100:]}"
        message = f"{name}: {message.strerror}{nearest(last, os.listdir(folder or '.')) if missing else ''}"
    elif isinstance(message, OSError) and message.strerror:
        message = message.strerror
    return "".join(c if c.isprintable() else " " for c in str(message))


def json_fault(error: Exception) -> str:
    """The reason why a text cannot be read or written as JSON."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if "int_max_str_digits" in str(error):
        return "a number in it has thousands of digits"
    return one_line(error)


def unknown_argument(function: str, name: str, known: Sequence[str]) -> TypeError:
    """The error for a keyword argument that does not exist, with what a name of other libraries means here."""
    if name in _ANSWERS:
        return TypeError(f"{function}() has no argument {name!r}: {_ANSWERS[name]}")
    meant = _BY_ALIAS.get(name)
    near = f"; did you mean {meant!r}?" if meant in known else nearest(name, known)
    return TypeError(f"{function}() has no argument {name!r}{near or ';'} allowed: {', '.join(known)}")


def no_attribute(owner: object, name: str, peers: Mapping[str, str]) -> AttributeError:
    """The error for an attribute that does not exist.

    Args:
        owner: The object.
        name: The attribute.
        peers: What to write here, by the names that other libraries have for it.
    """
    known = [other for other in dir(owner) if not other.startswith("_")]
    near = f"; here it is {peers[name]}" if name in peers else nearest(name, known, cutoff=0.7)
    owner_name = owner.__name__ if isinstance(owner, type) else type(owner).__name__
    return AttributeError(f"{owner_name} has no attribute {name!r}{near}")


class Answering(type):
    """A metaclass of public classes: their attributes that do not exist, such as Llama.from_pretrained, are answered by
    `no_attribute` with the names in `_peers`.
    """

    if not TYPE_CHECKING:

        def __getattr__(cls, name: str) -> Any:
            raise no_attribute(cls, name, cls.__dict__.get("_peers", {}))


def checked_keywords(function: Function) -> Function:
    """Decorates a public function: a wrong call raises a TypeError that names its arguments and the nearest known one.

    Keywords that a function takes as **options are left to it.
    """
    signature = inspect.signature(function)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items() if name != "self"}
    known = [name for name, kind in kinds.items() if kind is not inspect.Parameter.VAR_KEYWORD]
    title = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        if len(known) == len(kinds):
            for name in keywords:
                if name not in known:
                    raise unknown_argument(title, name, known)
        try:
            return function(*args, **keywords)
        except TypeError:
            try:
                signature.bind(*args, **keywords)
            except TypeError as error:
                for name in keywords:
                    if name not in known and (name in _ANSWERS or _BY_ALIAS.get(name) in known):
                        raise unknown_argument(title, name, known) from None
                more = ", ..." if len(known) < len(kinds) else ""
                reason = str(error).replace(" keyword-only", "")  # a word of Python 3.12 and later
                raise TypeError(f"{title}(): {reason}; its arguments are {', '.join(known)}{more}") from None
            raise

    return cast(Function, checked)


def checked_fields(cls: type[Class]) -> type[Class]:
    """Decorates a dataclass: a field that does not exist raises a TypeError with the nearest that does."""
    setattr(cls, "__init__", checked_keywords(cls.__init__))  # noqa: B010  (an assignment would not be typed)
    return cls


def brief(value: Any, length: int = 80) -> str:
    """The repr of a value, cut to `length` characters. Long values are never formatted whole."""
    _REPR.maxstring = _REPR.maxother = _REPR.maxlong = length
    try:
        text = _REPR.repr(value)
    except ValueError:  # Python refuses to write a whole number of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= length else text[: length - 3] + "..."
