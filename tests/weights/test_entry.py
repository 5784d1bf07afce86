"""Entries: any part of any tensor is what numpy's slicing of the whole gives, however it is stored and wrapped."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

from llama_jax import files
from llama_jax.weights import tensor
from llama_jax.weights.tensor import File, LazyTensor

SHAPE = (24, 10)
PARTS = [
    (slice(0, 24), slice(0, 10)),
    (slice(5, 6), slice(0, 10)),
    (slice(7, 19), slice(3, 8)),
    (slice(0, 24), slice(9, 10)),
    (slice(4, 4), slice(0, 10)),
]


def written(path, array, *, before=3):
    """The entry of an array in a file, `before` bytes from its start."""
    path.write_bytes(b"\xff" * before + array.tobytes() + b"\xff" * 5)
    return tensor.stored(File(path), before, array.dtype, array.shape)


def numbers(shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def check(found: LazyTensor, expected: np.ndarray, parts=PARTS):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    for part, dtype in itertools.product(parts, (None, np.float32, ml_dtypes.bfloat16)):
        array = found.read(part, dtype)
        np.testing.assert_array_equal(array, expected[part].astype(dtype or expected.dtype))
        assert array.flags.c_contiguous and (array.ctypes.data % 64 == 0 or not array.size)
    rows = np.concatenate([block.reshape(-1) for block in found.blocks()])
    np.testing.assert_array_equal(rows, expected.reshape(-1))


@pytest.fixture(params=["stored", "joined rows", "joined columns", "transposed", "reordered", "in memory"])
def wrapped(request, tmp_path):
    """A lazy tensor of each kind, and its array."""
    array = numbers(SHAPE, ml_dtypes.bfloat16)
    if request.param == "stored":
        return written(tmp_path / "a", array), array
    if request.param == "in memory":
        return tensor.of_array(lambda: array, array.dtype, array.shape), array
    if request.param == "transposed":
        return tensor.transposed(written(tmp_path / "a", np.ascontiguousarray(array.T))), array
    if request.param == "reordered":
        order = np.random.default_rng(1).permutation(6)
        return tensor.reordered(written(tmp_path / "a", array), 6, order), array.reshape(4, 6, 10)[:, order].reshape(
            SHAPE
        )
    axis = int(request.param == "joined columns")
    pieces = np.split(array, [2, 7], axis=axis)
    return tensor.joined([written(tmp_path / str(i), p.copy()) for i, p in enumerate(pieces)], axis), array


def test_every_part_is_that_of_the_whole(wrapped):
    check(*wrapped)


def test_every_part_is_that_of_the_whole_when_read_in_many_blocks(wrapped, monkeypatch):
    monkeypatch.setattr(tensor, "_BLOCK", 64)
    check(*wrapped)


@pytest.mark.parametrize("least", [0, 1 << 30])
def test_columns_are_read_by_runs_or_through_whole_rows(tmp_path, monkeypatch, least):
    monkeypatch.setattr(tensor, "_LEAST_RUN", least)
    array = numbers((5, 7, 6))
    found = written(tmp_path / "a", array)
    parts = [(slice(1, 3), slice(2, 7), slice(0, 6)), (slice(0, 5), slice(6, 7), slice(2, 5)), (slice(2, 3),)]
    for part in parts:
        np.testing.assert_array_equal(found.read(part), array[part])


def test_a_shard_reads_only_its_own_bytes(tmp_path, monkeypatch):
    array = numbers((64, 4096))
    found = written(tmp_path / "a", array)
    counted = []
    read_into = File.read_into
    monkeypatch.setattr(
        File, "read_into", lambda self, out, start: (counted.append(len(out)), read_into(self, out, start))
    )
    for part in ((slice(0, 8),), (slice(0, 64), slice(1024, 2048))):
        counted.clear()
        out = found.read(part)
        assert sum(counted) == out.nbytes < array.nbytes / 3


def test_casting_holds_a_block_of_the_file_and_the_result(tmp_path):
    import tracemalloc

    array = numbers((4096, 2048), ml_dtypes.bfloat16)
    found = written(tmp_path / "a", array)
    tracemalloc.start()
    found.read(None, np.float32)
    assert tracemalloc.get_traced_memory()[1] < 4 * array.size + 3 * tensor._BLOCK
    tracemalloc.stop()


def test_scalars_and_empty_tensors_are_read(tmp_path):
    for shape in ((), (0,), (3, 0), (0, 4)):
        array = numbers((max(1, math.prod(shape)),))[: math.prod(shape)].reshape(shape)
        np.testing.assert_array_equal(written(tmp_path / "a", array).read(), array)


def test_a_file_that_was_cut_off_is_an_error(tmp_path):
    found = written(tmp_path / "a", numbers(SHAPE))
    (tmp_path / "a").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="a: ends at byte 100; .* more were expected"):
        found.read()


def test_a_block_of_writing_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), files.whole_file(tmp_path / "a") as file:
        file.write(b"x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
