"""Claims about tokenizer.json and GGUF vocabularies: ids are compared with those of the `tokenizers` library, live.

tests/golden/make_tokenizers.py holds what transformers and llama.cpp make of what is written here.
"""

import hashlib
import json
import os
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from helpers.paths import GOLDEN_FOLDER
from helpers.tokenizers import GOLDEN as TEXT
from helpers.tokenizers import digest, small_tokenizer
from llama_jax.errors import ConfigError
from llama_jax.text import StreamDecoder, Tokenizer, encode_dialog, llama3_template, parse_assistant
from llama_jax.text.byte_pairs import LLAMA3_SPECIALS
from llama_jax.text.chat_format import Llama3Format
from llama_jax.text.formats import gguf as gguf_vocabulary
from llama_jax.text.formats import huggingface as huggingface_vocabulary
from llama_jax.text.library_vocabulary import LibraryVocabulary
from llama_jax.text.merging import every_split, in_merge_order
from llama_jax.text.patterns import GPT2_PATTERN, ONE_DIGIT_PATTERN, SPLIT_PATTERN
from llama_jax.text.vocabulary import byte_chars, spelled
from llama_jax.text.vocabulary_files import find

GOLDEN = json.loads((GOLDEN_FOLDER / "tokenizers.json").read_text(encoding="utf-8"))
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


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return small_tokenizer()


# ---- the same ids as `tokenizers` ----


@pytest.mark.parametrize("kind", CUTS)
def test_trained_vocabularies_give_the_librarys_ids(kind, tmp_path):
    rng = random.Random(kind)
    strings = [*STRINGS.values(), *(nasty(rng) for _ in range(600))]
    for specials in ((), ("<s>", "</s>", "<pad>")):
        theirs = trained(kind, specials=specials)
        ours = opened(theirs, tmp_path)
        assert not differing(ours, theirs, strings)
        assert list(ours.special_tokens) == list(specials) and ours.vocab_size == theirs.get_vocab_size()


@pytest.mark.parametrize("kind", CUTS)
def test_words_are_cut_alike_at_characters_of_every_kind(kind, tmp_path):
    theirs = library({char: byte for byte, char in CHARS.items()}, [], kind=kind)
    pattern = opened(theirs, tmp_path).vocabulary.pattern
    points = [*range(0x3000), *range(0x3000, 0x110000, 101), *range(0x11DE0, 0x11DF0), *range(0x16FF0, 0x16FF8)]
    chars = [chr(c) for c in points if not 0xD800 <= c < 0xE000]
    for start in range(0, len(chars), 2_000):
        line = "".join(f"{c}a {c} \t1{c}'{c}\n" for c in chars[start : start + 2_000])
        words = [
            line[begin:end].encode() for _, (begin, end) in theirs.pre_tokenizer.pre_tokenize_str(line) if end > begin
        ]
        # Each word is a token, and so are neighbours together: only cuts in the same places give a token a word.
        known = (
            {bytes([byte]) for byte in range(256)} | {*words} | {a + b for a, b in zip(words, words[1:], strict=False)}
        )
        ranks = {token: rank for rank, token in enumerate(sorted(known, key=len))}
        ours = tiktoken.Encoding("words", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        assert ours.decode_tokens_bytes(ours.encode_ordinary(line)) == words


def random_model(rng: random.Random) -> tuple[dict[str, int], list, bool]:
    """A vocabulary and merges as no trainer makes them: any order, useless and unreachable ones among them."""
    letters = [CHARS[byte] for byte in set(rng.choice(["ab", "abc", "ab1 ", "aé' s\n", "a🙂 é", "abcdefgh"]).encode())]
    vocab, merges, pool = {char: byte for byte, char in CHARS.items()}, [], [*letters]
    for _ in range(rng.randint(0, 25)):
        pair = rng.choice(pool), rng.choice(pool)
        if pair not in merges and len("".join(pair)) <= 12:
            merges.append(pair)
            if "".join(pair) not in vocab:
                vocab["".join(pair)] = len(vocab)
                pool.append("".join(pair))
    for _ in range(rng.randint(0, 2)):
        vocab.setdefault("".join(rng.choices(letters, k=rng.randint(3, 6))), len(vocab))
    if rng.random() < 0.5:
        rng.shuffle(merges)
    elif rng.random() < 0.5:
        merges = [(t[:i], t[i:]) for t in vocab for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    if rng.random() < 0.4:
        vocab = dict(zip(vocab, rng.sample(range(len(vocab)), len(vocab)), strict=True))
    return vocab, merges, rng.random() < 0.5


def test_any_merge_list_gives_the_librarys_ids(tmp_path):
    rng, read, by_library = random.Random(7), 0, 0
    while read < 150:
        vocab, merges, ignore_merges = random_model(rng)
        theirs = library(vocab, merges, kind=rng.choice(CUTS), ignore_merges=ignore_merges)
        ours = opened(theirs, tmp_path)
        by_library += isinstance(ours.vocabulary, LibraryVocabulary)
        huggingface_vocabulary.write(ours.vocabulary, tmp_path)
        again, copy = Tokenizer(tmp_path / "tokenizer.json"), Library.from_file(str(tmp_path / "tokenizer.json"))
        copy.encode_special_tokens = True
        alphabet = "".join({char for token in vocab if len(token) > 1 for char in token})
        letters = bytes(byte for byte, char in CHARS.items() if char in alphabet).decode("utf-8", "ignore") + "a é"
        strings = ["".join(rng.choices(letters, k=rng.choice([3, 8, 20, 60]))) for _ in range(30)]
        assert not differing(ours, theirs, strings) and not differing(again, copy, strings)
        assert [ours.encode(s) for s in strings] == [again.encode(s) for s in strings]
        assert (
            again.fingerprint == ours.fingerprint and pickle.loads(pickle.dumps(ours)).fingerprint == ours.fingerprint
        )
        read += 1
    assert 10 < by_library < 100


def test_a_word_that_merges_leave_in_two_pieces_is_refused_by_name():
    vocab = {char: byte for byte, char in CHARS.items()} | {"ab": 256, "abc": 257}
    with pytest.raises(ConfigError, match="token 'abc' may be a whole word, but no merge forms it"):
        in_merge_order(vocab, [("a", "b")], whole_words=True)
    assert in_merge_order(vocab, [("a", "b")], whole_words=False)[1] == ["abc"]
    assert in_merge_order(vocab | {"xyz": 258}, [("a", "b"), ("ab", "c")], whole_words=True)[0][-1] == "xyz"


def test_a_token_that_no_merge_makes_comes_from_no_text_but_can_be_decoded(tmp_path):
    vocab = {char: byte for byte, char in CHARS.items()} | {"ab": 256, "abc": 257}
    ours = opened(library(vocab, [("a", "b")]), tmp_path)
    assert ours.encode("abc") == [256, ord("c")] and ours.decode([257]) == "abc"
    assert ours.vocabulary.silent == {b"abc": 257} and ours.vocab_size == 258


def test_long_words_and_long_runs_give_the_librarys_ids(tmp_path):
    theirs = trained("gpt2")
    ours = opened(theirs, tmp_path)
    runs = ["a" * 40_000, "the" * 9_000, " " * 60_000 + "x", "\n" * 30_000, "1" * 30_000, "é🙂" * 9_000, " \n" * 20_000]
    assert not differing(ours, theirs, runs)
    with pytest.raises(ValueError, match=r"900,000 characters of white space in a row; .* at most 800,000: cut"):
        ours.encode("x" + " " * 900_000)
    assert len(ours.encode(" " * 800_000)) > 0


# ---- added tokens ----


def test_names_of_control_tokens_in_text_stay_text(tmp_path):
    theirs = trained("gpt2", specials=("<s>", "zebra"))
    ours = opened(theirs, tmp_path)
    assert not differing(ours, theirs, ["<s> a <s>", "of zebras", "<<s>>", "zebra"])
    assert set(ours.encode("<s>zebra zebra")).isdisjoint({0, 1}) and ours.decode([0, 1], skip_special=True) == ""
    with pytest.raises(ValueError, match=r"merge \('t', 'he'\) has a part or a result that is not a plain token"):
        opened(trained("gpt2", specials=("the",)), tmp_path)  # so that "the" would come from text after all


def test_other_added_tokens_are_found_in_text_as_the_library_finds_them(tmp_path):
    rng = random.Random(3)
    pieces = ["<a", "<a>", "a>b", "  ", "b<", "é🙂", "a", ">", " ", "b", "x", "<|s|>", "|>", "s|>x", "\n"]
    for _ in range(60):
        theirs = library({char: byte for byte, char in CHARS.items()}, [], kind=rng.choice(CUTS))
        specials = [AddedToken("<|s|>", special=True, normalized=rng.random() < 0.5)]
        names = rng.sample(["<a", "<a>", "a>b", "  ", "b<", "é🙂", "|>", "s|>x", "<|"], rng.randint(1, 6))
        theirs.add_special_tokens(specials)
        theirs.add_tokens([AddedToken(name, special=False, normalized=rng.random() < 0.5) for name in names])
        ours = opened(theirs, tmp_path)
        strings = ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(40)]
        assert not differing(ours, theirs, strings)
        theirs.encode_special_tokens = False
        assert [ours.encode(s, special_tokens=True) for s in strings] == [theirs.encode(s).ids for s in strings]
        theirs.encode_special_tokens = True
        huggingface_vocabulary.write(ours.vocabulary, tmp_path)
        again = Tokenizer(tmp_path / "tokenizer.json")
        assert again.fingerprint == ours.fingerprint and not differing(again, theirs, strings)
        assert ours.decode(ours.encode(names[0]), skip_special=True) == names[0]


# ---- Llama 3 ----

# Hugging Face's names where they are not Meta's: no step_id, no image, and later numbers of reserved places.
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


@pytest.mark.parametrize("names", [list(LLAMA3_SPECIALS), HF_SPECIALS], ids=["Meta's names", "Hugging Face's names"])
def test_llama3s_json_is_the_tokenizer_of_its_model_file(names, small, tmp_path):
    ours = opened(llama3_library(small, names), tmp_path, eos_token="<|eot_id|>", bos_token="<|begin_of_text|>")
    assert ours.fingerprint == small.fingerprint and ours.vocab_size == small.vocab_size
    assert list(ours.special_tokens) == names
    for key in ("bos_id", "eos_id", "pad_id", "eot_id", "eom_id", "stop_tokens"):
        assert getattr(ours, key) == getattr(small, key), key
    assert all(ours.encode(s) == small.encode(s) for s in STRINGS.values())
    reserved = opened(llama3_library(small, names), tmp_path, eos_token="<|reserved_special_token_7|>")
    assert reserved.eos_id == small.eos_id and set(reserved.stop_tokens) - set(small.stop_tokens) == {
        reserved.special_tokens["<|reserved_special_token_7|>"]
    }
    dialog = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert encode_dialog(ours, dialog) == encode_dialog(small, dialog)


def test_the_published_vocabulary_gives_the_librarys_ids(tmp_path):
    path = os.environ.get("LLAMA3_TOKENIZER")
    if not path:
        pytest.skip("LLAMA3_TOKENIZER does not name Meta's tokenizer.model")
    real = Tokenizer(path)
    theirs = llama3_library(real, HF_SPECIALS)
    ours = opened(theirs, tmp_path)
    assert ours.fingerprint == real.fingerprint
    rng = random.Random(11)
    tokens = [token.decode("utf-8", "ignore") for token in real.vocabulary.tokens]
    mixed = ["".join(rng.choices(tokens, k=rng.randint(1, 6))) for _ in range(3_000)]
    assert not differing(ours, theirs, [*STRINGS.values(), *mixed, *(nasty(rng) for _ in range(3_000))])


def test_tokens_that_merge_in_no_order_of_time_are_read_as_they_are(tmp_path):
    """Llama 3 has such: `ab` comes after `abc` in the list, and is merged before it."""
    tokens = [*(bytes([i]) for i in range(256)), b"abc", b"ab", b"xyz"]
    ours = Tokenizer.from_ranks({token: i for i, token in enumerate(tokens)})
    theirs = llama3_library(ours, list(LLAMA3_SPECIALS))
    again = opened(theirs, tmp_path)
    strings = ["abc", "xabc", "abcabcab", "xyz", "xyzz", " xyz", "ab c"]
    assert again.fingerprint == ours.fingerprint and not differing(again, theirs, strings)


# ---- begin and end of text ----


def test_bos_is_what_the_template_puts_in_front_and_eos_what_the_files_beside_name(tmp_path):
    theirs = trained("gpt2", specials=("<s>", "</s>"))
    ours = opened(theirs, tmp_path, bos_token="<s>", eos_token={"content": "</s>"})
    assert (ours.bos_id, ours.eos_id, ours.stop_tokens) == (None, 1, (1,))  # nothing puts <s> in front
    assert ours.encode("a", bos=True, eos=True) == [*ours.encode("a"), 1]
    theirs.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    ours = opened(theirs, tmp_path)
    assert (ours.bos_id, ours.eos_id) == (0, 1)
    assert ours.encode("some text", bos=True) == theirs.encode("some text").ids
    assert (ours.pad_id, ours.eot_id, ours.eom_id) == (None, None, None)


def test_a_vocabulary_without_bos_and_eos_adds_none(tmp_path):
    ours = opened(trained("digits"), tmp_path)
    assert ours.encode("a1", bos=True, eos=True) == ours.encode("a1") and ours.stop_tokens == ()


def test_chat_needs_llama3s_control_tokens_and_says_so(tmp_path):
    ours = opened(trained("gpt2", specials=("<s>",)), tmp_path)
    with pytest.raises(
        ConfigError, match=r"has no <\|begin_of_text\|>, .* Llama 3's chat format needs: give a chat template"
    ) as error:
        encode_dialog(ours, [{"role": "user", "content": "Hi"}])
    assert "\n" not in str(error.value)
    message = {"role": "assistant", "content": "plain text", "tool_calls": []}
    assert parse_assistant(ours.encode("plain text"), tokenizer=ours) == message


def test_streams_of_shuffled_ids_decode_as_a_whole(tmp_path):
    rng = random.Random(1)
    vocab = dict(zip(CHARS.values(), rng.sample(range(256), 256), strict=True))
    ours = opened(library(vocab, []), tmp_path)
    ids = ours.encode("é🙂 漢字")
    stream = StreamDecoder(ours)
    assert "".join(map(stream.push, ids)) == "é🙂 漢字" == ours.decode(np.array(ids)) and ids != list(
        "é🙂 漢字".encode()
    )


# ---- what is refused ----


FLAGS = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)


def changed(**parts: object) -> Callable[[dict], None]:
    """A change of some keys of the file."""
    return lambda data: data.update(parts)


def in_model(**parts: object) -> Callable[[dict], None]:
    return lambda data: data["model"].update(parts)


def added(**parts: object) -> Callable[[dict], None]:
    token = FLAGS | {"id": 300, "content": "<new>", "special": False} | parts
    return lambda data: data["added_tokens"].append(token)


def renamed(old: str, new: str) -> Callable[[dict], None]:
    """A token of another name."""
    return lambda data: data["model"]["vocab"].update({new: data["model"]["vocab"].pop(old)})


SPLIT = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(**parts: object) -> Callable[[dict], None]:
    return changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT | parts, BYTE_LEVEL]})


def template_of(*single: object, ids: object = 299) -> Callable[[dict], None]:
    return changed(
        post_processor={
            "type": "TemplateProcessing",
            "single": list(single),
            "pair": [BODY, BODY],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [ids], "tokens": ["<s>"]}},
        }
    )


BOS, BODY = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
ODD_SPLIT = split(pattern={"Regex": r"\w+|\W"})
BY_LIBRARY = {  # what tiktoken cannot do
    "normalizer": changed(normalizer={"type": "NFC"}),
    "no decoder": changed(decoder=None),
    "byte fallback": in_model(byte_fallback=True),
    "suffix": in_model(end_of_word_suffix="</w>"),
    "no pre_tokenizer": changed(pre_tokenizer=None),
    "prefix space": changed(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}),
    "no regex": changed(pre_tokenizer=BYTE_LEVEL),
    "unknown pattern": ODD_SPLIT,
    "string pattern": split(pattern={"String": " "}),
    "removed": split(behavior="Removed"),
    "inverted": split(invert=True),
    "left strip": added(lstrip=True),
    "a byte is missing": renamed("~", "~~"),
    "long tokens": renamed("~", "~" * 9_000),
    "a merge twice": lambda data: data["model"]["merges"].append(data["model"]["merges"][0]),
    "an odd character": renamed("~", "a b"),
    "added token with a gap": added(id=301),
    "added token of two ids": added(content="a"),
}
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 40}
SLOW = "could take very long"
UNSUPPORTED = {
    "decoder": (changed(decoder={"type": "WordPiece", "prefix": "#", "cleanup": False}), "decoder 'WordPiece'"),
    "dropout": (in_model(dropout=0.1), "model.dropout is 0.1, which makes ids random"),
    "prefix": (in_model(continuing_subword_prefix="##"), "model.continuing_subword_prefix is not supported"),
    "unknown setting": (in_model(new_rule=True), "model.new_rule is not supported"),
    "metaspace": (changed(pre_tokenizer={"type": "Metaspace"}), "cannot read it"),
    "post-processor": (changed(post_processor={"type": "New"}), "post_processor New|cannot read it"),
    "two tokens in front": (template_of(BOS, BOS, BODY), "at most one special token before the text"),
    "two ids": (template_of(BOS, BODY, ids=5), "'<s>' in front of a text, which is not one token"),
    "a repeated repetition": (split(pattern={"Regex": "(a+)+b"}), SLOW),
    "a back-reference": (split(pattern={"Regex": r"(a)\1"}), SLOW),
    "a long chain": (split(pattern={"Regex": "a*a*a*a*a*b"}), SLOW),
    "a text that grows": (
        changed(normalizer={"type": "Sequence", "normalizers": [REPLACE] * 3}),
        "64,000 times as long",
    ),
    "a damaged map": (changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}), "is damaged"),
}
DAMAGED = {
    "no model": (changed(model=None), "model must be an object, got None"),
    "no vocabulary": (in_model(vocab=[]), "model.vocab must be an object"),
    "no merges": (in_model(merges={}), "model.merges must be a list"),
    "a merge of three": (in_model(merges=["a b c"]), "'a b c', which is not a pair"),
    "a merge of numbers": (in_model(merges=[[1, 2]]), r"\[1, 2\], which is not a pair"),
    "a number for a merge": (in_model(merges=[3]), "3, which is not a pair"),
    "a merge of no tokens": (
        in_model(merges=["a qqq"]),
        r"\('a', 'qqq'\) has a part or a result that is not a plain token",
    ),
    "an id that is no number": (lambda data: data["model"]["vocab"].update(a="b"), "'a': 'b'"),
    "an id twice": (lambda data: data["model"]["vocab"].update(a=66), "id 66 is used twice"),
    "a negative id": (lambda data: data["model"]["vocab"].update(a=-1), "has id -1"),
    "an id far out": (lambda data: data["model"]["vocab"].update(a=1 << 62), "ids of 300 tokens must be 0 to 299"),
    "added token without a name": (added(content=None), "must have content, id and flags"),
    "added token of surrogates": (added(content="\ud800"), "cannot be the name of a token"),
    "added token that is no object": (changed(added_tokens=[1]), "an added token must be an object, got 1"),
    "no added tokens": (changed(added_tokens=None), "added_tokens must be a list"),
}


@pytest.fixture
def sound(tmp_path) -> tuple[dict, Path]:
    """The contents of a file that is read, and where to put it: 256 bytes, 43 merges and <s>, with ids in order."""
    made = library({char: byte for byte, char in CHARS.items()}, [])
    data = json.loads(made.to_str())
    for _ in range(43):
        data["model"]["merges"].append(f"{'a' * (len(data['model']['vocab']) - 255)} a")
        data["model"]["vocab"]["a" * (len(data["model"]["vocab"]) - 254)] = len(data["model"]["vocab"])
    data["added_tokens"] = [FLAGS | {"id": 299, "content": "<s>", "special": True}]
    return data, tmp_path / "tokenizer.json"


@pytest.mark.parametrize("name", BY_LIBRARY)
def test_what_tiktoken_cannot_do_gives_the_librarys_ids_by_the_library(name, sound):
    data, path = sound
    BY_LIBRARY[name](data)
    path.write_text(json.dumps(data))
    ours, theirs = Tokenizer(path), Library.from_file(str(path))
    theirs.encode_special_tokens = True
    assert isinstance(ours.vocabulary, LibraryVocabulary) and ours.vocab_size >= theirs.get_vocab_size()
    rng = random.Random(name)
    strings = [*STRINGS.values(), "a <new> ab", "~~ ~a b", *(nasty(rng) for _ in range(50))]
    expected = [encoding.ids for encoding in theirs.encode_batch(strings, add_special_tokens=False)]
    assert [ours.encode(s) for s in strings] == expected
    assert [ours.decode(ids) for ids in expected] == theirs.decode_batch(expected, skip_special_tokens=False)
    assert pickle.loads(pickle.dumps(ours)).fingerprint == ours.fingerprint


@pytest.mark.parametrize("name", [*UNSUPPORTED, *DAMAGED])
def test_unsound_json_is_refused_in_one_line_that_names_the_part(name, sound):
    data, path = sound
    path.write_text(json.dumps(data))
    assert Tokenizer(path).vocab_size == 300
    change, message = (UNSUPPORTED | DAMAGED)[name]
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert isinstance(error.value, ConfigError) == (name in UNSUPPORTED)
    assert name not in UNSUPPORTED or "can still be used with token ids" in str(error.value)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"model": 1, "model": 2}', "'model' appears twice"),
        (b"[1]", "must be a JSON object"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_a_file_that_is_no_json_is_refused(contents, message, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(contents)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(tmp_path / "tokenizer.json")
    assert "tokenizer.json" in str(error.value) and "\n" not in str(error.value)


def test_many_names_to_look_for_are_found_by_the_library(sound):
    data, path = sound
    data["added_tokens"] += [FLAGS | {"id": 300 + i, "content": f"<{i}>", "special": False} for i in range(2_001)]
    path.write_text(json.dumps(data))
    assert Tokenizer(path).encode("a<7><2000>") == [97, 307, 2_300]


def test_settings_that_are_no_tokens_are_refused(tmp_path):
    for settings, message in (
        ({"eos_token": 5}, "eos_token must be a name, got 5"),
        ({"additional_special_tokens": "<a>"}, "additional_special_tokens must be a list of tokens, got '<a>'"),
        ({"extra_special_tokens": ["<a>", 7]}, "a token of extra_special_tokens or additional_special_tokens must be"),
        ({"added_tokens_decoder": {"900": "<a>"}}, "added_tokens_decoder has '900': '<a>', not an id and a token"),
        ({"added_tokens_decoder": {"x": {"content": "<a>"}}}, "added_tokens_decoder has 'x'"),
    ):
        with pytest.raises(ValueError, match=f"tokenizer_config.json: {re.escape(message)}"):
            opened(trained("gpt2"), tmp_path, **settings)


# The tokens that transformers 5.24 adds, for the `tokenizers` library to add.
NAMED = "<|im_start|> <|im_end|> <tool_call> [PAD]".split()


@pytest.mark.parametrize("kind", ["llama3", "gpt2", "metaspace"])
@pytest.mark.parametrize(
    ("files", "added"),
    [
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, ["<|im_end|>"]),
        ({"tokenizer_config": {"pad_token": "[PAD]", "eos_token": {"content": "<|im_end|>"}}}, ["<|im_end|>", "[PAD]"]),
        ({"tokenizer_config": {"image_token": "[PAD]", "bos_token": "<|im_start|>"}}, ["<|im_start|>", "[PAD]"]),
        ({"tokenizer_config": {"additional_special_tokens": NAMED[:2], "pad_token": "[PAD]"}}, ["[PAD]", *NAMED[:2]]),
        ({"tokenizer_config": {"extra_special_tokens": {"a": "<|im_end|>"}}}, ["<|im_end|>"]),
        ({"special_tokens_map": {"eos_token": "<|im_end|>"}, "tokenizer_config": {"eos_token": "[PAD]"}}, NAMED[1:2]),
        ({"special_tokens_map": {"eos_token": "[PAD]"}, "tokenizer_config": {"added_tokens_decoder": {}}}, []),
        ({"special_tokens_map": {"additional_special_tokens": NAMED[:2]}}, NAMED[:2]),
        (
            {"added_tokens": {"<tool_call>": 5_001, "[PAD]": 5_000}, "special_tokens_map": {"pad_token": "[PAD]"}},
            ["[PAD]", AddedToken("<tool_call>", special=False, normalized=True)],
        ),
        (
            {
                "tokenizer_config": {
                    "eos_token": "<|im_end|>",
                    "added_tokens_decoder": {
                        "7001": {"content": "<tool_call>", "special": False, "normalized": False, "rstrip": True},
                        "7000": {"content": "[PAD]", "special": True},
                    },
                }
            },
            ["[PAD]", AddedToken("<tool_call>", special=False, normalized=False, rstrip=True), "<|im_end|>"],
        ),
        # A word of the vocabulary is looked for in text, and is no control token.
        ({"tokenizer_config": {"pad_token": "end"}}, [AddedToken("end", special=False, normalized=False)]),
        ({"tokenizer_config": {"pad_token": "d"}}, [AddedToken("d", special=False, normalized=False)]),
    ],
)
def test_tokens_of_other_files_are_added_as_transformers_adds_them(kind, files, added, tmp_path):
    theirs = metaspace() if kind == "metaspace" else trained(kind, specials=("<s>",))
    theirs.save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    theirs.add_tokens([t if isinstance(t, AddedToken) else AddedToken(t, special=True) for t in added])
    ours = Tokenizer(tmp_path)
    rng = random.Random(kind)
    pieces = [*NAMED, *NAMED, "<s>", " ", "the end", "héllo", "\n"]
    texts = ["".join(rng.choice(pieces) for _ in range(8)) for _ in range(60)]
    for special in (True, False):
        theirs.encode_special_tokens = not special
        for text in texts:
            ids = theirs.encode(text, add_special_tokens=False).ids
            as_piece = kind == "metaspace" and {*ids} & {*ours.special_tokens.values()}  # by the model, which lists it
            if special or not as_piece:
                assert ours.encode(text, special_tokens=special) == ids
    assert ours.special_tokens == {t.content: i for i, t in theirs.get_added_tokens_decoder().items() if t.special}


@pytest.mark.parametrize(
    "changes",
    [
        {"added_tokens": 5},
        {"added_tokens": [{"id": 1, "content": {}}]},
        {"model": {"type": "Unigram", "vocab": [[{}, 0.0], ["<unk>", 0.0]], "unk_id": 0}},
        {"model": {"type": "BPE", "vocab": {"<x>": "1", "a": 0}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"<x>": 1, "a": 0}, "merges": [[1, {}], "a"]}},
    ],
)
def test_damage_is_refused_in_one_line_where_other_files_add_tokens(changes, tmp_path):
    trained("gpt2").save(str(tmp_path / "tokenizer.json"))
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(data | changes))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<x>", "pad_token": "a"}))
    with pytest.raises(ValueError, match="tokenizer.json: ") as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def metaspace() -> Library:
    """A Unigram vocabulary, whose words begin with a space."""
    characters = sorted({*"abcdefghijklmnopqrstuvwxyz<>|/_[]PADé\n"})
    listed = [("<unk>", 0.0), ("<s>", 0.0), ("\u2581", -2.0), ("end", -2.4), *((c, -3.0) for c in characters)]
    made = Library(models.Unigram(listed, unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<s>"])
    return made


# ---- written ----


def test_written_files_are_read_back_and_loaded_by_the_library(small, tmp_path):
    huggingface_vocabulary.write(small.vocabulary, tmp_path, model_max_length=4_096)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    theirs = Library.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    rng = random.Random(2)
    assert not differing(small, theirs, [*STRINGS.values(), *(nasty(rng) for _ in range(1_000))])
    assert theirs.encode("hi").ids == small.encode("hi", bos=True)
    again = Tokenizer(tmp_path / "tokenizer.json")
    assert again.fingerprint == small.fingerprint and again.special_tokens == small.special_tokens


def test_transformers_reads_what_is_written(small):
    golden = GOLDEN["transformers"]
    assert golden["bos_eos_pad"] == [small.bos_id, small.eos_id, small.pad_id]
    assert (golden["size"], golden["model_max_length"]) == (small.vocab_size, 4_096)
    assert golden["with_bos"] == small.encode("with begin", bos=True)
    assert len(golden["strings"]) > 200
    assert not [n for n, ids in golden["strings"].items() if digest(small.encode(STRINGS[n])) != ids]


def test_merges_are_those_of_hugging_faces_converter(small):
    merges = [[spelled(left), spelled(right)] for left, right in every_split(list(small.vocabulary.tokens))]
    assert hashlib.sha256(json.dumps(merges).encode()).hexdigest() == GOLDEN["transformers"]["merges"]


def test_the_chat_template_renders_what_encode_dialog_encodes(small):
    golden = hashlib.sha256(llama3_template.CHAT_TEMPLATE.encode()).hexdigest()
    assert golden == GOLDEN["template"], "run tests/golden/make_tokenizers.py: the template has changed"
    for name, case in GOLDEN["dialogs"].items():
        arguments = {key: value for key, value in case.items() if key != "text"}
        assert small.decode(encode_dialog(small, **arguments)[0]) == case["text"], name


def test_only_vocabularies_of_dialogs_fit_the_chat_template(small, tmp_path):
    for tokenizer, fits in ((small, True), (opened(trained("gpt2", specials=("<s>",)), tmp_path), False)):
        assert llama3_template.fits(tokenizer.vocabulary) == fits
        assert (Llama3Format(tokenizer).template is not None) == fits


def test_two_tokens_of_one_spelling_cannot_be_written(small, tmp_path):
    fields = gguf_fields(small)
    fields["tokens"][small.pad_id] = "a"
    with pytest.raises(ConfigError, match="both the token and the special token spelled 'a'"):
        huggingface_vocabulary.write(from_gguf(fields).vocabulary, tmp_path)


# ---- folders ----


def test_a_folder_keeps_either_kind_and_finds_it_again(small, tmp_path):
    general = opened(trained("gpt2", specials=("<s>",)), tmp_path, eos_token="<s>")
    run = tmp_path / "run"
    run.mkdir()
    for tokenizer, name in ((small, "tokenizer.model"), (general, "tokenizer.json"), (small, "tokenizer.model")):
        assert tokenizer.save_to(run) == run / name == find(run)
        again = Tokenizer(run / name)
        assert (again.fingerprint, again.path) == (tokenizer.fingerprint, run / name)
        assert again.eos_id == tokenizer.eos_id
    with pytest.raises(ConfigError, match="tokenizer.model in Meta's format can only hold ranks .* use `save_to`"):
        general.save(tmp_path / "tokenizer.model")


def test_other_names_for_reserved_places_are_kept_in_a_json(small, tmp_path):
    ours = opened(llama3_library(small, HF_SPECIALS), tmp_path)
    assert ours.save_to(tmp_path) == tmp_path / "tokenizer.json"
    assert list(Tokenizer(tmp_path / "tokenizer.json").special_tokens) == HF_SPECIALS


def test_find_prefers_metas_file_unless_it_is_another_format(small, tmp_path):
    assert find(tmp_path) is None and find(tmp_path / "nothing") is None
    (tmp_path / "original").mkdir()
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00 ")
    assert find(tmp_path) == tmp_path / "tokenizer.model"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert find(tmp_path) == tmp_path / "tokenizer.json"
    small.save(tmp_path / "original" / "tokenizer.model")
    assert find(tmp_path) == tmp_path / "original" / "tokenizer.model"
    small.save(tmp_path / "tokenizer.model")
    assert find(tmp_path) == tmp_path / "tokenizer.model"


def test_a_missing_json_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file; give a vocabulary file or a folder"):
        Tokenizer(tmp_path / "tokenizer.json")


# ---- GGUF ----


def gguf_fields(tokenizer: Tokenizer) -> dict:
    """The argument of `from_gguf`."""
    return dict(gguf_vocabulary.fields(tokenizer.vocabulary))


def from_gguf(fields: dict) -> Tokenizer:
    return Tokenizer.from_vocabulary(gguf_vocabulary.vocabulary(fields))


def test_llama_cpp_gives_the_ids_of_the_fields_that_are_written(small):
    fields = gguf_vocabulary.fields(small.vocabulary)
    golden = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    assert golden == GOLDEN["fields"], "run tests/golden/make_tokenizers.py: what is written has changed"
    assert GOLDEN["llama_cpp"]["with_bos"] == small.encode("with begin", bos=True)
    assert len(GOLDEN["llama_cpp"]["strings"]) > 200
    assert not [n for n, ids in GOLDEN["llama_cpp"]["strings"].items() if digest(small.encode(STRINGS[n])) != ids]


def test_gguf_fields_are_read_back_as_the_same_vocabulary(small, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    others = [opened(trained(kind, specials=("<s>",)), tmp_path) for kind in ("gpt2", "digits", "one_digit")]
    for tokenizer in (small, *others):
        again = from_gguf(gguf_fields(tokenizer))
        assert again.fingerprint == tokenizer.fingerprint and again.special_tokens == tokenizer.special_tokens
        assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
        assert again.encode("It's 123 é\n") == tokenizer.encode("It's 123 é\n")


def test_fine_tunes_of_llama_3_by_another_name_have_its_ids(small):
    named = from_gguf(gguf_fields(small) | {"pre": "smaug-bpe"})
    assert all(named.encode(s) == small.encode(s) for s in STRINGS.values())


def test_gguf_bos_follows_the_way_of_cutting_where_the_file_does_not_say(small):
    fields = gguf_fields(small)
    assert from_gguf(fields | {"add_bos": None}).bos_id == small.bos_id
    assert from_gguf(fields | {"add_bos": False}).bos_id is None
    assert from_gguf(fields | {"add_bos": None, "pre": "gpt-2"}).bos_id is None


def test_user_defined_tokens_of_a_gguf_are_found_in_text(small):
    fields = gguf_fields(small)
    fields["token_types"] = np.array(fields["token_types"], np.int32)
    fields["token_types"][small.pad_id] = 4
    found = from_gguf(fields)
    name = "<|finetune_right_pad_id|>"
    assert found.encode(f"a{name}b") == [*small.encode("a"), small.pad_id, *small.encode("b")]
    assert name not in found.special_tokens and from_gguf(gguf_fields(found)).fingerprint == found.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "rwkv"}, "tokenizer.ggml.model 'rwkv' is not supported.*used with token ids"),
        ({"pre": "llama-bp"}, "tokenizer.ggml.pre 'llama-bp' is not supported; did you mean 'llama-bpe'.*token ids"),
        ({"pre": None}, "tokenizer.ggml.pre None is not supported"),
        ({"token_types": None}, r"token_type has 0 types for 1,100 tokens"),
        ({"token_types": [6] * 1_100}, "token_type of id 0 is 6, which byte-level BPE does not have"),
        ({"tokens": ["a"] * 1_100}, "has 'a' twice, as ids 0 and 1"),
        ({"bos": 1_100}, r"bos_token_id is 1100, but there are 1,100 tokens"),
        ({"eos": -1}, "eos_token_id is -1"),
        ({"merges": ["abc"]}, "'abc', which is not two tokens"),
        ({"merges": [""]}, "'', which is not two tokens"),
        ({"merges": ["a b", "a b"]}, "is listed twice"),
    ],
)
def test_unsound_gguf_fields_are_refused_in_one_line(change, message, small):
    with pytest.raises(ValueError, match=message) as error:
        from_gguf(gguf_fields(small) | change)
    assert "\n" not in str(error.value)


def test_vocabularies_that_llama_cpp_cannot_have_are_not_written(tmp_path):
    vocab = {char: byte for byte, char in CHARS.items()} | {"ab": 256, "abcd": 257}
    for kind, ignore_merges in (("llama3", False), ("gpt2", True)):
        ours = opened(library(vocab, [("a", "b")], kind=kind, ignore_merges=ignore_merges), tmp_path)
        with pytest.raises(ConfigError, match="unlike this vocabulary"):
            gguf_vocabulary.fields(ours.vocabulary)
