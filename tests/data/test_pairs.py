"""Claims about preference pairs: what a record becomes, how pairs lie in rows, what is refused, and what is shown."""

import hashlib
import json
import os
import random
import re

import numpy as np
import pytest

from helpers.files import write
from helpers.packing import NAMES, slow_rows
from helpers.records import ANSWER, ASK, FUNCTION, documents_in, expected, random_pair, store_of
from helpers.runs import text_run
from llama_jax import manifest
from llama_jax.data import inspect, prepare
from llama_jax.data.encoding import encode_pair
from llama_jax.data.loader import Loader, evaluation_batches
from llama_jax.data.packing import Mixture, WholeRows, pack
from llama_jax.data.records import Pair, parse
from llama_jax.data.sources import documents_from, fingerprint_of
from llama_jax.data.store import TokenStore, build_store
from llama_jax.errors import ConfigError
from llama_jax.text import Tokenizer
from llama_jax.text.chat_format import Llama3Format
from llama_jax.text.record_encoder import RecordEncoder

T = 640
BETTER, WORSE = ({"role": "assistant", "content": text} for text in ("Because.", "No idea."))
GOOD = {"prompt": [ASK], "chosen": [BETTER], "rejected": [WORSE]}
TEXTS = {"prompt": "One and one is", "chosen": " two.", "rejected": " three."}
Document = tuple[list[int], list[bool]]


def expected_pair(tokenizer: Tokenizer, record: dict) -> tuple[Document, Document]:
    """Ids and targets of both answers, by the format's description and the meaning of the three shapes."""
    if isinstance(record["chosen"], str):
        prompt = [tokenizer.bos_id, *tokenizer.encode(record["prompt"])]
        answers = [[*tokenizer.encode(record[key]), tokenizer.eos_id] for key in ("chosen", "rejected")]
        return tuple((prompt + ids, [False] * len(prompt) + [True] * len(ids)) for ids in answers)
    before = [{"role": "system", "content": record["system"]}] if "system" in record else []
    before += record.get("prompt", [])
    dialogs = [before + (a if isinstance(a, list) else [a]) for a in (record["chosen"], record["rejected"])]
    shared = os.path.commonprefix([[json.dumps(message) for message in dialog] for dialog in dialogs])
    first = len(before) if "prompt" in record else len(shared)
    return tuple(expected(tokenizer, messages, record.get("tools"), first) for messages in dialogs)


def short_pairs(count: int, seed: int, tokenizer: Tokenizer, longest: int = T) -> list[dict]:
    """Random pairs of at most `longest` tokens together."""
    rng = random.Random(seed)
    found: list[dict] = []
    while len(found) < count:
        record = random_pair(rng)
        found += [record] if sum(len(ids) for ids, _ in expected_pair(tokenizer, record)) <= longest else []
    return found


@pytest.fixture(scope="module")
def records(tokenizer) -> list[dict]:
    return short_pairs(1000, 11, tokenizer)


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer, records) -> TokenStore:
    return store_of(tmp_path_factory.mktemp("pairs"), records, tokenizer, max_length=T)


# ---- ids and targets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["tokenizer", "merging"])
def test_a_thousand_pairs_have_the_ids_and_targets_of_an_independent_construction(tmp_path, request, which):
    vocabulary, rng = request.getfixturevalue(which), random.Random(2)
    records = [random_pair(rng) for _ in range(1000)]
    assert sum("tools" in record for record in records) > 200
    assert sum(isinstance(record["chosen"], str) for record in records) > 100
    assert sum("prompt" not in record for record in records) > 100
    assert sum("system" in record for record in records) > 20
    assert sum(len([m for m in record.get("prompt", ()) if "content" in m]) > 4 for record in records) > 100
    store = store_of(tmp_path, records, vocabulary, workers=2)
    wanted = [document for record in records for document in expected_pair(vocabulary, record)]
    assert documents_in(store) == wanted
    assert store.pairs and store.masked and store.num_records == 1000 and store.num_documents == 2000
    assert store.num_targets == sum(sum(mask) for _, mask in wanted)


def test_every_shape_of_a_pair_becomes_the_same_ids(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    earlier = [system, ASK, ANSWER, {"role": "user", "content": "Really?"}]
    tools = [FUNCTION]
    records = [
        {"prompt": earlier, "chosen": [BETTER], "rejected": [WORSE], "tools": tools},
        {"prompt": earlier, "chosen": BETTER, "rejected": WORSE, "tools": json.dumps(tools)},
        {"prompt": earlier[1:], "system": "Be brief.", "chosen": [BETTER], "rejected": [WORSE], "tools": tools},
        {"chosen": [*earlier, BETTER], "rejected": [*earlier, WORSE], "tools": tools, "prompt": None},
        {"chosen": [*earlier, BETTER], "rejected": [*earlier, WORSE], "tools": tools, "prompt": "Really?"},
        {"chosen": [*earlier[1:], BETTER], "rejected": [*earlier[1:], WORSE], "system": "Be brief.", "tools": tools},
    ]
    wanted = tuple(expected(tokenizer, [*earlier, answer], tools, 4) for answer in (BETTER, WORSE))
    assert [encode_pair(parse(record, "r"), tokenizer, max_length=None) for record in records] == [wanted] * 6
    assert sum(wanted[0][1]) == len(b"Because.") + 1  # and not the earlier answer, which is the same words


def test_a_record_that_is_a_dialog_too_is_read_as_what_is_asked_for(tmp_path, tokenizer):
    record = {"messages": [ASK, BETTER], **GOOD}
    path = write(tmp_path / "d.jsonl", [record] * 3)
    dialogs, pairs = (
        build_store([path], tokenizer, cache_dir=tmp_path / "cache", pairs=pairs) for pairs in (False, True)
    )
    assert (dialogs.pairs, dialogs.num_documents) == (False, 3) and (pairs.pairs, pairs.num_documents) == (True, 6)
    assert dialogs.path != pairs.path
    assert documents_in(pairs)[:2] == list(expected_pair(tokenizer, GOOD))
    assert documents_in(dialogs)[0] == documents_in(pairs)[0]


def test_a_vocabulary_is_learned_from_both_answers(tmp_path):
    found = list(documents_from([write(tmp_path / "d.jsonl", [GOOD, TEXTS])]))
    assert all(isinstance(sample, Pair) for sample in found)
    text = "\n".join(sample.text for sample in found)
    assert all(word in text for word in ("Why?", "Because.", "No idea.", "One and one is two.", "is three."))


# ---- rows ----------------------------------------------------------------------------------------------------


def test_rows_of_a_thousand_pairs_equal_a_slow_construction(store, records, tokenizer):
    documents = [document for record in records for document in expected_pair(tokenizer, record)]
    wanted = slow_rows(documents, T, False, together=2)
    rows = pack(store, sequence_length=T, loss_on="assistant")
    assert isinstance(rows, WholeRows) and len(rows) == len(wanted)
    for i, row in enumerate(wanted):
        assert {name: array.tolist() for name, array in rows[i].items()} == row
    filled = sum((np.array(row["segments"]) > 0).sum() for row in wanted)
    assert (
        rows.padding_fraction == pytest.approx(1 - filled / (len(wanted) * T), abs=1e-12)
        and rows.padding_fraction < 0.06
    )


def pairs_in(row: dict[str, np.ndarray]) -> list[tuple[Document, Document]]:
    """The pairs of one row, from its arrays alone."""
    segments, found = row["segments"], []
    assert segments.max() % 2 == 0
    for segment in range(1, int(segments.max()) + 1):
        (places,) = np.nonzero(segments == segment)
        assert np.array_equal(row["positions"][places], np.arange(len(places)))
        mask = [False, *(row["weights"][places][:-1] > 0).tolist()]
        found.append((row["tokens"][places].tolist(), mask))
    return list(zip(found[::2], found[1::2], strict=True))


def test_rows_hold_every_pair_exactly_once_chosen_before_rejected(store, records, tokenizer):
    rows = pack(store, sequence_length=T, loss_on="assistant")
    found = [pair for i in range(len(rows)) for pair in pairs_in(rows[i])]
    assert sorted(found) == sorted(expected_pair(tokenizer, record) for record in records)
    assert max(len(pairs_in(rows[i])) for i in range(len(rows))) >= 3


def test_a_pair_must_fit_into_a_row_together(tmp_path, tokenizer):
    one, other = (len(ids) for ids, _ in expected_pair(tokenizer, GOOD))
    lines = [GOOD] * 20 + [GOOD | {"rejected": [{**WORSE, "content": WORSE["content"] + "!"}]}]
    store = store_of(tmp_path, lines, tokenizer, max_length=one + other)
    assert (store.num_records, store.num_bad, store.num_too_long) == (20, 0, 1)
    said = json.loads(store.quarantine.read_text())
    assert said["line"] == 21
    assert (
        f"{one} tokens of 'chosen' and {other + 1} of 'rejected' are more than data.sequence_length=" in said["reason"]
    )
    rows = pack(store, sequence_length=one + other, loss_on="assistant")
    assert len(rows) == 20 and rows.padding_fraction == 0
    with pytest.raises(ValueError, match=f"a pair of {one + other} tokens does not fit into rows of {one + other - 1}"):
        pack(store, sequence_length=one + other - 1, loss_on="assistant")
    with pytest.raises(ConfigError, match="data.loss_on='all' would count the prompts .*: set it to 'assistant'"):
        pack(store, sequence_length=T, loss_on="all")


def test_the_same_documents_that_are_no_pairs_have_other_rows_and_another_fingerprint(tmp_path, tokenizer):
    dialogs = [{"messages": [ASK, answer]} for answer in (BETTER, WORSE)]
    pairs = store_of(tmp_path, [GOOD] * 3, tokenizer)
    alone = build_store([write(tmp_path / "o.jsonl", dialogs * 3)], tokenizer, cache_dir=tmp_path / "cache")
    assert pairs.fingerprint == alone.fingerprint and documents_in(pairs) == documents_in(alone)
    prints = {pack(store, sequence_length=90, loss_on="assistant").fingerprint for store in (pairs, alone)}
    assert len(prints) == 2


def test_the_loader_resumes_pairs_and_hosts_share_them_out(store):
    rows = pack(store, sequence_length=T, loss_on="assistant")
    straight = Loader(rows, batch_size=4, seed=1)
    batches = [next(straight) for _ in range(30)]
    loader = Loader(rows, batch_size=4, seed=1)
    for _ in range(9):
        next(loader)
    again = Loader(rows, batch_size=4, seed=1)
    again.restore(json.loads(json.dumps(loader.state())))
    hosts = [Loader(rows, batch_size=4, seed=1, rows_of_host=part, start_step=9) for part in ([0, 1], [2, 3])]
    for batch in batches[9:]:
        other, parts = next(again), [next(host) for host in hosts]
        for name in NAMES:
            np.testing.assert_array_equal(batch[name], other[name])
            np.testing.assert_array_equal(batch[name], np.concatenate([part[name] for part in parts]))
    last = list(evaluation_batches(rows, batch_size=7, max_batches=None))[-1]
    assert {name: array.shape for name, array in last.items()} == dict.fromkeys(NAMES, (7, T))


def test_a_mixture_of_pair_files_draws_whole_pairs_of_each_by_weight(tmp_path, tokenizer):
    parts, all_pairs = [], []
    for name, seed in (("a", 1), ("b", 2)):
        records = short_pairs(60, seed, tokenizer)
        path = write(tmp_path / f"{name}.jsonl", records)
        store = build_store([path], tokenizer, cache_dir=tmp_path / "cache", max_length=T)
        parts.append(pack(store, sequence_length=T, loss_on="assistant"))
        all_pairs.append({repr(expected_pair(tokenizer, record)) for record in records})
    mixture = Mixture(tuple(parts), (1.0, 3.0))
    loader = Loader(mixture, batch_size=8, seed=0)
    state = None
    counts, seen = [0, 0], []
    for step in range(20):
        state = loader.state() if step == 12 else state
        batch = next(loader)
        seen.append(batch)
        for i in range(8):
            drawn = {repr(pair) for pair in pairs_in({name: array[i] for name, array in batch.items()})}
            (part,) = [n for n in (0, 1) if drawn <= all_pairs[n]]
            counts[part] += 1
    assert counts == [40, 120]
    again = Loader(mixture, batch_size=8, seed=0)
    again.restore(state)
    for batch in seen[12:]:
        assert all(np.array_equal(batch[name], other) for name, other in next(again).items())


# ---- what is refused -----------------------------------------------------------------------------------------


def answers(chosen, rejected=WORSE, **more) -> dict:
    return {"prompt": [ASK], "chosen": chosen, "rejected": rejected, **more}


EMPTY = {"role": "assistant", "content": " "}
BAD = [
    (answers([BETTER], [BETTER]), "'chosen' and 'rejected' are the same: there is nothing to prefer"),
    (answers([BETTER], [{**BETTER, "name": "x"}]), "'chosen' and 'rejected' are the same"),
    ({**TEXTS, "rejected": " two."}, "'chosen' and 'rejected' are the same"),
    ({"chosen": [ASK, BETTER], "rejected": [ASK, BETTER]}, "'chosen' and 'rejected' are the same"),
    (answers([EMPTY]), "messages[1]: the assistant's answer is empty"),
    (answers([BETTER], [EMPTY]), "messages[1]: the assistant's answer is empty"),
    (answers([]), "'chosen' is empty after the 1 messages that it shares"),
    (answers([BETTER], []), "'rejected' is empty after the 1 messages that it shares"),
    ({**TEXTS, "chosen": " \n"}, "'chosen' is empty: there is nothing to learn"),
    ({**TEXTS, "rejected": ""}, "'rejected' is empty: there is nothing to learn"),
    ({"chosen": [ASK, BETTER], "rejected": [ASK]}, "'rejected' is empty after the 1 messages that it shares"),
    (
        {"chosen": [ASK, BETTER], "rejected": [{**ASK, "content": "How?"}, WORSE]},
        "'chosen' and 'rejected' share no first message: give 'prompt' as a list",
    ),
    (
        {"chosen": [ASK, ANSWER, ASK, BETTER], "rejected": [ASK, ANSWER, {**ASK, "content": "How?"}, WORSE]},
        "must share their messages up to one of the assistant: message 2 of 'chosen' is",
    ),
    (answers([ASK, BETTER], [ASK, WORSE]), "must share their messages up to one of the assistant: message 1"),
    ({"prompt": "Why?", "chosen": [BETTER], "rejected": [WORSE]}, "share no first message"),
    ({**TEXTS, "prompt": None}, "'chosen' and 'rejected' are texts, and 'prompt' is missing"),
    ({**TEXTS, "prompt": 3}, "'prompt' must be a string, found int"),
    ({**TEXTS, "system": "Be brief."}, "'system' has no meaning in a record of this shape: put all into 'prompt'"),
    (answers("Because.", prompt="Why?"), "'chosen' must be a list of messages, or a string where"),
    (answers([BETTER], 3), "'rejected' must be a list of messages, or a string where"),
    (answers(["Because."]), "chosen[0] must be a dict with 'role' and 'content', got 'Because.'"),
    (answers([BETTER], prompt=[]), "'prompt' is empty: an answer needs a question"),
    (answers([BETTER], prompt=[{"role": "usr", "content": "x"}]), "did you mean 'user'?"),
    (answers([BETTER], tools=["ad"]), "tools[0]: 'ad' (str) is not a built-in tool"),
    (answers([BETTER], tools="add"), "'tools' must be a list"),
    (answers([{**BETTER, "weight": 0}]), "no message of the assistant is to be learned"),
    ({"prompt": [ASK], "chosen": [BETTER]}, "'chosen' without 'rejected'"),
    ({"rejected": "b"}, "'rejected' without 'chosen'"),
    ({"messages": [ASK, ANSWER]}, "not a preference pair, as the records before it are"),
    ({"text": "plain"}, "not a preference pair, as the records before it are"),
    (b'{"prompt": ', "not a line of JSON"),
    (answers([{**BETTER, "content": "x" * 800}]), "'rejected' are more than data.sequence_length=640"),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=range(len(BAD)))
def test_a_bad_pair_goes_to_quarantine_with_file_line_and_reason(tmp_path, tokenizer, line, reason):
    store = store_of(tmp_path, [*[GOOD] * 20, line, b"", TEXTS], tokenizer, max_length=T)
    assert store.pairs and (store.num_records, store.num_bad + store.num_too_long) == (21, 1)
    (listed,) = [json.loads(text) for text in store.quarantine.read_text().splitlines()]
    assert (listed["file"], listed["line"]) == (str(tmp_path / "data.jsonl"), 21)
    assert reason in listed["reason"] and listed["reason"].isprintable()
    assert documents_in(store) == [*expected_pair(tokenizer, GOOD)] * 20 + [*expected_pair(tokenizer, TEXTS)]


def test_an_empty_answer_earlier_in_the_prompt_is_nobodys_to_learn(tokenizer):
    prompt = [ASK, EMPTY, ASK]
    found = encode_pair(parse(answers([BETTER], prompt=prompt), "r"), tokenizer, max_length=None)
    assert found == tuple(expected(tokenizer, [*prompt, answer], None, 3) for answer in (BETTER, WORSE))


def test_more_than_five_percent_of_bad_pairs_stop_and_pairs_are_what_is_counted(tmp_path, tokenizer):
    assert store_of(tmp_path, [*[GOOD] * 19, {}], tokenizer).num_bad == 1
    with pytest.raises(ValueError, match=r"^2 of 20 documents cannot be used \(10.0%.* the first: "):
        store_of(tmp_path, [*[GOOD] * 18, {}, {}], tokenizer)


def test_stores_of_texts_and_dialogs_are_found_where_they_were_before_pairs(tmp_path, tokenizer):
    """The keys, written out; and meta of before, which says nothing of pairs. Those of dialogs have a version."""
    for name, lines, length in (("t", [{"text": "plain"}], []), ("d", [{"messages": [ASK, ANSWER]}], [T, 3, "drop"])):
        path = write(tmp_path / f"{name}.jsonl", lines)
        made = build_store([path], tokenizer, cache_dir=tmp_path / "cache", max_length=T)
        identity = [1, fingerprint_of([path]), tokenizer.fingerprint, tokenizer.vocab_size, *length]
        assert made.path.name == hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
        meta = json.loads((made.path / "meta.json").read_text())
        assert meta.pop("pairs") is False
        (made.path / "meta.json").write_text(json.dumps(meta))
        again = build_store([path], tokenizer, cache_dir=tmp_path / "cache", max_length=T)
        assert again.path == made.path and not again.pairs and again.record_kind == "document"


def test_a_store_of_pairs_with_an_odd_document_is_damaged(tmp_path, tokenizer):
    store = store_of(tmp_path, [{"messages": [ASK, ANSWER]}] * 3, tokenizer)
    meta = {name: value for name, value in store.meta.items() if name != manifest.SEAL}
    (store.path / "meta.json").write_text(json.dumps(manifest.sealed(meta | {"pairs": True})))
    with pytest.raises(ValueError, match="3 documents are not pairs"):
        TokenStore(store.path)


# ---- a run ---------------------------------------------------------------------------------------------------


def pair_run(tmp_path, lines: list, **changes):
    base = {
        "data__train": (write(tmp_path / "data.jsonl", lines),),
        "data__sequence_length": T,
        "train__objective": "dpo",
        "init_from": "somewhere",
    }
    return text_run(tmp_path, **(base | changes))


def test_a_run_takes_pairs_for_dpo_and_says_how_many(tmp_path, tokenizer):
    said: list[str] = []
    lines = [GOOD] * 30 + [{**GOOD, "messages": [ASK, BETTER]}, {}]
    path = write(tmp_path / "held.jsonl", [TEXTS] * 4)
    train, validation = prepare.rows(pair_run(tmp_path, lines, data__validation=(path,)), tokenizer, said.append)
    assert train.parts[0].store.pairs and validation.store.pairs
    assert said[0].startswith("train: 31 pairs, 2,") and " targets), " in said[0] and " padding), " in said[0]
    assert said[1].startswith("train: left out as bad: 1 of 32 pairs, the first: ")
    assert said[2].startswith("train: each row is seen ") and said[2].endswith(
        ": set train.steps lower if that is not meant"
    )
    assert said[3].startswith("train: one, two and three epochs are ")
    assert said[4].startswith("validation: 4 pairs, ")


def test_an_objective_and_data_that_do_not_go_together_are_named_with_the_mend(tmp_path, tokenizer):
    def refused(words: str, lines: list, **changes):
        with pytest.raises(ConfigError, match=words) as caught:
            prepare.rows(pair_run(tmp_path, lines, **changes), tokenizer, print)
        assert "\n" not in str(caught.value)

    dialogs = [{"messages": [ASK, ANSWER]}] * 3
    refused(
        "data.train: .*data.jsonl holds dialogs or completions, .*'dpo' does .*: give records of 'prompt', 'chos",
        dialogs,
    )
    refused("data.train: .*data.jsonl holds texts, .* or set train.objective='sft'", [{"text": "x"}])
    words = "data.train: .*data.jsonl holds preference pairs, .*'sft' .*: set train.objective='dpo', or give the chosen"
    refused(words, [GOOD] * 3, train__objective="sft")
    refused("data.loss_on='all' would count the prompts", [GOOD] * 3, data__loss_on="all")
    held = write(tmp_path / "held.jsonl", dialogs)
    refused("data.validation: .*held.jsonl holds dialogs", [GOOD] * 3, data__validation=(held,))
    pairs = write(tmp_path / "pairs.jsonl", [GOOD] * 3)
    refused("data.train: .*held.jsonl holds dialogs", [], data__train=(pairs, held), data__weights=(1.0, 1.0))


def test_inspect_shows_pairs_and_counts_them(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.setenv("LINES", "80")
    run = pair_run(tmp_path, [GOOD] * 30, data__sequence_length=160, init_from=str(tmp_path))
    inspect.show(run, RecordEncoder(tokenizer, Llama3Format(tokenizer)), color=False)
    one, other = (len(ids) for ids, _ in expected_pair(tokenizer, GOOD))
    both = one + other
    out = capsys.readouterr().out
    assert (
        f"train: 30 pairs, {30 * both:,} tokens ({18 / both:.1%} targets), 15 rows ({1 - both / 80:.1%} padding)" in out
    )
    lengths = f"tokens a pair: {both} to {both}, mean {both}, median {both}, 95 % of them up to {both}; 2.0 pairs a row"
    assert f"train: {lengths}" in out
    wanted = []
    for k in (1, 2):
        for answer, n, text in (("chosen", one, "Because."), ("rejected", other, "No idea.")):
            wanted += [f"── pair {k}, {answer}: {n} tokens, 9 counted ──", f"⟦{text}<|eot_id|>⟧"]
    wanted.append(f"── {160 - 2 * both} positions of padding ──")
    shown = re.findall("── .* ──|⟦[^ ].*?⟧", out)
    assert shown == wanted * 2
