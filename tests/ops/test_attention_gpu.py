"""The attention kernels for NVIDIA GPUs, interpreted on a CPU, against the plain attention; and where they run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.attention import described_h100, draw, filled, packed, plain, with_gradients
from helpers.numbers import gap
from llama_jax import model, parallel
from llama_jax.choices import KV_TYPES
from llama_jax.config import SIZES
from llama_jax.ops.attention import Call, flash, flash_kernels, split, xla
from llama_jax.params import abstract_params

# Tolerance for float32 sums in another order, relative to the largest value of the result; the largest seen is 7e-7.
ROUNDING = 2e-6
BFLOAT16 = 2e-2  # bfloat16 has 8 bits: 4e-3 a rounding
SMALL = flash_kernels.Blocks(queries=32, keys=16, backward=16, stages=2, interpret=True)


def kernel(q, k, v, segments=None):
    return flash_kernels.attention(q, k, v, *flash.document_ranges(*q.shape[:2], segments), SMALL)


CASES = {
    "off the edges of blocks": ([[40, 1, 30, 2]], 73, 8, 2, 64, "both"),
    "many documents and padding": ([[1, 2] * 12], 40, 4, 2, 64, "float32"),
    "one document in a short row": ([[9]], 9, 4, 1, 64, "float32"),
    "a head of 128": ([[20, 12], [33]], 33, 2, 1, 128, "both"),
    "a head of 80": ([[30, 10]], 40, 2, 2, 80, "float32"),
}
EXACT = [case[:5] + (jnp.float32, ROUNDING) for case in CASES.values()]
ROUNDED = [case[:5] + (jnp.bfloat16, BFLOAT16) for case in CASES.values() if case[5] == "both"]


@pytest.mark.parametrize(("rows", "T", "N", "K", "H", "dtype", "tolerance"), EXACT + ROUNDED)
def test_results_and_gradients_are_those_of_plain_attention(rows, T, N, K, H, dtype, tolerance):
    segments, positions = packed(rows, T)
    B = len(rows)
    real = (segments > 0)[:, :, None, None]
    q, k, v, g = draw(1, B, T, N, H), draw(2, B, K, T, H), draw(3, B, K, T, H), draw(4, B, T, N, H) * real
    expected = with_gradients(functools.partial(plain, segments=segments, positions=positions), q, k, v, g)
    ours = with_gradients(functools.partial(kernel, segments=segments), *(a.astype(dtype) for a in (q, k, v)), g)
    assert ours[0].dtype == dtype
    for name, a, b in zip("oqkv", ours, expected, strict=True):
        a, b = (a * real, b * real) if name == "o" else (a, b)
        assert gap(a, b) < tolerance, name


def test_with_the_blocks_of_an_h100_results_are_those_of_plain_attention():
    segments, positions = packed([[70, 33, 27]], 140)
    q, k, v = draw(1, 1, 140, 2, 64), draw(2, 1, 1, 140, 64), draw(3, 1, 1, 140, 64)
    real = (segments > 0)[:, :, None, None]
    out = jax.jit(flash.attend)(Call(q, k, v, positions, segments))
    assert gap(out * real, plain(q, k, v, segments, positions) * real) < ROUNDING


def test_without_documents_a_row_is_one():
    q, k, v = draw(1, 1, 40, 2, 64), draw(2, 1, 1, 40, 64), draw(3, 1, 1, 40, 64)
    assert gap(jax.jit(kernel)(q, k, v), plain(q, k, v, None, jnp.arange(40)[None])) < ROUNDING


@pytest.mark.parametrize("lengths", [[40, 24], [17, 30, 9]], ids=str)
def test_a_document_does_not_see_another_not_even_in_its_gradients(lengths):
    T, N, K, H = 64, 8, 2, 64
    segments, _ = packed([lengths], T)
    q, k, v, g = draw(1, 1, T, N, H), draw(2, 1, K, T, H), draw(3, 1, K, T, H), draw(4, 1, T, N, H)
    first = (segments == 1)[0]
    second = np.asarray(segments == 2)[0]
    run = jax.jit(lambda q, k, v, g: with_gradients(functools.partial(kernel, segments=segments), q, k, v, g))
    before = run(q, k, v, g)
    by_query, by_key = first[None, :, None, None], first[None, None, :, None]
    after = run(*(jnp.where(m, 3 * a + 1, a) for m, a in ((by_query, q), (by_key, k), (by_key, v), (by_query, g))))
    for name, a, b in zip("oqkv", before, after, strict=True):
        axis = 1 if name in "oq" else 2
        a, b = (np.compress(second, np.asarray(x), axis) for x in (a, b))
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize(
    ("sizes", "balanced"), [({"context": 4}, True), ({"data": 2, "context": 2, "tensor": 2}, False)], ids=str
)
def test_devices_that_share_a_row_attend_to_the_keys_of_all_of_it(sizes, balanced, monkeypatch):
    T, N, K = 64, 4, 2
    monkeypatch.setattr(flash, "_blocks", lambda capability: SMALL)
    segments, positions = packed(2 * [[30, 7, 20], [5, 59]], T)
    B, real = segments.shape[0], (segments > 0)[:, :, None, None]
    q, k, v, g = draw(1, B, T, N, 64), draw(2, B, K, T, 64), draw(3, B, K, T, 64), draw(4, B, T, N, 64) * real
    expected = with_gradients(functools.partial(plain, segments=segments, positions=positions), q, k, v, g)
    layout = parallel.Layout(parallel.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))]), "train")

    def attend(q, k, v):
        with parallel.use(layout):
            order = parallel.length_order(T) if balanced else (0,)
            q, k, v, own = (
                parallel.reordered(a, order, axis=axis) for a, axis in ((q, 1), (k, 2), (v, 2), (segments, 1))
            )
            with parallel.use_balanced(order):
                out = flash.attend(Call(q, k, v, positions, own))
            return parallel.reordered(out, order, back=True)

    for name, a, b in zip("oqkv", with_gradients(attend, q, k, v, g), expected, strict=True):
        a, b = (a * real, b * real) if name == "o" else (a, b)
        assert gap(a, b) < ROUNDING, name


# A KV cache


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize(("N", "K", "H"), [(8, 2, 64), (3, 1, 128)], ids=str)
def test_a_decode_step_equals_plain_attention_and_reads_no_dead_block(kv, N, K, H):
    call, spoiled = filled(kv, N, K, H, T=1)
    assert gap(jax.jit(split.attend)(spoiled), xla.attend(call)) < ROUNDING


def test_a_row_that_ended_beyond_the_bound_reads_no_slot_beyond_it():
    call, _ = filled("compute", 8, 2, 64, T=1)
    call = call._replace(positions_BT=jnp.asarray([[5], [1000]]), window=dataclasses.replace(call.window, bound=128))
    assert gap(jax.jit(split.attend)(call), xla.attend(call)) < ROUNDING


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("T", [3, 33])
def test_a_chunk_of_a_prompt_equals_plain_attention(kv, T, monkeypatch):
    monkeypatch.setattr(flash, "_blocks", lambda capability: SMALL._replace(keys=64))
    call, spoiled = filled(kv, 8, 2, 64, T)
    assert gap(jax.jit(flash.attend)(spoiled), xla.attend(call)) < ROUNDING


@pytest.mark.parametrize("backend", [split, flash])
def test_a_cache_of_16_bits_differs_by_its_rounding_only(backend):
    for dtype, tolerance in ((jnp.bfloat16, BFLOAT16), (jnp.float16, BFLOAT16 / 8)):
        call, _ = filled("compute", 8, 2, 64, 1, dtype)
        q, k, v = (a.astype(jnp.float32) for a in call[:3])
        out = jax.jit(backend.attend)(call)
        assert out.dtype == dtype
        assert gap(out, xla.attend(call._replace(q_BTNH=q, k=k, v=v))) < tolerance


@pytest.mark.parametrize("backend", [split, flash])
def test_on_a_mesh_each_device_attends_for_its_own_rows_and_heads(backend, monkeypatch):
    monkeypatch.setattr(flash, "_blocks", lambda capability: SMALL)
    call, _ = filled("int8", 4, 2, 64, 1)
    layout = parallel.Layout(parallel.make_mesh({"tensor": 2}, jax.devices()[:2]), "infer")

    def attend(call):
        with parallel.use(layout):
            return backend.attend(call)

    assert gap(jax.jit(attend)(call), xla.attend(call)) < ROUNDING


# Where they run: programs lowered for a GPU that need not be here.

CONFIG = dataclasses.replace(
    SIZES["tiny"], vocab_size=512, embed_dim=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, ffn_dim=128
)


@pytest.mark.parametrize(("remat", "calls"), [("none", 3), ("dots", 3), ("attention", 3), ("full", 4)])
def test_the_backward_pass_runs_the_forward_kernel_again_only_where_everything_is_recomputed(remat, calls, monkeypatch):
    monkeypatch.setattr(parallel, "device_platform", lambda: "cuda")
    monkeypatch.setattr(parallel, "compute_capability", lambda: 90)

    def run(params, tokens, positions, segments):
        hidden, _ = model.forward(CONFIG, params, tokens, positions, segments, dtype=jnp.bfloat16, remat=remat)
        return jnp.sum(hidden.astype(jnp.float32))

    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    with described_h100():
        traced = jax.jit(jax.grad(run)).trace(abstract_params(CONFIG, stacked=True), ids, ids, ids)
        lowered = traced.lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @__gpu$xla.gpu.triton") == calls
