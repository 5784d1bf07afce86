"""Text: vocabularies, tokenizers, Llama 3's dialog format and a trainer of small vocabularies (no jax)."""

from llama_jax.text.bpe_training import train_bpe
from llama_jax.text.chat import encode_dialog, parse_assistant
from llama_jax.text.tokenizer import StreamDecoder, Tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "encode_dialog", "parse_assistant", "train_bpe"]
