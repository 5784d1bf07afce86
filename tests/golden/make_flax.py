"""Regenerate flax_folder.npz: folders that transformers' FlaxLlamaForCausalLM saved, and its logits.

    pip install "transformers==4.56.2" "jax==0.6.2" "flax==0.10.7"     # the last ones in which it works
    python tests/golden/make_flax.py

Two folders of one small model: float32 in one file, and bfloat16 in shards. Names in the npz are "folder/file" (bytes),
next to tokens and the logits of the float32 weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from transformers import FlaxLlamaForCausalLM, LlamaConfig

HERE = Path(__file__).parent


def main() -> None:
    """Write flax_folder.npz next to this file."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,  # the only one that it knows
    )
    model = FlaxLlamaForCausalLM(config, seed=0)
    draw = np.random.RandomState(0)

    def noise(leaf: jax.Array) -> np.ndarray:
        """Adds noise to a weight that is large enough for attention to be far from uniform, and for norms to differ
        from one.
        """
        drawn = draw.standard_normal(leaf.shape).astype(np.float32)
        return 1 + 0.2 * drawn if leaf.ndim == 1 else 1.5 * drawn / leaf.shape[0] ** 0.5

    model.params = jax.tree.map(noise, model.params)
    tokens = draw.randint(0, config.vocab_size, (2, 24))
    with jax.default_matmul_precision("highest"):
        logits = model(tokens).logits
    kept = {"tokens": tokens, "logits": np.asarray(logits, np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/single")
        model.save_pretrained(
            f"{folder}/sharded",
            params=jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), model.params),
            max_shard_size="4KB",
        )
        for path in sorted(Path(folder).rglob("*.*")):
            kept[str(path.relative_to(folder))] = np.frombuffer(path.read_bytes(), np.uint8)
    np.savez_compressed(HERE / "flax_folder.npz", **kept)
    print(*kept, (HERE / "flax_folder.npz").stat().st_size)


if __name__ == "__main__":
    main()
