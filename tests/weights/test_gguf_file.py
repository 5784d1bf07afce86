"""GGUF files: numbers are those of ggml to the bit, and damaged files are refused in one line."""

import dataclasses
import math
import struct
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from helpers.errors import refusal
from helpers.paths import GOLDEN_FOLDER
from helpers.sound import lazy
from llama_jax import gguf_header
from llama_jax.weights.formats import gguf_blocks, gguf_file

GOLDEN = np.load(GOLDEN_FOLDER / "gguf.npz")
TYPES = GOLDEN_FOLDER / "gguf_types.gguf"
PARTS = sorted(GOLDEN_FOLDER.glob("gguf_split-*.gguf"))


def text(string):
    data = string if isinstance(string, bytes) else string.encode()
    return struct.pack("<Q", len(data)) + data


def key(name, kind, data):
    return text(name) + struct.pack("<I", kind) + data


def info(name, dims, kind=0, start=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, start)


def encode(keys=(), infos=(), data=b"", *, version=3, counts=None):
    """A file, written here by the format's description and not by the code under test."""
    tensors, pairs = counts or (len(infos), len(keys))
    header = b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + b"".join(keys) + b"".join(infos)
    return header + (bytes(-len(header) % 32) + data if data else b"")


def write(tmp_path, data, name="bad.gguf"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


# What ggml packs.


@pytest.mark.parametrize("name", [key.removeprefix("types/") for key in GOLDEN.files if key.startswith("types/")])
def test_numbers_are_those_of_ggml_bit_for_bit(name):
    found, expected = gguf_file.open_file(TYPES).entries[name], GOLDEN[f"types/{name}"]
    assert found.shape == expected.shape
    assert found.kind == name.upper()
    np.testing.assert_array_equal(found.read(None, np.float32).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", [key.removeprefix("types/") for key in GOLDEN.files if key.startswith("types/")])
def test_any_part_of_a_tensor_is_read_alone(name):
    found, whole = gguf_file.open_file(TYPES).entries[name], GOLDEN[f"types/{name}"]
    last = whole.shape[-1]
    for columns in (slice(0, 1), slice(1, last), slice(last // 2, last - 1), slice(last - 1, last), slice(2, 2)):
        for rows in (slice(0, whole.shape[0]), slice(1, 2)):
            index = (rows, *(slice(0, n) for n in whole.shape[1:-1]), columns)
            for dtype in (np.float32, jnp.bfloat16):
                part = found.read(index, np.dtype(dtype))
                np.testing.assert_array_equal(part, whole[index].astype(dtype))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_numbers_become_the_blocks_of_ggml(kind):
    found = gguf_blocks.quantize(kind, GOLDEN["quantize/numbers"])
    np.testing.assert_array_equal(found, GOLDEN[f"quantize/{kind}"])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_numbers_too_small_for_a_scale_become_zeros(kind):
    tiny = np.float32([[1e-44, -1e-39, *[0.0] * 30]])
    assert not gguf_blocks.dequantize(kind, gguf_blocks.quantize(kind, tiny)).any()


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_exact_pieces_are_the_numbers(name):
    found = gguf_file.open_file(TYPES).entries[name]
    bits, values, scales = found.quantized
    assert (values.shape, values.dtype) == ((3, 160 * bits // 8), np.dtype(np.int8 if bits == 8 else np.uint8))
    assert (scales.shape, scales.dtype) == ((3, 5), np.dtype(np.float16))
    packed = values.read().reshape(3, 5, -1)
    integers = packed if bits == 8 else np.concatenate([packed & 15, packed >> 4], axis=2).astype(np.int8) - 8
    numbers = integers * scales.read(None, np.float32)[..., None]
    np.testing.assert_array_equal(numbers.reshape(3, 160), GOLDEN[f"types/{name}"])
    for piece in (values, scales):
        part = (slice(1, 3), slice(piece.shape[1] // 3, piece.shape[1] - 1))
        np.testing.assert_array_equal(piece.read(part), piece.read()[part])


def test_metadata_is_what_was_written():
    found = gguf_file.open_file(TYPES).metadata
    for bits in (8, 16, 32, 64):
        assert found[f"value.uint{bits}"] == 2**bits - 1
        assert found[f"value.int{bits}"] == -(2 ** (bits - 1))
    assert found["value.float32"] == found["value.float64"] == 1e-5
    assert found["value.true"] is True and found["value.false"] is False
    assert found["value.string"] == "Ġé\n日本🦙"
    assert found["value.strings"] == ["", "a", "🦙"]
    assert found["value.ints"].tolist() == [1, -2, 3]
    assert found["value.floats"].tolist() == [0.5, 1.5]
    assert found["value.bools"].tolist() == [True, False]
    assert found["general.alignment"] == 64


@pytest.mark.parametrize("part", PARTS, ids=lambda path: path.name)
def test_a_split_file_opens_from_any_of_its_parts(part):
    found = gguf_file.open_file(part)
    assert list(found.entries) == [f"t{i}" for i in range(5)]
    assert all((tensor.read() == i).all() for i, tensor in enumerate(found.entries.values()))
    assert found.size == sum(path.stat().st_size for path in PARTS)
    assert found.metadata["general.architecture"] == "none"


def test_version_2_is_read_like_version_3(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    for version in (2, 3):
        path = write(
            tmp_path, encode([key("a", 4, b"\1\0\0\0")], [info("t", (3, 2))], array.tobytes(), version=version)
        )
        found = gguf_file.open_file(path)
        assert found.version == version and found.metadata == {"a": 1}
        np.testing.assert_array_equal(found.entries["t"].read(), array)


# Writing.


@pytest.mark.parametrize("kind", gguf_file.WRITTEN)
def test_a_written_file_reads_back(tmp_path, kind):
    values = {
        "text": "Ġé🦙",
        "yes": True,
        "int": 7,
        "wide": -(1 << 40),
        "float": 1e-5,
        "strings": ["a", ""],
        "ints": np.int32([1, -2]),
    }
    arrays = {"a": np.random.RandomState(0).standard_normal((5, 96)).astype(np.float32)}
    arrays["b"] = arrays["a"][:, :32].copy()
    told = []
    path = tmp_path / "w.gguf"
    gguf_file.save_file(path, values, {n: (lazy(a), kind) for n, a in arrays.items()}, progress=told.append)
    found = gguf_file.open_file(path)
    assert found.metadata.pop("ints").tolist() == [1, -2]
    assert found.metadata == {name: value for name, value in values.items() if name != "ints"}
    assert list(found.entries) == ["a", "b"]
    assert sum(told) == sum(e.nbytes for e in found.entries.values())
    for name, array in arrays.items():
        if kind in gguf_file.PLAIN:
            expected = array.astype(gguf_file.PLAIN[kind])
        else:
            expected = gguf_blocks.dequantize(kind, gguf_blocks.quantize(kind, array))
        np.testing.assert_array_equal(found.entries[name].read(), expected)


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_blocks_are_copied_exactly(tmp_path, name):
    source = gguf_file.open_file(TYPES).entries[name]
    source = dataclasses.replace(source, kind="of another format")
    gguf_file.save_file(tmp_path / "w.gguf", {}, {"t": (source, name.upper())})
    found = gguf_file.open_file(tmp_path / "w.gguf").entries["t"].quantized
    for mine, theirs in zip(found[1:], source.quantized[1:], strict=True):
        assert mine.read().tobytes() == theirs.read().tobytes()


@pytest.mark.parametrize(("kind", "number"), [("F16", 1e6), ("Q8_0", 1e9), ("Q4_0", math.nan), ("F32", math.inf)])
def test_numbers_that_a_kind_cannot_hold_are_refused(tmp_path, kind, number):
    array = np.full((2, 32), number, np.float32)
    with pytest.raises(ValueError, match="not finite") as error:
        gguf_file.save_file(tmp_path / "w.gguf", {}, {"t": (lazy(array), kind)})
    assert "'t'" in refusal(error)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused(tmp_path):
    matrix = lazy(np.zeros((2, 33), np.float32))
    for tensors, word in (({"t": (matrix, "Q4_K")}, "Q4_K"), ({"t": (matrix, "Q8_0")}, "multiple of 32")):
        with pytest.raises(ValueError, match=word) as error:
            gguf_file.save_file(tmp_path / "w.gguf", {}, tensors)
        refusal(error)


# Files that are not sound.

ROW = np.zeros(8, np.float32).tobytes()
BAD = {
    "empty": (b"", "not a GGUF"),
    "other": (b"GGML" + bytes(40), "not a GGUF"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (encode(version=1), "version 1"),
    "version 4": (encode(version=4), "version 4"),
    "many tensors": (encode(counts=(1 << 62, 0)), "tensors"),
    "many keys": (encode(counts=(0, 1 << 62)), "keys"),
    "more than memory": (encode(counts=(1 << 18, 0), data=bytes(1 << 23)), "memory"),
    "more keys than there are": (encode([key("a", 4, bytes(4))], counts=(0, 2)), "key 2|2 keys"),
    "key length": (encode([struct.pack("<Q", 1 << 63) + bytes(20)]), "metadata key 1"),
    "key twice": (encode([key("a", 4, bytes(4)), key("a", 0, b"\1")]), "twice"),
    "key not UTF-8": (encode([key(b"\xff\xfe", 4, bytes(4))]), "UTF-8"),
    "string not UTF-8": (encode([key("a", 8, text(b"ab\xc3"))]), "'a' is not valid UTF-8"),
    "surrogate": (encode([key("a", 8, text(b"\xed\xa0\x80"))]), "UTF-8"),
    "string length": (encode([key("a", 8, struct.pack("<Q", 1 << 40))]), "'a'"),
    "value type": (encode([key("a", 13, bytes(8))]), "type 13"),
    "array type": (encode([key("a", 9, struct.pack("<IQ", 77, 1) + bytes(8))]), "type 77"),
    "array of arrays": (encode([key("a", 9, struct.pack("<IQ", 9, 1) + bytes(40))]), "array of type 9"),
    "array count": (encode([key("a", 9, struct.pack("<IQ", 4, 1 << 61))]), "'a'"),
    "strings count": (encode([key("a", 9, struct.pack("<IQ", 8, 1 << 61))]), "'a'"),
    "alignment 0": (encode([key("general.alignment", 4, bytes(4))]), "power of two"),
    "alignment 3": (encode([key("general.alignment", 4, b"\3\0\0\0")]), "power of two"),
    "alignment word": (encode([key("general.alignment", 8, text("32"))]), "power of two"),
    "alignment true": (encode([key("general.alignment", 7, b"\1")]), "power of two"),
    "alignment beyond": (
        encode([key("general.alignment", 10, struct.pack("<Q", 1 << 63))], [info("t", (8,))], ROW),
        "cut off",
    ),
    "tensor twice": (encode([], [info("t", (8,)), info("t", (8,), 0, 32)], ROW * 2), "twice"),
    "tensor not UTF-8": (encode([], [info(b"\xff", (8,))], ROW), "UTF-8"),
    "rank": (encode([], [info("t", (1, 1, 1, 1, 8))], ROW), "5 dimensions"),
    "huge rank": (encode([], [text("t") + struct.pack("<I", 1 << 31)], ROW), "dimensions"),
    "no numbers": (encode([], [info("t", (8, 0))], ROW), "at least 1"),
    "huge dimension": (encode([], [info("t", (1 << 63, 1 << 63, 1 << 63, 1 << 63))], ROW), "cut off"),
    "overflowing product": (encode([], [info("t", (1 << 32, 1 << 32))], ROW), "cut off"),
    "beyond the end": (encode([], [info("t", (9,))], ROW), "cut off"),
    "place beyond": (encode([], [info("t", (8,), 0, 1 << 60)], ROW), "cut off"),
    "misaligned": (encode([], [info("t", (1,), 0, 4)], ROW), "multiple of 32"),
    "overlap": (encode([], [info("s", (9,)), info("t", (8,), 0, 32)], ROW * 2), "within 's'"),
    "same place": (encode([], [info("s", (8,)), info("t", (8,))], ROW), "within"),
    "IQ4_XS": (encode([], [info("t", (256,), 23)], ROW * 9), "IQ4_XS"),
    "F64": (encode([], [info("t", (4,), 28)], ROW), "F64"),
    "withdrawn": (encode([], [info("t", (32,), 4)], ROW), "Q4_2"),
    "type from the future": (encode([], [info("t", (8,), 999)], ROW), "999"),
    "row of blocks": (encode([], [info("t", (33, 2), 8)], ROW * 9), "multiple of 32"),
    "blocks in a line": (encode([], [info("t", (32,), 8)], ROW * 9), "matrix"),
    "alignment array": (
        encode([key("general.alignment", 9, struct.pack("<IQ", 4, 500) + bytes(2000))]),
        "an array of 500 numbers",
    ),
    "split array": (encode([key("split.no", 9, struct.pack("<IQ", 4, 2) + bytes(8))]), "an array of 2 numbers"),
    "total array": (
        encode([key("split.tensors.count", 9, struct.pack("<IQ", 4, 2) + bytes(8))]),
        "split.tensors.count is an array of 2",
    ),
    "a part without parts": (encode([key("split.count", 2, b"\3\0")]), "split"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_unsound_files_are_refused(tmp_path, name):
    data, word = BAD[name]
    path = write(tmp_path, data)
    with pytest.raises(ValueError, match=word) as error:
        gguf_file.open_file(path)
    assert refusal(error).startswith(str(path))


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    array = struct.pack("<IQ", 8, 2) + text("ab") + text("")
    keys = [key("a", 8, text("word")), key("b", 9, array), key("c", 9, struct.pack("<IQhh", 3, 2, 1, 2))]
    whole = encode([*keys, key("d", 12, bytes(8))], [info("s", (4, 2)), info("t", (32, 1), 8, 32)], ROW + bytes(34))
    assert len(gguf_file.open_file(write(tmp_path, whole)).entries) == 2
    for length in range(len(whole)):
        with pytest.raises(ValueError) as error:
            gguf_file.open_file(write(tmp_path, whole[:length]))
        refusal(error)


def test_no_damage_does_worse_than_a_refusal(tmp_path):
    whole, draw = TYPES.read_bytes(), np.random.RandomState(0)
    opened = 0
    for _ in range(600):
        data = bytearray(whole)
        for place in draw.randint(0, 2400, draw.randint(1, 4)):
            data[place] = draw.choice([0, 1, 0x7F, 0xFF, draw.randint(256)])
        try:
            found = gguf_file.open_file(write(tmp_path, data))
            for tensor in found.entries.values():
                tensor.read()
            opened += 1
        except ValueError as error:
            assert "\n" not in str(error)
    assert 0 < opened < 600


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_a_scale_that_is_not_finite_is_refused_by_name(tmp_path, name):
    kind, numbers = name.upper(), gguf_blocks.BLOCKS[name.upper()][0]
    number = next(n for n, known in gguf_file._TYPES.items() if known == kind)
    at = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(kind, 0) + gguf_blocks.BLOCKS[kind][1]
    raw = bytearray(2 * gguf_blocks.BLOCKS[kind][1])
    raw[at : at + 2] = np.float16(math.nan).tobytes()
    found = gguf_file.open_file(write(tmp_path, encode([], [info("t", (numbers, 2), number)], bytes(raw)))).entries["t"]
    assert not found.read((slice(0, 1),)).any()
    readers = [found.read] + ([found.quantized.scales.read] if found.quantized else [])
    for read in readers:
        with pytest.raises(ValueError, match="'t' has a scale") as error:
            read()
        refusal(error)


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    def copy(*, skip=None, **renamed):
        for old in tmp_path.iterdir():
            old.unlink()
        for path in PARTS:
            if path != skip:
                (tmp_path / path.name).write_bytes(renamed.get("data", {}).get(path, path.read_bytes()))
        return tmp_path / PARTS[0].name

    first, second, third = PARTS
    cases = {
        "missing": lambda: copy(skip=second),
        "split.no and split.count": lambda: copy(data={second: third.read_bytes()}),
        "split.tensors.count": lambda: copy(
            data={third: encode([key("split.no", 2, b"\2\0"), key("split.count", 2, b"\3\0")])}
        ),
    }
    for word, make in cases.items():
        path = make()
        with pytest.raises(ValueError, match=word) as error:
            gguf_file.open_file(path)
        refusal(error)
    again = encode([key("split.no", 2, b"\2\0"), key("split.count", 2, b"\3\0")], [info("t0", (8,))], ROW)
    with pytest.raises(ValueError, match="'t0' is already in an earlier part"):
        gguf_file.open_file(copy(data={third: again}))
    alone = write(tmp_path, first.read_bytes(), "renamed.gguf")
    with pytest.raises(ValueError, match="keep the names"):
        gguf_file.open_file(alone)
    for name in ("x-00004-of-00003.gguf", "x-00000-of-00003.gguf", "x-00001-of-99999.gguf"):
        with pytest.raises(ValueError, match="parts must be 1 to"):
            gguf_file.open_file(write(tmp_path, first.read_bytes(), name))


@pytest.mark.parametrize(
    "value",
    [
        struct.pack("<IQ", 8, 1 << 18) + bytes(2 << 20),
        struct.pack("<IQ", 8, 3_000) + text("🦙" + "x" * 1200) * 3_000,
        struct.pack("<IQ", 8, 8) + (text("x" * (512 << 10) + "🦙")) * 8,
        struct.pack("<IQ", 4, 1 << 20) + bytes(4 << 20),
    ],
    ids=["empty strings", "many wide strings", "long wide strings", "numbers"],
)
def test_a_header_takes_no_more_memory_than_allowed(tmp_path, value, monkeypatch):
    monkeypatch.setattr(gguf_header, "_SPARE", 32_000_000)  # a quarter, so that the files are small
    path = write(tmp_path, encode([key("a", 9, value)]))
    tracemalloc.start()
    try:
        gguf_file.open_file(path)
    except ValueError as error:
        assert "memory" in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(value) + 16_000_000


def test_no_tensor_is_read_while_opening(tmp_path):
    size = 1 << 30
    path = write(tmp_path, encode([], [info("t", (1 << 15, size >> 17))], bytes(32)))
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + size)
    tracemalloc.start()
    assert gguf_file.open_file(path).entries["t"].nbytes == size
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()
