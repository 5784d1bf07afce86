"""Claims about SentencePiece vocabularies: ids and texts are compared with the `sentencepiece` library, live."""

import io
import json
import pickle
import random

import numpy as np
import pytest
import sentencepiece

from helpers.paths import GOLDEN_FOLDER
from llama_jax.errors import ConfigError
from llama_jax.text import StreamDecoder, Tokenizer
from llama_jax.text.formats import gguf
from llama_jax.text.piece_vocabulary import model_contents, parse_model

TEXTS = [c["text"] for c in json.loads((GOLDEN_FOLDER / "text.json").read_text("utf-8"))["strings"].values()]
LINES = [line for text in TEXTS for line in text.split("\n") if line.strip() and "\ud800" not in line][:400]
ODD = ["  two  spaces ", "<s> x </s><ctl><sep> a", "\n\n\t x", "", "<0x0A>", "héé 漢字 🙂", "▁x"]


def trained(algorithm: str, **options) -> bytes:
    """A model file that the library learns: Llama 2's settings for BPE, and its defaults for Unigram."""
    out = io.BytesIO()
    if algorithm == "bpe":
        options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.encode("utf-8", "ignore").decode() for line in LINES * 3),
        model_writer=out,
        model_type=algorithm,
        vocab_size=1_000,
        user_defined_symbols=["<sep>"],
        control_symbols=["<ctl>"],
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **({"byte_fallback": True} | options),
    )
    return out.getvalue()


@pytest.fixture(scope="module", params=["bpe", "unigram", "bpe without bytes"])
def model(request) -> bytes:
    return trained(request.param.split()[0], byte_fallback="without" not in request.param)


def opened(contents: bytes, folder, **config) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(contents)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


def strings(count: int) -> list[str]:
    rng = random.Random(5)
    pool = [*LINES, *ODD]
    return [*ODD, *("".join(rng.choice(pool)[rng.randrange(9) :][:25] for _ in range(3)) for _ in range(count))]


def test_ids_and_texts_are_the_librarys(model, tmp_path):
    ours, theirs = opened(model, tmp_path), sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in strings(400):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids and ours.decode(ids) == theirs.decode(ids), text
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, len(theirs))
    assert ours.special_tokens == {"<s>": 1, "</s>": 2, "<ctl>": 3} and ours.stop_tokens == (2,)
    assert pickle.loads(pickle.dumps(ours)).encode("abc") == ours.encode("abc")


def test_control_tokens_come_from_text_only_on_request(model, tmp_path):
    ours = opened(model, tmp_path)
    assert not {1, 2, 3} & set(ours.encode("<s>a<ctl> b</s>"))
    ids = ours.encode("<s>a<ctl> b</s>", special_tokens=True)
    assert ids == [1, *ours.encode("a"), 3, *ours.encode(" b"), 2]
    late = opened(model, tmp_path, legacy=False)  # no space in front of text after a control token
    assert late.encode("a<ctl>b", special_tokens=True)[-1] != late.encode("b")[0]


def test_a_stream_is_the_decoded_text_and_goes_on_after_a_prompt(model, tmp_path):
    ours = opened(model, tmp_path)
    ids = [1, *ours.encode("the 漢字 🙂 the"), 2]
    stream, later = StreamDecoder(ours), StreamDecoder(ours, continues=True)
    assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids, skip_special=True)
    text = "".join(map(later.push, ids)) + later.flush()
    assert text == ours.decode(ids, skip_special=True, continues=True) == " " + ours.decode(ids, skip_special=True)


def test_gguf_metadata_of_a_model_gives_its_ids(model, tmp_path):
    ours = opened(model, tmp_path)
    fields = gguf.fields(ours.vocabulary)
    again = Tokenizer.from_vocabulary(gguf.vocabulary(fields))
    for text in strings(100):
        if "<sep>" not in text:  # llama.cpp puts a space after it, SentencePiece one before it
            assert again.encode(text) == ours.encode(text) and again.decode(again.encode(text)) == ours.decode(
                ours.encode(text)
            )
    assert (again.bos_id, again.eos_id, again.special_tokens) == (1, 2, ours.special_tokens)
    assert again.encode("a<sep>b") == [*ours.encode("a"), 4, *ours.encode("b")]
    if fields["model"] == "llama":
        bare = Tokenizer.from_vocabulary(gguf.vocabulary(fields | {"space_first": False, "add_bos": False}))
        assert bare.bos_id is None and bare.decode(bare.encode(" x")) == " x"


def test_what_is_saved_is_read_again(model, tmp_path):
    ours = opened(model, tmp_path, added_tokens_decoder={"1200": {"content": "<pad>", "special": True}})
    (tmp_path / "run").mkdir()
    assert ours.save_to(tmp_path / "run") == tmp_path / "run" / "tokenizer.model"
    again = Tokenizer(tmp_path / "run")
    assert again.fingerprint == ours.fingerprint and again.special_tokens["<pad>"] == 1_200
    assert parse_model(model_contents(ours.vocabulary.model)) == ours.vocabulary.model


def test_files_beside_a_model_add_tokens_and_settings(model, tmp_path):
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<img>": 1_100, "[PAD]": 1_101}))
    ours = opened(model, tmp_path, add_bos_token=False, tokenizer_class="LlamaTokenizer", pad_token="[PAD]")
    assert ours.encode("a<img>[PAD]")[1:2] == [1_100] and 1_101 not in ours.encode("[PAD]")
    assert (ours.bos_id, ours.pad_id, ours.special_tokens["[PAD]"]) == (None, 1_101, 1_101)
    small = ours.for_model(len(ours.vocabulary.model.pieces))
    with pytest.raises(ConfigError, match=r"the text holds '<img>' \(id 1100\), which the model has no row for"):
        small.encode("a<img>")
    assert small.decode([1_101]) == "[PAD]" and small.encode("ab") == ours.encode("ab")


def test_tokens_that_the_settings_name_without_an_id_are_added(model, tmp_path):
    size = len(sentencepiece.SentencePieceProcessor(model_proto=model))
    ours = opened(model, tmp_path, eos_token="<|im_end|>", pad_token="a", additional_special_tokens=["<|x|>", "<s>"])
    assert ours.special_tokens == {"<s>": 1, "</s>": 2, "<ctl>": 3, "<|im_end|>": size, "<|x|>": size + 1}
    assert ours.eos_id == size and ours.decode([ours.pad_id]) == "a" and size in ours.stop_tokens
    assert ours.encode("<|x|>", special_tokens=True) == [size + 1] and size not in ours.encode("a<|im_end|>")
    listed = {"added_tokens_decoder": {str(size + 4): {"content": "<|im_end|>", "special": False}}}
    ours = opened(model, tmp_path, eos_token="<|im_end|>", **listed)
    assert ours.eos_id == ours.special_tokens["<|im_end|>"] == size + 4


def test_a_piece_that_is_a_control_token_never_comes_from_text(tmp_path):
    contents = trained("bpe")
    pieces = parse_model(contents).pieces
    place = next(i for i, piece in enumerate(pieces) if len(piece.text) > 3 and piece.type == 1 and i > 300)
    name = pieces[place].text
    added = {str(place): {"content": name, "special": True}}
    ours = opened(contents, tmp_path, added_tokens_decoder=added)
    text = name.replace("▁", " ")
    assert place not in ours.encode(f"x{text}") and place in ours.encode(name, special_tokens=True)


@pytest.mark.parametrize("cut", [1, 40, 1000, -3])
def test_a_damaged_model_is_refused_in_one_line(cut, tmp_path):
    with pytest.raises(ValueError) as error:
        opened(trained("bpe")[:cut] if cut > 0 else b"\n" + trained("bpe")[:cut], tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": None}, "scores must be 3 numbers"),
        ({"scores": [0.0, float("nan"), 0.0]}, "scores of id 1 is nan"),
        ({"tokens": ["<unk>", "a", "a"]}, "has 'a' twice"),
        ({"unknown": 7}, "unknown_token_id is 7, but there are 3 tokens"),
    ],
)
def test_unsound_gguf_pieces_are_refused(change, message):
    fields = dict.fromkeys(gguf.Fields.__annotations__) | {"model": "llama", "merges": []}
    fields |= {"tokens": ["<unk>", "<s>", "a"], "token_types": np.array([2, 3, 1]), "scores": [0.0, 0.0, -1.0]}
    assert Tokenizer.from_vocabulary(gguf.vocabulary(fields)).encode("a")
    with pytest.raises(ValueError, match=message):
        gguf.vocabulary(fields | change)
