"""A helper of the tests: small tokenizers, and Meta's golden ids (made by tests/golden/make_text.py)."""

import base64
import hashlib
import json

from helpers.paths import GOLDEN_FOLDER
from llama_jax.text.chat_format import Llama3Format
from llama_jax.text.tokenizer import Tokenizer

GOLDEN = json.loads((GOLDEN_FOLDER / "text.json").read_text(encoding="utf-8"))

BOS, EOS = 256, 257


class ByteTokenizer:
    """A tokenizer whose ids are bytes, so that tests know every id in advance."""

    vocab_size = 258
    fingerprint = "bytes"

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        return [BOS] * bos + list(text.encode()) + [EOS] * eos


class DialogTokenizer(Tokenizer):
    """A tokenizer that also encodes dialogs in Meta's reference format, as data needs it."""

    def encode_dialog(self, messages, *, tools=None, learn=None) -> tuple[list[int], list[bool]]:
        return Llama3Format(self).encode_for_training(messages, tools=tools, learn=learn)


def byte_tokenizer() -> DialogTokenizer:
    """A vocabulary with one id per byte, so that ids can be read."""
    return DialogTokenizer.from_ranks({bytes([i]): i for i in range(256)})


def small_tokenizer() -> DialogTokenizer:
    """The small vocabulary with merges, with which Meta's code made half of the golden ids."""
    return DialogTokenizer.from_ranks({base64.b64decode(token): i for i, token in enumerate(GOLDEN["small_tokens"])})


def digest(ids: list[int]) -> list:
    """The length of `ids` and a hash of them, as in the golden file."""
    return [len(ids), hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]]
