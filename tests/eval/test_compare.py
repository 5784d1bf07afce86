"""Two models side by side: intervals against their definition, each judge, what is kept, and the picture."""

import collections
import gc
import itertools
import json
import math
import shutil
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import sound
from helpers.program import program
from llama_jax import config as configs
from llama_jax.errors import ConfigError
from llama_jax.eval import comparison, intervals, judges, plot
from llama_jax.eval.judges import Case, Prompt
from llama_jax.ops.lora import LoraWeights
from llama_jax.params import init_params
from llama_jax.weights import export
from llama_jax.weights.adapters import Adapter
from llama_jax.weights.formats import peft


def case(number, a, b, reference=None, asked="2 + 2 ="):
    return Case(number, Prompt(f"p.jsonl:{number + 1}", asked, reference), a, b)


# ---- rates -------------------------------------------------------------------------------------------------


def test_the_interval_holds_the_rates_that_the_score_test_does_not_reject():
    """Wilson's interval is where |x/n - p| <= 1.96 sqrt(p (1 - p) / n); found here by trying every p."""
    p = np.linspace(0, 1, 200_001)
    for n, hits in [(1, 0), (1, 1), (4, 4), (10, 3), (80, 41), (100, 0), (1000, 999)]:
        kept = p[np.abs(hits / n - p) <= 1.959963984540054 * np.sqrt(p * (1 - p) / n) + 1e-12]
        rate = intervals.wilson(hits, n)
        assert (rate.low, rate.high) == pytest.approx((kept[0], kept[-1]), abs=1e-5)
        assert rate.share == hits / n and 0 <= rate.low <= rate.share <= rate.high <= 1


def test_the_interval_covers_the_truth_about_95_times_in_100():
    for p, n in itertools.product((0.1, 0.5, 0.97), (30, 100)):
        chance = [math.comb(n, x) * p**x * (1 - p) ** (n - x) for x in range(n + 1)]
        rates = [intervals.wilson(x, n) for x in range(n + 1)]
        assert 0.92 < sum(c for c, r in zip(chance, rates, strict=True) if r.low <= p <= r.high) < 0.98


def test_tallies_are_overall_and_by_category():
    given = [("x", "a"), ("x", "a"), ("x", "b"), (None, "tie"), ("overall", "b")]
    overall, x, other = intervals.tally(given)
    assert [r.share for r in overall.rates] == [0.4, 0.2, 0.4] and overall.n == 5
    assert (x.name, x.n, x.win.share, x.loss.share) == ("x", 3, 2 / 3, 1 / 3)
    assert (other.name, other.n, other.loss.share) == ("overall", 1, 1.0)
    text = intervals.table([overall, x], "left", "right")
    assert "40.0%" in text and "66.7% [20.8%, 93.9%]" in text  # (2 of 3: R's binom.confint, wilson)
    assert intervals.wilson(2, 3).low == pytest.approx(0.2077, abs=1e-4)


# ---- judges ------------------------------------------------------------------------------------------------


def test_exact_match_is_against_the_reference_or_one_of_them():
    cases = [
        case(0, " 4\n", "5", "4"),
        case(1, "5", "4", "4"),
        case(2, "4", "4 ", ["four", "4"]),
        case(3, "x", "", "4"),
    ]
    assert [v.verdict for v in judges.exact(cases)] == ["a", "b", "tie", "tie"]


def test_a_function_of_a_file_judges(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def longer(prompt, a, b, reference):\n    return 'a' if len(a) > len(b) else reference\n")
    judge = judges.by_function(f"{path}:longer")
    assert [v.verdict for v in judge([case(0, "aaa", "b"), case(1, "a", "bb", "tie")])] == ["a", "tie"]
    with pytest.raises(ConfigError, match=r"must return 'a', 'b' or 'tie', got 'A' for p.jsonl:3"):
        list(judge([case(2, "a", "bb", "A")]))
    path.write_text("def broken(prompt, a, b, reference):\n    return 1 / 0\n")
    with pytest.raises(ConfigError, match="p.jsonl:1: ZeroDivisionError"):
        list(judges.by_function(f"{path}:broken")([case(0, "a", "b")]))


@pytest.mark.parametrize(
    "place, said",
    [("x", "FILE.py:NAME"), ("mine.p:longer", "mine.py"), ("mine.py:long", "longer"), ("bad.py:f", "SyntaxError")],
)
def test_a_function_that_is_not_there_is_one_line(tmp_path, monkeypatch, place, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def longer(p, a, b, r): return 'a'\n")
    (tmp_path / "bad.py").write_text("def f(:\n")
    with pytest.raises(ConfigError) as error:
        judges.by_function(place)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_model_is_asked_twice_and_only_what_it_says_both_times_counts():
    said = {
        ("good", "bad"): "The first is right.\n[[1]]", ("bad", "good"): "I see [[1]] but no: [[2]]",  # good, both times
        ("x", "y"): "[[1]]", ("y", "x"): "[[1]]",  # whatever comes first
        ("p", "q"): "[[TIE]]", ("q", "p"): "[[tie]]",
        ("m", "n"): "hm", ("n", "m"): "[[2]]",
    }  # fmt: skip
    sizes = []

    def ask(questions):
        sizes.append(len(questions))
        shown = [tuple(part.split("\n")[0] for part in q.split("--- answer ")[1:]) for q in questions]
        assert all("1" in s[0] and "2" in s[1] for s in shown)
        pairs = [tuple(part.split("\n")[1] for part in q.split("--- answer ")[1:]) for q in questions]
        return [said[pair] for pair in pairs]

    cases = [case(0, "good", "bad"), case(1, "bad", "good"), case(2, "x", "y"), case(3, "p", "q"), case(4, "m", "n")]
    found = list(judges.by_model(ask, batch_size=4)(cases))
    assert [v.verdict for v in found] == ["a", "b", "tie", "tie", "tie"] and sizes == [4, 4, 2]
    assert found[2].notes["heard"] == ["a", "b"] and found[4].notes["heard"] == [None, "a"]


def test_the_question_to_a_judge_holds_dialog_reference_and_braces_as_they_are():
    text = judges.question(case(0, "{a}", "{b}", ["4", "four"], [{"role": "user", "content": "{x}"}]), True)
    assert "user: {x}" in text and "4 / four" in text and text.index("{b}") < text.index("{a}")


def test_a_person_does_not_see_whose_answer_is_whose_and_keys_mean_what_is_shown():
    cases = [case(i, f"A{i}", f"B{i}\x1b[2J") for i in range(60)]
    screens = []
    keys = iter(["?", "", *["a"] * 58, "t", "q"])
    found = list(judges.by_person(seed=3, total=60, ask=lambda _: next(keys), say=screens.append)(cases))
    assert len(found) == 59 and found[58].verdict == "tie"  # the last was quit
    for verdict, screen in zip(found[:58], screens, strict=False):
        first = screen.split("--- a\n")[1][0].lower()
        assert verdict.verdict == first == verdict.notes["shown_first"] and "\x1b" not in screen
    assert 15 < collections.Counter(v.verdict for v in found)["a"] < 43  # either may come first
    again = list(judges.by_person(seed=3, total=60, ask=lambda _: "a", say=lambda _: None)(cases[30:]))
    assert [v.verdict for v in again[:28]] == [v.verdict for v in found[30:58]]  # so that it can go on


# ---- the whole ---------------------------------------------------------------------------------------------

PROMPTS = [
    {"prompt": "one", "reference": "one!", "category": "words"},
    {"prompt": "two", "reference": "TWO", "category": "words"},
    {"messages": [{"role": "user", "content": "three"}], "reference": "x"},
    "four",
]


class Fake:
    """Fake models: A repeats the prompt with a mark, and B repeats it in capitals."""

    alive: list = []
    loads: list = []
    stop_tokens = chat_stop_tokens = ()

    def __init__(self, name, fail_after=None):
        self.name, self.tokenizer, self.left = name, self, fail_after
        self.config = type("Config", (), {"max_seq_len": 5000})

    def encode(self, text, bos):
        return list(text.encode())

    def encode_dialog(self, messages):
        return list(messages[-1]["content"].encode())

    def generate(self, ids, *, seed=(), temperature, max_new_tokens, **_):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise OSError("the machine went away")
        texts = [bytes(i).decode() for i in ids]
        if self.name == "judge":
            halves = [t.split("--- answer ")[1:] for t in texts]
            texts = ["[[1]]" if "!" in first else "[[2]]" for first, _ in halves]
        else:
            texts = [t + "!" if self.name == "a" else t.upper() for t in texts]
        return [type("Result", (), {"text": t, "finish_reason": "stop"}) for t in texts]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("llama_jax.compilation_cache.enable", lambda: None)
    Fake.alive, Fake.loads, Fake.version = [], [], 1
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)) + "\n")

    def load(source, *, adapters=None, **options):
        gc.collect()
        assert not [ref for ref in Fake.alive if ref() is not None], "two models in memory at once"
        Fake.loads.append((source, adapters))
        llama = Fake(source, fails.get(source))
        Fake.alive.append(weakref.ref(llama))
        return llama

    fails = {}
    monkeypatch.setattr(comparison, "load", load)
    monkeypatch.setattr(comparison, "_model_identity", lambda *names: str((Fake.version, *names)))

    def run(*argv, keys=(), fail=None):
        fails.clear()
        fails.update(fail or {})
        left = iter(keys)
        monkeypatch.setattr("builtins.input", lambda _="": next(left))
        monkeypatch.setattr(judges.by_person, "__kwdefaults__", {"ask": lambda _: next(left), "say": print})
        out = str(tmp_path / "out")
        status = program("eval", "compare", "a", "b", "--prompts", str(tmp_path / "prompts.jsonl"), "--out", out, *argv)
        return status, *capsys.readouterr()

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_everything_is_kept_printed_and_drawn(run, tmp_path):
    (tmp_path / "f.py").write_text("def f(prompt, a, b, reference):\n    return 'a' if reference else 'tie'\n")
    status, out, _ = run("--judge", "function", "--judge_function", f"{tmp_path / 'f.py'}:f", "--adapter_b", "tuned")
    assert status == 0 and Fake.loads == [("a", None), ("b", "tuned")]
    rows = lines(tmp_path / "out" / "comparison.jsonl")
    assert [(r["a"], r["b"], r["verdict"]) for r in rows] == [
        ("one!", "ONE", "a"), ("two!", "TWO", "a"), ("three!", "THREE", "a"), ("four!", "FOUR", "tie"),
    ]  # fmt: skip
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["tallies"][0]["win"]["share"] == 0.75 and summary["tallies"][1]["name"] == "words"
    assert "A: a" in out and "B: b + tuned" in out and "75.0%" in out and "100.0%" in out
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_judge_model_is_loaded_when_both_others_are_gone(run, tmp_path):
    status, out, _ = run("--judge", "model", "--judge_model", "judge")
    assert status == 0 and [name for name, _ in Fake.loads] == ["a", "b", "judge"]
    assert {row["verdict"] for row in lines(tmp_path / "out" / "comparison.jsonl")} == {"a"}


def test_a_person_may_quit_and_go_on_and_nothing_is_lost_or_made_twice(run, tmp_path):
    status, out, _ = run("--judge", "person", keys=["a", "q"])
    assert status == 0 and "judged 1 of 4" in out and len(lines(tmp_path / "out" / "verdicts.jsonl")) == 1
    with open(tmp_path / "out" / "verdicts.jsonl", "a") as file:
        file.write('{"judge": "person", "numb')  # killed while it was written
    status, out, _ = run("--judge", "person", keys=["b", "t", "a"])
    assert "=== 2 of 4" in out and "=== 1 of 4" not in out and "judged" not in out.splitlines()[-1]
    assert [line["number"] for line in lines(tmp_path / "out" / "verdicts.jsonl")] == [0, 1, 2, 3]
    assert len(Fake.loads) == 2  # the answers were there
    assert None not in [row["verdict"] for row in lines(tmp_path / "out" / "comparison.jsonl")]
    status, out, _ = run("--judge", "model", "--judge_model", "judge")  # another judge of the same answers
    assert status == 0 and len(Fake.loads) == 3 and len(lines(tmp_path / "out" / "verdicts.jsonl")) == 8


def test_answers_that_were_made_survive_an_end_in_the_middle(run, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(
        "\n".join(json.dumps({"prompt": str(i), "reference": "x"}) for i in range(20))
    )
    status, _, err = run("--judge", "exact", "--batch_size", "2", fail={"b": 1})
    assert status == 2 and "went away" in err
    assert len(lines(tmp_path / "out" / "answers.jsonl")) == 20 + 8
    status, _, _ = run("--judge", "exact", "--batch_size", "2")
    kept = lines(tmp_path / "out" / "answers.jsonl")
    assert status == 0 and len({(r["model"], r["number"]) for r in kept}) == len(kept) == 40
    assert [name for name, _ in Fake.loads] == ["a", "b", "b"]


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--judge", "exact"], 'prompts.jsonl:4 has no "reference"'),
        (["--judge", "exakt"], "exact, function, model, person"),
        (["--judge", "function"], "--judge_function is missing"),
        (["--judge", "person", "--judge_model", "m"], "goes with --judge model"),
        (["--judge", "person", "--max_new_tokens", "0"], "max_new_tokens"),
        (["--judge", "person", "--max_new_tokens", "4999"], "prompts.jsonl:1 has 3 tokens"),
        (["--judge", "person", "--temperature", "-1"], "temperature"),
        (["--judge", "person", "--sede", "1"], "--seed"),
    ],
)
def test_a_mistake_is_one_line(run, argv, said):
    status, out, err = run(*argv)
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_a_folder_of_another_comparison_is_refused(run, tmp_path):
    assert run("--judge", "person", keys=["q"])[0] == 0
    status, _, err = run("--judge", "person", "--seed", "1")
    assert status == 2 and "its seed is 0, and now 1" in err
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "other"}')
    assert "another comparison" in run("--judge", "person")[2]
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    assert "holds no comparison" in run("--judge", "person")[2]


def test_answers_of_a_model_that_has_changed_since_are_not_taken_for_its_own(run, tmp_path):
    assert run("--judge", "person", keys=["q"])[0] == 0
    Fake.version = 2  # other weights under the same name
    status, _, err = run("--judge", "person")
    assert status == 2 and "has answers of an earlier version of a: name another folder with --out" in err
    assert len(lines(tmp_path / "out" / "answers.jsonl")) == 8


def test_a_first_run_that_failed_before_any_answer_binds_nobody(run, tmp_path):
    assert run("--judge", "person", "--max_new_tokens", "4999")[0] == 2
    assert not (tmp_path / "out" / "answers.jsonl").exists()
    assert run("--judge", "person", keys=["q"])[0] == 0


def test_what_a_model_is_are_its_weights_and_its_adapters(tmp_path):
    config = configs.size("tiny")
    for seed, name in ((0, "one"), (0, "same"), (1, "other")):
        sound.save_params(tmp_path / name, config, init_params(config, jax.random.key(seed)))
    a, b = jnp.ones((2, config.embed_dim)), jnp.ones((config.num_heads * config.head_dim, 2))
    for name, factor in (("first", 1), ("second", 2)):
        path = ("layers", 0, "attention", "q")
        lora = export.lazy_lora({path: LoraWeights(a, factor * b, jnp.float32(1))})
        peft.write_adapter(tmp_path / name, Adapter(config, lora), base_model=None)
    place = lambda name: name and str(tmp_path / name)  # noqa: E731
    given = [("one", None), ("same", None), ("other", None), ("one", "first"), ("one", "second")]
    found = [comparison._model_identity(place(name), place(adapter)) for name, adapter in given]
    assert found[0] == found[1] and len(set(found)) == 4


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"prompt": 3}', '"prompt" must be'),
        ("{", "not a line of JSON"),
        ("3", "must be a text, or an object"),
        ('{"prompt": "a", "messages": []}', "either"),
        ('{"messages": []}', '"messages" must be'),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "must end with a message of the user"),
        ('{"prompt": "a", "reference": [3]}', '"reference"'),
        ('{"prompt": "a", "category": 3}', '"category"'),
        ("", "holds no prompt"),
        (b"\xff\xfe", "not a line of JSON"),
    ],
)
def test_a_bad_line_of_prompts_is_named(tmp_path, line, said):
    (tmp_path / "p.jsonl").write_bytes(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(ConfigError) as error:
        comparison.read_prompts(tmp_path / "p.jsonl")
    assert said in str(error.value) and "p.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_names_are_as_long_as_tells_them_apart():
    names = lambda **paths: comparison.Asked(**paths).names  # noqa: E731
    assert names(model_a="runs/sft", model_b="meta-llama/Llama-3.1-8B") == ("sft", "Llama-3.1-8B")
    assert names(model_a="runs/a/last", model_b="runs/b/last") == ("a/last", "b/last")
    assert names(model_a="m", model_b="m", adapter_a="x/sql") == ("m + sql", "m")
    assert names(model_a="m", model_b="m") == ("m (A)", "m (B)")


def test_bars_are_as_wide_as_the_rates_and_say_them(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    bars, texts = [], []
    barh, text = Axes.barh, Axes.text
    monkeypatch.setattr(
        Axes,
        "barh",
        lambda s, y, w, **k: (k.get("left") is not None and bars.append((y, k["left"], w))) or barh(s, y, w, **k),
    )
    monkeypatch.setattr(Axes, "text", lambda s, x, y, t, **k: texts.append(t) or text(s, x, y, t, **k))
    given = [("all won", "a")] * 5 + [("all lost", "b")] * 3 + [(None, "tie")] * 2
    plot.draw(intervals.tally(given), tmp_path / "p.png", name_a="a$", name_b="b", judge="x")
    assert bars[:3] == [(0, 0.0, 50.0), (0, 50.0, 20.0), (0, 70.0, 30.0)]
    assert bars[3:] == [
        (1, 0.0, 100.0),
        (1, 100.0, 0.0),
        (1, 100.0, 0.0),
        (2, 0.0, 0.0),
        (2, 0.0, 0.0),
        (2, 0.0, 100.0),
    ]
    assert [t for t in texts if t.endswith(" %") and "n =" not in t] == ["50 %", "20 %", "30 %", "100 %", "100 %"]
    assert any(t.startswith("n = 5   win 57\u2013100 %   loss 0\u201343 %") for t in texts)
