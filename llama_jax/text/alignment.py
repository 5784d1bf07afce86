"""The position of each token in the text that was encoded."""

from __future__ import annotations

from collections.abc import Sequence

from llama_jax.text.vocabulary import without_surrogates

_WINDOW = 64  # bytes that a vocabulary may lack tokens for, in a row


def byte_offsets(text: bytes, tokens: Sequence[bytes]) -> list[tuple[int, int]]:
    """The (start, end) of each token in a text, in bytes.

    The joined tokens of a byte-level vocabulary are the text. Other vocabularies add a space that is not in the text,
    or have no token for a rare character.

    Args:
        text: text in UTF-8.
        tokens: bytes of each token that the text was encoded to.

    Raises:
        ValueError: the tokens do not match the text, for example because the tokenizer changes it first.
    """
    offsets = []
    at = 0
    for token in tokens:
        if not text.startswith(token, at):
            bare = token.removeprefix(b" ")
            if text.startswith(bare, at):
                token = bare
            else:
                skipped = text.find(bare, at, at + _WINDOW + len(bare))
                if skipped < 0:
                    raise ValueError(
                        f"the token {token!r} does not match the text that was encoded, near {text[at : at + 20]!r}: "
                        "with this tokenizer, the assistant's tokens cannot be distinguished from the others"
                    )
                at, token = skipped, bare
        offsets.append((at, at + len(token)))
        at += len(token)
    if len(text) - at > _WINDOW:
        raise ValueError("the tokens end before the text does")
    return offsets


def utf8(text: str) -> bytes:
    """A text in UTF-8 as tokenizers read it: pairs of surrogates are characters, and lone ones are U+FFFD."""
    return without_surrogates(text).encode()


def length(text: str) -> int:
    """The number of bytes of a text in UTF-8, as tokenizers read it."""
    return len(utf8(text))
