"""Regenerate peft/ and peft.npz: adapters that peft wrote, its logits with them, and the weights it merges them into.

    pip install torch transformers peft numpy ml_dtypes     # the reference environment; jax is not needed
    PYTHONPATH=.:tests python tests/golden/make_peft.py

The base has the weights of make_model.py, drawn by name. The adapters' are drawn likewise, both matrices of each, so
that none of them is zero as a new one's are.
"""

from __future__ import annotations

import dataclasses
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from golden.make_model import VOCAB_STRIDE, _transformers_config, random_tokens, random_weights
from llama_jax.config import SIZES

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


def base() -> Any:
    """transformers' model of CONFIG."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(_transformers_config(CONFIG)).eval()
    model.load_state_dict({name: torch.from_numpy(w) for name, w in random_weights(CONFIG).items()}, strict=True)
    return model


def main() -> None:
    """Write peft.npz and a folder a case beside this file."""
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
    logits = {name: a[..., ::VOCAB_STRIDE] for name, a in kept.items() if name.endswith("logits")}
    np.savez_compressed(HERE / "peft.npz", **{**kept, **logits})
    print(f"{(HERE / 'peft.npz').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
