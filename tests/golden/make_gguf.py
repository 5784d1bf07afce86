"""Regenerate gguf.npz and the gguf_*.gguf: files written by ggml's own package, and the values in them.

    pip install gguf llama-cpp-python numpy ml_dtypes     # the reference environment; jax is not needed
    PYTHONPATH=.:tests python tests/golden/make_gguf.py

Files are written by gguf.GGUFWriter. Numbers are those of gguf.quants, and logits those of llama.cpp for the same
weights in float32, since it rounds activations to 16 or 8 bits wherever weights have no more.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from golden.make_model import random_tokens, random_weights
from llama_jax.config import SIZES, ModelConfig, RopeScaling

if TYPE_CHECKING:
    import gguf

HERE = Path(__file__).parent
LENGTH, STRIDE = 48, 4  # tokens of the prompt, and of the rows of logits that are kept
TEXT = "the thin 'tin' hat: 1234 things"

CONFIG = dataclasses.replace(
    SIZES["tiny"],
    vocab_size=320,
    embed_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_dim=96,
    rope_theta=10_000.0,
    rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64),
    max_seq_len=512,
)
# Of each weight that is not F32 the name, within its layer, and the kind that gguf_tiny.gguf keeps it in.
KINDS = {
    "token_embd": "Q8_0",
    "output": "Q8_0",
    "attn_q": "F16",
    "attn_k": "F16",
    "attn_v": "Q8_0",
    "attn_output": "Q4_0",
    "ffn_gate": "Q4_0",
    "ffn_up": "Q8_0",
    "ffn_down": "BF16",
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
MERGES = ["t h", "th e", "Ġ t", "Ġt h", "i n", "Ġth in", "h at", "a t", "1 2"]
# Rows of each kind, of so many blocks.
TYPE_ROWS, TYPE_BLOCKS = 3, {32: 5, 256: 2}


def kind_of(name: str) -> str:
    """The kind of a tensor of gguf_tiny.gguf."""
    return KINDS.get(name.removesuffix(".weight").split(".")[-1], "F32")


def tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """The weights of make_model.py by the names of GGUF, with q and k permuted as llama.cpp's converter does."""
    found = {}
    for name, array in random_weights(config).items():
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        if heads is not None:
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        found[name] = np.ascontiguousarray(array)
    return found


def factors(config: ModelConfig) -> np.ndarray:
    """The tensor rope_freqs.weight of llama.cpp's converter for Llama 3.1, float32."""
    scaling, out = config.rope_scaling, []
    longest = scaling.original_max_seq_len / scaling.low_freq_factor
    shortest = scaling.original_max_seq_len / scaling.high_freq_factor
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * np.pi * config.rope_theta ** (i / config.head_dim)
        if wavelength < shortest:
            out.append(1.0)
        elif wavelength > longest:
            out.append(scaling.factor)
        else:
            span = scaling.high_freq_factor - scaling.low_freq_factor
            smooth = (scaling.original_max_seq_len / wavelength - scaling.low_freq_factor) / span
            out.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(out, np.float32)


def byte_tokens() -> list[str]:
    """GPT-2's spelling of the 256 bytes, those that print first (openai/gpt-2, encoder.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]


def vocabulary() -> tuple[list[str], list[int]]:
    """Tokens and their types: bytes, merges, and control tokens up to the size of the vocabulary."""
    named = ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    tokens = byte_tokens() + [merge.replace(" ", "") for merge in MERGES]
    control = named + [f"<|reserved_special_token_{i}|>" for i in range(CONFIG.vocab_size - len(tokens) - len(named))]
    types = [1] * len(tokens) + [3] * len(control)  # normal, control
    return tokens + control, types


def write_tiny(path: Path, arrays: dict[str, tuple[np.ndarray, str]]) -> None:
    """A whole model: arrays as they are stored, with their kinds."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    tokens, types = vocabulary()
    writer.add_name("tiny")
    writer.add_context_length(CONFIG.max_seq_len)
    writer.add_embedding_length(CONFIG.embed_dim)
    writer.add_block_count(CONFIG.num_layers)
    writer.add_feed_forward_length(CONFIG.ffn_dim)
    writer.add_head_count(CONFIG.num_heads)
    writer.add_head_count_kv(CONFIG.num_kv_heads)
    writer.add_rope_dimension_count(CONFIG.head_dim)
    writer.add_rope_freq_base(CONFIG.rope_theta)
    writer.add_layer_norm_rms_eps(CONFIG.norm_eps)
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(tokens.index("<|begin_of_text|>"))
    writer.add_eos_token_id(tokens.index("<|end_of_text|>"))
    writer.add_eot_token_id(tokens.index("<|eot_id|>"))
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("rope_freqs.weight", factors(CONFIG))
    for name, (array, kind) in arrays.items():
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])
    _finish(writer)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _random_blocks(draw: np.random.RandomState, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Blocks of random bytes, drawn again until their numbers are finite and of sane size."""
    import gguf

    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    count = TYPE_BLOCKS[numbers]
    raw = draw.randint(0, 256, (TYPE_ROWS * count, size)).astype(np.uint8)
    while True:
        with np.errstate(all="ignore"):
            peaks = np.abs(gguf.quants.dequantize(raw, kind)).max(axis=1)
        bad = ~((peaks > 1e-6) & (peaks < 1e4))
        if not bad.any():
            return raw.reshape(TYPE_ROWS, count * size)
        raw[bad] = draw.randint(0, 256, (bad.sum(), size))


def _types(kept: dict[str, np.ndarray]) -> None:
    """A file with a tensor of every type and a value of every type."""
    import gguf

    draw = np.random.RandomState(3)
    writer = gguf.GGUFWriter(HERE / "gguf_types.gguf", "none")
    writer.add_custom_alignment(64)
    for kind in ("uint8", "uint16", "uint32", "uint64"):
        getattr(writer, f"add_{kind}")(f"value.{kind}", np.iinfo(kind).max)
    for kind in ("int8", "int16", "int32", "int64"):
        getattr(writer, f"add_{kind}")(f"value.{kind}", np.iinfo(kind).min)
    writer.add_float32("value.float32", 1e-5)
    writer.add_float64("value.float64", 1e-5)
    writer.add_bool("value.true", True)
    writer.add_bool("value.false", False)
    writer.add_string("value.string", "Ġé\n日本🦙")
    writer.add_array("value.strings", ["", "a", "🦙"])
    writer.add_array("value.ints", [1, -2, 3])
    writer.add_array("value.floats", [0.5, 1.5])
    writer.add_array("value.bools", [True, False])
    plain = draw.standard_normal((2, 3, 4, 5)).astype(np.float32)
    writer.add_tensor("f32", plain)
    writer.add_tensor("f16", plain[0].astype(np.float16))
    bf16 = gguf.quants.quantize(plain[0, 0], gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("bf16", bf16, raw_dtype=gguf.GGMLQuantizationType.BF16)
    kept |= {"types/f32": plain, "types/f16": plain[0].astype(np.float16).astype(np.float32)}
    kept["types/bf16"] = gguf.quants.dequantize(bf16, gguf.GGMLQuantizationType.BF16)
    for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        kind = gguf.GGMLQuantizationType[name]
        raw = _random_blocks(draw, kind)
        writer.add_tensor(name.lower(), raw, raw_dtype=kind)
        kept[f"types/{name.lower()}"] = gguf.quants.dequantize(raw, kind)
    _finish(writer)


def _quantized(kept: dict[str, np.ndarray]) -> None:
    """Ordinary and extreme values, and the blocks that ggml quantizes them to."""
    import gguf

    draw = np.random.RandomState(4)
    numbers = draw.standard_normal((6, 96)).astype(np.float32)
    numbers[1] *= 1e-6
    numbers[2] *= 3e3
    numbers[3] = np.round(numbers[3] * 8) / 8
    numbers[4] = np.arange(96) / 2 - 24  # halves, and ties for the largest
    numbers[5, :64] = 0
    kept["quantize/numbers"] = numbers
    for name in ("Q8_0", "Q4_0"):
        kept[f"quantize/{name}"] = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[name])


def _tiny(kept: dict[str, np.ndarray]) -> None:
    import gguf
    from llama_cpp import Llama

    mixed, plain = {}, {}
    for name, array in tensors(CONFIG).items():
        kind = kind_of(name)
        stored = gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind])
        mixed[name] = (stored, kind)
        numbers = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])
        plain[name] = (np.ascontiguousarray(numbers, np.float32), "F32")
    write_tiny(HERE / "gguf_tiny.gguf", mixed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plain.gguf"
        write_tiny(path, plain)
        model = Llama(
            str(path), n_ctx=64, n_gpu_layers=0, logits_all=True, type_k=0, type_v=0, flash_attn=False, verbose=False
        )
        model.eval(random_tokens(CONFIG, rows=1, length=LENGTH)[0].tolist())
        kept["tiny/logits"] = model.scores[:LENGTH:STRIDE].astype(np.float32)
        kept["tiny/ids"] = np.array(model.tokenize(TEXT.encode(), add_bos=True, special=False), np.int32)


def _split() -> None:
    import gguf

    for old in HERE.glob("gguf_split-*.gguf"):
        old.unlink()
    writer = gguf.GGUFWriter(HERE / "gguf_split.gguf", "none", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"t{i}", np.full((2, 3), i, np.float32))
    _finish(writer)


def main() -> None:
    """Write the files next to this one."""
    kept: dict[str, np.ndarray] = {}
    _types(kept)
    _quantized(kept)
    _tiny(kept)
    _split()
    np.savez_compressed(HERE / "gguf.npz", **kept)
    total = sum(path.stat().st_size for path in HERE.glob("gguf*"))
    print(f"{total:,} bytes in all; {TEXT!r} is {kept['tiny/ids'].tolist()}")


if __name__ == "__main__":
    main()
