"""Claims about the readers of data files: places in errors, bounds on what one file may do, and tables that are odd."""

import bz2
import gzip
import json
import lzma
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from helpers.files import write
from helpers.paths import ROOT
from llama_jax.data import readers, records
from llama_jax.data.records import BadLine
from llama_jax.data.sources import documents_from


def read(path) -> list:
    return list(documents_from([str(path)]))


def reasons(path) -> dict[str, str]:
    return {bad.name.rpartition(":")[2]: bad.reason for bad in read(path) if isinstance(bad, BadLine)}


# ---- places --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
@pytest.mark.parametrize(
    ("line", "column"),
    [
        ('{"messages": [{"role": "user", "content": "Hi', 43),  # 45 characters; the string begins there
        ('{"text": "abc", "more": [1, 2, 3], "and":    ', 46),  # 45 characters; the value is missing after them
        ('{"text": "ééé", oops}', 17),
        ('{"text": 1}}', 12),
    ],
)
def test_a_broken_line_is_named_by_its_line_and_column(tmp_path, line, column, end):
    path = tmp_path / "a.jsonl"
    path.write_bytes(f'{{"text": "sound"}}\n\n{line}{end}'.encode())
    assert f"at column {column})" in reasons(path)["3"]


def test_a_list_is_read_alike_whatever_its_layout_and_the_size_of_a_chunk(tmp_path, monkeypatch):
    rng = random.Random(0)
    texts = ["".join(rng.choices('aé🦙"\\[]{},\n 1', k=rng.randint(1, 300))) + "." for _ in range(60)]
    items = [{"text": text, "n": [1, {"x": [[], {}]}, -1.5e3, None]} for text in texts]
    for chunk in (7, 64, 1 << 20):
        monkeypatch.setattr(readers, "_CHUNK", chunk)
        for indent, ascii_only in ((None, True), (3, False)):
            text = json.dumps(items, indent=indent, ensure_ascii=ascii_only)
            (tmp_path / "a.json").write_text("\ufeff  " + text + "\n ", encoding="utf-8")
            assert [document.text for document in read(tmp_path / "a.json")] == texts
    (tmp_path / "a.json").write_bytes(b'[\n{"text": "a"},\n{"text": "\xc3\xa9\xff"}]')
    with pytest.raises(ValueError, match=r"not UTF-8 at byte 29 \(0xff\)"):
        read(tmp_path / "a.json")


# ---- bounds --------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Bounds that small files reach."""
    monkeypatch.setattr(readers, "MAX_DOCUMENT", 1000)
    monkeypatch.setattr(readers, "MAX_UNCHECKED", 20_000)
    monkeypatch.setattr(readers, "MAX_VALUES", 300)
    monkeypatch.setattr(readers, "_CHUNK", 100)


def test_a_long_line_is_bad_and_the_next_one_is_read(tmp_path, small):
    lines = [{"text": "a"}, {"text": "x" * 3000}, {"text": "b"}, {"text": "x" * 988}, {"text": "x" * 987}]
    path = write(tmp_path / "a.jsonl", lines)
    assert list(reasons(path)) == ["2", "4"]  # 1,001 bytes with the end of the line
    assert all("the line is larger than" in reason for reason in reasons(path).values())
    assert [d.text for d in read(path) if not isinstance(d, BadLine)] == ["a", "b", "x" * 987]


def test_a_line_that_never_ends_stops_the_file(tmp_path, small):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + b"x" * 20_000)
    with pytest.raises(
        ValueError, match=r"a\.jsonl:2: a line has more than .* MiB; write one JSON record on each line"
    ):
        read(tmp_path / "a.jsonl")


def test_a_record_of_too_many_values_is_bad_and_commas_in_its_text_are_none(tmp_path, small):
    path = write(tmp_path / "a.jsonl", [{"text": "a", "n": [1] * 310}, {"text": '[,"{' * 150}])
    assert list(reasons(path)) == ["1"] and "more than 300 values" in reasons(path)["1"]
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": "b", "n": [1] * 450}], separators=(",", ":")))
    with pytest.raises(ValueError, match="item 2: more than 300 values"):
        read(tmp_path / "a.json")


def test_a_large_item_of_a_list_stops_the_file(tmp_path, small):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": "x" * 9000}]))
    with pytest.raises(ValueError, match="item 2: the item is larger than .* at line 1 column 17"):
        read(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 1500}]))  # it ends within a buffer of the next size
    with pytest.raises(ValueError, match="item 1: the item is larger than"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "head", "words"),
    [
        ("a.jsonl", gzip.compress(b'{"text": "a"}', mtime=0), "it is gzip: end its name in .gz"),
        ("a.txt", bz2.compress(b"a text"), "it is compressed: decompress it"),
        ("a.txt.gz", gzip.compress(lzma.compress(b"a text"), mtime=0), "after decompression, it is compressed"),
        ("a.txt", "A text.".encode("utf-16"), "it is in UTF-16: convert it"),
        ("a.txt", "A text.".encode("utf-16-le"), "it is binary, or a text in another encoding"),
        ("a.jsonl.old", b'{"text": "a"}', "its name has .jsonl before another ending: end it in .jsonl"),
        ("a.jsonl.lz4", b"", "files ending in .lz4 are not supported"),
    ],
    ids=["gzip", "bzip2", "xz in gzip", "UTF-16", "UTF-16 without a mark", "another ending", "lz4"],
)
def test_a_file_of_another_format_is_named_as_such(tmp_path, name, head, words):
    (tmp_path / name).write_bytes(head)
    with pytest.raises(ValueError, match=f"{name}: {words}"):
        read(tmp_path / name)


def test_a_file_that_is_refused_is_closed(tmp_path):
    reader = readers._Reader(Path(write(tmp_path / "a.txt", ["A text.".encode("utf-16")])))
    with pytest.raises(ValueError, match=r"a\.txt: it is in UTF-16"), reader:
        pass
    assert reader._file.closed


def test_a_pipe_is_no_file_of_data(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match=r"a\.txt' is a pipe or a device, and data are read more than once"):
        documents_from([str(tmp_path / "a.txt")])


def test_a_text_may_begin_like_another_format_and_endings_may_be_in_capitals(tmp_path):
    (tmp_path / "a.txt").write_text("PAR1 BZh ORC")
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "BZh"}'))
    assert [document.text for document in documents_from([str(tmp_path)])] == ["BZh", "PAR1 BZh ORC"]


def test_a_large_text_is_read_in_parts_that_lose_nothing(tmp_path, small):
    rng = random.Random(1)
    paragraphs = ["é🦙x " * rng.randint(1, 60) for _ in range(40)] + ["日" * 2000]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    found = read(tmp_path / "a.txt")
    assert "".join(document.text for document in found) == "\n\n".join(paragraphs)
    assert len(found) > 10 and all(len(document.text.encode()) <= 1000 for document in found)
    assert sum(document.text.endswith("\n\n") for document in found) >= 8
    (tmp_path / "a.txt").write_bytes(b"x" * 5000 + b"\xff")
    with pytest.raises(ValueError, match="not UTF-8 at byte 5000 "):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.json.gz"])
def test_a_file_that_is_compressed_too_well_is_refused(tmp_path, small, name):
    line = json.dumps({"text": "x" * 900})
    whole = "[" + ",\n".join([line] * 2000) + "]" if "json." in name else "\n".join([line] * 2000)
    (tmp_path / name).write_bytes(gzip.compress(whole.encode()))
    with pytest.raises(ValueError, match=f"{name}: it is compressed more than 100 times"):
        read(tmp_path / name)
    rng = random.Random(2)
    sound = "\n".join(json.dumps({"text": str(rng.random())}) for _ in range(2000))
    (tmp_path / name).write_bytes(gzip.compress(sound.encode()))
    assert len(read(tmp_path / name)) > 30


def test_a_bomb_takes_little_memory(tmp_path):
    """With the bounds as they are: 300 MB from 0.3 MB as a text and as one line, and 4 GB from 0.5 MB as a table."""
    code = (
        "import resource, sys\nfrom llama_jax.data.sources import documents_from\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    print(list(documents_from(sys.argv[1:])))\n"
        "except ValueError as error:\n    print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    bomb = gzip.compress(b"x" * 300_000_000, compresslevel=1)
    for name in ("a.txt.gz", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(bomb)
    words = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), pa.array(["y" * 10_000_000]))
    messages = pa.StructArray.from_arrays([pa.array(["user", "assistant"] * 200), words], ["role", "content"])
    column = pa.ListArray.from_arrays(pa.array([0, 400], pa.int32()), messages)
    table_of(tmp_path / "a.parquet", {"messages": column}, store_schema=False)
    said = {}
    for name in ("a.txt.gz", "a.jsonl.gz", "a.parquet"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / name)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        said[name], grown = done.stdout.splitlines()
        assert float(grown) < 250, name  # MiB
    assert all("compressed more than 100 times" in said[name] for name in ("a.txt.gz", "a.jsonl.gz"))
    assert "the row is larger than 32 MiB" in said["a.parquet"]


# ---- tables --------------------------------------------------------------------------------------------------


def table_of(path, columns: dict, **options) -> str:
    pyarrow.parquet.write_table(pa.table(columns), path, **options)
    return str(path)


def broken_text(rows: list[bytes]) -> pa.Array:
    """Strings that need not be UTF-8."""
    return pa.array(rows, pa.binary()).view(pa.string())


def test_a_row_that_is_not_utf8_is_bad_and_the_others_are_read(tmp_path):
    path = table_of(tmp_path / "a.parquet", {"text": broken_text([b"one", b"tw\xffo", b"three"])})
    assert reasons(path) == {"2": "not UTF-8 at byte 2 of a string (0xff)"}
    assert [d.text for d in read(path) if not isinstance(d, BadLine)] == ["one", "three"]


def test_a_large_row_is_bad_and_the_others_are_read(tmp_path, small):
    texts = ["a", "x" * 5000, "b"] + ["c" * 400] * 6
    path = table_of(tmp_path / "a.parquet", {"text": texts})
    assert list(reasons(path)) == ["2"] and "the row is larger than" in reasons(path)["2"]
    assert [d.text for d in read(path) if not isinstance(d, BadLine)] == [t for t in texts if len(t) < 1000]
    alone = table_of(tmp_path / "b.parquet", {"text": ["x" * 5000, "y" * 5000]}, row_group_size=2, compression="none")
    assert list(reasons(alone)) == ["1", "2"] and "its row group has" in reasons(alone)["2"]


def test_a_column_that_is_compressed_too_well_is_refused(tmp_path, small):
    table = {"text": ["x" * 900 + str(i) for i in range(1000)]}
    path = table_of(tmp_path / "a.parquet", table, compression="zstd", use_dictionary=False)
    with pytest.raises(ValueError, match=r"a\.parquet: column 'text' is compressed more than 100 times"):
        read(path)


def test_a_dictionary_that_repeats_one_text_is_refused(tmp_path, small):
    indices = pa.array([0] * 2000, type=pa.int32())
    column = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * 500]))
    path = table_of(tmp_path / "a.parquet", {"text": column})
    with pytest.raises(ValueError, match=r"a\.parquet: its rows are more than 100 times as large as the file"):
        read(path)


def without_dictionary_offsets(path: str) -> None:
    """Patches a file of one row group so that its metadata name no dictionary, which its pages still have.

    Each data_page_offset becomes that of the dictionary, in as many bytes, and dictionary_page_offset (field 11 of
    parquet.thrift's ColumnMetaData) becomes index_page_offset (field 10), so that the next field is one further.
    """
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(0)
    data = Path(path).read_bytes()
    for i in range(group.num_columns):
        page, dictionary = group.column(i).data_page_offset, group.column(i).dictionary_page_offset
        width = len(varint(page))
        found = re.search(re.escape(b"\x26" + varint(page) + b"\x26" + varint(dictionary)) + b"([\x10-\xe0])", data)
        end = bytes([0x16]) + varint(dictionary) + bytes([found[1][0] + 0x10])
        data = data[: found.start()] + b"\x26" + varint(dictionary, width) + end + data[found.end() :]
    Path(path).write_bytes(data)


def varint(number: int, width: int = 1) -> bytes:
    """A positive integer in Thrift's compact form, zigzag and 7 bits in a byte, in `width` bytes or more."""
    number, parts = 2 * number, []
    while number or len(parts) < width:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts[:-1], parts[-1] & 127])


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("places", [("text",), ("messages",), ("text", "messages")])
def test_a_repeated_text_takes_its_memory_once_whatever_the_metadata_say(tmp_path, hidden, places):
    text = "x" * (1 << 20)
    rows = {"text": [text] * 256, "messages": [[{"role": "user", "content": text}]] * 256}
    rows = {name: cells for name, cells in rows.items() if name in places}
    path = table_of(tmp_path / "a.parquet", rows)
    if hidden:
        without_dictionary_offsets(path)
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(0)
    assert all(group.column(i).has_dictionary_page != hidden for i in range(group.num_columns))
    pool, usual = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(ValueError, match="its rows are more than 100 times as large as the file"):
            for _ in documents_from([path]):
                pass
    finally:
        pa.set_memory_pool(usual)
    assert pool.max_memory() < 64 << 20


def test_columns_without_a_meaning_are_not_read(tmp_path):
    path = table_of(tmp_path / "a.parquet", {"text": ["a", "b"], "id": broken_text([b"\xff", b"\xfe"]), "n": [1, 2]})
    assert [d.text for d in read(path)] == ["a", "b"]
    path = table_of(tmp_path / "b.parquet", {"txt": ["a", "b"], "id": [1, 2]})
    with pytest.raises(ValueError, match=r"b\.parquet: no key 'text', found \['id', 'txt'\]; did you mean 'txt'"):
        read(path)


def test_a_table_has_every_key_that_a_record_is_asked_for():
    """Each key that `parse` reads is a column that is read; the source of records.py is where they are."""
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(records))
    asked = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "get"
        and getattr(node.func.value, "id", "") == "record"
        and isinstance(node.args[0], ast.Constant)
    }
    assert {"prompt", "system", "label"} <= asked <= records.KEYS
