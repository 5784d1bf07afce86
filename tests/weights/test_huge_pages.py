"""Weights of a CPU in huge pages: the same numbers, in shared blocks of memory, which jax uses without a copy."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import SIZES
from llama_jax.infer.llama import Llama
from llama_jax.infer.load import load
from llama_jax.ops import quant
from llama_jax.params import init_params
from llama_jax.weights.huge_pages import LARGE, HugePages

pytestmark = pytest.mark.usefixtures("one_device")


def address(array):
    return array.unsafe_buffer_pointer()


def numbers(seed, shape, dtype):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint8"])
def test_small_arrays_lie_behind_one_another_and_keep_their_numbers(dtype):
    pages = HugePages()
    arrays = [numbers(seed, shape, dtype) for seed, shape in enumerate([(3, 5), (0, 4), (7,), (), (64, 33)])]
    moved = [pages.moved(array, fresh=False) for array in arrays]
    for array, copy in zip(arrays, moved, strict=True):
        assert copy.dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(copy), np.asarray(array))
    filled = [copy for copy in moved if copy.size]
    assert all(address(copy) % 64 == 0 for copy in filled)
    ends = [address(copy) + copy.nbytes for copy in filled]
    assert all(0 <= address(after) - end < 64 for end, after in zip(ends, filled[1:], strict=False))


def test_a_large_array_is_moved_only_if_xla_has_computed_it():
    pages = HugePages()
    large = numbers(0, (LARGE // 4,), "float32")
    assert pages.moved(large, fresh=False) is large
    moved = pages.moved(large, fresh=True)
    assert address(moved) != address(large)
    np.testing.assert_array_equal(np.asarray(moved), np.asarray(large))


def test_both_arrays_of_a_quantized_weight_are_moved():
    pages = HugePages()
    leaf = quant.fit(numbers(0, (8, 64), "float32"), 8)
    moved = pages.moved(leaf, fresh=True)
    assert address(moved.values) != address(leaf.values)
    assert address(moved.scales) - address(moved.values) == leaf.values.nbytes
    np.testing.assert_array_equal(np.asarray(moved.scales), np.asarray(leaf.scales))


def test_a_block_is_freed_with_its_last_array():
    pages = HugePages()
    first, second = (pages.moved(numbers(seed, (9,), "float32"), fresh=True) for seed in (0, 1))
    block = weakref.ref(pages._rest.base)  # the memory that its arrays are views of
    del pages, first
    assert block() is not None
    np.testing.assert_array_equal(np.asarray(second), np.asarray(numbers(1, (9,), "float32")))
    del second
    gc.collect()
    assert block() is None


def test_arrays_that_do_not_fit_in_the_rest_of_a_block_begin_another():
    pages = HugePages()
    count = 40 * (1 << 20) // (LARGE - 64)
    moved = [pages.moved(jnp.full(LARGE // 4 - 16, i, jnp.float32), fresh=True) for i in range(count)]
    places = sorted((address(array), array.nbytes) for array in moved)
    assert all(start >= before + size for (before, size), (start, _) in zip(places, places[1:], strict=False))
    assert all(bool((array == i).all()) for i, array in enumerate(moved))


def test_large_arrays_leave_the_block_of_small_ones():
    pages = HugePages()
    first = pages.moved(jnp.ones(16), fresh=True)
    pages.moved(jnp.ones(LARGE // 4), fresh=True)
    assert address(pages.moved(jnp.ones(16), fresh=True)) == address(first) + 64


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_the_weights_of_a_loaded_model_share_blocks(quantize, tmp_path):
    config = dataclasses.replace(SIZES["tiny"], embed_dim=64, head_dim=16, num_heads=4, num_kv_heads=2, ffn_dim=96)
    Llama(config, init_params(config, jax.random.key(0)), dtype="float32").save(tmp_path / "model", "hf")
    leaves = jax.tree.leaves(load(tmp_path / "model", quantize=quantize).params)
    places = sorted((address(leaf), leaf.nbytes) for leaf in leaves)
    gaps = [start - (before + size) for (before, size), (start, _) in zip(places, places[1:], strict=False)]
    assert len(leaves) > 10 and all(0 <= gap < 64 for gap in gaps)
