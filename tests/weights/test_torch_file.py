"""torch's files: every type is read without torch; anything but plain tensors is refused in one line."""

import io
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from golden import make_meta
from helpers.errors import refusal
from llama_jax.weights.formats import torch_file, torch_pickle
from llama_jax.weights.tensor import of_array

FOLDERS = make_meta.HERE  # each has files that torch.save wrote


class Name(str):
    """module.attribute, as a GLOBAL of a pickle."""


def program(*parts):
    """A pickle, assembled here: whole numbers, text, tuples, names and None as values, bytes as they are."""

    def value(part):
        match part:
            case bytes():
                return part
            case Name():
                return f"c{part.rpartition('.')[0]}\n{part.rpartition('.')[2]}\n".encode()
            case str():
                return b"X" + struct.pack("<I", len(part.encode())) + part.encode()
            case None:
                return b"N"
            case bool():
                return b"\x88" if part else b"\x89"
            case int():
                return b"\x8a\x08" + struct.pack("<q", part)
            case tuple():
                return b"(" + b"".join(map(value, part)) + b"t"

    return b"\x80\x02" + b"".join(map(value, parts)) + b"."


FLOATS = Name("torch.FloatStorage")
REBUILD = Name("torch._utils._rebuild_tensor_v2")
EMPTY = b"ccollections\nOrderedDict\n)R"


def tensor(*, kind=FLOATS, key="0", length=6, offset=0, shape=(2, 3), strides=(3, 1), rest=(False, EMPTY)):
    """{"a": one tensor}"""
    storage = (b"(" + program("storage", kind, key, "cpu", length)[2:-1] + b"tQ",)
    return program(b"}", "a", REBUILD, (*storage, offset, shape, strides, *rest), b"R", b"s")


_STORED = {"x/data/0": np.arange(6, dtype=np.float32).tobytes()}


def archive(pickled, *, how=zipfile.ZIP_STORED, **members):
    """A torch file as bytes; `members` are more of its members, or others."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as written:
        for name, data in ({"x/data.pkl": pickled} | _STORED | members).items():
            written.writestr(name, data)
    return out.getvalue()


def opened(tmp_path, data):
    path = tmp_path / "x.pth"
    path.write_bytes(data)
    return torch_file.open_file(path)


@pytest.mark.parametrize("name", list(torch_pickle.STORAGES))
def test_every_type_is_read_as_it_was_written(tmp_path, name):
    array = np.random.RandomState(0).randint(0, 2, (3, 5, 2)).astype(torch_pickle.STORAGES[name])
    tensors = {"b": array, "empty": array[:0], "scalar": array[0, 0, 0]}
    torch_file.save_file(tmp_path / "x.pth", {k: of_array(lambda a=a: a, a.dtype, a.shape) for k, a in tensors.items()})
    found = torch_file.open_file(tmp_path / "x.pth")
    assert list(found) == list(tensors)
    for name, entry in found.items():
        assert (entry.dtype, entry.shape) == (tensors[name].dtype, tensors[name].shape)
        np.testing.assert_array_equal(entry.read(), tensors[name])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [[0, 1, 2], [3, 4, 5]]),
        ({"offset": 2, "shape": (2, 2), "strides": (2, 1)}, [[2, 3], [4, 5]]),
        ({"shape": (1, 3), "strides": (-7, 1)}, [[0, 1, 2]]),
        ({"shape": (3, 1, 2), "strides": (2, 0, 1)}, [[[0, 1]], [[2, 3]], [[4, 5]]]),
        ({"shape": (), "strides": (), "offset": 5}, 5),
        ({"shape": (0, 3), "strides": (3, 1), "offset": 6}, np.zeros((0, 3))),
        ({"shape": (3, 0), "strides": (1, 1)}, np.zeros((3, 0))),  # as torch has them
        ({"rest": (False, EMPTY, None)}, [[0, 1, 2], [3, 4, 5]]),
    ],
    ids=str,
)
def test_a_tensor_is_the_part_of_its_storage_that_the_pickle_says(tmp_path, given, expected):
    np.testing.assert_array_equal(opened(tmp_path, archive(tensor(**given)))["a"].read(), expected)


def test_a_file_of_any_pickle_protocol_is_read(tmp_path):
    for stated in range(2, 6):
        data = b"\x80" + bytes([stated]) + b"\x95" + bytes(8) + tensor()[2:]
        assert list(opened(tmp_path, archive(data))) == ["a"]
    new = tensor().replace(FLOATS_AS_GLOBAL, b"\x8c\x05torch\x94\x8c\x0cFloatStorage\x94\x93\x94")
    assert new != tensor()
    assert list(opened(tmp_path, archive(new))) == ["a"]


FLOATS_AS_GLOBAL = b"ctorch\nFloatStorage\n"


def test_sizes_in_64_bits_are_read(tmp_path):
    """As torch writes them from 4 GB on."""
    data = archive(tensor())
    end = data.rindex(b"PK\5\6")
    count, size, start = struct.unpack("<HII", data[end + 10 : end + 20])
    wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    last = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
    np.testing.assert_array_equal(
        opened(tmp_path, data[:end] + wide + locator + last)["a"].read().reshape(-1), range(6)
    )
    torch_file.save_file(tmp_path / "wide.pth", opened(tmp_path, data))
    with open(tmp_path / "wide.pth", "rb") as file:  # the writer has them in every local header
        assert file.read(30)[18:26] == b"\xff" * 8


# torch's files: what is refused.


class Reduces:
    """Python's own pickler makes this a call."""

    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


def _system():
    import os

    return os.system


_COMMAND = "exit 1"
HOSTILE = {
    **{f"reduce, protocol {p}": (pickle.dumps(Reduces(_system(), _COMMAND), p), "system") for p in range(6)},
    "nested in a dict": (pickle.dumps({"a": [Reduces(_system(), _COMMAND)]}, 2), "posix.system"),
    "eval": (pickle.dumps({"a": Reduces(eval, "1")}, 2), "eval"),
    "getattr": (pickle.dumps({"a": Reduces(getattr, "", "format")}, 4), "getattr"),
    "import of a submodule": (program(Name("torch.serialization.load"), b")R"), "torch.serialization.load"),
    "a name within a known one": (b"\x80\x04\x8c\x05torch\x8c\x10FloatStorage.mro\x93.", "torch.FloatStorage.mro"),
    "a name that is long": (b"\x80\x02c" + b"a" * 300_000 + b"\nb\n.", "aaa..."),
    "a name with a line feed": (b"\x80\x04\x8c\x03o\ns\x8c\x06system\x93.", "o\\ns.system"),
    "a name of other things": (program(b"}}\x93"), "?"),
    "a storage is called": (program(FLOATS, b")R"), "torch.FloatStorage"),
    "a dict is made of arguments": (program(Name("collections.OrderedDict"), ("a",), b"R"), "OrderedDict"),
    "a tensor is called": (tensor()[:-2] + b")R.", "not a function"),
    "a text is called": (program("os.system", b")R"), "not a function"),
    "build sets attributes": (program(EMPTY, b"}", "__class__", 1, b"sb"), "attributes"),
    "build with __setstate__": (program(EMPTY, b"}", "__setstate__", 1, b"sb"), "attributes"),
    "build of a name": (program(FLOATS, b"}", "_metadata", b"}sb"), "attributes"),
    "build of a state that is text": (program(EMPTY, "x", b"b"), "attributes"),
    "INST": (b"\x80\x02(X\x01\0\0\0aios\nsystem\n.", "INST"),
    "OBJ": (b"\x80\x02(cos\nsystem\no.", "os.system"),
    "OBJ of a known name": (b"\x80\x02(" + FLOATS_AS_GLOBAL + b"o.", "OBJ"),
    "NEWOBJ": (program(FLOATS, b")\x81"), "NEWOBJ"),
    "NEWOBJ_EX": (program(FLOATS, b")}\x92"), "NEWOBJ_EX"),
    "EXT1": (b"\x80\x02\x82\x01.", "EXT1"),
    "EXT4": (b"\x80\x02\x84\x01\0\0\0.", "EXT4"),
    "PERSID": (b"\x80\x02P0\n.", "PERSID"),
    "bytes, such as another pickle": (pickle.dumps({"a": b"cos\nsystem\n."}, 4), "SHORT_BINBYTES"),
    "a second pickle after the first": (tensor() + tensor(), "left on the stack"),
    "out of band buffers": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "protocol 0": (pickle.dumps({"a": 1}, 0), "the pickle uses"),
    "protocol 6": (b"\x80\x06}.", "protocol 6"),
    "an unknown instruction": (b"\x80\x02\xff.", "xff"),
    "POP": (b"\x80\x02}0.", "POP"),
    "empty": (b"", "ends too early"),
    "only STOP": (b".", "left on the stack"),
    "an open mark": (b"\x80\x02}(.", "left on the stack"),
    "no mark": (b"\x80\x02t.", "mark"),
    "an empty stack": (b"\x80\x02R.", "empty stack"),
    "below the mark": (b"\x80\x02}}}(s.", "empty stack"),
    "memo under the mark": (b"\x80\x02}(q\0.", "missing"),
    "append to a dict": (b"\x80\x02}Na.", "a list is missing"),
    "item of a list": (b"\x80\x02]X\x01\0\0\0aNs.", "a dict is missing"),
    "a key without a value": (b"\x80\x02}(X\x01\0\0\0au.", "no value"),
    "a key that is a number": (b"\x80\x02}K\x01Ns.", "key of type int"),
    "a key that is a tuple": (b"\x80\x02})Ns.", "key of type tuple"),
    "a key twice": (program(b"}", "a", None, b"s", "a", None, b"s"), "twice"),
    "a huge memo index that was not put": (b"\x80\x02j\xff\xff\xff\xff.", "did not keep"),
    "a huge number": (b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".", "255 bytes"),
    "a number of four gigabytes": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "LONG4"),
    "a text of many exabytes": (b"\x80\x04\x8d" + b"\xff" * 8 + b".", "ends too early"),
    "a text that is not UTF-8": (b"\x80\x02X\x01\0\0\0\xff.", "UTF-8"),
    "a bare tensor": (tensor()[:2] + tensor()[tensor().index(b"ctorch") : -2] + b".", "a tensor, not a dict"),
    "a nested dict": (program(b"}", "model", b"}s"), "'model' is a dict"),
    "a number in the dict": (program(b"}", "step", 3, b"s"), "'step' is a int"),
    "None in the dict": (program(b"}", "x", None, b"s"), "'x' is None"),
    "a list": (b"\x80\x02].", "a list, not a dict"),
    "strides of zero": (tensor(strides=(0, 0)), "not contiguous"),
    "strides below zero": (tensor(strides=(-3, -1)), "not contiguous"),
    "transposed": (tensor(shape=(3, 2), strides=(1, 3)), "not contiguous"),
    "expanded": (tensor(shape=(2, 3), strides=(0, 1)), "not contiguous"),
    "one stride too few": (tensor(strides=(3,)), "arguments"),
    "a shape below zero": (tensor(shape=(-2, -3)), "arguments"),
    "a shape of truths": (tensor(shape=(True, True)), "arguments"),
    "a shape that is text": (tensor(shape="23"), "arguments"),
    "a shape of texts": (tensor(shape=("2", "3")), "arguments"),
    "a hundred dimensions": (tensor(shape=(1,) * 100, strides=(1,) * 100), "arguments"),
    "beyond its storage": (tensor(offset=1), "exceeds its storage"),
    "offset below zero": (tensor(offset=-1), "arguments"),
    "offset far beyond": (tensor(offset=1 << 62), "exceeds its storage"),
    "a shape far beyond": (tensor(shape=(1 << 62, 1 << 62), strides=(1 << 62, 1)), "larger than any memory"),
    "a huge shape of nothing": (tensor(shape=(0, 1 << 62, 4), strides=(0, 4, 1)), "larger than any memory"),
    "more arguments": (tensor(rest=(False, EMPTY, None, None)), "arguments"),
    "fewer arguments": (tensor(rest=()), "arguments"),
    "negated": (tensor(rest=(False, EMPTY, b"}" + program("neg", True)[2:-1] + b"s")), "arguments"),
    "a storage longer than its bytes": (tensor(length=7), "should have 28 bytes"),
    "a storage shorter than its bytes": (tensor(length=5, shape=(5,), strides=(1,)), "should have 20 bytes"),
    "a storage of another type": (tensor(kind=Name("torch.DoubleStorage")), "should have 48 bytes"),
    "a storage below zero": (tensor(length=-6), "storage"),
    "a storage that is not there": (tensor(key="1"), "storage '1', which is not in the file"),
    "a storage outside": (tensor(key="../../../etc/passwd"), "not in the file"),
    "a storage of no known class": (tensor(kind=Name("collections.OrderedDict")), "storage in a way"),
    "an unknown class": (tensor(kind=Name("torch.storage.UntypedStorage")), "torch.storage.UntypedStorage"),
    "a persistent id that is text": (program("os", b"Q"), "storage in a way"),
    "a parameter of nothing": (program(Name("torch._utils._rebuild_parameter"), (None,), b"R"), "_rebuild_parameter"),
    "a quantized tensor": (program(Name("torch._utils._rebuild_qtensor")), "_rebuild_qtensor"),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_pickles_of_anything_but_plain_tensors_are_refused(tmp_path, name):
    pickled, word = HOSTILE[name]
    with pytest.raises(ValueError) as error:
        opened(tmp_path, archive(pickled))
    text = refusal(error)
    assert str(tmp_path / "x.pth") in text and word in text, text


_FULL = torch_pickle.MAX_BYTES - 100
COSTLY = {
    "dicts": b"\x80\x02" + b"}" * _FULL,
    "marks": b"\x80\x02" + b"(" * _FULL,
    "tuples in tuples": b"\x80\x02)" + b"\x85" * _FULL + b".",
    "a tuple of itself twice, and so on": b"\x80\x02)" + b"q\0h\0\x86" * (_FULL // 5) + b".",
    "lists in themselves": b"\x80\x02]" + b"q\0h\0a" * (_FULL // 5) + b".",
    "memo": b"\x80\x02}" + b"\x94" * _FULL + b".",
    "a long shape, many times": b"\x80\x02" + b"".join(
        [REBUILD_AS_GLOBAL := b"ctorch._utils\n_rebuild_tensor_v2\nq\0", b"(NN(", b"K\1" * 200_000, b"tq\1q\2tq\3"]
    ) + b"h\0h\3R" * 20_000 + b".",
    "huge memo indices": b"\x80\x02}" + b"".join(b"r" + struct.pack("<I", (1 << 31) + i) for i in range(1000)) + b".",
}  # fmt: skip


@pytest.mark.parametrize("name", list(COSTLY))
def test_no_pickle_takes_memory_or_time_out_of_proportion(tmp_path, name):
    data = archive(COSTLY[name])
    (tmp_path / "x.pth").write_bytes(data)
    tracemalloc.start()
    try:
        found = torch_file.open_file(tmp_path / "x.pth")
        assert name == "huge memo indices" and found == {}
    except ValueError as error:
        assert len(str(error)) < 600
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < len(data) + 64_000_000


def _patched(data, marker, offset, value, *, last=True):
    """Bytes put at an offset from a marker."""
    at = (data.rindex(marker) if last else data.index(marker)) + offset
    return data[:at] + value + data[at + len(value) :]


_SOUND = archive(tensor())  # two members, and their entries in the directory: the pickle's first
_LONGER = len(tensor()) + 10
_END, _ENTRY, _HEADER = b"PK\5\6", b"PK\1\2", b"PK\3\4"
ARCHIVES = {
    "empty": (b"", "not a file of torch.save"),
    "text": (b"hello, world", "not a file of torch.save"),
    "a bare pickle": (pickle.dumps({}), "bare pickle"),
    "torch before 1.6": (pickle.dumps(0x1950A86A20F9469CFC6C, 2), "before 1.6"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "a safetensors file"),
    "GGUF": (b"GGUF\3\0\0\0", "a GGUF file"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
    "no pickle": (_SOUND.replace(b"x/data.pkl", b"x/data.pxl"), "0 files <folder>/data.pkl"),
    "two pickles": (archive(tensor(), **{"y/data.pkl": b""}), "2 files <folder>/data.pkl"),
    "a pickle further down": (_SOUND.replace(b"x/data.pkl", b"x/y/zz.pkl"), "0 files <folder>/data.pkl"),
    "compressed": (archive(tensor(), how=zipfile.ZIP_DEFLATED), "compressed"),
    "encrypted": (_patched(_SOUND, _ENTRY, 8, b"\1"), "encrypted"),
    "a path that climbs": (archive(tensor(), **{"../../x": b""}), "outside of its folder"),
    "an absolute path": (archive(tensor(), **{"/etc/passwd": b""}), "outside of its folder"),
    "big-endian": (archive(tensor(), **{"x/byteorder": b"big"}), "little-endian"),
    "big-endian in six letters": (archive(tensor(), **{"x/byteorder": b"bigbig"}), "little-endian"),
    "a damaged pickle": (_patched(_SOUND, b"storage", 0, b"S", last=False), "checksum"),
    "one name twice": (archive(tensor(), **{"x/data/1": b""}).replace(b"x/data/1", b"x/data/0"), "twice"),
    "a count that is too large": (_patched(_SOUND, _END, 8, b"\3\0\3\0"), "directory is damaged"),
    "a count that is too small": (_patched(_SOUND, _END, 8, b"\1\0\1\0"), "directory is damaged"),
    "a directory elsewhere": (_patched(_SOUND, _END, 16, b"\1\0\0\0"), "directory is not at the offset"),
    "a directory far away": (_patched(_SOUND, _END, 16, b"\xf0\xff\xff\xff"), "directory is not at the offset"),
    "a member far away": (_patched(_SOUND, _ENTRY, 42, b"\xf0\xff\xff\xff"), "after the end of the data"),
    "a member elsewhere": (_patched(_SOUND, _ENTRY, 42, b"\1\0\0\0"), "not where the zip directory says"),
    "a member of another name": (_patched(_SOUND, b"x/data/0", 7, b"1", last=False), "not where the zip directory"),
    "a size that is too large": (_patched(_SOUND, _ENTRY, 20, b"\xf0\xff\xff\x7f" * 2), "ends after the end"),
    "a size in 64 bits that is not there": (_patched(_SOUND, _ENTRY, 20, b"\xff\xff\xff\xff" * 2), "no size"),
    "two sizes": (_patched(_SOUND, _ENTRY, 20, b"\1"), "compressed"),
    "a long name": (_patched(_SOUND, _ENTRY, 28, b"\xff\xff"), "the zip directory is damaged"),
    "a long extra field in the member": (_patched(_SOUND, _HEADER, 28, b"\xff\xff"), "ends after the end"),
    "members that overlap": (_patched(_SOUND, _ENTRY, 20, struct.pack("<I", _LONGER) * 2, last=False), "overlap"),
    "text after the end": (_SOUND + b"\n", "cut off"),
    "a 64-bit end far away": (_SOUND[: _SOUND.rindex(_END)] + struct.pack("<4sIQI", b"PK\6\7", 0, 1 << 62, 1)
                              + _SOUND[_SOUND.rindex(_END) :], "directory is damaged"),
    "many members": (archive(b"", **{f"x/{i}": b"" for i in range(10_000)}), "10,002 members"),
    "a long pickle": (archive(b"}" * (torch_pickle.MAX_BYTES + 1)), "data.pkl has"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ARCHIVES))
def test_archives_that_are_not_torchs_are_refused(tmp_path, name):
    data, word = ARCHIVES[name]
    with pytest.raises(ValueError) as error:
        opened(tmp_path, data)
    text = refusal(error)
    assert str(tmp_path / "x.pth") in text and word in text, text


def test_a_file_that_was_cut_off_is_refused_wherever_it_was_cut(tmp_path):
    data = (FOLDERS / "one" / "consolidated.00.pth").read_bytes()
    for length in (*range(0, 100), *range(100, len(data), 997), *range(len(data) - 100, len(data))):
        with pytest.raises(ValueError) as error:
            opened(tmp_path, data[:length])
        assert "cut off" in refusal(error) or length < 4


def test_damaged_bytes_are_refused_or_harmless(tmp_path):
    """Any byte of the pickle or of the directory, changed at random: tensors of the same names, or one line."""
    data = (FOLDERS / "tied" / "consolidated.00.pth").read_bytes()
    draw = np.random.RandomState(0)
    names, directory = set(torch_file.open_file(FOLDERS / "tied" / "consolidated.00.pth")), data.index(_ENTRY)
    for i in range(1500):
        at = draw.randint(directory, len(data)) if i % 2 else draw.randint(0, 4000)
        spoiled = data[:at] + bytes([draw.randint(256)]) + data[at + 1 :]
        try:
            assert set(opened(tmp_path, spoiled)) == names
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 600


def test_damaged_pickles_are_refused_or_harmless():
    """The same of the pickle alone, past its checksum."""
    path = FOLDERS / "one" / "consolidated.00.pth"
    with zipfile.ZipFile(path) as whole:
        data = whole.read(next(name for name in whole.namelist() if name.endswith("data.pkl")))
    draw = np.random.RandomState(0)
    for _ in range(3000):
        spoiled = bytearray(data)
        for at in draw.randint(0, len(data), draw.randint(1, 4)):
            spoiled[at] = draw.randint(256)
        try:
            torch_pickle.load(bytes(spoiled))
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
