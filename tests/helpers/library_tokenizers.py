"""A helper of the tests: vocabularies of the tokenizers library, and a comparison of their ids with ours."""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from helpers.tokenizers import GOLDEN as TEXT
from llama_jax.text import Tokenizer
from llama_jax.text.byte_pairs import LLAMA3_SPECIALS
from llama_jax.text.merging import every_split
from llama_jax.text.patterns import GPT2_PATTERN, ONE_DIGIT_PATTERN, SPLIT_PATTERN
from llama_jax.text.vocabulary import byte_chars, spelled

STRINGS = {name: case["text"] for name, case in TEXT["strings"].items() if name != "lone_surrogates"}
CHARS = byte_chars()
CUTS = ["llama3", "one_digit", "gpt2_split", "gpt2", "digits"]


def cut(kind: str) -> pre_tokenizers.PreTokenizer:
    """A pre-tokenizer of the library, which splits text into words."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "gpt2":
        return byte_level
    if kind == "digits":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    regex = {"llama3": SPLIT_PATTERN, "one_digit": ONE_DIGIT_PATTERN, "gpt2_split": GPT2_PATTERN}[kind]
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), bare])


def library(vocab: dict[str, int], merges: list, *, kind: str = "llama3", ignore_merges: bool = False) -> Library:
    """A byte-level BPE of the library, in which control tokens in text are text, as they are here."""
    made = Library(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    made.pre_tokenizer, made.decoder = cut(kind), decoders.ByteLevel()
    made.encode_special_tokens = True
    return made


def trained(kind: str, *, specials: tuple[str, ...] = (), size: int = 900) -> Library:
    """A vocabulary that the library learns from the golden strings."""
    made = library({}, [], kind=kind)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=list(specials), show_progress=False
    )
    made.train_from_iterator([*STRINGS.values()] * 3, trainer)
    return made


def opened(made: Library, folder: Path, **config: object) -> Tokenizer:
    """Our tokenizer, from the file that the library saves."""
    made.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder / "tokenizer.json")


def nasty(rng: random.Random) -> str:
    """A string of mixed scripts, runs of spaces, digits, code, emoji, marks and control characters."""
    words = [
        "'s",
        "'LL",
        "'ſ",
        " the",
        "\n\n",
        "     ",
        "\t",
        " \r\n",
        "1000000",
        "٣½²",
        "e\u0301",
        "👨‍👩‍👧",
        "漢字",
        "हिन्दी",
    ]
    words += ["def ", "->", "\x00", "\x1c\x85", "\u2028\u3000", "\ufeff", "<|eot_id|>", "\U00011de3", "ß", "ﬆ", " x"]
    blocks = [0x20, 0x41, 0x61, 0xC0, 0x300, 0x400, 0x590, 0x900, 0x2000, 0x3040, 0xAC00, 0x1F300, 0x11DE0, 0x16FF0]

    def piece() -> str:
        if rng.random() < 0.5:
            return rng.choice(words)
        start = rng.choice(blocks)
        return "".join(chr(start + rng.randrange(0x60)) for _ in range(rng.randint(1, 8)))

    return "".join(piece() for _ in range(rng.randint(1, 8)))


def differing(ours: Tokenizer, theirs: Library, strings: list[str]) -> list[str]:
    """The strings whose ids differ, or which decoding does not restore."""
    ids = [ours.encode(s) for s in strings]
    expected = [encoding.ids for encoding in theirs.encode_batch(strings, add_special_tokens=False)]
    return [s for s, a, b in zip(strings, ids, expected, strict=True) if a != b or ours.decode(a) != s]


HF_SPECIALS = [
    *LLAMA3_SPECIALS[:5],
    "<|reserved_special_token_2|>",
    *LLAMA3_SPECIALS[6:11],
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
]


def llama3_library(ours: Tokenizer, names: list[str]) -> Library:
    """Llama 3's tokenizer.json as Hugging Face has it."""
    tokens = list(ours.vocabulary.tokens)
    merges = [(spelled(a), spelled(b)) for a, b in every_split(tokens)]
    made = library({spelled(t): i for i, t in enumerate(tokens)}, merges, ignore_merges=True)
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    bos = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", len(tokens))],
    )
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    return made
