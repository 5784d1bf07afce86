"""Regenerate model_logits.npz: logits and greedy tokens of small Llamas from transformers and from Meta's own code.

    pip install torch transformers numpy ml_dtypes     # the reference environment; jax is not needed
    pip install --no-deps llama-models                 # Meta's code; fairscale is stubbed below
    PYTHONPATH=. python tests/golden/make_model.py

Weights are drawn by name from numpy's RandomState, whose stream never changes, so that the tests draw the same ones and
only inputs and outputs are stored. Meta's code is given them under its own names, with the rotary pairs interleaved by
the table in llama_jax/weights/name_table.py.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import SIZES, ModelConfig
from llama_jax.weights import name_table

HERE = Path(__file__).parent
GREEDY = 24
VOCAB_STRIDE = 16  # of the logits that are kept

_TINY = SIZES["tiny"]
_32 = SIZES["llama3.2-1b"].rope_scaling
# head_dim is embed_dim / num_heads, which is all that Meta's code knows.
_META = dataclasses.replace(_TINY, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=176)
_NEAR = tuple(range(32))
_FAR = (*range(8), *range(8000, 8008), *range(9000, 9008), *range(131_000, 131_008))
CASES: dict[str, tuple[ModelConfig, tuple[int, ...]]] = {
    "tiny": (_TINY, _NEAR),
    "tiny_far": (_TINY, _FAR),
    "tied": (dataclasses.replace(_TINY, tied_embeddings=True, rope_scaling=_32), _NEAR),
    "tied_far": (dataclasses.replace(_TINY, tied_embeddings=True, rope_scaling=_32), _FAR),
    "llama3": (dataclasses.replace(_TINY, rope_scaling=None, max_seq_len=8192), _NEAR),
    "odd_head_mha": (
        dataclasses.replace(_TINY, embed_dim=72, num_heads=3, num_kv_heads=3, head_dim=20, norm_eps=1e-3),
        _NEAR,
    ),
    "mqa": (dataclasses.replace(_TINY, num_kv_heads=1, rope_theta=10_000.0), _NEAR),
    "meta": (_META, _NEAR),
    "meta_far": (_META, _FAR),
    "meta_llama3": (dataclasses.replace(_META, rope_scaling=None), _NEAR),
    "meta_llama3_far": (dataclasses.replace(_META, rope_scaling=None), _FAR),
    "meta_mha": (dataclasses.replace(_META, num_kv_heads=4), _FAR),
    "meta_mqa": (dataclasses.replace(_META, num_kv_heads=1, norm_eps=1e-3), _NEAR),
}


def random_weights(config: ModelConfig) -> dict[str, np.ndarray]:
    """Float32 weights by Hugging Face name, large enough that attention is far from uniform."""
    found = {}
    for weight in name_table.weights(config, "huggingface"):
        draw = np.random.RandomState(zlib.crc32(weight.name.encode()))
        noise = draw.standard_normal(weight.shape)
        matrix = len(weight.shape) == 2
        scaled = 1.5 * noise / weight.shape[-1] ** 0.5 if matrix else 1 + 0.2 * noise
        found[weight.name] = scaled.astype(np.float32)
    return found


def random_tokens(config: ModelConfig, *, rows: int, length: int) -> np.ndarray:
    """Token ids (rows, length), the same every time."""
    return np.random.RandomState(7).randint(0, config.vocab_size, (rows, length))


def _transformers_config(config: ModelConfig) -> Any:
    from transformers import LlamaConfig

    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling is not None:
        rope |= dataclasses.asdict(scaling) | {"rope_type": "llama3"}
        rope["original_max_position_embeddings"] = rope.pop("original_max_seq_len")
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.max_seq_len,
        rope_parameters=rope,
        tie_word_embeddings=config.tied_embeddings,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )


def _transformers(config: ModelConfig, tokens: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(_transformers_config(config)).eval()
    state = {name: torch.from_numpy(w) for name, w in random_weights(config).items()}
    if config.tied_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    # Given as a mask of its own, since transformers takes a jump in the positions for another document.
    mask = torch.zeros(1, 1, len(positions), len(positions))
    mask.masked_fill_(torch.ones(len(positions), len(positions)).triu(1).bool(), torch.finfo(torch.float32).min)
    with torch.inference_mode():
        ids = torch.from_numpy(tokens)
        logits = model(
            ids, attention_mask=mask.expand(len(ids), -1, -1, -1), position_ids=torch.from_numpy(positions)[None]
        ).logits
        out = {"hf": logits.numpy()}
        if positions[-1] < 8192:
            prompt = ids[:, :8]
            ones = torch.ones_like(prompt)
            grown = model.generate(prompt, attention_mask=ones, max_new_tokens=GREEDY, do_sample=False)
            out["greedy"] = grown[:, 8:].numpy().astype(np.int32)
            top = model(grown).logits[:, 7:-1].topk(2).values
            out["margin"] = (top[..., 0] - top[..., 1]).min().numpy()
    return out


def _meta_code() -> Any:
    """Meta's model.py, with fairscale's parallel layers replaced by the plain ones they are on one device."""
    import torch

    def linear(inputs: int, outputs: int, bias: bool, **_: Any) -> Any:
        return torch.nn.Linear(inputs, outputs, bias=bias)

    layers = types.ModuleType("fairscale.nn.model_parallel.layers")
    layers.ColumnParallelLinear = layers.RowParallelLinear = linear
    layers.VocabParallelEmbedding = lambda rows, dim, **_: torch.nn.Embedding(rows, dim)
    initialize = types.ModuleType("fairscale.nn.model_parallel.initialize")
    initialize.get_model_parallel_world_size = lambda: 1
    model_parallel = types.ModuleType("fairscale.nn.model_parallel")
    model_parallel.layers, model_parallel.initialize = layers, initialize
    for name in ("fairscale", "fairscale.nn"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["fairscale"].nn = sys.modules["fairscale.nn"]
    sys.modules["fairscale.nn"].model_parallel = model_parallel
    for module in (model_parallel, layers, initialize):
        sys.modules[module.__name__] = module
    from llama_models.llama3 import model

    return model


def _meta(config: ModelConfig, tokens: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
    import torch

    code = _meta_code()
    base = 2 * 4 * config.embed_dim // 3  # what Meta's code rounds up to a multiple of `multiple_of`
    assert config.ffn_dim // 2 < base <= config.ffn_dim, config
    assert config.embed_dim == config.num_heads * config.head_dim, config
    assert config.rope_scaling in (None, _TINY.rope_scaling), config
    model = code.Transformer(
        code.ModelArgs(
            dim=config.embed_dim,
            n_layers=config.num_layers,
            n_heads=config.num_heads,
            n_kv_heads=config.num_kv_heads,
            vocab_size=config.vocab_size,
            multiple_of=config.ffn_dim,
            norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            use_scaled_rope=config.rope_scaling is not None,
            max_batch_size=len(tokens),
            max_seq_len=len(positions),
        )
    ).eval()
    named = random_weights(config)
    theirs = {}
    pairs = zip(name_table.weights(config, "huggingface"), name_table.weights(config, "meta"), strict=True)
    for ours, meta in pairs:
        array = named[ours.name]
        theirs[meta.name] = torch.from_numpy(name_table.to_pairs(array, meta.pairs) if meta.pairs else array)
    model.load_state_dict(theirs, strict=True)
    # Their own table of angles, of which the rows of our positions take the place of the first ones.
    angles = code.precompute_freqs_cis(
        config.head_dim, int(positions[-1]) + 1, config.rope_theta, config.rope_scaling is not None
    )
    model.freqs_cis = angles[torch.from_numpy(positions)]
    return {"meta": model(torch.from_numpy(tokens), 0).numpy()}


def _frequencies(config: ModelConfig) -> np.ndarray:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(_transformers_config(config)).inv_freq.numpy()


def main() -> None:
    """Write model_logits.npz next to this file."""
    kept: dict[str, np.ndarray] = {f"frequencies/{name}": _frequencies(c) for name, c in SIZES.items()}
    for case, (config, where) in CASES.items():
        positions = np.array(where)
        tokens = random_tokens(config, rows=2, length=len(positions))
        out = _transformers(config, tokens, positions)
        if case.startswith("meta"):
            out |= _meta(config, tokens, positions)
            gap = np.abs(out["hf"] - out["meta"]).max() / np.abs(out["hf"]).max()
            print(f"{case}: transformers and Meta differ by {gap:.1e}")
        print(case, "largest logit", np.abs(out["hf"]).max(), "smallest greedy margin", out.pop("margin", None))
        for key, array in out.items():
            kept[f"{case}/{key}"] = array if key == "greedy" else array[..., ::VOCAB_STRIDE].astype(np.float32)
    np.savez_compressed(HERE / "model_logits.npz", **kept)
    print(f"{(HERE / 'model_logits.npz').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
