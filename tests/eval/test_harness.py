"""lm_eval's requests: scores equal stored ones of HFLM (golden/make_harness.py), and of lm_eval if it is installed.

The first part needs neither lm_eval nor torch. The second runs the real harness on our model and, where torch and
transformers are there too, on HFLM with the same folder.
"""

import copy
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest

import llama_jax
from golden import make_harness as golden
from helpers.program import program
from llama_jax.errors import ConfigError
from llama_jax.eval import lm_eval_requests, scoring
from llama_jax.sampling_params import SamplingParams

GOLD = json.loads(golden.GOLD.read_text())
RANKS = {bytes.fromhex(token): rank for rank, token in enumerate(GOLD["ranks"])}
MATCH = 1e-5  # relative; the harness' own tests allow 1e-2 in sums of 10 to 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return golden.make_model(tmp_path_factory.mktemp("harness"), RANKS)


@pytest.fixture(scope="module")
def llama(folder):
    return llama_jax.load(folder, dtype="float32")


# ---- without lm_eval ---------------------------------------------------------------------------------------


def test_ids_are_those_of_hflm_names_of_control_tokens_included(llama):
    assert len(GOLD["encode"]) > 30 and any("<|eot_id|>" in text for text, _ in GOLD["encode"])
    for text, ids in GOLD["encode"]:
        assert lm_eval_requests.encode(llama, text) == ids, text


def test_loglikelihoods_are_those_of_hflm(llama):
    pairs = GOLD["pairs"]
    assert max(len(a) + len(b) for a, b in pairs) > llama.config.max_seq_len + 20  # some are cut on the left
    found = dict(scoring.score(llama, pairs, batch_size=4))
    ours = np.array([found[i].logprobs.sum() for i in range(len(pairs))])
    theirs = np.array([logprob for *_, logprob, _ in GOLD["loglikelihood"]])
    np.testing.assert_allclose(ours, theirs, rtol=MATCH)
    assert ours[:2].argmax() == theirs[:2].argmax() and ours[2:6].argmax() == theirs[2:6].argmax()  # the choices
    assert [bool(found[i].greedy.all()) for i in range(len(pairs))] == [greedy for *_, greedy in GOLD["loglikelihood"]]


def test_is_greedy_is_exact(llama):
    pairs = [(context, tail) for context, tail, *_ in GOLD["greedy"]]
    found = dict(scoring.score(llama, pairs))
    flags = [bool(found[i].greedy.all()) for i in range(len(pairs))]
    assert flags == [greedy for *_, greedy in GOLD["greedy"]] == [True, False, True, False]
    assert found[1].greedy[:-1].all()  # it differs in its last token alone


def test_rolling_loglikelihoods_are_those_of_hflm_over_several_windows(llama):
    texts, theirs = zip(*GOLD["rolling"], strict=True)
    assert max(len(lm_eval_requests.encode(llama, text)) for text in texts) > 3 * llama.config.max_seq_len
    ours = lm_eval_requests.rolling(llama, texts, max_length=None, batch_size=3)
    np.testing.assert_allclose(ours, theirs, rtol=MATCH)


def test_texts_and_their_stops_are_those_of_hflm(llama):
    asks = [(context, settings) for context, settings, _ in GOLD["generate_until"]]
    theirs = [text for *_, text in GOLD["generate_until"]]
    for batch_size in (1, 5):
        found = dict(lm_eval_requests.generate_until(llama, asks, max_length=None, batch_size=batch_size))
        assert [found[i] for i in range(len(asks))] == theirs
    contexts = [context for context, _ in asks]
    assert "" in contexts and max(len(lm_eval_requests.encode(llama, c)) for c in contexts) > llama.config.max_seq_len
    free = dict(zip(golden.CONTEXTS, theirs, strict=False))  # the first of each, without stops
    cut = [(settings["until"], text) for (c, settings), text in zip(asks, theirs, strict=True) if text != free[c]]
    several = [stops for stops, _ in cut if isinstance(stops, list)]
    assert len(cut) > 5 and any(len(lm_eval_requests.encode(llama, stops[0], begin=False)) > 1 for stops in several)


def test_a_stop_string_ends_the_work_too(llama, monkeypatch):
    (context, settings, text) = GOLD["generate_until"][0]
    steps = []
    real = llama.engine.decode
    monkeypatch.setattr(llama.engine, "decode", lambda alive, **how: steps.append(how["limit"]) or real(alive, **how))
    dict(
        lm_eval_requests.generate_until(
            llama, [(context, {"until": text[0], "max_gen_toks": 48})], max_length=None, batch_size=1
        )
    )
    assert steps == [16]


def test_drawn_texts_follow_their_seed_and_settings(llama):
    ask = ("The river", {"do_sample": True, "temperature": 0.9, "max_gen_toks": 12})
    one = dict(lm_eval_requests.generate_until(llama, [ask] * 6, max_length=None, batch_size=4, seed=1))
    same = dict(lm_eval_requests.generate_until(llama, [ask] * 6, max_length=None, batch_size=2, seed=1))
    assert one == same and len(set(one.values())) > 3
    result = llama.generate("The river", max_new_tokens=12, temperature=0.9, seed=3)
    assert one[2] == result.text


@pytest.mark.parametrize(
    "given, temperature",
    [
        ({}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.2}, 0.2),
    ],
)
def test_greedy_unless_told_otherwise(llama, given, temperature):
    expected = SamplingParams(**{**vars(llama.sampling), "temperature": temperature, "top_k": 3})
    assert lm_eval_requests._sampling(llama, {**given, "top_k": 3}) == expected


@pytest.mark.parametrize(
    "given, said",
    [
        ({"max_gen_toks": 64}, "leaves no room"),
        ({"max_gen_toks": 0}, "max_gen_toks"),
        ({"max_gen_tok": 4}, "Did you mean 'max_gen_toks'"),
        ({"until": [3], "max_gen_toks": 4}, "until must be"),
        ({"do_sample": True, "temperature": -1, "max_gen_toks": 4}, "temperature"),
    ],
)
def test_settings_that_cannot_be_are_refused(llama, given, said):
    with pytest.raises(ConfigError) as error:
        list(lm_eval_requests.generate_until(llama, [("a", given)], max_length=None, batch_size=1))
    assert said.lower() in str(error.value).lower() and "\n" not in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_lm_eval_the_command_says_how_to_install_it(tmp_path, capsys):
    assert program("eval", "harness", "m", "--tasks", "arc_easy", "--out", str(tmp_path / "r.json")) == 2
    err = capsys.readouterr().err
    assert "pip install lm_eval" in err and err.count("\n") == 1


# ---- with lm_eval ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm(llama):
    pytest.importorskip("lm_eval", reason="the harness itself is not installed: pip install lm_eval")
    from llama_jax.eval import harness_model

    return harness_model(llama, batch_size=4)


def ask(lm, kind, requests_):
    return getattr(lm, kind)(golden.instances(kind, requests_))


def test_the_model_answers_lm_eval_as_hflm_does(lm):
    scores = ask(lm, "loglikelihood", golden.PAIRS)
    np.testing.assert_allclose([s[0] for s in scores], [g[2] for g in GOLD["loglikelihood"]], rtol=MATCH)
    assert [s[1] for s in scores] == [g[3] for g in GOLD["loglikelihood"]]
    rolling = ask(lm, "loglikelihood_rolling", [(text,) for text in golden.ROLLING])
    np.testing.assert_allclose(rolling, [total for _, total in GOLD["rolling"]], rtol=MATCH)
    asks = [tuple(item[:2]) for item in GOLD["generate_until"]]
    assert ask(lm, "generate_until", asks) == [item[2] for item in GOLD["generate_until"]]
    assert lm.tok_decode(lm.tok_encode("foo bar", add_special_tokens=False)) == "foo bar"


def test_dialogs_are_written_as_hflm_writes_them(lm):
    assert [lm.apply_chat_template(golden.DIALOG, flag) for flag in (True, False)] == GOLD["chat"]
    text = lm.apply_chat_template(golden.DIALOG[:2])
    assert lm.tok_encode(text) == lm.llama.encode_dialog(golden.DIALOG[:2])


def test_a_template_that_refuses_a_dialog_is_one_line(lm):
    from llama_jax.text.chat_format import choose

    def render(source: str) -> str:
        other = copy.copy(lm)
        other.llama = copy.copy(lm.llama)
        other.llama.chat_format = choose(lm.llama.tokenizer, source)
        return other.apply_chat_template(golden.DIALOG)

    for source in ("{{ raise_exception('no') }}", "{% for %}", "{{ messages[9].content }}", "{{ 1 / 0 }}"):
        with pytest.raises(ConfigError, match="chat template"):
            render(source)
    with pytest.raises(ConfigError, match="chat template"):  # the sandbox
        render("{{ ''.__class__.__mro__ }}")


TASKS = {
    "rivers_choice": """
task: rivers_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rivers_rolling": """
task: rivers_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "rivers_text": """
task: rivers_text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{gold}}"
generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(lm, tmp_path_factory):
    """Three local tasks over one file; the right text of the third is the model's own for every other question."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = ["Which river?", "Where is the sea?", "Is it cold?", "Who stopped?", "What ran north?"]
    own = ask(lm, "generate_until", [(q, {"until": ["."], "max_gen_toks": 8}) for q in questions])
    lines = [
        {"question": q, "choices": ["the north", "the sea", "a"], "answer": i % 3, "text": golden.TEXT[i : 90 + 40 * i]}
        | {"gold": own[i] if i % 2 else "x"}
        for i, q in enumerate(questions)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(folder / "data.jsonl")))
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_the_command_runs_whole_tasks_and_gives_hflms_results(
    lm, tasks, folder, tmp_path, capsys, offline, monkeypatch
):
    monkeypatch.setattr("llama_jax.compilation_cache.enable", lambda: None)
    out = tmp_path / "results.json"
    argv = ["--tasks", ",".join(TASKS), "--include", str(tasks), "--dtype", "float32", "--out", str(out)]
    assert program("eval", "harness", str(folder), *argv) == 0
    printed = capsys.readouterr().out
    results = json.loads(out.read_text())["results"]
    assert all(f"|{name}" in printed for name in TASKS) and "Stderr" in printed
    assert results["rivers_text"]["exact_match,none"] == pytest.approx(2 / 5)
    pytest.importorskip("torch", reason="HFLM needs torch")
    pytest.importorskip("transformers", reason="HFLM needs transformers")
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from llama_jax.eval import harness

    hflm = HFLM(pretrained=str(folder), device="cpu", dtype="float32")
    manager = harness.find_tasks(list(TASKS), [str(tasks)])
    theirs = lm_eval.simple_evaluate(hflm, tasks=list(TASKS), task_manager=manager, log_samples=False)["results"]
    compared = 0
    for name in TASKS:
        for metric, value in theirs[name].items():
            if isinstance(value, float) and not math.isnan(value):
                assert results[name][metric] == pytest.approx(value, rel=1e-4), metric
                compared += 1
    assert compared >= 6


def test_chat_tasks_and_fewshot_run(lm, tasks, offline):
    from llama_jax.eval import harness

    manager = harness.find_tasks(["rivers_choice"], [str(tasks)])
    long = harness.LlamaLM(lm.llama, batch_size=2)
    found = harness.evaluate(
        long,
        ["rivers_choice"],
        manager=manager,
        limit=3,
        apply_chat_template=True,
        system="Be short.",
        log_samples=True,
    )
    first = found["samples"]["rivers_choice"][0]["arguments"][0][0]
    assert first.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe short.<|eot_id|>")
    assert found["n-samples"]["rivers_choice"]["effective"] == 3


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--tasks", "arc_eazy"], "arc_easy"),
        (["--tasks", ","], "names no task"),
        (["--tasks", "arc_easy", "--limit", "1.5"], "--limit"),
        (["--tasks", "arc_easy", "--system", "x"], "--apply_chat_template"),
        (["--tasks", "arc_easy", "--include", "/nix"], "no such folder"),
        (["--tasks", "arc_easy", "--out", str(Path(__file__))], "is there already"),
        (["--tasks", "arc_easy", "--num_fewshots", "1"], "--num_fewshot"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(lm, capsys, argv, said):
    status = program("eval", "harness", "m", *argv)
    err = capsys.readouterr().err
    assert status == 2 and said in err and err.startswith("error: ") and err.count("\n") == 1
