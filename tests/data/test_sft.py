"""Claims about fine-tuning on dialogs: whole documents in rows, the loss on targets alone, and a run that resumes."""

import functools
import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.files import write
from helpers.numbers import gap
from helpers.packing import NAMES, slow_rows
from helpers.records import expected, random_dialog
from helpers.runs import dialog_run, metrics_of, text_run
from helpers.tokenizers import byte_tokenizer
from llama_jax.data.loader import Loader, evaluation_batches
from llama_jax.data.packing import PackedRows, WholeRows, best_fit, pack
from llama_jax.data.store import TokenStore, build_store
from llama_jax.params import init_params
from llama_jax.text import Tokenizer, encode_dialog
from llama_jax.train import run as loop
from llama_jax.train.objectives import sft_sums

T = 320


def short_dialogs(count: int, seed: int, tokenizer: Tokenizer, longest: int) -> list[dict]:
    """Random dialogs, plain ones and with tools, of at most `longest` tokens."""
    rng = random.Random(seed)
    found: list[dict] = []
    while len(found) < count:
        record = random_dialog(rng)
        options = {"tools": record.get("tools"), "add_generation_prompt": False}
        ids = encode_dialog(tokenizer, record["messages"], **options)[0]
        found += [record] if len(ids) <= longest else []
    return found


TEXTS = ["a long text. " * 60, "a short one"]


@pytest.fixture(scope="module")
def records(tokenizer) -> list[dict]:
    """A thousand dialogs, and among them two texts of which one is longer than two rows."""
    found = short_dialogs(1000, 3, tokenizer, T)
    assert sum("tools" in record for record in found) > 50
    return [*found[:100], *({"text": text} for text in TEXTS), *found[100:]]


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer, records) -> TokenStore:
    folder = tmp_path_factory.mktemp("store")
    return build_store([write(folder / "d.jsonl", records)], tokenizer, cache_dir=folder / "cache", max_length=T)


def documents_of(records: list[dict], tokenizer: Tokenizer) -> list[tuple[list[int], list[bool]]]:
    """Ids and targets of records, without the code that is tested: dialogs by the format's description."""
    found = []
    for record in records:
        if "messages" in record:
            found.append(expected(tokenizer, record["messages"], record.get("tools")))
        else:
            prompt, answer = record.get("prompt", ""), record.get("completion") or record["text"]
            asked = [tokenizer.bos_id, *prompt.encode()]  # an id is a byte here
            counted = ["text" in record] * len(asked)
            learned = [*answer.encode(), tokenizer.eos_id]
            found.append((asked + learned, counted + [True] * len(learned)))
    return found


# ---- rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_rows_of_a_thousand_dialogs_equal_a_slow_construction(store, records, tokenizer, loss_on):
    rows = pack(store, sequence_length=T, loss_on=loss_on)
    wanted = slow_rows(documents_of(records, tokenizer), T, loss_on == "all")
    assert isinstance(rows, WholeRows) and len(rows) == len(wanted)
    for i, row in enumerate(wanted):
        assert {name: array.tolist() for name, array in rows[i].items()} == row
    filled = sum((np.array(row["segments"]) > 0).sum() for row in wanted)
    assert (
        rows.padding_fraction == pytest.approx(1 - filled / (len(wanted) * T), abs=1e-12)
        and rows.padding_fraction < 0.06
    )


@pytest.mark.parametrize("length", [2, 3, 16, 100])
def test_short_rows_cut_text_into_pieces_that_predict_everything_once(store, length):
    """Without a limit on the store even dialogs are cut like this; build_store's max_length keeps them out."""
    rows = WholeRows(store, sequence_length=length, loss_on="all")
    assert sum(rows[i]["weights"].sum() for i in range(len(rows))) == store.num_tokens - store.num_documents
    masked = WholeRows(store, sequence_length=length, loss_on="assistant")
    assert sum(masked[i]["weights"].sum() for i in range(len(masked))) == store.num_targets


def test_best_fit_is_deterministic_and_never_overfills():
    rng = np.random.default_rng(0)
    for capacity in (2, 7, 64, 1000):
        lengths = rng.integers(1, capacity + 1, 3000)
        rows = best_fit(lengths, capacity)
        filled = np.bincount(rows, weights=lengths)
        assert filled.max() <= capacity and filled.min() > 0
        assert len(filled) <= 11 / 9 * np.ceil(lengths.sum() / capacity) + 6 / 9 or capacity == 2
        np.testing.assert_array_equal(best_fit(lengths, capacity), rows)


def test_text_alone_is_cut_as_ever(tmp_path, tokenizer):
    path = write(tmp_path / "t.jsonl", [{"text": "one"}, {"text": "another"}])
    text = build_store([path], tokenizer, cache_dir=tmp_path / "cache", max_length=8)
    rows = pack(text, sequence_length=8, loss_on="assistant")
    assert isinstance(rows, PackedRows) and rows.fingerprint == text.fingerprint
    assert rows.padding_fraction == 1 - (text.num_tokens - 1) / (2 * 8)


def test_the_loader_resumes_rows_of_dialogs_and_refuses_another_loss(store):
    rows = {name: pack(store, sequence_length=T, loss_on=name) for name in ("assistant", "all")}
    loader = Loader(rows["assistant"], batch_size=4, seed=1)
    batches = [next(loader) for _ in range(len(rows["assistant"]) // 2)]
    again = Loader(rows["assistant"], batch_size=4, seed=1, start_step=9)
    for batch, other in zip(batches[9:], again, strict=False):
        assert all(np.array_equal(batch[name], other[name]) for name in NAMES)
    with pytest.raises(ValueError, match="are not what they were"):
        Loader(rows["all"], batch_size=4, seed=1).restore(loader.state())
    last = list(evaluation_batches(rows["assistant"], batch_size=7, max_batches=None))[-1]
    assert {name: array.shape for name, array in last.items()} == dict.fromkeys(NAMES, (7, T))


# ---- the loss ------------------------------------------------------------------------------------------------


def relative_gap(a, b) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(gap(x, y) for x, y in pairs)


def test_gradients_of_a_packed_batch_equal_those_of_its_documents_one_by_one(tmp_path, tokenizer):
    length = 256
    records = short_dialogs(12, 7, tokenizer, 128)
    records += [record for record in short_dialogs(60, 8, tokenizer, length) if "tools" in record][:4]
    assert sum("tools" in record for record in records) >= 4
    assert any(message.get("tool_calls") for record in records for message in record["messages"])
    records += [{"prompt": "The sum of one and one", "completion": " is two."}, {"text": "plain text"}]
    path = write(tmp_path / "d.jsonl", records)
    store = build_store([path], tokenizer, cache_dir=tmp_path / "cache", max_length=length)
    rows = pack(store, sequence_length=length, loss_on="assistant")
    packed = [rows[i] for i in range(len(rows))]
    assert 2 * len(packed) < len(records) == store.num_documents
    assert max(int(row["segments"].max()) for row in packed) >= 3
    run = text_run(tmp_path, model__num_layers=2, model__vocab_size=tokenizer.vocab_size)
    config = run.model
    params = jax.jit(functools.partial(init_params, config))(jax.random.key(0))

    @jax.jit
    def gradients(params, batch):
        loss = lambda params: sft_sums(run, params, batch, dtype=jnp.float32)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    (together, _), summed = gradients(params, {name: np.stack([row[name] for row in packed]) for name in NAMES})
    alone, one_by_one, targets = 0.0, jax.tree.map(jnp.zeros_like, params), 0
    for ids, mask in documents_of(records, tokenizer):
        batch = {name: np.zeros((1, length), np.int32) for name in NAMES[:4]}
        batch["weights"] = np.zeros((1, length), np.float32)
        n = len(ids)
        batch["tokens"][0, :n], batch["targets"][0, : n - 1] = ids, ids[1:]
        batch["positions"][0, :n], batch["segments"][0, :n] = range(n), 1
        batch["weights"][0, : n - 1] = mask[1:]
        (loss, _), grads = gradients(params, batch)
        alone, one_by_one = alone + loss, jax.tree.map(jnp.add, one_by_one, grads)
        targets += sum(mask[1:])
    assert abs(float(together - alone)) < 1e-5 * float(alone)
    assert relative_gap(summed, one_by_one) < 1e-5
    assert sum(row["weights"].sum() for row in packed) == targets == store.num_targets


# ---- a run ---------------------------------------------------------------------------------------------------


def test_a_run_on_dialogs_resumes_to_the_bit_and_counts_targets_only(tmp_path, capsys):
    constant = {"optimizer__schedule": "constant", "data__validation": (str(tmp_path / "dialogs.jsonl"),)}
    whole = dialog_run(tmp_path, "whole", **constant)
    loop.train(whole)
    said = capsys.readouterr().out
    assert "train: 60 documents" in said and " targets), " in said and " padding), " in said
    loop.train(dialog_run(tmp_path, "parts", train__steps=3, **constant))
    loop.train(dialog_run(tmp_path, "parts", **constant))
    steps, parts = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts")
    assert steps[-1] == parts[-1] and "validation_loss" in steps[-1]
    assert [line for line in steps if "loss" in line] == [line for line in parts if "loss" in line]
    tokens = [line["tokens"] for line in steps if "loss" in line]
    loop.train(dialog_run(tmp_path, "all", data__loss_on="all", **constant))
    everything = [line["tokens"] for line in metrics_of(tmp_path / "all") if "loss" in line]
    assert len(tokens) == 8 and all(5 * a < b for a, b in zip(tokens, everything, strict=True))
    with pytest.raises(ValueError, match="data.loss_on was 'assistant', is now 'all'"):
        loop.train(dialog_run(tmp_path, "whole", data__loss_on="all", train__steps=9, **constant))


def test_bad_data_stops_a_run_before_it_starts_and_a_little_is_told_of(tmp_path, capsys):
    good = {"instruction": "Say y", "output": "y"}
    given = str(tmp_path / "some.model")
    byte_tokenizer().save(given)
    bad = [good] * 30 + [{"instruction": "a", "output": ""}] * 4
    words = r"4 of 34 documents cannot be used \(11.8%; .*: 'output' is empty.*; all of them are listed in "
    for run in (
        dialog_run(tmp_path, "bad", bad, data__tokenizer=given),
        dialog_run(tmp_path, "bad"),  # nor is a vocabulary learned of it
    ):
        with pytest.raises(ValueError, match=words) as caught:
            loop.train(run)
        listed = Path(str(caught.value).rpartition(" listed in ")[2]).read_text()
        assert [json.loads(line)["line"] for line in listed.splitlines()] == [31, 32, 33, 34]
    assert "model:" not in capsys.readouterr().out and not (tmp_path / "bad" / "metrics.jsonl").exists()
    loop.train(dialog_run(tmp_path, "good", [good] * 30 + [{"instruction": "a", "output": ""}], train__steps=1,
                          optimizer__warmup_steps=0))  # fmt: skip
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "as bad" in line]
    assert line.startswith("train: left out as bad: 1 of 31 documents, the first: ")
    assert json.loads(Path(line.rpartition(" listed in ")[2]).read_text())["line"] == 31


def test_a_run_of_before_a_key_existed_resumes_with_its_default(tmp_path):
    run = dialog_run(tmp_path, "run", train__steps=2)
    loop.train(run)
    for path in (tmp_path / "run" / "checkpoints").rglob("*"):
        if path.is_file() and b'"loss_on": "assistant", ' in (data := path.read_bytes()):
            path.write_bytes(data.replace(b'"loss_on": "assistant", ', b""))
            break
    else:
        raise AssertionError("no file of the checkpoint holds the config")
    for path in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):  # which such a run did not have either
        path.unlink()
    assert loop.train(dialog_run(tmp_path, "run", train__steps=3)).step == 3
