"""The old Flax Llama folders: as transformers wrote them, as flax writes them, and damaged in every way."""

import json
import struct
import tracemalloc

import flax.serialization
import jax.numpy as jnp
import ml_dtypes
import msgpack as reference
import numpy as np
import pytest

from helpers.paths import GOLDEN_FOLDER
from llama_jax import model
from llama_jax.weights import name_table
from llama_jax.weights.formats import flax as flax_folder
from llama_jax.weights.formats import huggingface, msgpack
from llama_jax.weights.tensor import File

GOLDEN = GOLDEN_FOLDER / "flax_folder.npz"
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.int32, np.uint16, np.uint64, np.bool_)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The stored folders, and the tokens and logits of them."""
    folder = tmp_path_factory.mktemp("flax")
    with np.load(GOLDEN) as stored:
        for name in stored.files:
            if "/" in name:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(stored[name].tobytes())
        return folder, stored["tokens"], stored["logits"]


def params_of(folder, config):
    entries = flax_folder.open_folder(folder)
    known = name_table.weights(config, "flax")
    assert {weight.name: weight.stored_shape for weight in known} == {n: e.shape for n, e in entries.items()}
    return name_table.build(config, [(w.path, jnp.asarray(w.from_disk(entries[w.name]).read())) for w in known])


def logits_of(folder, tokens):
    config = huggingface.read_config(folder)
    params = params_of(folder, config)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model.forward(config, params, jnp.asarray(tokens), positions, None, dtype=jnp.float32)
    return np.asarray(model.unembed(config, params, hidden))


def opened(tmp_path, data, name="flax_model.msgpack"):
    path = tmp_path / name
    path.write_bytes(data)
    return msgpack.open_file(File(path))


def refused(tmp_path, data, *words):
    """The message of the one-line error by which these bytes are refused within little memory."""
    with pytest.raises(ValueError) as error:
        opened(tmp_path, data)
    tracemalloc.start()
    with pytest.raises(ValueError):
        opened(tmp_path, data)
    assert tracemalloc.get_traced_memory()[1] < 64_000_000
    tracemalloc.stop()
    message = str(error.value)
    assert message.startswith(str(tmp_path / "flax_model.msgpack")) and "\n" not in message and len(message) < 2000
    for word in words:
        assert word in message
    return message


def array(shape, dtype, data, code=1):
    """An extension value like those of flax for arrays, with any contents."""
    return reference.ExtType(code, reference.packb((shape, dtype, data), use_bin_type=True))


def packed(tree):
    return reference.packb(tree, use_bin_type=True)


ONE = array((2,), "float32", bytes(8))


def test_the_folder_that_transformers_saved_gives_its_logits(golden):
    folder, tokens, expected = golden
    np.testing.assert_allclose(logits_of(folder / "single", tokens), expected, rtol=2e-5, atol=2e-5)


def test_shards_hold_the_same_weights_rounded(golden):
    folder, _, _ = golden
    whole, shards = flax_folder.open_folder(folder / "single"), flax_folder.open_folder(folder / "sharded")
    assert whole.keys() == shards.keys()
    for name, entry in whole.items():
        np.testing.assert_array_equal(entry.read().astype(ml_dtypes.bfloat16), shards[name].read())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: np.dtype(t).name)
def test_every_array_that_flax_writes_is_read_as_flax_reads_it(tmp_path, dtype):
    draw = np.random.RandomState(0)
    tree = {
        "model": {
            "layers": {str(i): {"kernel": draw.randint(0, 2, (i + 1, 300)).astype(dtype)} for i in range(40)},
            "norm": {"weight": draw.randint(0, 2, 7).astype(dtype)},
            "ä": {"scalar": np.asarray(1, dtype), "none": np.zeros((3, 0), dtype)},
        },
        "x" * 100: {str(i): np.ones((i,) * 4, dtype) for i in range(1, 18)},
    }
    data = flax.serialization.to_bytes(tree)
    found = opened(tmp_path, data)
    expected = {}

    def flatten(node, name):
        for key, below in node.items():
            flatten(below, (*name, key)) if isinstance(below, dict) else expected.update(
                {"/".join((*name, key)): below}
            )

    flatten(flax.serialization.msgpack_restore(data), ())
    assert found.keys() == expected.keys()
    for name, entry in found.items():
        assert (entry.dtype, entry.shape, entry.nbytes) == (dtype, expected[name].shape, expected[name].nbytes)
        np.testing.assert_array_equal(entry.read(), expected[name])


def test_only_headers_are_read_while_opening(tmp_path, monkeypatch):
    tree = {str(i): np.zeros((1000, 1000), np.float32) for i in range(5)}
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(flax.serialization.to_bytes(tree))
    file = File(path)
    read, sizes = file.read_into, []
    monkeypatch.setattr(file, "read_into", lambda out, start: (sizes.append(len(out)), read(out, start)))
    assert len(msgpack.open_file(file)) == 5
    assert sum(sizes) < 50_000


def in_chunks(monkeypatch, tree, size):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", size)
    return flax.serialization.to_bytes(tree)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("shape", [(37, 11), (407,), (5, 7, 9)])
@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_any_part_of_an_array_in_chunks_is_exact(tmp_path, monkeypatch, dtype, shape, block):
    whole = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    data = in_chunks(monkeypatch, {"a": {"kernel": whole}, "b": np.ones(3, dtype)}, 90)  # rows cross the chunks
    assert b"__msgpack_chunked_array__" in data
    monkeypatch.setattr(msgpack, "_BLOCK", block)
    found = opened(tmp_path, data)
    assert list(found) == ["a/kernel", "b"]
    entry = found["a/kernel"]
    assert (entry.dtype, entry.shape, entry.nbytes) == (dtype, shape, whole.nbytes)
    np.testing.assert_array_equal(entry.read(), whole)
    draw = np.random.RandomState(0)
    for _ in range(20):
        bounds = [sorted(draw.randint(0, n + 1, 2)) for n in shape]
        index = tuple(slice(low, high) for low, high in bounds)
        np.testing.assert_array_equal(entry.read(index), whole[index])
        np.testing.assert_array_equal(entry.read(index, np.float32), whole[index].astype(np.float32))


def test_a_model_in_chunks_gives_the_same_weights(tmp_path, monkeypatch, golden):
    folder, _, _ = golden
    tree = flax.serialization.msgpack_restore((folder / "single" / "flax_model.msgpack").read_bytes())
    (tmp_path / "flax_model.msgpack").write_bytes(in_chunks(monkeypatch, tree, 100))
    whole, chunked = flax_folder.open_folder(folder / "single"), flax_folder.open_folder(tmp_path)
    assert whole.keys() == chunked.keys()
    for name, entry in whole.items():
        np.testing.assert_array_equal(entry.read(), chunked[name].read())


def test_params_wrapped_as_one_collection_are_unwrapped(tmp_path):
    tree = {"lm_head": {"kernel": np.ones((2, 3), np.float32)}}
    (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes({"params": tree}))
    assert list(flax_folder.open_folder(tmp_path)) == ["lm_head/kernel"]


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    data = flax.serialization.to_bytes({"a": {"b": np.ones((2, 3), np.float32), "c": np.ones(300, np.int8)}})
    for length in range(len(data)):
        refused(tmp_path, data[:length])


def test_chunks_cut_off_anywhere_are_refused(tmp_path, monkeypatch):
    data = in_chunks(monkeypatch, {"a": np.ones((5, 3), np.float32)}, 20)
    for length in range(len(data)):
        refused(tmp_path, data[:length])


def test_any_one_byte_changed_is_read_or_refused_in_one_line(tmp_path, monkeypatch):
    data = in_chunks(monkeypatch, {"a": {"b": np.ones(2, np.float32)}, "c": np.ones((5, 3), np.int8)}, 10)
    for at in range(len(data)):
        for value in (0x00, 0x7F, 0x80, 0x81, 0xC0, 0xC4, 0xC7, 0xC9, 0xDD, 0xDF, 0xFF, data[at] ^ 1):
            broken = data[:at] + bytes([value]) + data[at + 1 :]
            try:
                for entry in opened(tmp_path, broken).values():
                    entry.read()
            except ValueError as error:
                assert "\n" not in str(error)


NOT_ARRAYS = {
    "complex": ({"a": reference.ExtType(2, packed((1.0, 2.0)))}, "type 2"),
    "scalar": ({"a": array((), "float32", bytes(4), code=3)}, "type 3"),
    "other_extension": ({"a": reference.ExtType(42, b"cos\nsystem\n")}, "type 42"),
    "timestamp": ({"a": reference.Timestamp(1)}, "type 255"),
    "text": ({"a": "text"}, "expected"),
    "bytes": ({"a": b"bytes"}, "expected"),
    "none": ({"a": None}, "expected"),
    "false": ({"a": False}, "expected"),
    "float": ({"a": 1.5}, "expected"),
    "negative": ({"a": -1}, "expected"),
    "number": ({"a": {"step": 3}}, "'a/step' is a number"),
    "true": ({"a": True}, "is a number"),
    "list": ({"a": [ONE]}, "expected"),
    "root_array": (ONE, "a map expected"),
    "root_list": ([ONE], "a map expected"),
    "number_as_key": ({1: ONE}, "a name expected"),
    "bytes_as_key": ({b"a": ONE}, "a name expected"),
    "empty": ({}, "no arrays"),
    "empty_below": ({"a": {"b": {}}}, "no arrays"),
    "same_name_by_two_ways": ({"a": {"b": ONE}, "a/b": ONE}, "'a/b' appears twice"),
    "long_name": ({"a" * 200: {"b" * 200: ONE}}, "401 characters"),
    "unknown_dtype": ({"a": array((2,), "object", bytes(16))}, "dtype 'object'"),
    "complex_dtype": ({"a": array((1,), "complex64", bytes(8))}, "complex64"),
    "dtype_as_number": ({"a": array((2,), 7, bytes(8))}, "a name expected"),
    "too_few_bytes": ({"a": array((3,), "float32", bytes(8))}, "(3,)"),
    "too_many_bytes": ({"a": array((1,), "float32", bytes(8))}, "(1,)"),
    "negative_dimension": ({"a": array((-1, -2), "float32", bytes(8))}, "a dimension expected"),
    "huge_dimensions": ({"a": array((1 << 63, 2), "float32", bytes(8))}, "shape"),
    "huge_beside_zero": ({"a": array((1 << 63, 0), "float32", b"")}, "shape"),
    "many_dimensions": ({"a": array((1,) * 40, "float32", bytes(4))}, "40 dimensions"),
    "fractional_dimension": ({"a": array((2.0,), "float32", bytes(8))}, "a dimension expected"),
    "text_as_data": ({"a": array((8,), "int8", "x" * 8)}, "bytes expected"),
    "short_tuple": ({"a": reference.ExtType(1, packed(((2,), "float32")))}, "not [shape, dtype, bytes]"),
    "long_tuple": ({"a": reference.ExtType(1, packed(((2,), "float32", bytes(8), 1)))}, "not [shape"),
    "spare_bytes": ({"a": reference.ExtType(1, packed(((2,), "float32", bytes(8))) + b"x")}, "ends at"),
    "reaches_out": ({"a": reference.ExtType(1, packed(((8,), "int8", bytes(8)))[:-8]), "b": ONE}, "ends at"),
    "empty_extension": ({"a": reference.ExtType(1, b"")}, "cut off"),
}


@pytest.mark.parametrize("tree, word", NOT_ARRAYS.values(), ids=NOT_ARRAYS)
def test_whatever_is_not_a_tree_of_arrays_is_refused(tmp_path, tree, word):
    refused(tmp_path, packed(tree), word)


CHUNKS = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 2}, "chunks": {"0": ONE, "1": ONE}}


def test_chunks_as_written_by_hand_are_read(tmp_path):
    assert opened(tmp_path, packed({"a": CHUNKS}))["a"].read().shape == (2, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": {"0": 2, "1": 3}},
        {"shape": {"0": 4, "2": 1}},
        {"shape": {"0": 4, "1": True}},
        {"shape": {"0": 0, "1": 1 << 62}},
        {"shape": {str(i): 1 for i in range(40)}},
        {"shape": {}},
        {"shape": ONE},
        {"shape": 4},
        {"chunks": {}},
        {"chunks": {"0": ONE}},
        {"chunks": {"0": ONE, "2": ONE}},
        {"chunks": {"0": ONE, "1": 2}},
        {"chunks": {"0": ONE, "1": array((4,), "float16", bytes(8))}},
        {"chunks": {"0": ONE, "1": array((1, 2), "float32", bytes(8))}},
        {"chunks": {"0": ONE, "1": CHUNKS}},
        {"chunks": {"0": array((0,), "float32", b"")}, "shape": {"0": 0}},
    ],
    ids=str,
)
def test_chunks_that_do_not_make_an_array_are_refused(tmp_path, change):
    refused(tmp_path, packed({"a": {**CHUNKS, **change}}), "'a' ", "in chunks")


@pytest.mark.parametrize("key", ["shape", "chunks"])
def test_chunks_with_a_part_missing_are_refused(tmp_path, key):
    refused(tmp_path, packed({"a": {k: v for k, v in CHUNKS.items() if k != key}}), key)


def test_a_name_given_twice_is_refused(tmp_path):
    one = packed("a") + packed(ONE)
    refused(tmp_path, b"\x82" + one + one, "'a' appears twice")


def test_bytes_after_the_end_are_refused(tmp_path):
    refused(tmp_path, packed({"a": ONE}) + b"\x80", "1 bytes follow")


def test_names_that_are_not_text_are_refused(tmp_path):
    refused(tmp_path, b"\x81\xa2\xff\xfe" + packed(ONE), "UTF-8")


LENGTHS = {
    "map32": b"\xdf\xff\xff\xff\xff",
    "map32_with_bytes": b"\xdf\x00\xff\xff\xff" + b"\xa0" * 100_000,
    "map_of_small_maps": b"\xdf\x00\x10\x00\x00" + b"\xa1a\x80" * (1 << 20),
    "ext32": b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
    "bin32": b"\x81\xa1a\xc9\x00\x00\x00\x14\x01\x93\x91\x02\xa7float32\xc6\xff\xff\xff\xff",
    "str8": b"\x81\xd9\xffa",
    "str32": b"\x81\xdb\xff\xff\xff\xffa",
    "array16_shape": b"\x81\xa1a\xc7\x30\x01\x93\xdc\xff\xff" + b"\x00" * 100,
    "zeros": bytes(1 << 20),
    "ones": b"\xff" * (1 << 20),
    "git_lfs_pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
}


@pytest.mark.parametrize("data", LENGTHS.values(), ids=LENGTHS)
def test_lengths_that_the_file_cannot_hold_are_refused_before_they_are_believed(tmp_path, data):
    refused(tmp_path, data)


def test_maps_within_maps_are_bounded(tmp_path):
    refused(tmp_path, b"\x81\xa1a" * 1_000_000 + b"\x80", "maps within each other")
    deep = ONE
    for _ in range(16):
        deep = {"a": deep}
    assert list(opened(tmp_path, packed(deep))) == ["/".join("a" * 16)]


def test_a_file_of_nothing_but_small_arrays_is_bounded(tmp_path):
    one = packed(array((1,), "int8", b"x"))
    names = range(1 << 16)
    refused(tmp_path, b"\xde\xff\xff" + b"".join(b"\xa4" + struct.pack(">I", i + (1 << 16)) + one for i in names))
    refused(tmp_path, packed({str(i): {str(j): array((1,), "int8", b"x") for j in range(200)} for i in range(200)}))


def test_a_folder_without_flax_weights_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match="no flax_model.msgpack and no flax_model.msgpack.index.json"):
        flax_folder.open_folder(tmp_path)


@pytest.mark.parametrize(
    "index, words",
    [
        ({}, "weight_map"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": ["a"]}, "weight_map"),
        ({"weight_map": {"a": 1}}, "bare name"),
        ({"weight_map": {"a": "../flax_model-00001-of-00001.msgpack"}}, "bare name"),
        ({"weight_map": {"a": "/tmp/x.msgpack"}}, "bare name"),
        ({"weight_map": {"a": "model.bin"}}, "bare name"),
        ({"weight_map": {"a": "absent.msgpack"}}, "missing, though flax_model.msgpack.index.json lists it"),
        ({"weight_map": {"aa": "shard.msgpack"}}, "no tensor 'aa'.*did you mean 'a'"),
    ],
    ids=str,
)
def test_an_index_that_names_anything_but_shards_of_its_folder_is_refused(tmp_path, index, words):
    (tmp_path / "shard.msgpack").write_bytes(packed({"a": ONE}))
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=words) as error:
        flax_folder.open_folder(tmp_path)
    assert "\n" not in str(error.value)
