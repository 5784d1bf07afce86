"""The native CPU kernels beside plain float64 products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.attention import draw, packed
from helpers.native import needs_cpu_kernels
from helpers.numbers import gap
from llama_jax import cache, parallel
from llama_jax.ops import cpu, linear, norm, quant, rope
from llama_jax.ops.attention import Call, native, xla
from llama_jax.ops.cpu import build, calls, check
from llama_jax.ops.remat import with_remat

pytestmark = needs_cpu_kernels
KINDS = ("float32", "bfloat16", 8, 4)
SHAPES = [(96, 7), (1056, 300)]
ODD = (101, 33)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Tests that call kernels directly, of which any may run first or alone."""
    cpu.ready()


def test_the_kernels_are_built_and_pass_their_check_where_there_is_a_compiler():
    build.register(build.library())  # raises the reason for which they cannot be built
    assert cpu.ready()
    check.against_xla()


def weight(kind, out, size, seed=0):
    """A weight of this kind and its numbers."""
    w = jnp.asarray(np.random.default_rng(seed).standard_normal((out, size)), jnp.float32)
    if isinstance(kind, str):
        return w.astype(kind), np.asarray(w.astype(kind), np.float64)
    w = quant.quantize(w, kind)
    return w, np.asarray(quant.dequantize(w, jnp.float32), np.float64)


def inputs(rows, size, dtype, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((rows, size)), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_those_of_the_numbers(kind, dtype):
    for size, out in [*SHAPES, *([ODD] if isinstance(kind, str) else [])]:
        w, numbers = weight(kind, out, size)
        product = jax.jit(lambda x, w: calls.linears(x, [w], dtype=jnp.float32)[0])
        for rows in (1, 2, 3, 5, 16):
            x = inputs(rows, size, dtype)
            assert gap(product(x, w), np.asarray(x, np.float64) @ numbers.T) < 2e-6, (size, out, rows)
        # Processors that multiply bfloat16 round dequantized weights to it for many rows.
        rounded = dtype == "bfloat16" and not isinstance(kind, str)
        each = [numbers, np.asarray(quant.dequantize(w, jnp.bfloat16), np.float64)] if rounded else [numbers]
        for rows in (17, 29, 520, 4100):  # the last 4 of 4,100 rows are multiplied after 4,096
            x = inputs(rows, size, dtype)
            gaps = [gap(product(x, w), np.asarray(x, np.float64) @ numbers.T) for numbers in each]
            assert min(gaps) < 2e-6, (size, out, rows)


@pytest.mark.parametrize("kind", [8, 4])
@pytest.mark.parametrize("groups", [1, 17, 513, 1030])
def test_one_row_of_any_number_of_groups(kind, groups):
    size = 32 * groups
    (w, numbers), x = weight(kind, 7, size), inputs(1, size, "bfloat16")
    (result,) = jax.jit(lambda x, w: cpu.linears(x, [w], dtype=jnp.float32))(x, w)
    assert gap(result, np.asarray(x, np.float64) @ numbers.T) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [(1, 1, 1), (33, 40, 7), (64, 96, 130), (700, 37, 129), (96, 1100, 65), (32, 2048, 96), (1056, 608, 70), (9, 0, 5)],
)
def test_matrix_products_of_gradients_are_those_of_the_numbers(dtype, rows, inner, columns):
    b, exact_b = inputs(inner, columns, dtype, 2), np.asarray(inputs(inner, columns, dtype, 2), np.float64)
    for transposed, shape in ((False, (rows, inner)), (True, (inner, rows))):
        a = inputs(*shape, dtype)
        expected = np.asarray(a, np.float64)
        expected = (expected.T if transposed else expected) @ exact_b
        product = jax.jit(lambda a, b, transposed=transposed: cpu.product(a, b, jnp.float32, transposed=transposed))
        assert gap(product(a, b), expected) < 2e-6
        rounded = cpu.product(a, b, jnp.dtype(dtype), transposed=transposed)
        np.testing.assert_array_equal(rounded, product(a, b).astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_softmax_of_a_part_of_the_vocabulary_and_its_gradient(dtype):
    for tokens, size, vocab, live in ((1, 16, 5, 5), (70, 40, 300, 290), (530, 96, 33, 33), (9, 32, 64, 0)):
        x, table = inputs(tokens, size, dtype), inputs(vocab, size, dtype, 2) * 0.1  # no score hides the others
        targets = jnp.asarray(np.random.default_rng(3).integers(-5, vocab + 5, tokens))
        scores = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
        scores[:, live:] = -np.inf
        hit = (np.asarray(targets)[:, None] == np.arange(vocab)) & (np.arange(vocab) < live)
        top, total, score, kept = cpu.loss(x, table, targets, jnp.int32(live), keep=True)
        if live:
            assert gap(kept[:, :live], scores[:, :live]) < 2e-6
            lse = np.log(np.exp(scores - scores.max(1, keepdims=True)).sum(1)) + scores.max(1)
            assert gap(np.asarray(top) + np.log(np.asarray(total)), lse) < 1e-6
        else:
            assert not np.asarray(total).any()
        assert gap(1 + np.asarray(score), 1 + np.where(hit, scores, 0).sum(1)) < 1e-5
        lse, all_T, hit_T = (inputs(1, tokens, "float32", seed)[0] for seed in (4, 5, 6))
        lse = lse + 3
        g = cpu.loss_gradient(x, table, targets, jnp.int32(live), lse, all_T, hit_T)
        expected = np.asarray(all_T)[:, None] * np.exp(scores - np.asarray(lse)[:, None])
        expected = expected - np.where(hit, np.asarray(hit_T)[:, None], 0)
        assert g.dtype == dtype and gap(1 + np.asarray(g, np.float64), 1 + expected) < (
            1e-5 if dtype == "float32" else 1e-2
        )
        in_place = cpu.loss_gradient(x, table, targets, jnp.int32(live), lse, all_T, hit_T, kept)
        assert gap(1 + np.asarray(in_place), 1 + expected) < 1e-5


def test_a_loss_that_is_not_a_number_stays_so():
    x, table = inputs(20, 64, "float32"), inputs(1000, 64, "float32", 2).at[700].set(np.nan)
    top, total, score, _ = cpu.loss(x, table, jnp.arange(20), jnp.int32(1000))
    assert np.isnan(np.asarray(top + jnp.log(total) - score)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others(kind):
    product = jax.jit(linear.linear)
    for out, size in ((130, 256), (7, 608)):
        w, _ = weight(kind, out, size)
        for dtype in ("float32", "bfloat16"):
            if kind == "float32" and dtype == "bfloat16":
                continue
            x = inputs(16, size, dtype)
            together = product(x, w)
            for rows in range(2, 16):
                np.testing.assert_array_equal(product(x[:rows], w), together[:rows])
            alone = product(x[:1], w)  # with AMX a single row of bfloat16 is summed in another order
            if dtype == "float32":
                np.testing.assert_array_equal(alone, together[:1])
            else:
                assert gap(alone, np.asarray(together[:1], np.float64)) < 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norm_activation_and_residual_are_those_of_separate_operations(dtype):
    (a, _), (b, _) = weight(dtype, 48, 160, 2), weight(dtype, 20, 160, 3)
    scale, bound = inputs(1, 160, dtype, 5)[0], 2e-6 if dtype == "float32" else 1e-2
    for rows in (1, 5, 530):
        x, up, plus = (inputs(rows, size, dtype, seed) for size, seed in ((160, 1), (160, 4), (48, 6)))
        normed = norm.rms_norm(x, scale, eps=1e-5)
        products = jax.jit(lambda *a: calls.linears(a[0], a[1:3], dtype=dtype, norm=(a[3], 1e-5)))(x, a, b, scale)
        for result, w in zip(products, (a, b), strict=True):
            assert result.dtype == dtype and gap(result, normed.astype(jnp.float32) @ w.astype(jnp.float32).T) < bound
        (result,) = jax.jit(lambda *a: calls.linears(a[0], [a[1]], dtype=dtype, up=a[2]))(x, a, up)
        hidden = (jax.nn.silu(x) * up).astype(jnp.float32)
        assert gap(result, hidden @ a.astype(jnp.float32).T) < bound
        (added,) = jax.jit(lambda *a: calls.linears(a[0], [a[1]], dtype=dtype, up=a[2], plus=a[3]))(x, a, up, plus)
        np.testing.assert_array_equal(added, plus + result)
    with pytest.raises(Exception, match="the type and the shape"):
        calls.linears(x, [a], dtype=dtype, plus=plus[:1])
    with pytest.raises(Exception, match="the type and the shape"):
        calls.linears(x, [a], dtype=dtype, plus=plus.astype("bfloat16" if dtype == "float32" else "float32"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_so(kind):
    w, _ = weight(kind, 32, 64)
    for dtype in ("float32", "bfloat16"):
        for wrong, rows in ((np.nan, 2), (np.inf, 2), (np.nan, 18)):
            x = inputs(rows, 64, dtype).at[1, 40].set(wrong)
            result = np.asarray(calls.linears(x, [w], dtype=jnp.float32)[0])
            assert np.isfinite(np.delete(result, 1, 0)).all() and not np.isfinite(result[1]).any()


@pytest.mark.parametrize("kind", ["float32", 8, 4])
def test_gradients_are_those_of_xla(kind):
    w, numbers = weight(kind, 32, 64)
    x = inputs(3, 64, "float32")
    for product in (linear.linear, linear.linear_f32):
        gradient = jax.jit(jax.grad(lambda x, p=product: (p(x, w) ** 2).sum()))(x)
        assert gap(gradient, 2 * (np.asarray(x, np.float64) @ numbers.T) @ numbers) < 1e-5
        both = jax.grad(lambda x: sum((a**2).sum() for a in linear.linears(x, [(w, None), (w, None)])))(x)
        assert gap(both, 2 * np.asarray(gradient)) < 1e-5
        mapped = jax.vmap(lambda row, p=product: p(row, w))(x)
        assert gap(mapped, np.asarray(x, np.float64) @ numbers.T) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("B", "T", "N", "H"), [(1, 1, 9, 64), (2, 300, 3, 64), (1, 7, 2, 128), (3, 5, 2, 10), (1, 0, 2, 16)]
)
def test_rotated_pairs_are_complex_products(B, T, N, H, dtype):
    x, g, angles = draw(1, B, T, N, H, dtype=dtype), draw(2, B, T, N, H, dtype=dtype), draw(3, B, T, H // 2)
    rotated, pullback = jax.vjp(lambda x: rope.rotate(x, jnp.cos(angles), jnp.sin(angles)), x)

    def turned(x, sign):
        halves = np.split(np.asarray(x, np.float64), 2, axis=-1)
        pairs = (halves[0] + 1j * halves[1]) * np.exp(sign * 1j * np.asarray(angles, np.float64))[:, :, None]
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    same = rope.rotate(x, jnp.cos(angles[:1]), jnp.sin(angles[:1]))[:1]  # one row of angles for all rows of x
    np.testing.assert_array_equal(same, rotated[:1])
    bound = 1e-6 if dtype == "float32" else 1e-2
    for result, expected in ((rotated, turned(x, 1)), (pullback(g)[0], turned(g, -1))):
        assert result.dtype == dtype and (result.size == 0 or gap(result, expected) < bound)


def test_rows_of_a_table_are_read_in_place_and_ids_outside_give_nan():
    table = inputs(9, 40, "bfloat16")
    ids = jnp.array([[8, 0, -1], [3, 9, 3]])
    embed = jax.jit(lambda table, ids: linear.embed(table, ids, jnp.bfloat16))
    found = np.asarray(embed(table, ids), np.float32)
    inside = np.asarray((ids >= 0) & (ids < 9))
    np.testing.assert_array_equal(found[inside], np.asarray(table, np.float32)[np.asarray(ids)[inside]])
    assert np.isnan(found[~inside]).all() and "llama_rows" in embed.lower(table, ids).as_text()


def softmax_attention(q, k, v, lengths):
    B, N, H = q.shape
    K = k.shape[1]
    out = np.zeros((B, N, H))
    for b in range(B):
        for n in range(N):
            keys, values = (a[b, n // (N // K), : lengths[b]] for a in (k, v))
            scores = keys @ q[b, n] / np.sqrt(H)
            weights = np.exp(scores - scores.max(initial=0))
            out[b, n] = weights @ values / max(weights.sum(), 1e-30)
    return out


def stored(cache, k, v):
    """Keys and values as a cache of this kind stores them, their scales (None but for int8), and their numbers."""
    if cache == "int8":
        scales = tuple((np.abs(a).max(-1) / 127).astype(np.float16) for a in (k, v))
        k, v = (np.round(a / s[..., None]).astype(np.int8) for a, s in zip((k, v), scales, strict=True))
        return k, v, scales, [a.astype(np.float64) * s[..., None] for a, s in zip((k, v), scales, strict=True)]
    k, v = (np.array(jnp.asarray(a, cache)) for a in (k, v))
    return k, v, None, [a.astype(np.float64) for a in (k, v)]


@pytest.mark.parametrize("head", [16, 48, 64, 128, 80])
@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
def test_attention_reads_the_live_keys_only(cache, head):
    rng = np.random.default_rng(head)
    lengths = [1, 37, 0, 50, 4]
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((5, 6, head), (5, 2, 50, head), (5, 2, 50, head)))
    k, v, scales, numbers = stored(cache, k, v)
    if scales is None:
        for b, n in enumerate(lengths):  # what lies beyond a row's length is never read
            k[b, :, n:] = v[b, :, n:] = np.nan
    result = jax.jit(cpu.attend)(q, k, v, jnp.array(lengths), scales)
    assert gap(result, softmax_attention(q.astype(np.float64), *numbers, lengths)) < 2e-6
    half = jax.jit(cpu.attend)(q.astype(jnp.bfloat16), k, v, jnp.array(lengths), scales)
    assert half.dtype == jnp.bfloat16
    rounded = np.asarray(jnp.asarray(q, jnp.bfloat16), np.float64)
    assert gap(half, softmax_attention(rounded, *numbers, lengths)) < 1e-2


def many_queries(q, k, v, low, high):
    B, T, N, H = q.shape
    k, v = (np.repeat(a, N // k.shape[1], axis=1) for a in (k, v))
    scores = np.einsum("btnh,bnsh->bnts", q, k) / np.sqrt(H)
    at = np.arange(k.shape[2])
    live = (at >= low[:, None, :, None]) & (at < high[:, None, :, None])
    weights = np.where(live, np.exp(np.where(live, scores, -np.inf) - scores.max(-1, keepdims=True)), 0)
    return np.einsum("bnts,bnsh->btnh", weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300), v)


# Rows, queries, query heads, key/value heads, slots and head dim.
MANY = [
    (2, 7, 6, 2, 50, 64),
    (1, 33, 9, 3, 700, 48),
    (1, 300, 8, 1, 600, 80),
    (3, 17, 4, 2, 40, 20),
    (1, 2, 2, 2, 999, 256),
]


@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
def test_attention_of_many_queries_reads_the_keys_of_each(cache):
    rng = np.random.default_rng(0)
    for B, T, N, K, S, H in MANY:
        q = rng.standard_normal((B, T, N, H)).astype(np.float32)
        k, v = (rng.standard_normal((B, K, S, H)).astype(np.float32) for _ in range(2))
        high = rng.integers(0, S - 1, (B, T))
        low = np.maximum(rng.integers(-S, S // 2, (B, T)), 0)
        high[0, 0] = 0  # a query without keys
        k, v, scales, numbers = stored(cache, k, v)
        if scales is None:
            k[:, :, S - 1] = v[:, :, S - 1] = np.nan  # no query reads it
        for dtype, bound in (("float32", 3e-6), ("bfloat16", 1e-2)):
            result = jax.jit(cpu.attend_many)(jnp.asarray(q, dtype), k, v, jnp.array(low), jnp.array(high), scales)
            rounded = np.asarray(jnp.asarray(q, dtype), np.float64)
            assert result.dtype == dtype
            assert gap(result, many_queries(rounded, *numbers, low, high)) < bound, (T, H, dtype)
            assert not np.asarray(result[0, 0], np.float32).any() or high[0, 0] > low[0, 0]


@pytest.mark.parametrize(("dtype", "documents"), [("float32", True), ("float32", False), ("bfloat16", True)])
def test_whole_rows_are_those_of_xla(dtype, documents):
    segments, positions = packed([[60, 1, 70], [131]] if documents else [[140], [140]], 140)
    q, k, v = (draw(n, 2, *shape, 32, dtype=dtype) for n, shape in enumerate(((140, 6), (3, 140), (3, 140))))

    def result(attend, q, k, v):
        out = attend(Call(q, k, v, positions, segments if documents else None))
        return jnp.where((segments > 0)[..., None, None], out, 0)

    ours, theirs = (jax.jit(functools.partial(result, module.attend)) for module in (native, xla))
    assert "llama_attention_many" in ours.lower(q, k, v).as_text()
    assert gap(ours(q, k, v), np.asarray(theirs(q, k, v), np.float64)) < (1e-5 if dtype == "float32" else 2e-2)
    if documents:  # another first document changes nothing in the others
        changed = [a.at[0, :60].add(3) if a is q else a.at[0, :, :60].add(3) for a in (q, k, v)]
        np.testing.assert_array_equal(ours(*changed)[0, 60:], ours(q, k, v)[0, 60:])


# Lengths of the documents of each row, length of a row, query heads, key/value heads and head dim.
WHOLE = [
    ([[1], [1]], 1, 2, 2, 16),
    ([[7], [3, 2]], 7, 4, 1, 24),
    ([[60, 1, 60], [130]], 130, 6, 2, 40),
    ([[300], [20, 200, 33], [299]], 300, 8, 2, 64),
    ([[97, 160], [257]], 257, 3, 1, 128),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("documents", "T", "N", "K", "H"), WHOLE)
def test_the_gradient_of_whole_rows_is_that_of_xla(documents, T, N, K, H, dtype):
    segments, positions = packed(documents, T)
    B = len(documents)
    arrays = [draw(n, B, *shape, H, dtype=dtype) for n, shape in enumerate(((T, N), (K, T), (K, T), (T, N)))]

    def gradients(attend, q, k, v, g):
        _, back = jax.vjp(lambda *qkv: attend(Call(*qkv, positions, segments)), q, k, v)
        return back(jnp.where((segments > 0)[..., None, None], g, 0))

    ours, theirs = (jax.jit(functools.partial(gradients, module.attend)) for module in (native, xla))
    assert "llama_attention_gradient" in ours.lower(*arrays).as_text()
    exact = theirs(*(a.astype(jnp.float32) for a in arrays))
    for name, a, b, c in zip(("d_q", "d_k", "d_v"), ours(*arrays), theirs(*arrays), exact, strict=True):
        assert a.dtype == b.dtype == dtype
        if T == 1:  # the weight of the only key does not depend on q and k
            assert np.abs(np.asarray(a - c)).max() < 1e-5
        else:
            assert gap(a, c) < (1e-5 if dtype == "float32" else 1.5 * gap(b, c)), name


def test_the_gradient_is_zero_without_keys_and_for_keys_that_no_query_reads():
    B, T, N, K, S, H = 2, 50, 6, 2, 300, 32
    q, k, v, g = (draw(n, B, *shape, H) for n, shape in enumerate(((T, N), (K, S), (K, S), (T, N))))
    rng = np.random.default_rng(0)
    low, high = rng.integers(0, 150, (B, T)), rng.integers(100, S - 1, (B, T))
    low[0, :40] = high[0, :40] = 7  # a whole block of queries without keys
    live = (np.arange(S) >= low[..., None]) & (np.arange(S) < high[..., None])

    def plain(q, k, v):
        scores = jnp.einsum("btkgh,bksh->btkgs", q.reshape(B, T, K, N // K, H), k, precision="highest") / H**0.5
        weights = jnp.where(live[:, :, None, None], jnp.exp(scores), 0)
        weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
        return jnp.einsum("btkgs,bksh->btkgh", weights, v, precision="highest").reshape(B, T, N, H)

    out, lse = cpu.attend_many_forward(q, k, v, low, high)
    expected, back = jax.vjp(plain, q, k, v)
    assert gap(out, expected) < 1e-5 and np.isneginf(lse[~live.any(-1)]).all()
    ours = jax.jit(cpu.attend_many_backward)(q, k, v, low, high, out, lse, g)
    for a, b in zip(ours, back(g), strict=True):
        assert gap(a, b) < 1e-5
    assert not np.asarray(ours[0])[~live.any(-1)].any() and not np.asarray(ours[1])[:, :, S - 1].any()


@pytest.mark.parametrize("remat", ["none", "attention", "full"])
def test_rematerialization_by_names_keeps_the_result_of_attention(remat):
    positions = jnp.broadcast_to(jnp.arange(40), (1, 40))
    q, k, v = (draw(n, 1, *shape, 16) for n, shape in enumerate(((40, 2), (1, 40), (1, 40))))
    layer = with_remat(lambda *a: jnp.sin(native.attend(Call(*a, positions))), remat)
    lowered = jax.jit(jax.value_and_grad(lambda *a: layer(*a).sum(), (0, 1, 2))).lower(q, k, v).as_text()
    assert lowered.count("@llama_attention_many(") == (2 if remat == "full" else 1)
    assert lowered.count("@llama_attention_gradient(") == 1


def test_padding_of_a_chunk_has_no_keys():
    k, v = (draw(i, 2, 2, 64, 32) for i in range(2))
    at = jnp.array([[60, 61, 62, 63, 64], [0, 1, 2, 3, 4]])
    window = cache.window(cache.KVCache((k,), (v,)), at, jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]) > 0)
    for queries in (5, 1):
        pad = cache.Window(at[:, -queries:], window.slots_BT[:, -queries:], 64)
        out = native.attend(Call(draw(2, 2, queries, 4, 32), k, v, at[:, -queries:], None, pad))
        assert not np.asarray(out[0, -1]).any() and np.asarray(out[1, -1]).all()


def test_sharded_arrays_keep_to_xla():
    w, _ = weight("float32", 32, 64)
    x = inputs(2, 64, "float32")
    with parallel.use(parallel.Layout(parallel.make_mesh({"tensor": 2, "data": 4}), "infer")):
        sharded = jax.jit(lambda x, w: linear.linear(x, w)).lower(x, w).as_text()
    assert "llama_linear" not in sharded
    with parallel.use(parallel.Layout(parallel.single_device_mesh(), "train")):
        assert "llama_linear" in jax.jit(lambda x, w: linear.linear(x, w)).lower(x, w).as_text()
    assert "llama_linear" in jax.jit(linear.linear).lower(x, w).as_text()
    many = jax.jit(linear.linear).lower(inputs(17, 64, "float32"), w).as_text()
    assert ("llama_linear" in many) == cpu.multiplies(17)
