"""Rows that come and go, against the full forward pass, which knows nothing of caches, and against each row alone."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.inference import (
    CONFIG,
    GREEDY,
    WARM,
    check_greedy,
    engine,
    full_logits,
    new_program,
    params,
    prompt,
    request,
    run,
    shared_program,
)
from llama_jax import parallel
from llama_jax.errors import ConfigError
from llama_jax.infer.engine import Engine, placed, round_up, spans
from llama_jax.infer.program import Program
from llama_jax.infer.request import Request
from llama_jax.infer.scheduler import Scheduler
from llama_jax.params import stack, unstack
from llama_jax.sampling_params import SamplingParams


def test_every_prompt_length_to_40_through_refilled_rows_equals_the_full_forward():
    requests = [request(n) for n in range(1, 41)]
    rows, last = run(requests)
    check_greedy(requests, rows)
    assert all(event.finish == "length" for event in last)


@pytest.mark.parametrize("max_chunk", [16, 64])
def test_every_chunking_of_long_ragged_prompts_equals_the_full_forward(max_chunk):
    requests = [request(n) for n in (200, 3, 65, 129)]
    check_greedy(requests, run(requests, on=engine(max_chunk=max_chunk))[0])


FEW = SamplingParams(temperature=1.0, allowed_tokens=range(40), logit_bias={7: 2.0}, frequency_penalty=0.3)


def test_a_row_of_a_crowd_equals_the_row_alone():
    """Greedy and drawn texts depend on nobody else: refilled rows, other lengths, settings and limits."""
    rng = np.random.default_rng(7)
    requests = [
        request(int(n), new=int(m), sampling=(GREEDY, WARM, FEW)[i % 3], seed=i, which=i)
        for i, (n, m) in enumerate(zip(rng.integers(1, 60, 20), rng.integers(1, 40, 20), strict=True))
    ]
    crowd, _ = run(requests)
    alone = Scheduler(engine(), rows=1)
    for r, (tokens, logprobs) in zip(requests, crowd, strict=True):
        ((own, own_logprobs),), _ = run([r], on=alone)
        assert own == tokens
        np.testing.assert_allclose(own_logprobs, logprobs, atol=1e-4)


def test_the_text_does_not_depend_on_how_the_loop_is_cut():
    r = request(9, new=100, sampling=WARM, seed=5)
    (whole,), _ = run([r], rows=1)
    for first, most in ((1, 8), (1, 1), (7, 64)):
        assert run([r], rows=1, first=first, most=most)[0][0][0] == whole[0]


def test_any_of_the_stop_tokens_of_its_own_row_ends_a_row_and_stays_in_it():
    r = request(5, new=40, sampling=WARM, seed=1)
    free = run([r])[0][0][0]
    stops = list(dict.fromkeys(free))[2:6]
    variants = [(), stops[:1], stops[1:3], stops[::-1]]
    rows, last = run([dataclasses.replace(r, stop_tokens=tuple(v)) for v in variants])
    for variant, (tokens, _), event in zip(variants, rows, last, strict=True):
        end = min((free.index(s) + 1 for s in variant), default=40)
        assert tokens == free[:end] and event.stop == (tokens[-1] if variant else None)
        assert event.finish == ("stop" if variant else "length")


def test_the_repetition_penalty_sees_prompt_and_text():
    harsh = SamplingParams(temperature=0.0, repetition_penalty=1e6)
    r = Request(tokens=prompt(150), max_new_tokens=60, sampling=harsh, seed=0)
    tokens = run([r])[0][0][0]
    assert len(set(tokens)) == 60 and not set(tokens) & set(r.tokens)


def test_the_likeliest_tokens_of_each_position_come_with_their_log_probabilities():
    requests = [request(5, top_logprobs=3), request(8), request(6, top_logprobs=5, sampling=WARM)]
    scheduler = Scheduler(engine(), rows=4)
    numbers = [scheduler.submit(r) for r in requests]
    top, tokens = {n: [] for n in numbers}, {n: [] for n in numbers}
    for event in scheduler.events(numbers):
        top[event.number] += event.top
        tokens[event.number] += event.tokens
    for n, r in zip(numbers, requests, strict=True):
        width = len(r.tokens) + len(tokens[n])
        ids = np.zeros((1, 64), np.int32)
        ids[0, :width] = [*r.tokens, *tokens[n]]
        logprobs = np.asarray(jax.nn.log_softmax(full_logits(ids)[0, len(r.tokens) - 1 : width - 1]))
        assert len(top[n]) == (6 if r.top_logprobs else 0)
        for best, row in zip(top[n], logprobs, strict=False):
            order = np.argsort(-row)[: r.top_logprobs]
            assert [i for i, _ in best] == order.tolist()
            np.testing.assert_allclose([p for _, p in best], row[order], atol=2e-4)


# Beginnings that are in the cache.


def test_prompts_that_begin_alike_are_read_once_and_answered_as_alone():
    few_shot = prompt(100)
    requests = [dataclasses.replace(request(7, which=i), tokens=few_shot + prompt(7, i)) for i in range(9)]
    rows, last = run(requests)
    check_greedy(requests, rows)
    assert last[0].reused == 0 and all(event.reused >= 100 for event in last[1:])


def test_the_next_turn_of_a_chat_starts_where_the_last_one_ended():
    scheduler = Scheduler(engine(), rows=1)
    dialog = prompt(50)
    for turn in range(3):
        r = Request(tokens=dialog, max_new_tokens=10, sampling=GREEDY)
        rows, (event,) = run([r], on=scheduler)
        check_greedy([r], rows)
        assert event.reused == (0 if turn == 0 else len(dialog) - 9)  # all but the last answer token and the question
        dialog = [*dialog, *rows[0][0], *prompt(8, turn)]


def test_samples_of_one_prompt_share_its_beginning_and_differ():
    requests = [request(90, new=12, sampling=WARM, seed=seed) for seed in range(6)]
    rows, last = run(requests)
    assert [event.reused for event in last] == [0] + [89] * 5
    assert len({tuple(tokens) for tokens, _ in rows}) == 6
    for r, (tokens, _) in zip(requests, rows, strict=True):
        assert run([r])[0][0][0] == tokens


def test_a_batch_that_grows_or_shrinks_keeps_what_its_rows_remember():
    scheduler = Scheduler(engine(), rows=4)
    long = request(100)
    run([long], on=scheduler)
    run([request(5, which=i) for i in range(4)], on=scheduler)  # grows to four rows; the first stays in the cache
    rows, (event,) = run([dataclasses.replace(long, tokens=long.tokens + prompt(3))], on=scheduler)  # one row again
    assert event.reused in (0, 100)
    check_greedy([dataclasses.replace(long, tokens=long.tokens + prompt(3))], rows)
    wide = dataclasses.replace(long, tokens=long.tokens + prompt(3), max_new_tokens=150)  # more capacity
    rows, (event,) = run([wide], on=scheduler)
    assert event.reused >= 102
    check_greedy([wide], rows)


# Requests that end early.


def test_a_cancelled_request_leaves_the_others_as_they_are():
    scheduler = Scheduler(engine(), rows=2)
    keep, stop, wait, last = (scheduler.submit(request(6, new=30, which=i)) for i in range(4))
    events = scheduler.step(4)
    assert {event.number for event in events} == {keep, stop}
    scheduler.cancel(stop)
    scheduler.cancel(wait)
    found = {keep: [t for e in events if e.number == keep for t in e.tokens], last: []}
    for event in scheduler.events([keep, last]):
        found[event.number] += event.tokens
    assert found[keep] == run([request(6, new=30, which=0)])[0][0][0]
    assert found[last] == run([request(6, new=30, which=3)])[0][0][0]
    assert scheduler.idle


def test_iterators_in_several_threads_each_get_their_own_text():
    scheduler, found = Scheduler(engine(), rows=2), {}

    def work(i):
        found[i] = run([request(6 + i, new=20, which=i)], on=scheduler, first=1, most=4)[0][0][0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join(120) for thread in threads]
    for i in range(4):
        assert found[i] == run([request(6 + i, new=20, which=i)])[0][0][0]


def test_a_client_that_steps_itself_leaves_nothing_behind_and_robs_no_iterator():
    scheduler = Scheduler(engine(), rows=2)
    stepped = [scheduler.submit(request(6, new=4, which=i)) for i in range(3)]
    (number,), events = scheduler.start([request(8, new=12)])
    found = {n: [] for n in stepped}
    while not scheduler.idle:
        for event in scheduler.step(4):
            found.setdefault(event.number, []).extend(event.tokens)
    own = [token for event in events for token in event.tokens]
    assert own == found[number] == run([request(8, new=12)])[0][0][0]
    assert all(len(found[n]) == 4 for n in stepped) and not scheduler._inbox


def test_an_iterator_whose_request_is_cancelled_ends():
    scheduler = Scheduler(engine(), rows=2)
    (one, two), events = scheduler.start([request(6, new=30), request(7, new=8)], most=4)
    numbers = [next(events).number]
    scheduler.cancel(one)
    numbers += [event.number for event in events]
    assert numbers.count(one) <= 2 and numbers[-1] == two and scheduler.idle


def test_an_interrupted_step_ends_its_requests_and_the_next_one_runs(monkeypatch):
    e = engine()
    scheduler = Scheduler(e, rows=1)
    number = scheduler.submit(request(5, new=9))

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(e, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(scheduler.events([number]))
    assert scheduler.idle
    rows, (event,) = run([request(5, new=7)], on=scheduler)
    check_greedy([request(5, new=7)], rows)
    assert event.reused == 4  # the prompt was read before the interruption, and is remembered


# Shapes, places and costs.


def test_a_mix_of_lengths_settings_and_limits_costs_a_bounded_number_of_compilations():
    program = new_program()
    scheduler = Scheduler(engine(program), rows=4)
    for n in range(1, 60):
        sampling = SamplingParams(temperature=n / 50, top_k=n, top_p=1 / (1 + n % 3), repetition_penalty=1 + n / 99)
        r = request(n, new=1 + n % 9, sampling=sampling, stop_tokens=tuple(range(n % 4)), which=n)
        run([r], on=scheduler, first=1 + n % 5)
    # start, decode; prefill of 16 and of 64; insert of prompts of up to 16, 32 and 64; all at 128 slots of capacity.
    assert program.compilations <= 7
    run([request(20, which=i) for i in range(9)], on=scheduler)
    # resize, decode of four rows; prefill and insert of four rows and of one.
    assert program.compilations <= 7 + 6


def test_lengths_round_up_to_few_sizes():
    assert [round_up(n) for n in (1, 128, 129, 4096, 4097, 100_000)] == [128, 128, 256, 4096, 8192, 102_400]
    assert spans(0, (16, 64)) == [] and spans(150, (16, 64)) == [(0, 64), (64, 64), (128, 64)]
    assert spans(70, (16, 64)) == [(0, 64), (64, 16)]


def test_the_decode_loop_updates_a_donated_cache_in_place():
    e = engine()
    run([request(5, new=20), request(7, new=20)], on=e, rows=2)
    before = [a.unsafe_buffer_pointer() for a in e.state.cache.k]
    state = e.state
    with jax.transfer_guard("disallow"):  # nothing but what is asked for crosses between host and device
        e.decode([False, False], limit=3, longest=5)
    assert [a.unsafe_buffer_pointer() for a in e.state.cache.k] == before
    assert state.cache.k[0].is_deleted()


@pytest.mark.parametrize("sizes", [{"tensor": 2, "data": 4}, {"tensor": 8}, {"context": 2, "tensor": 4}], ids=str)
def test_eight_devices_make_the_same_tokens_as_one(sizes):
    """A tensor axis beyond the key/value heads repeats them; context splits the cache along its slots."""
    mesh = parallel.make_mesh(sizes)
    program = new_program(mesh=mesh)
    on_mesh = placed(CONFIG, params(), mesh=mesh, dtype=jnp.float32)
    e = Engine(program, on_mesh, max_chunk=64)
    requests = [request(n, which=n, sampling=(GREEDY, WARM)[n % 2], seed=n) for n in (1, 33, 70, 6, 20)]
    assert [t for t, _ in run(requests, on=e)[0]] == [t for t, _ in run(requests)[0]]
    held = e.params["layers"][0]["ffn"]["up"].sharding.shard_shape((CONFIG.ffn_dim, CONFIG.embed_dim))
    assert held == (CONFIG.ffn_dim // sizes.get("tensor", 1), CONFIG.embed_dim)
    k = e.state.cache.k[0]
    rows, heads, slots, _ = k.sharding.shard_shape(k.shape)
    assert rows == max(1, 4 // sizes.get("data", 1)) and slots == e.capacity // sizes.get("context", 1)
    assert heads == max(1, CONFIG.num_kv_heads // sizes["tensor"])


def test_a_tensor_axis_that_fits_no_heads_is_refused_with_the_legal_ones():
    odd = dataclasses.replace(CONFIG, num_heads=12, num_kv_heads=4, head_dim=CONFIG.head_dim)
    mesh = parallel.make_mesh({"tensor": 8})
    with pytest.raises(ConfigError, match=r"tensor=8 .* 4 key/value heads and 12 query heads.*\[1, 2, 4, 12\]"):
        Program.make(odd, mesh=mesh, dtype=jnp.float32)


def test_stacked_and_unrolled_weights_are_the_same_model():
    e = Engine(shared_program(), unstack(stack(params())), max_chunk=64)
    assert run([request(9)], on=e) == run([request(9)])


def test_bfloat16_decodes_what_its_own_full_forward_ranks_first():
    cast = placed(CONFIG, params(), mesh=None, dtype=jnp.bfloat16)
    e = Engine(new_program(dtype=jnp.bfloat16), cast)
    r = request(20, new=16)
    tokens = run([r], on=e, rows=1)[0][0][0]
    ids = np.array([[*r.tokens, *tokens]], np.int32)
    logits = np.asarray(e.logits(ids))[0, 19:-1]
    behind = logits.max(-1) - logits[np.arange(16), tokens]
    assert (behind < 0.05 * logits.std()).all()  # a tie within bfloat16's rounding
    assert e.state.cache.k[0].dtype == jnp.uint16  # on a CPU, bfloat16 by its bits


def test_a_cache_in_8_bits_takes_a_quarter_and_stays_near_the_full_forward():
    e = engine(new_program(kv="int8"))
    r = request(60, new=16)
    tokens, logprobs = run([r], on=e, rows=1)[0][0]
    exact = engine()
    run([r], on=exact, rows=1)
    sizes = [sum(a.nbytes for a in jax.tree.leaves(x.state.cache)) for x in (e, exact)]
    assert sizes[0] / sizes[1] == pytest.approx((1 + 2 / CONFIG.head_dim) / 4)
    ids = np.array([[*r.tokens, *tokens]], np.int32)
    full = np.asarray(jax.nn.log_softmax(e.logits(ids), axis=-1))[0, 59:-1]
    np.testing.assert_allclose(logprobs, full[np.arange(16), tokens], atol=0.2)


def test_a_prompt_that_fills_the_model_decodes_to_its_last_position():
    short = dataclasses.replace(CONFIG, max_seq_len=150)
    e = Engine(Program.make(short, mesh=None, dtype=jnp.float32), params(), max_chunk=64)
    r = request(143, new=7)
    check_greedy([r], run([r], on=e)[0])


@pytest.mark.parametrize("limit", [0, 65])
def test_a_limit_beyond_the_buffer_is_refused(limit):
    with pytest.raises(ConfigError, match="limit must be from 1 to 64"):
        engine().decode([], limit=limit, longest=0)


def test_an_unknown_chunk_size_or_cache_type_is_refused():
    with pytest.raises(ConfigError, match="max_chunk must be one of"):
        engine(max_chunk=100)
    with pytest.raises(ConfigError, match="kv must be one of compute, int8"):
        new_program(kv="int3")
