"""Prefill and decode against the full forward pass, which knows nothing of caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config as configs
from llama_jax import model, parallel
from llama_jax.errors import ConfigError
from llama_jax.infer import engine
from llama_jax.infer.engine import Engine, Request
from llama_jax.params import init_params, unstack
from llama_jax.sampling_params import SamplingParams

CONFIG = configs.size("tiny")
GREEDY = SamplingParams(temperature=0.0, top_p=1.0)
WARM = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, repetition_penalty=1.1)


@functools.cache
def params():
    sharp = init_params(CONFIG, jax.random.key(0))
    return unstack(jax.tree.map(lambda a: a * 6 if a.ndim > 2 else a, sharp))  # else texts stall at once


def new_engine(**options):
    return Engine(CONFIG, params(), **{"mesh": None, "dtype": jnp.float32, **options})


@functools.cache
def shared_engine():
    return new_engine(max_chunk=64)


def prompt(length, seed=0):
    return np.random.default_rng([seed, length]).integers(0, CONFIG.vocab_size, length).tolist()


def request(length, *, new=6, sampling=GREEDY, seed=0, which=0):
    return Request(tokens=prompt(length, which), max_new_tokens=new, sampling=sampling, seed=seed)


def collect(pieces):
    rows = None
    for piece in pieces:
        rows = rows or [([], []) for _ in piece.tokens]
        for (tokens, logprobs), new, new_logprobs in zip(rows, piece.tokens, piece.logprobs, strict=True):
            tokens += new
            logprobs += new_logprobs
    return rows


def run(requests, *, on=None, stops=(), **options):
    return collect((on or shared_engine()).run(requests, stop_tokens=stops, **options))[: len(requests)]


@jax.jit
def _full_logits(tokens_BT):
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden, _ = model.forward(CONFIG, params(), tokens_BT, positions, None)
    return model.unembed(CONFIG, params(), hidden)


def check_greedy(requests, rows, *, atol=2e-4):
    """Each new token is the likeliest of the full forward over all before it, and has its log-probability there."""
    width = max(len(r.tokens) + r.max_new_tokens for r in requests)
    width = -(-width // 64) * 64
    tokens_BT = np.zeros((len(requests), width), np.int32)
    for row, r, (new, _) in zip(tokens_BT, requests, rows, strict=True):
        row[: len(r.tokens) + len(new)] = [*r.tokens, *new]
    logits = np.asarray(_full_logits(tokens_BT))
    for at, r, (new, logprobs) in zip(logits, requests, rows, strict=True):
        assert len(new) == r.max_new_tokens
        before = at[len(r.tokens) - 1 : len(r.tokens) - 1 + len(new)]
        assert new == before.argmax(-1).tolist(), f"prompt of {len(r.tokens)}"
        expected = before.max(-1) - np.log(np.exp(before - before.max(-1, keepdims=True)).sum(-1)) - before.max(-1)
        np.testing.assert_allclose(logprobs, expected, atol=atol)


def test_cached_decode_equals_the_full_forward_for_every_prompt_length_to_40():
    requests = [request(n) for n in range(1, 41)]
    check_greedy(requests, [run([r])[0] for r in requests])


@pytest.mark.parametrize("max_chunk", [16, 64, 512])
def test_every_chunking_of_a_long_ragged_batch_equals_the_full_forward(max_chunk):
    requests = [request(n) for n in (200, 3, 65, 129)]
    check_greedy(requests, run(requests, on=new_engine(max_chunk=max_chunk)))


def test_a_ragged_batch_equals_its_rows_one_by_one():
    for sampling in (GREEDY, WARM):
        requests = [request(n, new=3 + n % 5, sampling=sampling, seed=n, which=n) for n in (1, 17, 40, 2, 30)]
        together = run(requests)
        for alone, row in zip(requests, together, strict=True):
            tokens, logprobs = run([alone])[0]
            assert tokens == row[0]
            np.testing.assert_allclose(logprobs, row[1], atol=1e-4)


def test_the_text_does_not_depend_on_how_the_loop_is_cut():
    r = request(9, new=100, sampling=WARM, seed=5)
    whole = run([r])
    for first, most in ((1, 8), (1, 1), (7, 64), (64, 64)):
        assert run([r], first=first, most=most)[0][0] == whole[0][0]


def test_seeds_make_the_text():
    texts = {seed: run([request(4, new=12, sampling=WARM, seed=seed)])[0][0] for seed in range(6)}
    assert len({tuple(t) for t in texts.values()}) == 6
    assert run([request(4, new=12, sampling=WARM, seed=3)])[0][0] == texts[3]


def test_any_of_the_stop_tokens_ends_a_row_and_stays_in_it():
    r = request(5, new=40, sampling=WARM, seed=1)
    free = run([r])[0][0]
    for count in (1, 2, 3, 5):
        stops = list(dict.fromkeys(free))[2 : 2 + count]
        first = min(free.index(s) for s in stops)
        for order in (stops, stops[::-1]):
            assert run([r], stops=order)[0][0] == free[: first + 1]


def test_rows_end_apart_and_later_ones_are_not_disturbed():
    requests = [request(6, new=n, sampling=WARM, seed=n) for n in (1, 30, 2, 70)]
    rows = run(requests)
    assert [len(tokens) for tokens, _ in rows] == [1, 30, 2, 70]
    assert rows[3][0] == run([requests[3]])[0][0]


def test_the_repetition_penalty_sees_prompt_and_text():
    harsh = SamplingParams(temperature=0.0, repetition_penalty=1e6)
    r = Request(tokens=prompt(150), max_new_tokens=60, sampling=harsh, seed=0)
    tokens = run([r])[0][0]
    assert len(set(tokens)) == 60 and not set(tokens) & set(r.tokens)


def test_a_mix_of_lengths_settings_and_limits_costs_a_bounded_number_of_compilations():
    e = new_engine(max_chunk=64)
    lengths = range(1, 120)
    for n in lengths:
        sampling = SamplingParams(temperature=n / 50, top_k=n, top_p=1 / (1 + n % 3), repetition_penalty=1 + n / 99)
        collect(e.run([request(n, new=1 + n % 9, sampling=sampling)], stop_tokens=range(n % 4), first=1 + n % 5))
    # begin: chunks of 16 and 64; extend: 16 and 64; decode: 1; all at 128 slots of capacity.
    assert e.compilations <= 5
    for n in (3, 5, 6, 7, 8):
        collect(e.run([request(20, which=i) for i in range(n)], stop_tokens=()))
    assert e.compilations <= 5 + 2 * 2  # two batch sizes: 4 and 8 rows


def test_nothing_but_what_is_asked_for_crosses_between_host_and_device():
    e = shared_engine()
    state = e.prefill([request(5)], stop_tokens=(1,))
    with jax.transfer_guard("disallow"):
        state, piece = e.decode(state, limit=2)
    assert len(piece.tokens[0]) == 2


def test_the_decode_loop_updates_a_donated_cache_in_place():
    e = shared_engine()
    state = e.prefill([request(5, new=20), request(7, new=20)], stop_tokens=())
    before = [a.unsafe_buffer_pointer() for a in state.cache.k]
    after, _ = e.decode(state, limit=3)
    assert [a.unsafe_buffer_pointer() for a in after.cache.k] == before
    assert state.cache.k[0].is_deleted()


@pytest.mark.parametrize("sizes", [{"tensor": 2, "data": 4}, {"tensor": 4, "fsdp": 2}], ids=str)
def test_eight_devices_make_the_same_tokens_as_one(sizes):
    mesh = parallel.make_mesh(sizes)
    e = Engine(
        CONFIG,
        engine.placed(CONFIG, params(), mesh=mesh, dtype=jnp.float32),
        mesh=mesh,
        dtype=jnp.float32,
        max_chunk=64,
    )
    requests = [request(n, which=n) for n in (1, 33, 70, 5)]
    check_greedy(requests, run(requests, on=e))
    warm = [request(n, sampling=WARM, seed=n) for n in (4, 20, 9)]
    assert [t for t, _ in run(warm, on=e)] == [t for t, _ in run(warm)]
    count = e.compilations
    assert count <= 4  # begin of 64 and 16, extend of 16, decode
    run(requests, on=e)
    run(requests[2:3], on=e, first=1, most=4)  # one row, which no data axis divides
    first_of_one_row = e.compilations
    run(requests[2:3], on=e, first=3)
    assert e.compilations == first_of_one_row
    held = e.params["layers"][0]["ffn"]["up"].sharding.shard_shape((CONFIG.ffn_dim, CONFIG.embed_dim))
    assert held == (CONFIG.ffn_dim // sizes.get("tensor", 1), CONFIG.embed_dim)


def test_a_tensor_axis_that_does_not_divide_the_kv_heads_is_refused_with_the_legal_ones():
    mesh = parallel.make_mesh({"tensor": 8})
    with pytest.raises(ConfigError, match=r"tensor=8 .* 4 key/value heads.*\[1, 2, 4\]"):
        Engine(CONFIG, params(), mesh=mesh, dtype=jnp.float32)


def test_bfloat16_decodes_what_its_own_full_forward_ranks_first():
    cast = engine.placed(CONFIG, params(), mesh=None, dtype=jnp.bfloat16)
    e = Engine(CONFIG, cast, mesh=None, dtype=jnp.bfloat16)
    r = request(20, new=16)
    tokens, _ = run([r], on=e)[0]
    ids = np.array([[*r.tokens, *tokens]], np.int32)
    logits = np.asarray(e.logits(ids))[0, 19:-1]
    behind = logits.max(-1) - logits[np.arange(16), tokens]
    assert (behind < 0.05 * logits.std()).all()  # a tie within bfloat16's rounding
    assert cache_dtype(e) == jnp.bfloat16


def cache_dtype(e):
    return e.prefill([request(3)], stop_tokens=()).cache.k[0].dtype


def test_a_prompt_that_fills_the_model_decodes_to_its_last_position():
    short = configs.dataclasses.replace(CONFIG, max_seq_len=150)
    e = Engine(short, params(), mesh=None, dtype=jnp.float32, max_chunk=64)
    r = request(143, new=7)
    check_greedy([r], run([r], on=e))


@pytest.mark.parametrize("limit", [0, 65])
def test_a_limit_beyond_the_buffer_is_refused(limit):
    with pytest.raises(ConfigError, match="limit must be from 1 to 64"):
        shared_engine().decode(None, limit=limit)


def test_an_unknown_chunk_size_is_refused():
    with pytest.raises(ConfigError, match="max_chunk must be one of"):
        new_engine(max_chunk=100)
