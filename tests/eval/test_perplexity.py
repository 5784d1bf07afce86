"""Perplexity and scoring, compared with sums over full logits in numpy, and with small examples by hand."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

import llama_jax.eval
from helpers.program import program
from helpers.tokenizers import byte_tokenizer
from llama_jax import config as configs
from llama_jax.data.encoding import encode
from llama_jax.data.records import Completion, Dialog
from llama_jax.errors import ConfigError
from llama_jax.eval import scoring, sliding_window
from llama_jax.infer import whole_texts
from llama_jax.infer.llama import Llama
from llama_jax.params import init_params
from llama_jax.text.record_encoder import RecordEncoder

CONFIG = dataclasses.replace(configs.size("tiny"), max_seq_len=64)
TEXTS = [
    "The river rises in the north.",
    "Où est l'été? " * 5,
    "x",
    "It runs for three hundred miles, and meets the sea.",
]
MATCH = 2e-6  # relative, of sums in float32 and float64


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda a: 6 * a, init_params(CONFIG, jax.random.key(3)))  # far from uniform


@pytest.fixture(scope="module")
def llama(params):
    return Llama(CONFIG, params, byte_tokenizer())


def log_softmax(llama, ids):
    logits = np.asarray(llama.logits([ids]), np.float64)[0]
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def nats_at(llama, ids, place, context, stride):
    """-log p of one id, given what its window holds before it."""
    ends = [min(context + 1, len(ids))]
    while ends[-1] <= place:
        ends.append(min(ends[-1] + stride, len(ids)))
    seen = ids[max(0, ends[-1] - 1 - context) : place]
    return -log_softmax(llama, seen)[-1, ids[place]]


def naive(llama, texts, context, stride):
    """The nats of each document and its number of tokens, computed one position at a time."""
    nats, counts = [], []
    for text in texts:
        ids = [llama.tokenizer.bos_id, *text.encode()]
        nats.append(sum(nats_at(llama, ids, place, context, stride) for place in range(1, len(ids))))
        counts.append(len(ids) - 1)
    return np.array(nats), np.array(counts)


@pytest.mark.parametrize("context, stride", [(64, 64), (32, 16), (16, 5), (7, 1)])
def test_perplexity_is_the_sum_over_logits_place_by_place(llama, context, stride):
    texts = TEXTS if stride > 5 else TEXTS[2:]
    found = sliding_window.perplexity(llama, texts, context=context, stride=stride, batch_size=3)
    nats, counts = naive(llama, texts, context, stride)
    bytes_ = sum(len(text.encode()) for text in texts)
    assert found.tokens == counts.sum() == found.bytes == bytes_  # a token a byte
    assert found.nats_per_token == pytest.approx(nats.sum() / counts.sum(), rel=MATCH)
    assert found.perplexity == pytest.approx(math.exp(nats.sum() / counts.sum()), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / bytes_, rel=MATCH)


@pytest.mark.parametrize("context, stride", [(64, 64), (16, 8)])
def test_of_dialogs_and_completions_what_training_counts_is_measured(llama, context, stride):
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]
    samples = [Dialog("d:1", messages, None), Completion("c:1", "One, two,", " three"), TEXTS[0]]
    result = sliding_window.perplexity(llama, samples, context=context, stride=stride, batch_size=2)
    encoder = RecordEncoder(llama.tokenizer, llama.chat_format, "no")
    rows = [encode(sample, encoder, max_length=None) for sample in samples[:2]]
    ids = [llama.tokenizer.bos_id, *TEXTS[0].encode()]
    rows.append((ids, [True] * len(ids)))
    nats = [nats_at(llama, ids, i, context, stride) for ids, targets in rows for i in range(1, len(ids)) if targets[i]]
    assert result.tokens == len(nats) and result.documents == 3
    assert result.nats_per_token == pytest.approx(np.mean(nats), rel=MATCH)
    assert result.bytes == len("Nobody." + " three" + TEXTS[0])  # control tokens are no text


def test_windows_predict_every_id_once_after_at_least_the_overlap():
    rng = np.random.default_rng(0)
    for _ in range(300):
        length, context = int(rng.integers(0, 60)), int(rng.integers(1, 20))
        stride = int(rng.integers(1, context + 1))
        ids = list(range(length))
        found = list(sliding_window.windows(ids, context=context, stride=stride))
        assert [i for _, targets in found for i in targets] == ids[1:]
        for before, targets in found:
            assert [*before, *targets] == list(range(before[0], targets[-1] + 1)) and len(before) >= 1
            assert len(before) + len(targets) == min(context + 1, targets[-1] + 1)  # full, or all that there is


def test_the_standard_error_is_what_drawing_documents_again_and_again_gives():
    rng = np.random.default_rng(1)
    ratios, errors = [], []
    for _ in range(2000):
        counts = rng.integers(20, 200, 60)
        nats = counts * (3 + rng.normal(0, 0.5, 60))  # a document's tokens are alike
        ratios.append(nats.sum() / counts.sum())
        errors.append(sliding_window._ratio_error(nats, counts))
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.05)


def test_the_error_is_over_windows_where_there_is_one_document(llama):
    one = sliding_window.perplexity(llama, TEXTS[1:2], context=16, stride=8)
    assert (one.documents, one.windows > 5) == (1, True) and 0 < one.standard_error < one.nats_per_token
    assert math.isnan(sliding_window.perplexity(llama, ["a few"], context=16).standard_error)


def test_scores_and_greedy_are_those_of_the_logits_whatever_shares_a_batch(llama):
    rng = np.random.default_rng(2)
    requests = []
    for length in (1, 3, 9, 17, 40, 63, 80):
        ids = rng.integers(0, CONFIG.vocab_size, length).tolist()
        best = int(log_softmax(llama, ids[-64:])[-1].argmax())
        requests += [
            (ids, [best]),
            (ids, [(best + 1) % CONFIG.vocab_size]),
            (ids, [best, 5]),
            (ids[:-1], [ids[-1], best]),
        ]
    requests = [(context, targets) for context, targets in requests if context]
    found = dict(scoring.score(llama, requests, batch_size=4))
    assert sorted(found) == list(range(len(requests)))
    for i, (context, targets) in enumerate(requests):
        row = [*context, *targets][-65:-1]
        logprobs = log_softmax(llama, row)[-len(targets) :]
        # logits reach 20: MATCH of that
        np.testing.assert_allclose(found[i].logprobs, logprobs[range(len(targets)), targets], rtol=1e-5, atol=4e-5)
        assert found[i].greedy.tolist() == (logprobs.argmax(-1) == targets).tolist()


def test_logits_in_pieces_are_the_same(llama, monkeypatch):
    requests = [(list(range(10)), list(range(20, 50))), ([1], [2, 3])]
    whole = dict(scoring.score(llama, requests))
    monkeypatch.setattr(whole_texts, "_LOGITS", 7 * 2 * CONFIG.vocab_size)  # 7 places of 2 rows, which divides nothing
    fresh = Llama(CONFIG, llama.params, llama.tokenizer)
    for i, found in scoring.score(fresh, requests):
        np.testing.assert_allclose(found.logprobs, whole[i].logprobs, rtol=1e-6)
        assert found.greedy.tolist() == whole[i].greedy.tolist()


def test_a_mesh_changes_no_score(params, llama):
    requests = [(list(range(i + 1)), [3, 4, 5]) for i in range(9)]
    from llama_jax.infer.inputs import as_mesh

    spread = Llama(CONFIG, params, llama.tokenizer, as_mesh({"data": 2, "tensor": 4}))
    one, many = dict(scoring.score(llama, requests, batch_size=4)), dict(scoring.score(spread, requests, batch_size=4))
    for i in range(len(requests)):
        np.testing.assert_allclose(many[i].logprobs, one[i].logprobs, rtol=1e-5, atol=1e-5)


def test_what_is_read_alike_is_read_once_and_shapes_are_few(params, llama, monkeypatch):
    fresh = Llama(CONFIG, params, llama.tokenizer)
    rows = []
    real = fresh.engine.score
    monkeypatch.setattr(fresh.engine, "score", lambda t, s, c: rows.append((t.shape, c.shape)) or real(t, s, c))
    context = list(range(12))
    list(scoring.score(fresh, [(context, [letter]) for letter in (65, 66, 67, 68)]))
    assert rows == [((1, 16), (1, 8, 4))]
    rows.clear()
    list(scoring.score(fresh, [(list(range(1 + i % 60)), [7] * (1 + i % 4)) for i in range(200)], batch_size=8))
    assert len(rows) == 8 and len(set(rows)) == 3  # 60 different inputs, of lengths to 16, 32 and 64


def test_damaged_weights_are_told_instead_of_scored(params, llama):
    broken = Llama(CONFIG, jax.tree.map(lambda a: a * np.nan, params), llama.tokenizer)
    with pytest.raises(ValueError, match="not finite"):
        list(scoring.score(broken, [([1], [2])]))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"context": 65}, "max_seq_len=64"),
        ({"context": 8, "stride": 9}, "from 1 to context=8"),
        ({"stride": 0}, "stride must be a whole number"),
        ({"batch_size": 0}, "batch_size"),
        ({"texts": [""]}, "no token to predict"),
        ({"texts": "one"}, "give [text]"),
    ],
)
def test_perplexity_refuses_what_cannot_be(llama, options, said):
    with pytest.raises(ConfigError) as error:
        llama_jax.eval.perplexity(llama, **{"texts": TEXTS, **options})
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "request_, said",
    [
        (([], [1]), "context has no token"),
        (([1], []), "continuation has no"),
        (([1], [1] * 65), "65 tokens"),
        (([1], [512]), "vocab"),
    ],
)
def test_scoring_refuses_what_cannot_be(llama, request_, said):
    with pytest.raises(ConfigError, match=said):
        list(scoring.score(llama, [request_]))


@pytest.fixture
def run(llama, monkeypatch, capsys):
    monkeypatch.setattr("llama_jax.infer.load.load", lambda source, **_: llama)
    monkeypatch.setattr("llama_jax.compilation_cache.enable", lambda: None)

    def run(*argv):
        status = program("eval", "perplexity", "m", *map(str, argv))
        return status, *capsys.readouterr()

    return run


def test_the_command_prints_what_the_function_says(run, llama, tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    expected = sliding_window.perplexity(llama, TEXTS, context=32, stride=8)
    status, out, _ = run("--text", tmp_path, "--context", 32, "--stride", 8)
    assert status == 0
    words = {line.split("  ")[0]: line for line in out.splitlines()}
    assert words["nats per token"].endswith(f"{expected.nats_per_token:.4f} ± {expected.standard_error:.4f}")
    assert float(words["perplexity"].split()[-1]) == pytest.approx(expected.perplexity, rel=1e-3)
    assert f"{expected.bits_per_byte:.4f}" in words["bits per byte"] and "4 documents" in out
    status, out, _ = run("--text", tmp_path, "--context", 32, "--stride", 8, "--json")
    assert json.loads(out)["nats_per_token"] == expected.nats_per_token


@pytest.mark.parametrize(
    "lines, argv, said",
    [
        ('{"text": "a"}\n{"txet": 1}', (), "d.jsonl:2"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', (), "is a preference pair"),
        ('{"text": "a"}', ("--strid", "3"), "Did you mean '--stride'"),
        ('{"text": "a"}', ("--mesh", "tensor"), "AXIS=N"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(run, tmp_path, lines, argv, said):
    (tmp_path / "d.jsonl").write_text(lines)
    status, out, err = run("--text", tmp_path / "d.jsonl", *argv)
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert said.lower() in err.lower()


def test_a_text_that_holds_the_name_of_a_control_token_is_warned_about_once(llama, caplog):
    llama_jax.eval.perplexity(llama, TEXTS)
    assert not caplog.records
    llama_jax.eval.perplexity(llama, (text + "<|eot_id|>" for text in TEXTS))
    (record,) = caplog.records
    assert "a text holds '<|eot_id|>', the name of a control token" in record.getMessage()
