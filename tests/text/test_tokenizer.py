"""Claims about the tokenizer and the vocabulary trainer; tests/golden/make_text.py holds Meta's side."""

import base64
import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from helpers.paths import ROOT
from helpers.tokenizers import GOLDEN, digest
from llama_jax.errors import ConfigError
from llama_jax.text import StreamDecoder, Tokenizer, train_bpe
from llama_jax.text.bpe_training import _trained_model
from llama_jax.text.byte_pairs import metas_pieces

STRINGS = {name: case["text"] for name, case in GOLDEN["strings"].items()}
SURROGATES = {"lone_surrogates"}
BYTES = {bytes([i]): i for i in range(256)}


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    """The published vocabulary."""
    path = os.environ.get("LLAMA3_TOKENIZER")
    if not path:
        pytest.skip("LLAMA3_TOKENIZER does not name Meta's tokenizer.model")
    return Tokenizer(path, expected_vocab_size=128_256)


def expand(pieces: list) -> str:
    """A long string from its golden recipe."""
    return "".join(piece * times for piece, times in pieces)


# ---- equal to Meta ----


def test_ids_equal_metas_with_the_published_vocabulary(real):
    wrong = [n for n, case in GOLDEN["strings"].items() if real.encode(case["text"]) != case["real"]]
    assert not wrong


def test_ids_equal_metas_with_a_small_vocabulary(small):
    wrong = [n for n, case in GOLDEN["strings"].items() if digest(small.encode(case["text"])) != case["small"]]
    assert not wrong


@pytest.mark.parametrize("vocabulary", ["real", "small"])
def test_long_strings_equal_metas(vocabulary, request):
    tokenizer = request.getfixturevalue(vocabulary)
    ids = {name: tokenizer.encode(expand(case["pieces"])) for name, case in GOLDEN["long"].items()}
    assert not [name for name, case in GOLDEN["long"].items() if digest(ids[name]) != case[vocabulary]]


def test_known_sentence_and_control_ids(real):
    ids = [128000, 2028, 374, 264, 1296, 11914, 13, 128001]
    assert real.encode("This is a test sentence.", bos=True, eos=True) == ids
    assert (real.bos_id, real.eos_id, real.pad_id) == (128000, 128001, 128004)
    assert real.stop_tokens == (128001, 128008, 128009)
    assert real.special_tokens["<|reserved_special_token_245|>"] == 128255
    assert real.special_tokens.items() >= GOLDEN["special_tokens"].items()
    assert real.fingerprint == "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"


def test_cuts_are_metas_for_every_mix_of_runs():
    def one_by_one(text, max_piece, max_run):
        for start in range(0, len(text), max_piece):
            piece, begin, length = text[start : start + max_piece], 0, 0
            for i, char in enumerate(piece):
                same = i > 0 and char.isspace() == piece[i - 1].isspace()
                length = length + 1 if same else 1
                if length > max_run:
                    yield piece[begin:i]
                    begin, length = i, 1
            yield piece[begin:]

    rng = random.Random(0)
    for _ in range(3_000):
        alphabet = rng.choice(["a ", "ab\n ", "a\x1c\x85\u3000\u200b", "aaaaaaaa ", "a        "])
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 60)))
        limits = {"max_piece": rng.randint(1, 40), "max_run": rng.randint(1, 12)}
        assert list(metas_pieces(text, **limits)) == list(one_by_one(text, **limits)), (text, limits)


# ---- encode and decode ----


@pytest.mark.parametrize("vocabulary", ["real", "small"])
def test_decode_gives_back_every_string(vocabulary, request):
    tokenizer = request.getfixturevalue(vocabulary)
    for name, text in STRINGS.items():
        if name not in SURROGATES:
            assert tokenizer.decode(tokenizer.encode(text)) == text, name


def test_ids_are_exactly_256_more_than_the_ranks(small):
    assert small.vocab_size == len(GOLDEN["small_tokens"]) + 256
    assert sorted(small.special_tokens.values()) == list(range(small.vocab_size - 256, small.vocab_size))


def test_special_names_in_text_never_become_control_ids(small):
    for name in small.special_tokens:
        ids = small.encode(f"a{name}b")
        assert max(ids) < small.bos_id and small.decode(ids) == f"a{name}b"


def test_bos_and_eos_enclose_the_text(small):
    assert small.encode("hi", bos=True, eos=True) == [small.bos_id, *small.encode("hi"), small.eos_id]
    assert small.encode("") == []


def test_surrogate_pairs_join_and_lone_ones_become_replacement_characters(small):
    assert small.decode(small.encode("a\ud83d\ude42b")) == "a🙂b"
    assert small.decode(small.encode("a\ud800b\udc00")) == "a\ufffdb\ufffd"


@pytest.mark.parametrize("text", [b"bytes", None, 3, ["a"]])
def test_encode_refuses_what_is_not_text(small, text):
    with pytest.raises(TypeError, match=f"takes a str, got {type(text).__name__}"):
        small.encode(text)


def test_decode_skips_specials_only_when_asked(small):
    ids = [small.bos_id, *small.encode("hi"), small.eot_id]
    assert small.decode(ids) == "<|begin_of_text|>hi<|eot_id|>"
    assert small.decode(ids, skip_special=True) == "hi"
    assert small.decode_bytes(small.encode("é")[:1]) + small.decode_bytes(small.encode("é")[1:]) == "é".encode()


def test_decode_reads_integer_arrays_and_refuses_others(small):
    ids = small.encode("some text")
    assert small.decode(np.array(ids, np.int32)) == small.decode(np.array(ids)) == "some text"
    assert small.decode([np.int32(i) for i in ids]) == "some text"
    for wrong in (np.array(ids, np.float32), np.array([ids]), 5, "some text", [1.5], None):
        with pytest.raises(TypeError, match="flat sequence of integer ids"):
            small.decode(wrong)


def test_decode_names_the_id_out_of_range(small):
    with pytest.raises(ValueError, match=rf"id {small.vocab_size} .*0 to {small.vocab_size - 1}"):
        small.decode([1, small.vocab_size])
    with pytest.raises(ValueError, match="id -1 "):
        small.decode(np.array([-1]))


def test_broken_utf8_decodes_to_replacement_characters():
    tokenizer = Tokenizer.from_ranks(BYTES)
    assert tokenizer.decode([0xE2, 0x82, 0x41, 0xFF]) == "\ufffdA\ufffd"


def test_stream_never_breaks_a_character_and_equals_decode():
    tokenizer = Tokenizer.from_ranks(BYTES)
    rng = random.Random(1)
    text = "".join(STRINGS[name] for name in sorted(STRINGS) if name not in SURROGATES)
    assert "".join(map(StreamDecoder(tokenizer).push, tokenizer.encode(text))) == text
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in "é".encode()] == ["", "é"]
    for _ in range(500):
        alphabet = rng.choice([[0xE2, 0x82, 0xAC, 0x41], [0xF0, 0x9F, 0x99, 0x82, 0xED, 0xA0], range(512)])
        ids = [rng.choice(alphabet) for _ in range(rng.randint(0, 30))]
        parts, at = [], 0
        while at < len(ids):
            step = rng.randint(1, 4)
            parts.append(stream.push(ids[at] if step == 1 else np.array(ids[at : at + step])))
            at += step
        assert "".join(parts) + stream.flush() == tokenizer.decode(ids, skip_special=True)


def test_stream_prints_nothing_for_control_tokens(small):
    stream = StreamDecoder(small)
    assert [stream.push(i) for i in small.special_tokens.values()] == [""] * 256
    assert stream.push(np.int32(small.encode("x")[0])) == "x"


def test_pickled_copy_and_threads_give_the_same_ids(small):
    copy = pickle.loads(pickle.dumps(small))
    texts = list(STRINGS.values())
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(copy.encode, texts)) == [small.encode(text) for text in texts]
    assert copy.fingerprint == small.fingerprint and copy.vocab_size == small.vocab_size


def test_importing_text_imports_no_jax():
    code = "import sys, llama_jax.text; sys.exit('jax' in sys.modules or 'tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---- files ----


@pytest.fixture
def lines(small, tmp_path) -> list[bytes]:
    """The lines of a sound file."""
    small.save(tmp_path / "sound.model")
    return (tmp_path / "sound.model").read_bytes().splitlines(keepends=True)


def test_saved_file_loads_as_the_same_vocabulary(small, tmp_path):
    small.save(tmp_path / "tokenizer.model")
    loaded = Tokenizer(str(tmp_path / "tokenizer.model"), expected_vocab_size=small.vocab_size)
    assert loaded.fingerprint == small.fingerprint
    assert loaded.fingerprint == hashlib.sha256((tmp_path / "tokenizer.model").read_bytes()).hexdigest()
    assert loaded.encode("save and load") == small.encode("save and load")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.model"]


def test_line_endings_blank_lines_and_order_do_not_change_the_vocabulary(small, lines, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\r\n".join(line.strip() for line in reversed(lines)) + b"\r\n\r\n")
    assert Tokenizer(path).fingerprint == small.fingerprint


def replaced(number: int, line: bytes):
    """A damage: line `number` (from 1) becomes `line`."""
    return lambda lines: [*lines[: number - 1], line, *lines[number:]]


DAMAGES = {
    "not base64": (replaced(700, b"!!! 699\n"), "line 700: .*not base64"),
    "base64 with a wrong tail": (replaced(700, b"abc 699\n"), "line 700: .*not base64"),
    "no rank": (replaced(300, b"YWJj\n"), "line 300: expected `base64 rank`"),
    "three fields": (replaced(300, b"YWJj 299 1\n"), "line 300: expected `base64 rank`"),
    "rank is a word": (replaced(300, b"YWJjZGVmZw== x\n"), "line 300: rank b'x' is not a whole number"),
    "rank is negative": (replaced(300, b"YWJjZGVmZw== -1\n"), "line 300: rank b'-1' is not a whole"),
    "rank twice": (replaced(300, b"YWJjZGVmZw== 298\n"), "line 300: rank 298 is on line 299 already"),
    "rank left out": (
        lambda lines: lines[:399] + lines[400:],
        "line 400: .*has rank 400 where rank 399 should be",
    ),
    "token twice": (replaced(300, b"IQ== 299\n"), r"line 300: token b'!' is on line 1 already"),
    "empty token": (replaced(300, b" 299\n"), "line 300: expected"),
    "a byte without a token": (replaced(1, b"YWJjZGVmZw== 0\n"), r"1 of the 256 single bytes .*0x21"),
    "empty file": (lambda lines: [], "line 1: the file is empty"),
    "cut within the last rank": (
        lambda lines: [*lines[:-1], lines[-1][:-2]],
        "line 844: rank 84 .*cut short",
    ),
    "cut within the last token": (
        lambda lines: [*lines[:-1], lines[-1][:3]],
        "line 844: expected .*cut short",
    ),
    "a git lfs pointer": (lambda lines: [b"version https://git-lfs.github.com/spec/v1\n"], "git lfs pull"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_refused_in_one_line_with_place_and_mend(damage, lines, tmp_path):
    harm, message = DAMAGES[damage]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(harm(lines)))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert any(remedy in str(error.value) for remedy in ("copy the file again", "git lfs pull"))


def test_every_cut_of_a_file_is_refused_given_the_models_size(small, lines, tmp_path):
    data, path = b"".join(lines), tmp_path / "tokenizer.model"
    for keep in range(0, len(data) - 1, 97):
        path.write_bytes(data[:keep])
        with pytest.raises(ValueError, match="tokenizer.model"):
            Tokenizer(path, expected_vocab_size=small.vocab_size)


def test_file_cut_between_lines_is_known_by_the_models_size(lines, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(lines[:800]))
    assert Tokenizer(path).vocab_size == 1_056
    with pytest.raises(ValueError, match=r"holds 1,056 tokens .* model has 1,100; .*cut short") as error:
        Tokenizer(path, expected_vocab_size=1_100)
    assert "\n" not in str(error.value)


def test_missing_file_and_folder_say_what_to_give(tmp_path):
    for path in (None, "", "  ", 5, b"tokenizer.model"):
        with pytest.raises(ConfigError, match="the path of a tokenizer must be a file or a folder .*, got "):
            Tokenizer(path)
    for path in ("a" * 5_000, tmp_path / ("a" * 300), "a/" * 2_500):
        with pytest.raises(ConfigError, match=r"cannot be the path of a file: it has .* bytes, too many") as caught:
            Tokenizer(path)
        assert len(str(caught.value)) < 200
    with pytest.raises(FileNotFoundError, match="no such file; give a vocabulary file"):
        Tokenizer(tmp_path / "nothing.model")
    with pytest.raises(FileNotFoundError, match="has no vocabulary file"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "ranks",
    [{}, {b"a": 0}, BYTES | {b"ab": 257}, BYTES | {b"ab": 255}, BYTES | {b"": 256}, BYTES | {"ab": 256}],
)
def test_unsound_ranks_are_refused(ranks):
    with pytest.raises(ValueError, match="^ranks: "):
        Tokenizer.from_ranks(ranks)


# ---- the trainer ----


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """Python sources of the standard library, which hold prose, code, numbers and long runs."""
    folder = Path(json.__file__).parent.parent
    names = ["argparse.py", "textwrap.py", "shutil.py", "pathlib.py", "statistics.py", "tarfile.py"]
    texts = [(folder / n).read_text(encoding="utf-8") for n in names if (folder / n).exists()]
    return [
        *texts,
        *(STRINGS[n] for n in sorted(STRINGS) if not n.startswith("fuzz") and n not in SURROGATES),
    ]


def test_training_twice_gives_the_same_ranks(corpus):
    first, second = (train_bpe(iter(corpus), vocab_size=2_000) for _ in range(2))
    assert list(first.items()) == list(second.items()) and list(first.values()) == list(range(1_744))
    assert Tokenizer.from_ranks(first).vocab_size == 2_000
    assert sorted(list(first)[:256]) == [bytes([i]) for i in range(256)]


def test_training_in_another_process_with_other_threads_gives_the_same_ranks():
    code = (
        "import json, hashlib; from llama_jax.text import *; texts = list("
        "s['text'] for s in json.load(open('tests/golden/text.json'))['strings'].values());"
        "print(Tokenizer.from_ranks(train_bpe(texts, vocab_size=900)).fingerprint)"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, capture_output=True, check=True
        ).stdout
        for env in ({"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}, {"RAYON_NUM_THREADS": "3"})
    }
    assert len(prints) == 1


def test_trained_ids_equal_those_of_the_tokenizers_library(corpus):
    train, held_out = corpus[1:], [corpus[0], *STRINGS.values()]
    held_out = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in held_out]
    ours = Tokenizer.from_ranks(train_bpe(train, vocab_size=3_000))
    theirs = _trained_model(train, 3_000 - 256)
    assert [ours.encode(text) for text in held_out] == [theirs.encode(text).ids for text in held_out]
    assert len(ours.encode(held_out[0])) < 0.5 * len(held_out[0])


def test_trainer_refuses_impossible_sizes():
    with pytest.raises(ValueError, match="vocab_size is 511; it must be at least 512"):
        train_bpe(["a"], vocab_size=511)
    with pytest.raises(ValueError, match=r"vocab_size is 600 .* only 513 tokens .*model.vocab_size of a run. to 513"):
        train_bpe(["ab", "ab"], vocab_size=600)
    with pytest.raises(TypeError, match=r"pass \[text\]"):
        train_bpe("one text", vocab_size=600)
    assert train_bpe([], vocab_size=512) == train_bpe(["abc\ud800"], vocab_size=512)


def test_tokens_and_vocabularies_of_no_model_are_refused(lines, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(lines) + base64.b64encode(b"a" * 5000) + b" %d\n" % len(lines))
    with pytest.raises(ConfigError, match="has 5,000 bytes"):
        Tokenizer(path)
    path.write_bytes(b"\n" * 600_000)
    with pytest.raises(ValueError, match="more than any vocabulary"):
        Tokenizer(path)
