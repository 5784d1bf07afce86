"""Claims about `python -m llama_jax inspect data`: what the loss counts can be seen, on a terminal and elsewhere."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from helpers.files import write
from helpers.paths import ROOT
from helpers.program import program
from helpers.records import ANSWER, ASK
from helpers.runs import write_config
from llama_jax.data.inspect import render
from llama_jax.data.packing import pack
from llama_jax.data.store import build_store

ALONE = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Because.<|eot_id|>⟧"
)


def rows_of(tmp_path, tokenizer, records, length):
    path = write(tmp_path / "d.jsonl", records)
    store = build_store([path], tokenizer, cache_dir=tmp_path / "cache", max_length=length)
    return pack(store, sequence_length=length, loss_on="assistant")


def test_targets_borders_and_padding_are_marked(tmp_path, tokenizer):
    records = [{"messages": [ASK, ANSWER]}, {"prompt": "a\x1b[31m", "completion": "b\né"}]
    rows = rows_of(tmp_path, tokenizer, records, 60)
    assert len(rows) == 1
    lines = list(render(rows[0], tokenizer, color=False))
    wanted = [
        "── document 1: 36 tokens, 9 counted ──",
        ALONE,
        "── document 2: 12 tokens, 5 counted ──",
        "<|begin_of_text|>a␛[31m⟦b\né<|end_of_text|>⟧",
        "── 12 positions of padding ──",
    ]
    assert lines == "\n".join(wanted).split("\n")
    colored = "\n".join(render(rows[0], tokenizer, color=True))
    assert "\x1b[32mBecause.<|eot_id|>\x1b[0m" in colored and "⟦" not in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == "\n".join(lines).replace("⟦", "").replace("⟧", "")


def test_a_row_that_begins_within_a_document_says_so(tmp_path, tokenizer):
    rows = rows_of(tmp_path, tokenizer, [{"text": "x" * 5000}], 2000)
    first, second = (list(render(rows[i], tokenizer, color=False)) for i in (0, 1))
    assert first == ["── document 1: 2,000 tokens, 1,999 counted ──", "<|begin_of_text|>⟦" + "x" * 1999 + "⟧"]
    assert "continued from another row" in second[0] and second[1].startswith("x⟦x")


@pytest.mark.parametrize("color", [False, True])
def test_a_row_is_cut_to_the_screen_and_says_so(tmp_path, tokenizer, color):
    text = "日本" * 30 + "\n" + "é" * 45 + "\n\n" + "z" * 100
    rows = rows_of(tmp_path, tokenizer, [{"text": text}, {"text": "short"}], 2000)
    whole = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in render(rows[0], tokenizer, color=color)]
    wide = sum(len(line) > 40 for line in whole)
    assert wide >= 3 and whole[-1].endswith("positions of padding ──")
    for lines in (3, 8, 100):
        shown = [
            re.sub(r"\x1b\[[0-9;]*m", "", line)
            for line in render(rows[0], tokenizer, color=color, width=40, lines=lines)
        ]
        columns = [sum(2 if c in "日本" else 1 for c in line) for line in shown]
        assert len(shown) <= lines and max(columns) <= 50  # the last line says how to see more
        assert max(columns[:-1]) <= 40
        cut = shown[-1].startswith("...") and "--full" in shown[-1]
        assert cut == (lines < 10)
        if not cut:
            assert "".join(shown).replace("\n", "") == "".join(whole).replace("\n", "")


def test_nothing_is_marked_that_the_loss_does_not_count(tmp_path, tokenizer):
    rows = rows_of(tmp_path, tokenizer, [{"messages": [ASK, ANSWER]}] * 7, 100)
    for i in range(len(rows)):
        marked = re.findall("⟦(.*?)⟧", "\n".join(render(rows[i], tokenizer, color=False)))
        assert set(marked) == {"Because.<|eot_id|>"}
        assert len(marked) * 9 == np.sum(rows[i]["weights"])


def config(tmp_path, records, extra="pass", length=64):
    path = write(tmp_path / "chats.jsonl", records)
    return [
        f"--config={write_config(tmp_path, extra)}",
        f"--config.data.train={path}",
        f"--config.data.sequence_length={length}",
    ]


def test_the_command_prints_statistics_and_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LINES", "60")
    records = [{"messages": [ASK, ANSWER]}] * 30 + [{"text": "x" * 100}, {"messages": [ASK]}]
    assert program("inspect", "data", *config(tmp_path, records)) == 0
    out = capsys.readouterr().out
    assert "train: 31 documents, 1,182 tokens (31.4% targets), 32 rows (42.2% padding)" in out
    assert re.search(r"train: left out as bad: 1 of 32 documents, the first: \S+:32: no message .*; listed in ", out)
    assert "tokens a document: 36 to 102, mean 38, median 36, 95 % of them up to 36; 1.0 documents a row" in out
    assert out.count("of 8 of the first step (in ⟦ ⟧: what the loss counts)") == 2
    assert ALONE in out and "\x1b" not in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flags", "most"), [([], 24), (["--rows=1"], 24), (["--rows=0"], 17)])
def test_what_is_printed_fits_a_screen(tmp_path, capsys, monkeypatch, flags, most):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "24")
    long = {"messages": [ASK, {"role": "assistant", "content": "\n".join("word " * 400 for _ in range(30))}]}
    good = [{"messages": [ASK, {"role": "assistant", "content": "line\n" * 300}]}] * 40
    records = [*good, long, {"messages": [ASK]}, {"messages": [ASK, {**ANSWER, "wieght": 0}]}]
    arguments = [*config(tmp_path, records, length=2048), "--config.model.max_seq_len=2048"]
    assert program("inspect", "data", *arguments, *flags) == 0
    out = capsys.readouterr().out
    assert sum(-(-max(len(line), 1) // 120) for line in out.splitlines()) <= most
    assert "left out as bad: 2 of 43 documents, the first: " in out
    assert "left out as longer than data.sequence_length=2048: 1 of 43 documents" in out
    for reason in ("no message is the assistant's", "the key 'wieght' is not known; did you mean 'weight'?"):
        assert re.search(rf"left out, 1 like chats.jsonl:\d+: .*{re.escape(reason[:40])}", out)
    assert out.count("--full shows whole rows") == (0 if flags == ["--rows=0"] else 1)


def test_whole_rows_are_shown_where_they_are_asked_for(tmp_path, capsys):
    records = [{"messages": [ASK, {"role": "assistant", "content": "line\n" * 300}]}] * 9
    arguments = [*config(tmp_path, records, length=2048), "--config.model.max_seq_len=2048"]
    assert program("inspect", "data", *arguments, "--full", "--rows=3") == 0
    out = capsys.readouterr().out
    assert out.count("of 8 of the first step") == 3 and out.count("\nline") > 3 * 290 and "--full" not in out


def test_colour_is_for_terminals_that_want_it(tmp_path, capsys, monkeypatch):
    arguments = ["inspect", "data", *config(tmp_path, [{"messages": [ASK, ANSWER]}] * 3)]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "")
    program(*arguments)
    assert "\x1b[32mBecause." in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    program(*arguments)
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.data.loss_on=asistant"], "did you mean 'assistant'?"),
        (["--config.data.los_on=all"], "did you mean 'data.loss_on'?"),
        (["--config.data.train=nowhere.jsonl"], "data.train: 'nowhere.jsonl' matches no file"),
        (["--config.data.tokenizer=nowhere.model"], "data.tokenizer='nowhere.model' does not exist"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, arguments, words):
    status = program("inspect", "data", *config(tmp_path, [{"text": "x"}]), *arguments)
    error = capsys.readouterr().err
    assert status == 2 and words in error and error.startswith("error: ") and error.count("\n") == 1


def test_without_a_config_data_is_a_folder_like_any_other(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    status = program("inspect", "data")
    assert status == 2 and "data" in capsys.readouterr().err


def test_the_program_runs_where_the_output_is_ascii(tmp_path):
    arguments = config(tmp_path, [{"messages": [ASK, {"role": "assistant", "content": "日本"}]}] * 3)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "ascii"}
    line = [sys.executable, "-m", "llama_jax", "inspect", "data", *arguments]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "???<|eot_id|>?" in done.stdout
