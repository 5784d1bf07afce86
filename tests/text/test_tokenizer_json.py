"""tokenizer.json: ids are compared with those of the `tokenizers` library, live."""

import os
import pickle
import random

import numpy as np
import pytest
import tiktoken
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Library

from helpers.library_tokenizers import (
    CHARS,
    CUTS,
    HF_SPECIALS,
    STRINGS,
    differing,
    library,
    llama3_library,
    nasty,
    opened,
    trained,
)
from llama_jax.errors import ConfigError
from llama_jax.text import StreamDecoder, Tokenizer, encode_dialog, parse_assistant
from llama_jax.text.byte_pairs import LLAMA3_SPECIALS
from llama_jax.text.formats import huggingface as huggingface_vocabulary
from llama_jax.text.library_vocabulary import LibraryVocabulary
from llama_jax.text.merging import in_merge_order

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
