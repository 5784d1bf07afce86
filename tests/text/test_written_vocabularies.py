"""Vocabularies written as tokenizer.json and as GGUF metadata: other programs and we read the same ids back.

tests/golden/make_tokenizers.py holds the ids that transformers and llama.cpp give for them.
"""

import hashlib
import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer as Library

from helpers.library_tokenizers import (
    CHARS,
    HF_SPECIALS,
    STRINGS,
    differing,
    library,
    llama3_library,
    nasty,
    opened,
    trained,
)
from helpers.paths import GOLDEN_FOLDER
from helpers.tokenizers import digest
from llama_jax.errors import ConfigError
from llama_jax.text import Tokenizer, encode_dialog, llama3_template
from llama_jax.text.chat_format import Llama3Format
from llama_jax.text.formats import gguf as gguf_vocabulary
from llama_jax.text.formats import huggingface as huggingface_vocabulary
from llama_jax.text.merging import every_split
from llama_jax.text.vocabulary import spelled
from llama_jax.text.vocabulary_files import find

GOLDEN = json.loads((GOLDEN_FOLDER / "tokenizers.json").read_text(encoding="utf-8"))

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
