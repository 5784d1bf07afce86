"""Regenerate parts.npz: outputs of the parts of a Llama, each alone, from transformers' modules.

    pip install torch transformers numpy     # the reference environment; jax is not needed
    PYTHONPATH=.:tests python tests/golden/make_parts.py

Weights and inputs are drawn by name from numpy's RandomState, whose stream never changes, so that the tests draw the
same ones and only outputs are stored.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import numpy as np

from golden.make_model import _transformers_config, random_weights
from helpers.paths import GOLDEN_FOLDER
from llama_jax.config import SIZES, ModelConfig

FILE = GOLDEN_FOLDER / "parts.npz"
_TINY = dataclasses.replace(SIZES["tiny"], num_layers=1, num_kv_heads=2)
CASES: dict[str, ModelConfig] = {
    "llama3.1": _TINY,  # RoPE with the scaling of Llama 3.1
    "llama3": dataclasses.replace(_TINY, rope_scaling=None, max_seq_len=8192),
}
T = 12
POSITIONS = np.array([range(T), [0, 1, 2, 3, 4000, 4001, 4002, 4003, 8000, 8001, 8002, 8003]])
SEGMENTS = np.array([[1] * T, [1] * 5 + [2] * 7])
IGNORED = -100  # the label of a token that the loss leaves out


def draw(name: str, *shape: int) -> np.ndarray:
    """Normal float32 numbers that depend on the name and the shape alone."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def hidden(config: ModelConfig) -> np.ndarray:
    """The hidden states (2, T, D) that go into the norm, the attention, the feed-forward network and the block."""
    return draw("hidden", 2, T, config.embed_dim)


def heads(config: ModelConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries (2, T, N, H), and keys and values (2, T, K, H), for attention without its projections."""
    q = 2 * draw("q", 2, T, config.num_heads, config.head_dim)
    k, v = (draw(name, 2, T, config.num_kv_heads, config.head_dim) for name in "kv")
    return q, k, v


def targets(config: ModelConfig) -> np.ndarray:
    """The ids (2, T) to predict, a third of them IGNORED."""
    random = np.random.RandomState(3)
    ids = random.randint(0, config.vocab_size, (2, T))
    return np.where(random.random_sample((2, T)) < 1 / 3, IGNORED, ids)


def _causal(segments: np.ndarray | None) -> Any:
    """The additive mask (2, 1, T, T) of causal attention, within the segments where there are any."""
    import torch

    allowed = np.tril(np.ones((T, T), bool))[None].repeat(2, axis=0)
    if segments is not None:
        allowed &= segments[:, :, None] == segments[:, None, :]
    return torch.from_numpy(np.where(allowed, 0.0, np.finfo(np.float32).min).astype(np.float32))[:, None]


def _loss(config: ModelConfig, x: Any, table: Any) -> dict[str, Any]:
    """The mean loss over the tokens that count, and its gradient with respect to the hidden states."""
    import torch
    from transformers.loss.loss_utils import ForCausalLMLoss

    x = x.clone().requires_grad_()
    labels = torch.from_numpy(targets(config))
    loss = ForCausalLMLoss(x @ table.T, labels, config.vocab_size, shift_labels=labels, ignore_index=IGNORED)
    loss.backward()
    return {"loss": loss.detach(), "loss_gradient": x.grad}


def _parts(config: ModelConfig) -> dict[str, np.ndarray]:
    import torch
    from transformers.models.llama import modeling_llama as code

    theirs = _transformers_config(config)
    weights = {name: torch.from_numpy(array) for name, array in random_weights(config).items()}
    block = code.LlamaDecoderLayer(theirs, layer_idx=0).eval()
    prefix = "model.layers.0."
    block.load_state_dict({k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}, strict=True)
    x = torch.from_numpy(hidden(config))
    with torch.inference_mode():
        rotary = code.LlamaRotaryEmbedding(theirs)(x, torch.from_numpy(POSITIONS))
        q, k, v = (torch.from_numpy(array).transpose(1, 2) for array in heads(config))
        turned_q, turned_k = code.apply_rotary_pos_emb(q, k, *rotary)
        scale = config.head_dim**-0.5
        attend = lambda mask: code.eager_attention_forward(block.self_attn, q, k, v, mask, scale)[0]  # noqa: E731
        mask = _causal(None)
        out = {
            "norm": block.input_layernorm(x),
            "rope_q": turned_q.transpose(1, 2),
            "rope_k": turned_k.transpose(1, 2),
            "attention": attend(mask),
            "attention_packed": attend(_causal(SEGMENTS)),
            "attention_module": block.self_attn(x, position_embeddings=rotary, attention_mask=mask)[0],
            "feed_forward": block.mlp(x),
            "block": block(x, attention_mask=mask, position_embeddings=rotary),
        }
    out |= _loss(config, x, weights["lm_head.weight"])
    return {name: array.numpy() for name, array in out.items()}


def main() -> None:
    """Write parts.npz next to this file."""
    kept = {f"{case}/{name}": array for case, config in CASES.items() for name, array in _parts(config).items()}
    np.savez_compressed(FILE, **kept)
    print({name: array.shape for name, array in kept.items()}, f"{FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
