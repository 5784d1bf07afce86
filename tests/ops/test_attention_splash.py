"""The splash kernel, interpreted on a CPU, against the plain attention; and where it is chosen."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as library

from helpers.attention import draw, packed, plain, with_gradients
from helpers.numbers import gap
from llama_jax import model, parallel
from llama_jax.config import SIZES
from llama_jax.data.packing import PackedRows, WholeRows
from llama_jax.ops.attention import Call, splash
from llama_jax.params import abstract_params

# Tolerance for float32 sums in another order, relative to the largest value of the result; the largest seen is 9e-7.
ROUNDING = 2e-6
T, K = 384, 2  # three blocks of 128 each way


PACKED, PADDED = ([100, 28, 1, T - 129], [T - 5, 5]), ([130, 2, 60], [300])


def kernel(q, k, v, segments=None):
    """The kernel, interpreted because this is a CPU. It masks by segments alone."""
    return splash.attend(Call(q, k, v, None, segments))


def check(rows, N, *, T=T, H=64, tolerance=ROUNDING, dtype=jnp.float32):
    """Forward and backward of both; what padding sees is nobody's concern, and nothing comes back from it."""
    segments, positions = packed(rows, T)
    B = len(rows)
    real = (segments > 0)[:, :, None, None]
    q, k, v, g = draw(1, B, T, N, H), draw(2, B, K, T, H), draw(3, B, K, T, H), draw(4, B, T, N, H) * real
    reference = functools.partial(plain, segments=segments, positions=positions)
    expected, *gradients = with_gradients(reference, q, k, v, g)
    out, *ours = with_gradients(functools.partial(kernel, segments=segments), *(a.astype(dtype) for a in (q, k, v)), g)
    assert out.dtype == dtype and out.shape == q.shape
    assert gap(out * real, expected * real) < tolerance
    for name, a, b in zip("qkv", ours, gradients, strict=True):
        assert gap(a, b) < tolerance, name


@pytest.mark.parametrize("length", [T, 2048])  # the second has blocks as long rows have them: 512 queries, 1,024 keys
@pytest.mark.parametrize("fused", [True, False], ids=["one backward kernel", "two"])
def test_the_kernel_equals_plain_attention(length, fused, monkeypatch):
    monkeypatch.setattr(splash, "_MAX_FUSED", length if fused else 0)
    assert splash._block_sizes(length).use_fused_bwd_kernel == fused
    check(PACKED if length == T else [[900, 300, 848]], N=2 * K, T=length)


@pytest.mark.parametrize(("N", "H"), [(K, 64), (4 * K, 128)])
def test_the_kernel_equals_plain_attention_for_any_group_of_heads_and_head_dim(N, H):
    check(PADDED, N, H=H)


def test_in_bfloat16_the_kernel_differs_by_its_rounding_only():
    check(PACKED, 2 * K, tolerance=2e-2, dtype=jnp.bfloat16)  # bfloat16 has 8 bits: 4e-3 a rounding


def test_without_segments_a_row_is_one_document():
    q, k, v = draw(1, 1, T, 2 * K, 64), draw(2, 1, K, T, 64), draw(3, 1, K, T, 64)
    segments, positions = packed([[T]], T)
    out = jax.jit(kernel)(q, k, v)
    assert gap(out, plain(q, k, v, segments, positions)) < ROUNDING


@pytest.mark.parametrize("sizes", [{"data": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_on_a_mesh_each_device_runs_the_kernel_on_its_rows_and_heads(sizes):
    layout = parallel.Layout(parallel.make_mesh(sizes), "train")
    with parallel.use(layout):
        check(4 * PADDED, N=2 * K)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("sizes", [{"context": 4}, {"data": 2, "context": 2, "tensor": 2}], ids=str)
def test_devices_that_share_a_row_attend_to_the_keys_of_all_of_it(sizes, balanced):
    T, N = 1024, 2 * K
    segments, positions = packed(2 * [[300, 17, T - 317], [5, 900]], T)
    B, real = segments.shape[0], (segments > 0)[:, :, None, None]
    q, k, v, g = draw(1, B, T, N, 64), draw(2, B, K, T, 64), draw(3, B, K, T, 64), draw(4, B, T, N, 64) * real
    expected = with_gradients(functools.partial(plain, segments=segments, positions=positions), q, k, v, g)
    layout = parallel.Layout(parallel.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))]), "train")

    def attend(q, k, v):
        with parallel.use(layout):
            order = parallel.length_order(T) if balanced else (0,)
            rows = [parallel.reordered(a, order, axis=axis) for a, axis in ((q, 1), (k, 2), (v, 2), (segments, 1))]
            with parallel.use_balanced(order):
                out = kernel(*rows)
            return parallel.reordered(out, order, back=True)

    for name, a, b in zip("oqkv", with_gradients(attend, q, k, v, g), expected, strict=True):
        a, b = (a * real, b * real) if name == "o" else (a, b)
        assert gap(a, b) < ROUNDING, name


def test_in_balanced_order_all_devices_attend_to_equally_many_keys():
    layout = parallel.Layout(parallel.make_mesh({"context": 4}, jax.devices()[:4]), "train")
    with parallel.use(layout):
        mask = splash._Causal((1024, 1024), parallel.length_order(1024))
    keys = (mask.q_sequence + 1).reshape(4, -1).sum(axis=1)
    assert len(set(keys.tolist())) == 1


# What the kernel takes for granted.


@pytest.mark.parametrize("kind", [PackedRows, functools.partial(WholeRows, loss_on="all")], ids=["packed", "whole"])
def test_in_rows_of_documents_the_order_of_positions_in_a_segment_is_that_of_places(kind):
    lengths = np.random.default_rng(0).integers(1, 90, 40)
    total = int(lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = kind(
        SimpleNamespace(
            pairs=False, marked=False, tokens=np.arange(total), offsets=offsets, num_tokens=total, fingerprint=""
        ),
        sequence_length=64,
    )
    padding = 0
    for i in range(len(rows)):
        segments, positions = rows[i]["segments"], rows[i]["positions"]
        same = segments[:, None] == segments
        of_plain, of_kernel = (same & (order[:, None] >= order) for order in (positions, np.arange(64)))
        real = segments > 0
        np.testing.assert_array_equal(of_plain[real], of_kernel[real])
        padding += np.sum(~real)
    assert padding > 0


@pytest.mark.parametrize("blocks", [(128, 128), (128, 256), (256, 128), (512, 512)], ids=str)
def test_blocks_found_by_their_corners_are_those_found_by_looking(blocks):
    def information(mask):
        q, kv = blocks
        sizes = library.BlockSizes(q, kv, 128, q, kv, 128, q, kv)
        kernel = library.make_splash_mha(
            library.MultiHeadMask([mask]), block_sizes=sizes, head_shards=1, q_seq_shards=1
        )
        return jax.tree.leaves((kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info))

    expected = information(library.CausalMask((1024, 1024)))
    assert len(expected) == 9
    for ours, theirs in zip(information(splash._Causal((1024, 1024))), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("T", [128, 384, 640, 1024, 8192, 8320, 131072])
def test_blocks_divide_every_length_that_is_taken(T):
    sizes = splash._block_sizes(T)
    for q, kv, compute in (
        (sizes.block_q, sizes.block_kv, sizes.block_kv_compute),
        (sizes.block_q_dkv, sizes.block_kv_dkv, sizes.block_kv_dkv_compute),
    ):
        assert T % q == T % kv == kv % compute == compute % 128 == 0
    assert sizes.has_backward_blocks


# Where it is chosen: programs lowered for a platform that need not be here.

CONFIG = dataclasses.replace(
    SIZES["tiny"], vocab_size=512, embed_dim=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, ffn_dim=128
)


@pytest.fixture
def kernels(monkeypatch):
    def count(
        *,
        platform="tpu",
        length=256,
        dtype=jnp.bfloat16,
        mesh=None,
        config=CONFIG,
        remat="none",
        gradient=False,
    ):
        """The number of kernel calls in a forward pass, or in its gradient, lowered for a platform."""
        monkeypatch.setattr(parallel, "device_platform", lambda: platform)
        layout = parallel.Layout(parallel.make_mesh(mesh or {}, jax.devices()[: 8 if mesh else 1]), "train")

        def run(params, tokens, positions, segments):
            with parallel.use(layout):
                hidden, _ = model.forward(config, params, tokens, positions, segments, dtype=dtype, remat=remat)
                return jnp.sum(hidden.astype(jnp.float32))

        config = dataclasses.replace(config, max_seq_len=max(length, config.max_seq_len))
        params = abstract_params(config, stacked=True)
        ids = jax.ShapeDtypeStruct((8, length), jnp.int32)
        traced = jax.jit(jax.grad(run) if gradient else run).trace(params, ids, ids, ids)
        return traced.lower(lowering_platforms=(platform,)).as_text().count("@tpu_custom_call")

    return count


# Among them more tensor parts than the two key/value heads, a row on four devices, and pipeline stages.
TAKEN = [
    None,
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"tensor": 4, "data": 2},
    {"context": 2, "fsdp": 4},
    {"stage": 2, "fsdp": 4},
]


@pytest.mark.parametrize("mesh", TAKEN, ids=str)
def test_on_a_tpu_the_model_runs_the_kernel(mesh, kernels):
    assert kernels(mesh=mesh, length=512) == 1  # in the scan of the layers


@pytest.mark.parametrize(
    "case",
    [
        {"platform": "cpu"},
        {"length": 200},
        {"dtype": jnp.float32},
        {"config": dataclasses.replace(CONFIG, head_dim=32)},
        {"mesh": {"context": 4, "data": 2}},  # 64 tokens a device
    ],
    ids=lambda case: "-".join(case),
)
def test_what_the_kernel_cannot_do_is_plain_attention(case, kernels):
    assert kernels(**case) == 0


@pytest.mark.parametrize(("remat", "calls"), [("none", 2), ("dots", 2), ("attention", 2), ("full", 3)])
def test_the_backward_pass_runs_the_kernel_again_only_where_everything_is_recomputed(remat, calls, kernels):
    assert kernels(remat=remat, gradient=True) == calls
