"""Claims about sources, the token store, packing and the loader."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from helpers.paths import ROOT, TESTS
from helpers.tokenizers import BOS, EOS, ByteTokenizer
from llama_jax.data import records, sources, store
from llama_jax.data.corpus import Document
from llama_jax.data.loader import Loader, evaluation_batches
from llama_jax.data.packing import PackedRows
from llama_jax.data.sources import documents_from, fingerprint_of
from llama_jax.data.store import DamagedStore, TokenStore, build_store


@pytest.fixture
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    lengths = [1, 40, 3, 0, 90, 7, 7, 200, 1, 1, 25]
    return ["".join(chr(97 + c) for c in rng.integers(0, 26, n)) or "." for n in lengths]


@pytest.fixture
def file(tmp_path, texts) -> str:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def built(tmp_path, file) -> TokenStore:
    return build_store([file], ByteTokenizer(), cache_dir=tmp_path / "cache", workers=2)


def by_index(batches) -> list[bytes]:
    """Batches as bytes, for comparison."""
    return [b"".join(batch[name].tobytes() for name in sorted(batch)) for batch in batches]


def take(iterator, count: int) -> list:
    return [next(iterator) for _ in range(count)]


# Sources


@pytest.mark.parametrize("name", ["chats.csv", "chats.JL", "chats.zst", "chats.jsonl.zst"])
def test_tables_and_archives_are_not_taken_for_texts(tmp_path, name):
    (tmp_path / name).write_text('{"messages": []}')
    for pattern in (name, "chats.*"):
        with pytest.raises(ValueError, match=r"are not supported; write records as lines of a \.jsonl file"):
            documents_from([str(tmp_path / pattern)])


def test_sources_come_in_a_fixed_order_from_files_folders_globs_and_gzip(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "a.md").write_text("\ufeffay", encoding="utf-8")
    (tmp_path / "ignored.py").write_text("code")
    (tmp_path / "deep" / "c.jsonl").write_text('{"text": "see"}\n\n{"text": "dee", "id": 1}\n')
    with gzip.open(tmp_path / "deep" / "er" / "e.json-lines.gz", "wt") as out:
        out.write('{"text": "e"}\n')
    whole = list(documents_from([str(tmp_path)]))
    assert [d.text for d in whole] == ["ay", "bee", "see", "dee", "e"]
    assert whole[3].name == f"{(tmp_path / 'deep' / 'c.jsonl').as_posix()}:3"
    assert [d.text for d in documents_from([str(tmp_path / "**" / "*.json*")])] == ["see", "dee", "e"]
    # Any ending is welcome by name, and a file named twice is read once.
    named = [str(tmp_path / "ignored.py"), str(tmp_path / "b.txt"), str(tmp_path / "*.txt")]
    assert [d.text for d in documents_from(named)] == ["code", "bee"]


def test_corpus_parts_are_sources():
    train, held = (list(documents_from([name])) for name in sources.CORPUS)
    assert len(train) > 10 * len(held) > 0
    assert fingerprint_of(["stdlib:train"]) != fingerprint_of(["stdlib:validation"])


def test_sources_fingerprint_follows_size_time_and_path(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = fingerprint_of([str(path)])
    assert fingerprint_of([str(path)]) == before
    os.utime(path, ns=(1, 1))
    touched = fingerprint_of([str(path)])
    path.write_text("longer")
    os.utime(path, ns=(1, 1))
    assert len({before, touched, fingerprint_of([str(path)])}) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": oops}\n', r"a\.jsonl:2: not a line of JSON.*oops"),
        ("a.jsonl", b'{"txt": "x", "id": 1}\n', r"a\.jsonl:1: no key 'text', found \['id', 'txt'\].*'txt'"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: expected.*JSON list"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: 'text' must be a string, found int"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8 at byte 10 of the line \(0xff\)"),
        ("a.txt", b"abc\xff", r"a\.txt: not UTF-8 at byte 3 \(0xff\); convert"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz: not a whole gzip file"),
        ("a.txt", b" \n", r"holds no text"),
    ],
)
def test_bad_files_are_named_with_the_place_and_the_mend(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build_store([str(tmp_path / name)], ByteTokenizer(), cache_dir=tmp_path / "cache")


def test_a_pattern_without_a_match_names_the_nearest(tmp_path):
    (tmp_path / "train.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"trian\.txt' matches no file; the nearest.*train\.txt"):
        documents_from([str(tmp_path / "trian.txt")])
    with pytest.raises(FileNotFoundError, match=r"holds no file ending in \.txt"):
        documents_from([str(tmp_path / "empty")])
    with pytest.raises(FileNotFoundError, match=r"stdlib:test.*stdlib:train, stdlib:validation"):
        documents_from(["stdlib:test"])
    with pytest.raises(ValueError, match="no data was named"):
        documents_from([])
    with pytest.raises(TypeError, match=r"write \['a\.txt'\]"):
        documents_from("a.txt")


# Store


def test_store_holds_every_document_between_bos_and_eos(built, texts):
    assert built.num_documents == len(texts)
    assert built.tokens.dtype == np.uint16
    found = [built.tokens[a:b].tolist() for a, b in zip(built.offsets, built.offsets[1:], strict=False)]
    assert found == [[BOS, *text.encode(), EOS] for text in texts]
    content = built.tokens.tobytes() + np.asarray(built.offsets).tobytes()
    assert built.fingerprint == hashlib.sha256(content).hexdigest()


def test_order_does_not_depend_on_the_number_of_threads(tmp_path, file, monkeypatch):
    monkeypatch.setattr(store, "_GROUP_CHARACTERS", 10)

    class Uneven(ByteTokenizer):
        def encode(self, text, *, bos=False, eos=False):
            time.sleep(0.01 * (len(text) % 3))
            return super().encode(text, bos=bos, eos=eos)

    seen: list[tuple[int, int]] = []
    prints = set()
    for workers in (1, 4):
        cache = tmp_path / f"cache{workers}"
        made = build_store(
            [file], Uneven(), cache_dir=cache, workers=workers, progress=lambda d, t: seen.append((d, t))
        )
        prints.add(made.fingerprint)
        assert seen[-1] == (made.num_documents, made.num_tokens)
    assert len(prints) == 1
    assert len(seen) > 4


def test_memory_is_bounded_by_a_few_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_GROUP_CHARACTERS", 1)
    read = 0
    gaps = []

    def documents():
        nonlocal read
        for i in range(100):
            read += 1
            yield Document(str(i), "text")

    groups = store._encoded(documents(), ByteTokenizer(), workers=2)
    for written, _ in enumerate(groups, start=1):
        gaps.append(read - written)
    assert read == 100 and max(gaps) <= 5


def test_large_vocabularies_take_four_bytes(tmp_path, file):
    class Large(ByteTokenizer):
        vocab_size = 128256

        def encode(self, text, *, bos=False, eos=False):
            return [128000, *super().encode(text), 128001]

    made = build_store([file], Large(), cache_dir=tmp_path / "cache")
    assert made.tokens.dtype == np.uint32
    assert made.tokens[0] == 128000 and made.tokens[-1] == 128001


def test_ids_outside_the_vocabulary_are_refused_and_leave_nothing(tmp_path, file):
    class Wrong(ByteTokenizer):
        vocab_size = 200

    with pytest.raises(ValueError, match=r"texts\.jsonl:1.*outside \[0, 200\)"):
        build_store([file], Wrong(), cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_built_store_is_opened_again_until_data_or_tokenizer_change(tmp_path, file, built):
    class Never(ByteTokenizer):
        def encode(self, text, *, bos=False, eos=False):
            raise AssertionError("tokenised again")

    cache = built.path.parent
    assert build_store([file], Never(), cache_dir=cache).path == built.path
    never = Never()
    never.fingerprint = "other"
    with pytest.raises(AssertionError, match="tokenised again"):
        build_store([file], never, cache_dir=cache)
    with open(file, "a") as out:
        out.write('{"text": "one more"}\n')
    assert build_store([file], ByteTokenizer(), cache_dir=cache).num_documents == built.num_documents + 1


@pytest.mark.parametrize("damage", ["cut tokens", "no meta", "bad meta", "cut offsets", "no tokens", "wrong offsets"])
def test_a_damaged_store_is_refused_with_the_mend_and_rebuilt_in_the_cache(built, file, damage):
    want = built.tokens[:].tolist()
    path = built.path
    if damage == "cut tokens":
        os.truncate(path / "tokens.bin", built.num_tokens)
    elif damage == "no meta":
        (path / "meta.json").unlink()
    elif damage == "bad meta":
        (path / "meta.json").write_text("{")
    elif damage == "cut offsets":
        os.truncate(path / "offsets.npy", 140)
    elif damage == "no tokens":
        (path / "tokens.bin").unlink()
    else:
        np.save(path / "offsets.npy", built.offsets[::-1].copy())
    with pytest.raises(DamagedStore, match="is damaged .* delete that folder and build it again"):
        TokenStore(path)
    with pytest.warns(UserWarning, match="rebuilding it now"):
        again = build_store([file], ByteTokenizer(), cache_dir=path.parent)
    assert again.tokens[:].tolist() == want
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_store([file], ByteTokenizer(), cache_dir=path.parent)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy"])
def test_a_flipped_bit_in_the_cache_is_noticed_and_the_store_rebuilt(built, file, name):
    want, path = built.tokens[:].tolist(), built.path
    data = bytearray((path / name).read_bytes())
    data[-5 if name == "tokens.bin" else -8] ^= 1  # a token's value; the end of the last document
    (path / name).write_bytes(data)
    with pytest.warns(UserWarning, match="is damaged .*: rebuilding it now"):
        again = build_store([file], ByteTokenizer(), cache_dir=path.parent)
    assert again.tokens[:].tolist() == want and again.fingerprint == built.fingerprint
    again.verify()


def test_reading_stops_early_where_most_records_are_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_HOPELESS_AT", 100)
    monkeypatch.setattr(store, "_GROUP_CHARACTERS", 50)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + '{"txt": "b"}\n' * 5000)
    with pytest.raises(
        ValueError, match=r"of \d{3} documents cannot be used \(99.*a\.jsonl:2: no key 'text'"
    ) as caught:
        build_store([str(path)], ByteTokenizer(), cache_dir=tmp_path / "cache", workers=1)
    assert len(Path(str(caught.value).rpartition(" listed in ")[2]).read_text().splitlines()) < 500
    assert build_store([str(path)], ByteTokenizer(), cache_dir=tmp_path / "cache", max_bad=1.0).num_bad == 5000


def test_no_bit_of_the_header_of_the_offsets_is_an_error_of_numpy(built):
    path = built.path / "offsets.npy"
    whole = path.read_bytes()
    refused = 0
    for bit in range(8 * 128):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            with warnings.catch_warnings(action="ignore"):
                TokenStore(built.path)
        except DamagedStore:
            refused += 1
    assert refused > 500  # the others are in the padding of the header, and change nothing


def test_a_killed_build_leaves_no_store_and_is_swept_later(tmp_path, file):
    code = f"""
"Builds a store and kills itself at the first report of progress."
import os, sys
sys.path.insert(0, {str(TESTS)!r})
from helpers.tokenizers import ByteTokenizer
from llama_jax.data import store
def die(documents, tokens): os.kill(os.getpid(), 9)
store.build_store([{file!r}], ByteTokenizer(), cache_dir={str(tmp_path / "cache")!r}, progress=die)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == -9
    (leftover,) = (tmp_path / "cache").iterdir()
    assert ".partial-" in leftover.name
    made = build_store([file], ByteTokenizer(), cache_dir=tmp_path / "cache")
    assert leftover.exists()  # it might still have been at work
    for path in [*leftover.iterdir(), leftover]:
        os.utime(path, (1, 1))
    build_store([file], ByteTokenizer(), cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [made.path]


def test_the_loser_of_a_race_uses_the_winners_store(tmp_path, file):
    barrier = threading.Barrier(2, timeout=20)

    class Together(ByteTokenizer):
        met = threading.local()

        def encode(self, text, *, bos=False, eos=False):
            if not getattr(self.met, "yes", False):
                self.met.yes = True
                barrier.wait()
            return super().encode(text, bos=bos, eos=eos)

    made: list[TokenStore] = []

    def build():
        made.append(build_store([file], Together(), cache_dir=tmp_path / "cache", workers=1))

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made[0].fingerprint == made[1].fingerprint
    assert list((tmp_path / "cache").iterdir()) == [made[0].path] == [made[1].path]


def test_a_build_that_fails_leaves_no_thread(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 1}\n' * 100_000)
    before = threading.active_count()
    with pytest.raises(ValueError, match="cannot be used") as caught:
        build_store([str(path)], ByteTokenizer(), cache_dir=tmp_path / "cache", workers=1)
    assert caught.traceback and threading.active_count() == before  # although the error holds the frames of the build


# Packing


def slow_rows(texts: list[str], length: int) -> list[dict[str, list]]:
    """The packed rows, one prediction at a time, from the definition alone."""
    stream = [(d, t) for d, text in enumerate(texts) for t in [BOS, *text.encode(), EOS]]
    rows = []
    for start in range(0, len(stream) - 1, length):
        row: dict[str, list] = {k: [] for k in ("tokens", "targets", "positions", "segments", "weights")}
        for i in range(start, start + length):
            if i + 1 >= len(stream):
                for values in row.values():
                    values.append(0)
                continue
            same = i > start and stream[i][0] == stream[i - 1][0]
            row["tokens"].append(stream[i][1])
            row["targets"].append(stream[i + 1][1])
            row["positions"].append(row["positions"][-1] + 1 if same else 0)
            row["segments"].append((row["segments"] or [0])[-1] + (not same))
            row["weights"].append(float(stream[i][0] == stream[i + 1][0]))
        rows.append(row)
    return rows


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 41, 395, 396, 397, 1000])
def test_packed_rows_equal_a_slow_construction(built, texts, length):
    rows = PackedRows(built, sequence_length=length)
    want = slow_rows(texts, length)
    assert len(rows) == len(want)
    for i, expected in enumerate(want):
        row = rows[i]
        assert {name: array.tolist() for name, array in row.items()} == expected
        assert {a.dtype.name for n, a in row.items() if n != "weights"} == {"int32"}
        assert row["weights"].dtype == np.float32


@pytest.mark.parametrize("length", [1, 5, 16, 1000])
def test_every_prediction_is_made_exactly_once_an_epoch(built, texts, length):
    rows = PackedRows(built, sequence_length=length)
    total = sum(rows[i]["weights"].sum() for i in range(len(rows)))
    assert total == sum(len(text.encode()) + 1 for text in texts)
    flat = np.concatenate([rows[i]["targets"][rows[i]["segments"] > 0] for i in range(len(rows))])
    assert flat.tolist() == built.tokens[1:].tolist()


def test_no_loss_predicts_a_document_from_another(built):
    rows = PackedRows(built, sequence_length=32)
    for i in range(len(rows)):
        row = rows[i]
        assert not row["weights"][row["targets"] == BOS].any()
        assert not row["weights"][row["segments"] == 0].any()


def test_packing_refuses_what_it_cannot_pack(built):
    with pytest.raises(ValueError, match="sequence_length must be at least 1, got 0"):
        PackedRows(built, sequence_length=0)
    with pytest.raises(IndexError):
        PackedRows(built, sequence_length=8)[10**6]


# Loader


@pytest.fixture
def rows(built) -> PackedRows:
    return PackedRows(built, sequence_length=16)


def row_ids(rows: PackedRows, batches) -> list[int]:
    """The indices of the rows in these batches."""
    known = {rows[i]["tokens"].tobytes(): i for i in range(len(rows))}
    assert len(known) == len(rows)
    return [known[tokens.tobytes()] for batch in batches for tokens in batch["tokens"]]


def test_each_epoch_visits_every_row_once_in_another_order(rows):
    count = len(rows)
    ids = row_ids(rows, take(Loader(rows, batch_size=1, seed=3), 3 * count))
    epochs = [ids[i * count : (i + 1) * count] for i in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert list(range(count)) not in epochs


def test_batches_follow_one_order_whatever_their_size(rows):
    wanted = row_ids(rows, take(Loader(rows, batch_size=1, seed=3), 60))
    for size in (4, 5, 60):  # across the epochs' ends, which no multiple of 4 meets
        assert row_ids(rows, take(Loader(rows, batch_size=size, seed=3), 60 // size)) == wanted


def test_another_seed_is_another_order_even_shifted_by_an_epoch(rows):
    count = len(rows)
    orders = {}
    for seed in range(4):
        ids = row_ids(rows, take(Loader(rows, batch_size=1, seed=seed), 2 * count))
        for epoch in range(2):
            orders[seed, epoch] = tuple(ids[epoch * count : (epoch + 1) * count])
    assert len(set(orders.values())) == 8
    assert by_index(take(Loader(rows, batch_size=4, seed=1), 9)) == by_index(
        take(Loader(rows, batch_size=4, seed=1, prefetch=0), 9)
    )


def test_without_shuffle_rows_come_in_order(rows):
    ids = row_ids(rows, take(Loader(rows, batch_size=len(rows), seed=0, shuffle=False), 2))
    assert ids == list(range(len(rows))) * 2


@pytest.mark.parametrize("stop", [0, 1, 3, 11])
def test_resuming_gives_the_same_batches_in_mid_epoch(rows, stop):
    straight = by_index(take(Loader(rows, batch_size=4, seed=7), 16))
    first = Loader(rows, batch_size=4, seed=7, prefetch=5)
    assert by_index(take(first, stop)) == straight[:stop]
    state = json.loads(json.dumps(first.state()))
    assert state["rows"] == stop * 4
    second = Loader(rows, batch_size=4, seed=7)
    take(second, 2)
    second.restore(state)
    assert by_index(take(second, 16 - stop)) == straight[stop:]
    third = Loader(rows, batch_size=4, seed=7, start_step=stop)
    assert by_index(take(third, 16 - stop)) == straight[stop:]


def test_hosts_shares_make_up_the_whole_batch(rows):
    whole = take(Loader(rows, batch_size=6, seed=2), 8)
    shares = [[0, 1, 2], [5, 3, 4]]
    parts = [take(Loader(rows, batch_size=6, seed=2, rows_of_host=share), 8) for share in shares]
    for step, batch in enumerate(whole):
        for name, array in batch.items():
            for share, part in zip(shares, parts, strict=True):
                assert np.array_equal(part[step][name], array[share])


def test_fewer_rows_than_a_batch_repeat_inside_it(built):
    rows = PackedRows(built, sequence_length=300)
    assert len(rows) == 2
    batch = next(Loader(rows, batch_size=7, seed=0))
    ids = row_ids(rows, [batch])
    assert [sorted(ids[i : i + 2]) for i in (0, 2, 4)] == [[0, 1]] * 3


def test_epochs_end(rows):
    loader = Loader(rows, batch_size=4, seed=0, epochs=2)
    assert len(list(loader)) == 2 * len(rows) // 4
    loader.restore({**loader.state(), "rows": 4})
    assert len(list(loader)) == 2 * len(rows) // 4 - 1


def test_resuming_with_another_batch_size_goes_on_with_the_next_row(rows):
    wanted = row_ids(rows, take(Loader(rows, batch_size=1, seed=3), 42))
    first = Loader(rows, batch_size=6, seed=3)
    seen = row_ids(rows, take(first, 2))
    for size in (1, 4, 5):
        second = Loader(rows, batch_size=size, seed=3)
        second.restore(first.state())
        more = row_ids(rows, take(second, 30 // size))
        assert seen + more == wanted[: len(seen + more)] and second.position == len(seen + more)


def test_positions_of_earlier_versions_counted_batches(rows):
    loader = Loader(rows, batch_size=4, seed=7)
    state = {key: value for key, value in loader.state().items() if key != "rows"} | {"step": 3, "batch_size": 4}
    loader.restore(state)
    assert loader.position == 12


def test_state_of_other_data_or_settings_is_refused(built, rows):
    state = Loader(rows, batch_size=4, seed=7).state()
    others = {
        "seed": Loader(rows, batch_size=4, seed=8),
        "sequence_length": Loader(PackedRows(built, sequence_length=8), batch_size=4, seed=7),
        "shuffle": Loader(rows, batch_size=4, seed=7, shuffle=False),
    }
    for key, loader in others.items():
        message = rf"{key} was {state[key]!r} when it was saved and is {loader.state()[key]!r} now; set it back"
        with pytest.raises(ValueError, match=message):
            loader.restore(state)
    loader = Loader(rows, batch_size=4, seed=7)
    with pytest.raises(
        ValueError, match="the text, tokenizer, weights or loss of data.train are not what they were; set it back"
    ):
        loader.restore({**state, "store": "abc"})
    with pytest.raises(ValueError, match="rows must be a count of rows, got -1"):
        loader.restore({**state, "rows": -1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be between 0"),
        ({"rows_of_host": [4]}, r"rows from 0 to 3 of the batch, got \[4\]"),
        ({"rows_of_host": []}, "rows_of_host must name rows"),
        ({"batch_size": 10**6, "epochs": 1}, "do not fill one batch"),
        ({"start_step": -1}, "cannot be negative"),
    ],
)
def test_impossible_settings_are_refused(rows, settings, message):
    with pytest.raises(ValueError, match=message):
        Loader(rows, **{"batch_size": 4, "seed": 0, **settings})


def test_evaluation_is_every_row_once_in_order_then_padding(rows):
    batches = list(evaluation_batches(rows, batch_size=4, max_batches=None))
    flat = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    assert len(flat["tokens"]) == -(-len(rows) // 4) * 4 > len(rows)
    for i in range(len(rows)):
        assert all(np.array_equal(flat[name][i], array) for name, array in rows[i].items())
    assert not any(array[len(rows) :].any() for array in flat.values())
    halves = [list(evaluation_batches(rows, batch_size=4, max_batches=3, rows_of_host=h)) for h in ([0, 1], [2, 3])]
    joined = [
        {name: np.concatenate([left[name], right[name]]) for name in left} for left, right in zip(*halves, strict=True)
    ]
    assert by_index(joined) == by_index(batches[:3])
    with pytest.raises(ValueError, match="max_batches must be at least 1"):
        evaluation_batches(rows, batch_size=4, max_batches=0)


def test_importing_the_data_floor_imports_neither_jax_nor_grain():
    code = (
        "import sys, llama_jax.data.corpus, llama_jax.data.loader\n"
        "assert not {'jax', 'grain', 'flax'} & set(sys.modules), sorted(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
