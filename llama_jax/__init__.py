"""Llama 3.1 in JAX and Flax: one decoder for sharded fine-tuning and compiled sampling.

import llama_jax

llama = llama_jax.load("runs/quickstart")
print(llama.generate("Once upon a time").text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers and editors read these; at run time __getattr__ imports each name on first use
    from llama_jax.config import ModelConfig as ModelConfig
    from llama_jax.config import RopeScaling as RopeScaling
    from llama_jax.errors import ConfigError as ConfigError
    from llama_jax.infer.llama import Llama as Llama
    from llama_jax.infer.load import load as load
    from llama_jax.infer.result import Result as Result
    from llama_jax.run_config import RunConfig as RunConfig
    from llama_jax.sampling_params import SamplingParams as SamplingParams
    from llama_jax.text.tokenizer import Tokenizer as Tokenizer

__version__ = "0.1.0"

# `import llama_jax` imports no jax, and a tokenizer needs none.
_MODULES = {
    "load": "llama_jax.infer.load",
    "Llama": "llama_jax.infer.llama",
    "Result": "llama_jax.infer.result",
    "SamplingParams": "llama_jax.sampling_params",
    "Tokenizer": "llama_jax.text.tokenizer",
    "ModelConfig": "llama_jax.config",
    "RopeScaling": "llama_jax.config",
    "RunConfig": "llama_jax.run_config",
    "ConfigError": "llama_jax.errors",
}
__all__ = list(_MODULES)
# Names of transformers, peft, TRL and vLLM, and what to write here.
_LOAD, _TRAIN = "llama_jax.load(model)", "from llama_jax.train.run import train"
_PEERS = {
    **dict.fromkeys(("from_pretrained", "AutoModelForCausalLM", "LlamaForCausalLM", "AutoModel", "LLM"), _LOAD),
    **dict.fromkeys(("pipeline", "PeftModel", "AutoPeftModelForCausalLM"), f"{_LOAD}, with adapters=... for LoRA"),
    **dict.fromkeys(("AutoTokenizer", "PreTrainedTokenizerFast"), f"Tokenizer(path), or {_LOAD}.tokenizer"),
    **dict.fromkeys(("Trainer", "SFTTrainer", "DPOTrainer", "TrainingArguments", "train", "LoraConfig"), _TRAIN),
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    near = f"; instead, use {_PEERS[name]}" if name in _PEERS else f"; it has {', '.join(_MODULES)}"
    raise AttributeError(f"module 'llama_jax' has no attribute {name!r}{near}")


def __dir__() -> list[str]:
    return sorted([*(name for name in globals() if name.startswith("__")), *__all__])
