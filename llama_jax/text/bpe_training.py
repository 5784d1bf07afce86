"""A trainer of small byte-level BPE vocabularies with Llama 3's split pattern."""

from collections.abc import Iterable
from typing import Any

from llama_jax.text.byte_pairs import NUM_SPECIAL
from llama_jax.text.patterns import SPLIT_PATTERN
from llama_jax.text.vocabulary import byte_chars, unspelled, without_surrogates


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> dict[bytes, int]:
    """Learns a vocabulary from texts. Returns the rank of each token by its bytes, for `Tokenizer.from_ranks`.

    Ranks 0 to 255 are the single bytes, in the order of Meta's file. The merges follow in the order in which they are
    learned. The same texts give the same ranks for any number of threads.

    Args:
        texts: documents; a lone surrogate counts as U+FFFD, as in `Tokenizer.encode`.
        vocab_size: number of ids of the finished tokenizer, its 256 special tokens included; at least 512.

    Raises:
        ValueError: `vocab_size` is below 512, or the texts are too small to learn so many tokens.
        TypeError: `texts` is one str.
        ImportError: the `tokenizers` package is not installed.
    """
    if isinstance(texts, str):
        raise TypeError("train_bpe takes an iterable of texts, got one str; pass [text]")
    if vocab_size < 256 + NUM_SPECIAL:
        raise ValueError(
            f"vocab_size is {vocab_size}; it must be at least {256 + NUM_SPECIAL} (256 bytes + {NUM_SPECIAL} special "
            "tokens)"
        )
    num_ranks = vocab_size - NUM_SPECIAL
    vocab = _trained_model(texts, num_ranks).get_vocab()
    if len(vocab) != num_ranks:
        raise ValueError(
            f"vocab_size is {vocab_size} but the texts hold only {len(vocab) + NUM_SPECIAL} tokens to learn: "
            f"give more text, or set vocab_size (model.vocab_size of a run) to {len(vocab) + NUM_SPECIAL} or less"
        )
    return {unspelled(token): rank for token, rank in sorted(vocab.items(), key=lambda item: item[1])}


def _trained_model(texts: Iterable[str], num_ranks: int) -> Any:
    """A `tokenizers.Tokenizer` of `num_ranks` tokens, or of as many as the texts yield."""
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ImportError("train_bpe needs the `tokenizers` package: pip install tokenizers") from error
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=num_ranks,
        initial_alphabet=sorted(byte_chars().values()),
        special_tokens=[],
        show_progress=False,
    )
    model.train_from_iterator(map(without_surrogates, texts), trainer)
    return model
