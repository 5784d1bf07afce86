"""The vocabulary in the metadata of a GGUF file, as plain data: read into a `Vocabulary`, and made from one.

Facts about the format are llama.cpp's (`llama-vocab.cpp`, and `docs/gguf.md` of ggml): tokens by id, spelled a
printable character a byte; their types; merges as two tokens with a space between; and a name for the way of cutting
text into words, which also settles whether a word that is a token needs no merges.
"""

from collections.abc import Sequence
from typing import TypedDict

from llama_jax.errors import ConfigError, brief
from llama_jax.text.byte_pairs import BytePairs
from llama_jax.text.merging import every_split, in_merge_order
from llama_jax.text.patterns import DIGITS_PATTERN, GPT2_PATTERN, ONE_DIGIT_PATTERN, SPLIT_PATTERN
from llama_jax.text.vocabulary import spelled, unspelled

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_PATTERNS = {
    "llama-bpe": SPLIT_PATTERN,
    "llama3": SPLIT_PATTERN,
    "llama-v3": SPLIT_PATTERN,
    "gpt-2": GPT2_PATTERN,
    "smollm": DIGITS_PATTERN,
    "qwen2": ONE_DIGIT_PATTERN,
}
_BY_IDS = "the model itself can still be used with token ids"


class Fields(TypedDict):
    """The tokenizer metadata of a GGUF file.

    Attributes:
        model: tokenizer.ggml.model; "gpt2" is byte-level BPE.
        pre: tokenizer.ggml.pre, the name of the split pattern.
        tokens: token texts by id.
        token_types: types by id: 1 normal, 3 control, 4 user-defined (found in text wherever it stands), 5 unused.
        merges: two tokens with a space between, the first merge first.
        bos: id that begins a text, or None.
        eos: id that ends a text, or None.
        add_bos: whether the model wants `bos` in front; None leaves it to `pre`.
    """

    model: str
    pre: str | None
    tokens: list[str]
    token_types: Sequence[int] | None
    merges: list[str]
    bos: int | None
    eos: int | None
    add_bos: bool | None


def vocabulary(fields: Fields) -> BytePairs:
    """The vocabulary that a file's metadata describes.

    Raises:
        ConfigError: a tokenizer that cannot be reproduced here, such as SentencePiece; says why.
        ValueError: metadata that does not agree with itself.
    """
    model, pre, tokens, token_types = fields["model"], fields["pre"], fields["tokens"], fields["token_types"]
    merges, bos, eos, add_bos = fields["merges"], fields["bos"], fields["eos"], fields["add_bos"]
    if model != "gpt2":
        raise ConfigError(f"tokenizer.ggml.model {brief(model)} is not supported, only 'gpt2'; {_BY_IDS}")
    if pre not in _PATTERNS:
        raise ConfigError(f"tokenizer.ggml.pre {brief(pre)} is not supported, only {', '.join(_PATTERNS)}; {_BY_IDS}")
    if token_types is None or len(token_types) != len(tokens):
        count = 0 if token_types is None else len(token_types)
        raise ValueError(f"tokenizer.ggml.token_type has {count:,} types for {len(tokens):,} tokens")
    specials: dict[str, int] = {}
    found: dict[str, int | None] = {}
    ids: dict[str, int] = {}
    places = {_NORMAL: ids, _CONTROL: specials, _UNUSED: specials, _USER_DEFINED: found}
    for i, (token, kind) in enumerate(zip(tokens, map(int, token_types), strict=True)):
        if kind not in places:
            raise ConfigError(f"tokenizer.ggml.token_type of id {i} is {kind}, which byte-level BPE has not; {_BY_IDS}")
        if token in places[kind]:
            raise ValueError(f"tokenizer.ggml.tokens has {token[:60]!r} twice, as ids {places[kind][token]} and {i}")
        places[kind][token] = i
    for name, token in (("bos", bos), ("eos", eos)):
        if token is not None and not 0 <= token < len(tokens):
            raise ValueError(f"tokenizer.ggml.{name}_token_id is {token}, but there are {len(tokens):,} tokens")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if wrong := [merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2]:
        raise ValueError(f"tokenizer.ggml.merges has {wrong[0][:60]!r}, which is not two tokens with a space between")
    as_bytes = {token: unspelled(token) for token in ids}
    try:
        order, silent = in_merge_order(ids, pairs, whole_words=_takes_whole_words(pre))
    except ConfigError as error:
        raise ConfigError(f"tokenizer.ggml.merges: {error}; {_BY_IDS}") from None
    return BytePairs(
        tokens={as_bytes[token]: ids[token] for token in order},
        specials=specials,
        pattern=_PATTERNS[pre],
        bos_id=bos if (_takes_whole_words(pre) if add_bos is None else add_bos) else None,
        declared_eos=eos,
        silent={as_bytes[token]: ids[token] for token in silent},
        found=(found,) if found else (),
    )


def fields(held: BytePairs) -> Fields:
    """What to write into a GGUF file so that llama.cpp, and `vocabulary`, come to the same ids.

    Raises:
        ConfigError: llama.cpp has no name for such a vocabulary.
    """
    pre = next(name for name, pattern in _PATTERNS.items() if pattern == held.pattern)
    whole_words = _takes_whole_words(pre)
    plain = {spelled(token): i for token, i in held.tokens.items()}
    merges = [(spelled(left), spelled(right)) for left, right in every_split(list(held.tokens))]
    unmade = [] if whole_words else in_merge_order(plain, merges, whole_words=False)[1]
    if unmade or (whole_words and held.silent):
        raise ConfigError(
            f"GGUF's {pre!r} has {'every' if whole_words else 'no'} word that is a token, but that no merges make, "
            "stand for itself; this vocabulary is otherwise"
        )
    if len(held.found) > 1:
        raise ConfigError("a GGUF file holds one round of tokens that are found in text; this vocabulary has two")
    kinds = dict.fromkeys(held.specials.values(), _CONTROL)
    kinds |= {i: _USER_DEFINED for names in held.found for i in names.values() if i is not None}
    return Fields(
        model="gpt2",
        pre=pre,
        tokens=[name.decode() if i in kinds else spelled(name) for i, name in enumerate(held.by_id)],
        token_types=[kinds.get(i, _NORMAL) for i in range(held.size)],
        merges=[f"{left} {right}" for left, right in merges],
        bos=held.bos_id,
        eos=held.eos_id,
        add_bos=held.bos_id is not None,
    )


def _takes_whole_words(pre: str) -> bool:
    """Whether llama.cpp makes a word that is a token that token (ignore_merges), and adds bos unless told not to."""
    return _PATTERNS[pre] == SPLIT_PATTERN
