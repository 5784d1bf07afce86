"""safetensors files: what is written is read, and what is not sound is refused in one line."""

import json
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from helpers.errors import refusal
from helpers.folders import encode
from llama_jax.weights.formats import safetensors
from llama_jax.weights.tensor import of_array


def entries(tensors):
    return {k: of_array(lambda a=a: a, a.dtype, a.shape) for k, a in tensors.items()}


@pytest.mark.parametrize("dtype", list(safetensors.DTYPES))
def test_every_type_is_read_as_it_was_written(tmp_path, dtype):
    array = np.random.RandomState(0).randint(0, 2, (3, 5, 2)).astype(safetensors.DTYPES[dtype])
    tensors = {"b": array, "empty": array[:0], "scalar": array[0, 0, 0]}
    safetensors.save_file(tmp_path / "x.safetensors", entries(tensors), {"format": "pt"})
    found = safetensors.open_folder(tmp_path)
    assert list(found) == list(tensors)
    for name, entry in found.items():
        assert (entry.dtype, entry.shape) == (tensors[name].dtype, tensors[name].shape)
        np.testing.assert_array_equal(entry.read(), tensors[name])
    np.testing.assert_array_equal(found["b"].read((slice(1, 3), slice(None), slice(1))), array[1:3, :, :1])


def test_unaligned_tensors_are_read(tmp_path):
    tensors = {"a": np.ones(3, np.int8), "b": np.arange(5, dtype=np.float32), "c": np.ones(2, ml_dtypes.bfloat16)}
    (tmp_path / "model.safetensors").write_bytes(encode(tensors))
    for name, entry in safetensors.open_folder(tmp_path).items():
        np.testing.assert_array_equal(entry.read(), tensors[name])


def test_a_failed_save_leaves_nothing_under_the_name(tmp_path):
    path = tmp_path / "x.safetensors"

    def fails():
        raise OSError("disk full")

    broken = of_array(fails, np.dtype(np.float32), (3,))
    with pytest.raises(OSError, match="disk full"):
        safetensors.save_file(path, {**entries({"a": np.ones(2)}), "b": broken})
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="complex64"):
        safetensors.save_file(path, entries({"a": np.ones(2, np.complex64)}))


def crafted(header, data=b"\0" * 16, *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(**change):
    return crafted({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **change}})


_SOUND = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "empty file": (b"", "too short"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "too short"),
    "header longer than the file": (crafted({}, length=1 << 20), "claims 1,048,576"),
    "header of 2^63 bytes": (crafted({}, length=1 << 63), "claims"),
    "header of all ones": (b"\xff" * 64, "claims"),
    "no JSON": (crafted(b"{'a'"), "not valid JSON"),
    "no UTF-8": (crafted(b'{"\xff": 1}'), "not valid JSON"),
    "empty header": (crafted(b""), "not valid JSON"),
    "a list": (crafted([]), "must be a JSON object"),
    "deep nesting": (crafted(b"[" * 200_000), "nested too deeply"),
    "a number of 10,000 digits": (crafted(b'{"a": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "duplicate names": (crafted(b'{"a": {}, "a": {}}'), "twice"),
    "duplicate keys": (crafted(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "twice"),
    "metadata of numbers": (crafted({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    "tensor is a string": (crafted({"a": "F32"}), "described by"),
    "no shape": (crafted({"a": {"dtype": "F32", "data_offsets": [0, 16]}}), "described by"),
    "unknown key": (one(strides=[1]), "described by"),
    "unknown dtype": (one(dtype="F4"), "'F4'"),
    "float8": (one(dtype="F8_E4M3"), "'F8_E4M3'"),
    "dtype is a list": (one(dtype=["F32"]), "dtype"),
    "negative dimension": (one(shape=[-2, -2]), "shape"),
    "fractional dimension": (one(shape=[2.0, 2]), "shape"),
    "true as a dimension": (one(shape=[True, 4]), "shape"),
    "shape of 10^30": (one(shape=[10**30]), "shape"),
    "shape that overflows to 16 bytes": (one(shape=[(1 << 62) - 1, 1 << 61, 4]), "larger than any memory"),
    "overflow beside a zero": (one(shape=[1 << 61, 1 << 61, 0], data_offsets=[0, 0]), "larger than any memory"),
    "rank 100": (one(shape=[1] * 100), "at most 32"),
    "size unlike the shape": (one(shape=[2, 3]), "needs 24 bytes"),
    "odd number of bytes": (one(data_offsets=[0, 15]), "give it 15"),
    "offsets reversed": (one(data_offsets=[16, 0]), "data_offsets"),
    "negative offset": (one(data_offsets=[-16, 0]), "data_offsets"),
    "beyond the end": (one(data_offsets=[16, 32]), "within the file's 16 bytes"),
    "three offsets": (one(data_offsets=[0, 8, 16]), "data_offsets"),
    "offsets are strings": (one(data_offsets=["0", "16"]), "data_offsets"),
    "cut off": (one()[:-1], "cut off"),
    "overlap": (crafted({"a": _SOUND, "b": {**_SOUND, "data_offsets": [4, 12]}}, b"\0" * 12), "overlaps"),
    "same bytes twice": (crafted({"a": _SOUND, "b": _SOUND}, b"\0" * 8), "overlaps"),
    "gap": (crafted({"a": _SOUND, "b": {**_SOUND, "data_offsets": [12, 20]}}, b"\0" * 20), "gap"),
    "bytes that nothing claims": (crafted({"a": _SOUND}, b"\0" * 12), "belongs to no tensor"),
}


@pytest.mark.parametrize("case", list(HOSTILE))
def test_hostile_file_is_refused_in_one_line_without_allocating(tmp_path, case):
    data, words = HOSTILE[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=words) as error:
        safetensors.open_folder(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()
    assert "model.safetensors" in refusal(error)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/a.safetensors",
        "..\\a.safetensors",
        "a.bin",
        "C:a.safetensors",
        7,
        "",
    ],
)
def test_index_may_only_name_files_of_its_own_folder(tmp_path, shard):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match="bare name"):
        safetensors.open_folder(tmp_path)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": "model-1.safetensors", "a": "model-2.safetensors"}}', "twice"),
        ('{"weight_map": {"a": "model-2.safetensors"}}', "model-2.safetensors: missing"),
        ('{"weight_map": {"b": "model-1.safetensors"}}', "no tensor 'b'"),
    ],
)
def test_broken_index_is_refused(tmp_path, index, words):
    (tmp_path / "model-1.safetensors").write_bytes(encode({"a": np.ones(2, np.float32)}))
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=words) as error:
        safetensors.open_folder(tmp_path)
    refusal(error)


def test_folder_without_one_clear_set_of_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        safetensors.open_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="no safetensors file"):
        safetensors.open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="pytorch_model.bin, which is another format"):
        safetensors.open_folder(tmp_path)
    sound = encode({"a": np.ones(2, np.float32)})
    (tmp_path / "consolidated.safetensors").write_bytes(sound)
    assert list(safetensors.open_folder(tmp_path)) == ["a"]
    (tmp_path / "more.safetensors").write_bytes(sound)
    with pytest.raises(ValueError, match="index"):
        safetensors.open_folder(tmp_path)
