"""Regenerate peft/ and peft.npz: adapters that peft wrote, its logits with them, and the weights it merges them into.

    pip install torch transformers peft numpy ml_dtypes     # the reference environment; jax is not needed
    PYTHONPATH=.:tests python tests/golden/make_peft.py

The base has the weights of make_model.py, drawn by name. What an adapter trains is drawn likewise, both matrices of
each pair, so that none of them is zero as a new one's are. CASES are adapters of CONFIG; MORE are adapters of SMALL,
whose whole matrices take little room. Each is opened by peft again, and must give the same logits there.
"""

from __future__ import annotations

import dataclasses
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from golden.make_model import VOCAB_STRIDE, _transformers_config, random_tokens, random_weights
from llama_jax.config import SIZES, ModelConfig

HERE = Path(__file__).parent
# Heads that fill the width, which is a multiple of 32, so that Meta's files and quantized ones hold it too.
CONFIG = dataclasses.replace(SIZES["tiny"], num_layers=2, embed_dim=64, head_dim=8)
TOKENS = random_tokens(CONFIG, rows=2, length=12)
MERGED = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight")
ROWS = 24  # of merged weights, one of so many is kept
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES: dict[str, dict[str, Any]] = {
    "all_linear": {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"},
    "rslora": {"r": 3, "lora_alpha": 4, "target_modules": LINEAR, "use_rslora": True, "lora_dropout": 0.1},
    "patterns": {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": r".*\.(q_proj|k_proj|down_proj)",
        "rank_pattern": {"q_proj": 3, r"model\.layers\.1\.mlp\.down_proj": 1},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5, "q_proj": 1, "down_proj": 2.5},
    },
    "some": {
        "r": 1,
        "lora_alpha": 2,
        "target_modules": ["o_proj", "down_proj", "up_proj"],
        "exclude_modules": ["up_proj"],
        "layers_to_transform": [1],
    },
    "lm_head": {"r": 1, "lora_alpha": 2, "target_modules": ["lm_head", "v_proj"]},
}

SMALL = dataclasses.replace(CONFIG, vocab_size=64, embed_dim=32, num_heads=4, num_kv_heads=2, ffn_dim=48)
SMALL_STRIDE = 3  # of logits, one of so many is kept
SMALL_TOKENS = random_tokens(SMALL, rows=2, length=12)
Q, NEW = ["q_proj"], list(range(64, 70))
SAVED, TIED, RESIZED = {"save_embedding_layers": True}, {"tied": True}, {"rows": 70}
_EXPRESSIONS = {
    "r": 2,
    "lora_alpha": 6,
    "target_modules": r"^model\.layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.(up|down)_proj)$",
    # peft sorts the keys when it saves, and the first that matches counts.
    "rank_pattern": {"(k|o)_proj": 4, r"layers\.[1-9]\.mlp\..*": 3, "self.attn.q_proj": 1},
    "alpha_pattern": {
        r".*\.1\.self.*": 3,
        r"[kv]_proj$": 5.5,
        "^layers.*": 50,
        "q_proj": 9,
        r"u\w{1,2}_proj|lm_head": 2,
    },
}
# LoraConfig's settings, and how the adapter is made: a tied base, rows of its vocabulary, flags of save_pretrained.
MORE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lm_head_base": ({"target_modules": ["lm_head", "v_proj"]}, {}),
    "embed": ({"target_modules": ["embed_tokens", "q_proj"], "fan_in_fan_out": True}, {}),
    "vocabulary": ({"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True, "lora_alpha": 3}, {}),
    "embeddings_saved": ({"target_modules": Q, "bias": "all"}, SAVED),
    "modules": ({"target_modules": Q, "modules_to_save": ["lm_head", "embed_tokens", "norm"]}, {}),
    "modules_twice": ({"target_modules": Q, "modules_to_save": ["lm_head", "input_layernorm"]}, SAVED),
    "resized": ({"target_modules": Q}, SAVED | RESIZED),
    "resized_modules": ({"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, RESIZED),
    "tokens": ({"target_modules": Q, "trainable_token_indices": [1, 5]}, {}),
    "tokens_both": ({"target_modules": Q, "trainable_token_indices": {"embed_tokens": [9, 5], "lm_head": [7]}}, {}),
    "tokens_alike": (
        {"target_modules": ["o_proj"], "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1, 5]}},
        {},
    ),
    "tokens_saved": ({"target_modules": Q, "trainable_token_indices": {"lm_head": [7, 2]}}, SAVED),
    "tokens_new": ({"target_modules": Q, "trainable_token_indices": {"embed_tokens": NEW, "lm_head": NEW}}, RESIZED),
    "dora": ({"target_modules": "all-linear", "use_dora": True}, {}),
    "dora_vocabulary": ({"target_modules": ["embed_tokens", "lm_head", "o_proj"], "use_dora": True}, {}),
    "dora_rslora": ({"target_modules": Q, "use_dora": True, "use_rslora": True, "alpha_pattern": {"q_proj": 3}}, {}),
    "expressions": (_EXPRESSIONS, {}),
    "layers": ({"target_modules": LINEAR, "layers_to_transform": 1, "layers_pattern": "l[a-z]+"}, {}),
    "excluded": ({"target_modules": "all-linear", "exclude_modules": r".*\.(0|mlp)\..*"}, {}),
    "bin": ({"target_modules": ["gate_proj"]}, {"bin": True}),
    "tied_lm_head": ({"target_modules": ["lm_head", "q_proj"]}, TIED),
    "tied_embed": ({"target_modules": ["embed_tokens", "q_proj"]}, TIED),
    "tied_ensured": ({"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, TIED),
    "tied_module": ({"target_modules": Q, "modules_to_save": ["embed_tokens"]}, TIED),
    "tied_modules": ({"target_modules": Q, "modules_to_save": ["embed_tokens", "lm_head"]}, TIED),
    "tied_module_ensured": (
        {"target_modules": Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        TIED,
    ),
    "tied_tokens": ({"target_modules": Q, "trainable_token_indices": [1, 5]}, TIED),
    "tied_tokens_head": ({"target_modules": Q, "trainable_token_indices": {"lm_head": [1, 5]}}, TIED),
    "tied_tokens_new": ({"target_modules": Q, "trainable_token_indices": NEW}, TIED | RESIZED),
    "tied_tokens_saved": ({"target_modules": Q, "trainable_token_indices": [1, 5]}, TIED | SAVED),
    "tied_tokens_lm_head": ({"target_modules": ["lm_head", "q_proj"], "trainable_token_indices": [1, 5]}, TIED),
    "tied_resized": ({"target_modules": Q}, TIED | SAVED | RESIZED),
}
# The cases of MORE whose loss on SMALL_TOKENS and its gradients are kept, for training.
TRAINED = ("vocabulary", "tied_lm_head", "tied_embed", "tokens_alike", "tied_tokens")


def small_config(case: str) -> ModelConfig:
    """The config of the base of one of MORE, before its vocabulary is resized."""
    return dataclasses.replace(SMALL, tied_embeddings=MORE[case][1].get("tied", False))


def base(config: ModelConfig = CONFIG) -> Any:
    """transformers' model of a config."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(_transformers_config(config)).eval()
    weights = {name: torch.from_numpy(w) for name, w in random_weights(config).items()}
    if config.tied_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True)
    return model


def _draw(weight: Any, name: str) -> None:
    """Fill a weight by its name; norms and magnitudes stay near their size."""
    import torch

    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(weight.shape).astype(np.float32)
    if weight.ndim == 1:
        weight.mul_(torch.from_numpy(1 + 0.2 * noise))
    else:
        weight.copy_(torch.from_numpy(0.5 * noise / np.float32(weight.shape[-1] ** 0.5)))


def _small_base(case: str) -> Any:
    """The base of one of MORE, with as many rows of the vocabulary as it asks for."""
    import torch

    model, rows = base(small_config(case)), MORE[case][1].get("rows")
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            for name, weight in (("embed", model.get_input_embeddings()), ("head", model.get_output_embeddings())):
                if name == "embed" or not small_config(case).tied_embeddings:
                    _draw(weight.weight[SMALL.vocab_size :], f"{case} new rows of {name}")
    return model


def _more(case: str, kept: dict[str, np.ndarray]) -> None:
    """Make one of MORE, save it, open it again, and keep its logits."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file

    (settings, made), tokens = MORE[case], torch.from_numpy(SMALL_TOKENS)
    settings = {"r": 2, "lora_alpha": 4, **settings}
    torch.manual_seed(0)
    model = get_peft_model(_small_base(case), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                _draw(weight, f"{case} {name}")
    folder = HERE / "peft" / case
    shutil.rmtree(folder, ignore_errors=True)
    flags = {"save_embedding_layers": made["save_embedding_layers"]} if "save_embedding_layers" in made else {}
    model.save_pretrained(folder, **flags)
    (folder / "README.md").unlink()
    if made.get("bin"):
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    with torch.inference_mode():
        logits = model(tokens).logits.numpy()
        again = PeftModel.from_pretrained(_small_base(case), folder).eval()(tokens).logits.numpy()
        before = base(small_config(case))(tokens).logits.numpy()
    print(
        f"{case:20} change {np.abs(logits[..., :64] - before).max():.3f}, opened again {np.abs(again - logits).max()}"
    )
    kept[f"{case}/logits"] = again[..., ::SMALL_STRIDE]
    if case in TRAINED:
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        kept[f"{case}/loss"] = loss.detach().numpy()
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                short = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
                kept[f"{case}/grad/{short}"] = weight.grad.numpy()


def main() -> None:
    """Write peft.npz and a folder a case next to this file."""
    import torch
    from peft import LoraConfig, get_peft_model

    kept: dict[str, np.ndarray] = {}
    tokens = torch.from_numpy(TOKENS)
    with torch.inference_mode():
        kept["base/logits"] = base()(tokens).logits.numpy()
        for case, settings in CASES.items():
            model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    draw = np.random.RandomState(zlib.crc32(f"{case} {name}".encode()))
                    noise = 0.5 * draw.standard_normal(weight.shape) / weight.shape[-1] ** 0.5
                    weight.copy_(torch.from_numpy(noise.astype(np.float32)))
            folder = HERE / "peft" / case
            shutil.rmtree(folder, ignore_errors=True)
            model.save_pretrained(folder, save_embedding_layers=False)
            (folder / "README.md").unlink()
            kept[f"{case}/logits"] = model(tokens).logits.numpy()
            merged = model.merge_and_unload().state_dict()
            for name in MERGED:
                kept[f"{case}/{name}"] = merged[name].numpy()[::ROWS]
            change = np.abs(kept[f"{case}/logits"] - kept["base/logits"]).max()
            print(case, "largest logit", np.abs(kept[f"{case}/logits"]).max(), "largest change", change)
    for case in MORE:
        _more(case, more := {})
        kept |= more
    logits = {name: a[..., ::VOCAB_STRIDE] for name, a in kept.items() if name.endswith("logits") and a.shape[-1] > 100}
    np.savez_compressed(HERE / "peft.npz", **{**kept, **logits})
    print(f"{(HERE / 'peft.npz').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
