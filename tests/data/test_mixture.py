"""Claims about mixtures with weights, and about Parquet files (with pyarrow only)."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from helpers.files import write
from helpers.records import ANSWER, ASK, documents_in, random_dialog, store_of
from helpers.runs import dialog_run, metrics_of, parse, write_config
from helpers.tokenizers import ByteTokenizer, byte_tokenizer
from llama_jax.data.loader import Loader
from llama_jax.data.packing import Mixture, PackedRows
from llama_jax.data.sources import documents_from
from llama_jax.data.store import build_store
from llama_jax.errors import ConfigError
from llama_jax.train import run as loop


def rows_of(tmp_path: Path, name: str, count: int) -> PackedRows:
    """As many rows, of one letter and a number each."""
    records = [{"text": f"{name}{i:05}"} for i in range(count)]
    path = write(tmp_path / f"{name}.jsonl", records)
    rows = PackedRows(build_store([path], ByteTokenizer(), cache_dir=tmp_path / "cache"), sequence_length=8)
    assert len(rows) == count
    return rows


@pytest.fixture
def mixture(tmp_path) -> Mixture:
    return Mixture((rows_of(tmp_path, "a", 40), rows_of(tmp_path, "b", 7), rows_of(tmp_path, "c", 30)), (2.0, 1.0, 0.5))


def drawn(loader: Loader, batches: int) -> list[str]:
    """The text of each row."""
    rows = np.concatenate([next(loader)["tokens"] for _ in range(batches)])
    return ["".join(chr(token) for token in row if token < 256) for row in rows]


def test_rows_come_in_proportion_to_the_weights(mixture):
    texts = drawn(Loader(mixture, batch_size=7, seed=0), 100)
    counts = [sum(text.startswith(name) for text in texts) for name in "abc"]
    assert np.abs(np.array(counts) - [400, 200, 100]).max() <= 1
    every = [sum(text.startswith("a") for text in texts[i : i + 35]) for i in range(0, 700, 35)]
    assert min(every) >= 19 and max(every) <= 21  # in proportion all along


def test_each_part_is_seen_whole_before_it_starts_anew_in_another_order(mixture):
    texts = drawn(Loader(mixture, batch_size=7, seed=0), 100)
    for name, count in (("a", 40), ("b", 7), ("c", 30)):
        mine = [text for text in texts if text.startswith(name)]
        epochs = [mine[i : i + count] for i in range(0, len(mine) - count + 1, count)]
        assert epochs and all(len(set(epoch)) == count for epoch in epochs)
        assert len(epochs) < 2 or epochs[0] != epochs[1]


def test_a_mixture_resumes_and_is_shared_out_as_rows_are(mixture):
    straight = drawn(Loader(mixture, batch_size=6, seed=3), 40)
    loader = Loader(mixture, batch_size=6, seed=3)
    drawn(loader, 15)
    again = Loader(mixture, batch_size=6, seed=3)
    again.restore(json.loads(json.dumps(loader.state())))
    assert drawn(again, 25) == straight[15 * 6 :]
    halves = [drawn(Loader(mixture, batch_size=6, seed=3, rows_of_host=part), 40) for part in ([0, 1, 2], [3, 4, 5])]
    assert [t for i in range(40) for half in halves for t in half[3 * i : 3 * i + 3]] == straight
    other = Mixture(mixture.parts, (2.0, 1.0, 0.6))
    with pytest.raises(ValueError, match="of data.train are not what they were"):
        Loader(other, batch_size=6, seed=3).restore(loader.state())
    with pytest.raises(ValueError, match="epochs must be None for a mixture"):
        Loader(mixture, batch_size=6, seed=3, epochs=2)


def test_one_part_is_the_rows_themselves(mixture):
    rows = mixture.parts[0]
    one = Mixture((rows,), (3.0,))
    assert one.fingerprint == rows.fingerprint
    assert drawn(Loader(one, batch_size=5, seed=1), 20) == drawn(Loader(rows, batch_size=5, seed=1), 20)


def test_weights_are_given_as_numbers_beside_the_patterns(tmp_path):
    given = f"--config={write_config(tmp_path)}"
    assert parse(given, "--config.data.train=a,b", "--config.data.weights=2,0.5")[0].data.weights == (2.0, 0.5)
    assert parse(given, "--config.data.weights=3")[0].data.weights == (3.0,)
    with pytest.raises(ConfigError, match="data.weights must be a number, got 'two'"):
        parse(given, "--config.data.weights=two")


def test_a_run_on_a_mixture_of_text_and_dialogs_resumes_to_the_bit(tmp_path, capsys):
    (tmp_path / "plain.txt").write_text("Plain text of no great length. " * 40)
    dialogs = write(tmp_path / "more.jsonl", [{"messages": [ASK, ANSWER]}] * 40)
    changes = {
        "data__train": (str(tmp_path / "plain.txt"), dialogs),
        "data__weights": (1.0, 3.0),
        "optimizer__schedule": "constant",
        "train__steps": 4,
    }
    loop.train(dialog_run(tmp_path, "whole", **changes))
    assert f"train: 75.0% of rows from {dialogs}, each seen 1.71 times in this run" in capsys.readouterr().out
    loop.train(dialog_run(tmp_path, "parts", **(changes | {"train__steps": 2})))
    loop.train(dialog_run(tmp_path, "parts", **changes))
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")


# ---- Parquet -------------------------------------------------------------------------------------------------


def test_parquet_without_pyarrow_is_refused_with_the_command_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for pattern in (tmp_path, tmp_path / "*.parquet", tmp_path / "a.parquet"):
        with pytest.raises(ConfigError, match=r"a\.parquet: reading Parquet needs pyarrow, .*: pip install pyarrow$"):
            documents_from([str(pattern)])


def test_parquet_gives_what_json_lines_give(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    import random

    rng = random.Random(0)
    tokenizer = byte_tokenizer()
    records = [random_dialog(rng) for _ in range(300)]
    # A column has one type: tools are strings of JSON, and what a record lacks is null.
    table = [{"messages": r["messages"], "tools": json.dumps(r["tools"]) if "tools" in r else None} for r in records]
    table += [{"prompt": "a", "completion": "b"}, {"text": "c"}, {"completion": "d"}]
    columns = {key: [row.get(key) for row in table] for key in ("messages", "tools", "prompt", "completion", "text")}
    (tmp_path / "t").mkdir()
    parquet.write_table(pyarrow.table(columns), tmp_path / "t" / "data.parquet", row_group_size=100)
    found = build_store([str(tmp_path / "t")], tokenizer, cache_dir=tmp_path / "cache")
    wanted = store_of(tmp_path, [*records, *table[-3:]], tokenizer)
    assert documents_in(found) == documents_in(wanted) and found.num_bad == 1
    assert json.loads(found.quarantine.read_text())["line"] == 303

    # Structs have the keys of all rows, null where a row has none: those are nobody's arguments.
    call = lambda name, **given: [  # noqa: E731
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": given}}]},
    ]
    calls = [{"messages": call("weather", city="Paris")}, {"messages": call("add", x=1)}]
    parquet.write_table(pyarrow.Table.from_pylist(calls), tmp_path / "calls.parquet")
    assert parquet.read_table(tmp_path / "calls.parquet").to_pylist() != calls
    found = build_store([str(tmp_path / "calls.parquet")], tokenizer, cache_dir=tmp_path / "cache")
    assert documents_in(found) == documents_in(store_of(tmp_path, calls, tokenizer))
    data = (tmp_path / "t" / "data.parquet").read_bytes()
    (tmp_path / "t" / "data.parquet").write_bytes(data[:-20])
    with pytest.raises(ValueError, match=r"data\.parquet: not a whole Parquet file") as caught:
        build_store([str(tmp_path / "t")], tokenizer, cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
