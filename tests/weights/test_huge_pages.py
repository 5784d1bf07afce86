"""Weights of a CPU in huge pages: the same numbers, in shared blocks of memory, which jax uses without a copy."""

import dataclasses
import gc
import weakref

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.config import SIZES
from llama_jax.infer.llama import Llama
from llama_jax.infer.load import load
from llama_jax.ops import quant
from llama_jax.params import init_params
from llama_jax.weights import huge_pages

MIB = 1 << 20
TINY = dataclasses.replace(SIZES["tiny"], embed_dim=64, head_dim=16, num_heads=4, num_kv_heads=2, ffn_dim=96)


def address(array):
    return array.unsafe_buffer_pointer()


def numbers(seed, shape, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def gaps(arrays):
    """The bytes between neighbors in memory; negative for arrays that overlap."""
    places = sorted((address(array), array.nbytes) for array in arrays)
    return [start - (before + size) for (before, size), (start, _) in zip(places, places[1:], strict=False)]


def kept(pages, array):
    """The numbers of an array in memory of HugePages, as jax uses it."""
    out = pages.empty(array.shape, array.dtype)
    out[...] = array
    return jax.device_put(out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint8"])
def test_small_arrays_lie_behind_one_another_and_keep_their_numbers(dtype):
    arrays = [numbers(seed, shape, dtype) for seed, shape in enumerate([(3, 5), (0, 4), (7,), (), (64, 33)])]
    pages = huge_pages.HugePages()
    copies = [kept(pages, array) for array in arrays]
    for array, copy in zip(arrays, copies, strict=True):
        assert copy.dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(copy), np.asarray(array))
    filled = [copy for copy in copies if copy.size]
    assert all(address(copy) % 64 == 0 for copy in filled)
    assert all(0 <= gap < 64 for gap in gaps(filled))


def test_large_arrays_leave_the_block_of_small_ones():
    pages = huge_pages.HugePages()
    first, large, second = (kept(pages, np.ones(size, np.float32)) for size in (16, MIB, 16))
    assert address(second) == address(first) + 64 and bool((large == 1).all())


def test_arrays_that_do_not_fit_in_the_rest_of_a_block_begin_another():
    pages = huge_pages.HugePages()
    arrays = [kept(pages, np.full(3 * MIB // 4, i, np.float32)) for i in range(14)]
    assert all(gap >= 0 for gap in gaps(arrays)) and sorted(gaps(arrays))[:12] == [0] * 12  # 10 and 4 of them
    assert all(bool((array == i).all()) for i, array in enumerate(arrays))


def test_a_quantized_weight_is_copied_without_a_gap():
    pages = huge_pages.HugePages()
    leaf = quant.fit(numbers(0, (8, 64)), 8)
    copy = pages.copied(leaf)
    assert address(copy.values) != address(leaf.values)
    assert address(copy.scales) - address(copy.values) == leaf.values.nbytes
    for a, b in zip(jax.tree.leaves(copy), jax.tree.leaves(leaf), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_block_is_freed_with_its_last_array():
    pages = huge_pages.HugePages()
    first, second = (kept(pages, np.full(9, i, np.float32)) for i in range(2))
    block = weakref.ref(pages._rest.base)  # the memory that its arrays are views of
    del pages, first
    gc.collect()
    assert block() is not None and bool((second == 1).all())
    del second
    gc.collect()
    assert block() is None


def test_weights_of_several_devices_stay_and_others_keep_their_device():
    mesh = jax.make_mesh((8,), ("data",))
    leaf = quant.fit(numbers(0, (8, 64)), 8)
    spread = jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("data")))
    other = jax.device_put(leaf, jax.devices()[3])
    pages = huge_pages.HugePages()
    assert pages.copied(spread).values is spread.values
    assert pages.copied(other).values is not other.values
    assert pages.copied(other).values.sharding == other.values.sharding


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("stored", ["hf", "gguf"])
def test_the_weights_of_a_loaded_model_share_blocks_with_nothing_else(stored, quantize, tmp_path):
    llama = Llama(TINY, init_params(TINY, jax.random.key(0)), dtype="float32")
    place = tmp_path / ("model.gguf" if stored == "gguf" else "model")
    llama.save(place, stored, **({"dtype": "q8_0"} if stored == "gguf" else {}))
    leaves = jax.tree.leaves(load(place, quantize=quantize).params)
    assert len(leaves) > 10 and all(0 <= gap < 64 for gap in gaps(leaves))
