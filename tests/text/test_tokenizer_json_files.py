"""Contents of tokenizer.json: what only the library can do, damage in one line, and tokens of other files."""

import json
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from helpers.library_tokenizers import CHARS, STRINGS, library, nasty, opened, trained
from llama_jax.errors import ConfigError
from llama_jax.text import Tokenizer
from llama_jax.text.library_vocabulary import LibraryVocabulary
from llama_jax.text.patterns import SPLIT_PATTERN

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
