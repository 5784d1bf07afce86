"""Failures, neighbors and memory: what concerns one request concerns no other, and nothing grows or is lost."""

import dataclasses
import functools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.crowd import Crowd, Letters
from helpers.inference import (
    CONFIG,
    check_greedy,
    engine,
    new_program,
    params,
    prompt,
    request,
    run,
    shared_program,
)
from llama_jax.errors import ConfigError
from llama_jax.infer.engine import Engine
from llama_jax.infer.llama import Llama
from llama_jax.infer.scheduler import QueueFull, Scheduler
from llama_jax.params import init_params, unstack


def outcomes(requests, scheduler, **options):
    """(tokens, error) of each request."""
    numbers, events = scheduler.start(requests, **options)
    found = {number: ([], None) for number in numbers}
    for event in events:
        found[event.number] = (found[event.number][0] + event.tokens, event.error)
    return [found[number] for number in numbers]


def text_of(which, **more):
    return run([request(6, which=which, **more)], rows=1)[0][0][0]


# Failures.


def test_a_grammar_that_fails_ends_its_own_request_only():
    requests = [request(6, new=12, which=i) for i in range(3)]
    requests[1] = dataclasses.replace(requests[1], matcher=Letters(fails_after=4))
    found = outcomes(requests, Scheduler(engine(), rows=4))
    assert isinstance(found[1][1], OSError) and len(found[1][0]) == 4
    for i in (0, 2):
        assert found[i] == (text_of(i, new=12), None)


def test_an_engine_call_that_fails_for_one_row_fails_that_row_only(monkeypatch):
    e = engine()
    insert = e.insert

    def picky(requests):
        if any(r.seed == 13 for r in requests.values()):
            raise ValueError("no such seed")
        insert(requests)

    monkeypatch.setattr(e, "insert", picky)
    requests = [dataclasses.replace(request(6, which=i), seed=13 * (i == 1)) for i in range(3)]
    found = outcomes(requests, Scheduler(e, rows=4))
    assert str(found[1][1]) == "no such seed"
    assert [found[i] for i in (0, 2)] == [(text_of(i), None) for i in (0, 2)]


@functools.cache
def damaged_engine():
    """An engine whose token 7 gives values that are not finite."""
    damaged = dict(params(), embed=params()["embed"].at[7].set(jnp.nan))  # tied: give the unembedding too
    unembed = damaged.get("unembed", params()["embed"])
    config = dataclasses.replace(CONFIG, tied_embeddings=False)
    program = type(shared_program()).make(config, mesh=None, dtype=jnp.float32)
    return Engine(program, {**damaged, "unembed": unembed}, max_chunk=64)


def test_rows_whose_logits_are_not_finite_fail_and_the_others_go_on():
    e = damaged_engine()
    e.clear()
    requests = [dataclasses.replace(request(5), tokens=tokens) for tokens in ([1, 2, 3], [4, 7, 5], [6, 8])]
    found = outcomes(requests, Scheduler(e, rows=4))
    assert [error is None for _, error in found] == [True, False, True]
    assert "not finite" in str(found[1][1]) and len(found[0][0]) == len(found[2][0]) == 6
    alone = Scheduler(e, rows=1)  # in the row of the text that failed, the next ones are as before
    for tokens, (text, error) in zip(
        ([4, 7, 5, 2, 9, 3], [1, 2, 3], [6, 8]), [found[1], found[0], found[2]], strict=True
    ):
        ((again, failed),) = outcomes([dataclasses.replace(request(5), tokens=tokens)], alone)
        assert (again, failed is None) == (text, error is None)


def test_a_beginning_that_is_shared_with_a_text_that_is_not_finite_fails_no_other():
    e = damaged_engine()
    e.clear()
    start = [token + (token == 7) for token in prompt(20)]
    requests = [dataclasses.replace(request(5), tokens=start + end) for end in ([7, 5, 3], [8, 6, 2], [9, 7, 4], [1])]
    expected = [outcomes([r], Scheduler(e, rows=1)) for r in (requests[1], requests[3])]
    found = outcomes(requests, Scheduler(e, rows=4))
    assert [error is None for _, error in found] == [False, True, False, True]
    assert [[found[1]], [found[3]]] == expected
    scheduler = Scheduler(e, rows=1)  # a row that was left before its values were seen is not shared for ever
    number = scheduler.submit(requests[0])
    scheduler._rows.admit(scheduler._queue, most=1, rested=True)
    scheduler.cancel(number)
    assert [outcomes([r], scheduler) for r in (requests[1], requests[3])] == expected


def test_a_dispatch_that_fails_loses_the_rows_that_ran_and_no_request_that_waits(monkeypatch):
    e = engine()
    decode, calls = e.decode, []

    def once(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the device is gone")
        return decode(*args, **options)

    monkeypatch.setattr(e, "decode", once)
    found = outcomes([request(6, new=20, which=i) for i in range(4)], Scheduler(e, rows=2), most=4)
    assert [str(error) for _, error in found[:2]] == ["the device is gone"] * 2
    assert found[2:] == [(text_of(i, new=20), None) for i in (2, 3)]


def test_a_batch_that_cannot_grow_fails_the_request_that_needs_it(monkeypatch):
    e = engine()
    resize = e.resize

    def small(keep, *, rows, capacity):
        if capacity > 128:
            raise RuntimeError("out of memory")
        resize(keep, rows=rows, capacity=capacity)

    monkeypatch.setattr(e, "resize", small)
    scheduler = Scheduler(e, rows=2)
    found = outcomes([request(6, which=0), request(200, which=1), request(6, which=2)], scheduler)
    assert str(found[1][1]) == "out of memory"
    assert [found[i] for i in (0, 2)] == [(text_of(i), None) for i in (0, 2)]


def test_a_row_that_cannot_be_parked_is_forgotten_and_no_request_fails_for_it(monkeypatch):
    e = engine()

    def full(row, length):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(e, "park", full)
    scheduler = Scheduler(e, rows=4)
    for i in range(3):
        assert outcomes([request(90, which=i)], scheduler) == [(run([request(90, which=i)], rows=1)[0][0][0], None)]
    assert not scheduler._rows.parked


def test_a_request_whose_start_is_interrupted_waits_and_starts_later(monkeypatch):
    e = engine()
    scheduler = Scheduler(e, rows=2)
    outcomes([request(90)], scheduler)
    park = e.park

    def interrupted(row, length):
        monkeypatch.setattr(e, "park", park)
        raise KeyboardInterrupt

    monkeypatch.setattr(e, "park", interrupted)
    number = scheduler.submit(request(40, which=1))
    with pytest.raises(KeyboardInterrupt):
        scheduler.step(64)
    assert [event.number for event in scheduler.step(64)] == [number] and scheduler.idle


def test_after_an_interruption_of_a_resize_no_row_is_taken_for_another(monkeypatch):
    e = engine()
    scheduler = Scheduler(e, rows=4)
    texts = [outcomes([request(30, which=i)], scheduler)[0][0] for i in range(2)]
    resize = e.resize

    def interrupted(*args, **options):
        resize(*args, **options)
        monkeypatch.setattr(e, "resize", resize)
        raise KeyboardInterrupt

    monkeypatch.setattr(e, "resize", interrupted)
    numbers = [scheduler.submit(request(30, which=i)) for i in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        scheduler.step(64)
    ended = [event.number for _ in range(4) for event in scheduler.step(64) if event.finish]
    assert sorted(ended) == numbers and scheduler.idle
    assert [outcomes([request(30, which=i)], scheduler)[0][0] for i in range(2)] == texts


@pytest.mark.parametrize("drop", [lambda events: events.close(), lambda events: None], ids=["closed", "dropped"])
def test_an_iterator_that_is_left_before_its_first_event_cancels_its_requests(drop):
    scheduler = Scheduler(engine(), rows=2)
    numbers, events = scheduler.start([request(6), request(6, which=1)])
    drop(events)
    del events
    assert scheduler.idle and scheduler.step(8) == []


def test_rows_that_a_batch_gains_are_empty():
    e = engine()
    run([request(20)], on=Scheduler(e, rows=1))
    e.resize([0], rows=2, capacity=e.capacity)
    k = np.asarray(e.state.cache.k[0])
    assert k[0].any() and not k[1].any()


def test_an_interruption_between_two_events_ends_both_requests(monkeypatch):
    scheduler, calls = Scheduler(engine(), rows=2), []
    event = scheduler._event

    def interrupted(row, piece):
        calls.append(row)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return event(row, piece)

    monkeypatch.setattr(scheduler, "_event", interrupted)
    numbers = [scheduler.submit(request(6, which=i)) for i in range(2)]
    with pytest.raises(KeyboardInterrupt):
        scheduler.step(64)
    assert sorted((event.number, event.finish) for event in scheduler.step(64)) == [(n, "error") for n in numbers]
    assert scheduler.idle


def test_generate_says_which_prompts_failed_and_returns_the_others(monkeypatch, caplog):
    llama = Llama(CONFIG, params())
    insert = llama.engine.insert

    def picky(requests):
        if any(list(r.tokens) == [9, 9] for r in requests.values()):
            raise ValueError("no such prompt")
        insert(requests)

    monkeypatch.setattr(llama.engine, "insert", picky)
    good, bad = llama.generate([[1, 2], [9, 9]], max_new_tokens=4, temperature=0)
    assert good.finish_reason == "length" and len(good.tokens) == 4 and good.error == ""
    assert (bad.finish_reason, bad.error, bad.tokens) == ("error", "no such prompt", [])
    assert "prompt 1 failed: no such prompt" in caplog.text
    best, _ = llama.generate([[1, 2], [9, 9]], max_new_tokens=4, best_of=2, temperature=0)
    assert best.tokens == good.tokens
    for call in (lambda: llama.generate([9, 9]), lambda: list(llama.stream([9, 9]))):
        with pytest.raises(ValueError, match="no such prompt"):
            call()


# Threads.


def test_submit_and_cancel_do_not_wait_for_a_dispatch(monkeypatch):
    e = engine()
    decode, running, go = e.decode, threading.Event(), threading.Event()

    def slow(*args, **options):
        running.set()
        assert go.wait(60)
        return decode(*args, **options)

    monkeypatch.setattr(e, "decode", slow)
    scheduler = Scheduler(e, rows=2)
    first = scheduler.submit(request(6, new=30))
    worker = threading.Thread(target=lambda: scheduler.step(4))
    worker.start()
    assert running.wait(60)
    start = time.monotonic()
    second = scheduler.submit(request(6, which=1))
    scheduler.cancel(first)
    assert time.monotonic() - start < 1 and not go.is_set() and not scheduler.idle
    go.set()
    worker.join(60)
    found = {}
    while not scheduler.idle:
        for event in scheduler.step(8):
            found.setdefault(event.number, []).extend(event.tokens)
    assert found == {second: text_of(1)}


def test_new_weights_come_between_two_dispatches_and_never_beside_an_old_cache():
    llama = Llama(CONFIG, params())
    other = unstack(init_params(CONFIG, jax.random.key(3)))
    wanted = Llama(CONFIG, other).generate([5, 6, 7], max_new_tokens=8, temperature=0).tokens
    stop, errors = threading.Event(), []

    def busy():
        while not stop.is_set():
            try:
                llama.generate([[1, 2, 3]] * 3, max_new_tokens=20, temperature=0)
            except RuntimeError as error:
                errors.append(str(error))

    worker = threading.Thread(target=busy)
    worker.start()
    for i in range(6):
        llama.set_params(other if i % 2 else params())
        if i % 2:
            assert llama.generate([5, 6, 7], max_new_tokens=8, temperature=0).tokens == wanted
    stop.set()
    worker.join(60)
    assert all("weights were replaced" in error for error in errors)


def test_a_queue_with_a_bound_refuses_more_and_takes_more_later():
    scheduler = Scheduler(engine(), rows=1, queue=2)
    kept = [scheduler.submit(request(6, which=i)) for i in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait already: at most 2 may"):
        scheduler.submit(request(6))
    scheduler.step(1)  # one has a row now
    kept.append(scheduler.submit(request(6, which=2)))
    scheduler.cancel(kept[1])
    kept.append(scheduler.submit(request(6, which=3)))
    while not scheduler.idle:
        scheduler.step(16)
    with pytest.raises(ConfigError, match="has ended, or was never submitted"):
        scheduler.events([kept[0]])
    with pytest.raises(ConfigError, match="queue must be a whole number of at least 1"):
        Scheduler(engine(), queue=0)


# Long prompts.


def test_rows_go_on_between_the_chunks_of_a_long_prompt():
    scheduler = Scheduler(engine(max_chunk=16), rows=2, interleave=3)
    quick = scheduler.submit(request(6, new=60))
    tokens = {quick: scheduler.step(1)[0].tokens}
    long = scheduler.submit(request(150, which=1))
    seen = []
    while not scheduler.idle:
        events = scheduler.step(32)
        for event in events:
            seen.append(event.number)
            tokens.setdefault(event.number, []).extend(event.tokens)
        assert len(events[0].tokens) <= 3 or long in seen
    assert seen.index(long) == 10  # 149 tokens in chunks of 16, with a dispatch of the other row after each
    assert tokens == {quick: text_of(0, new=60), long: run([request(150, which=1)])[0][0][0]}


def test_a_prompt_that_is_cancelled_while_it_is_read_leaves_its_beginning():
    scheduler = Scheduler(engine(max_chunk=16), rows=2)
    number = scheduler.submit(request(150))
    scheduler.step(1)
    scheduler.step(1)
    scheduler.cancel(number)
    rows, (event,) = run([request(150)], on=scheduler)
    check_greedy([request(150)], rows)
    assert event.reused == 32


def test_a_row_that_was_cancelled_writes_nothing_into_the_prompt_that_is_read_into_it():
    """On the device the old request is live until the next dispatch, which looks before it picks."""
    scheduler = Scheduler(engine(max_chunk=16), rows=2)
    first = scheduler.submit(request(6, new=60))
    second = scheduler.submit(dataclasses.replace(request(7, new=60), matcher=Letters()))
    scheduler.step(4)
    scheduler.cancel(first)
    scheduler.cancel(second)
    long = scheduler.submit(request(40, which=1))
    scheduler.submit(dataclasses.replace(request(6, new=20, which=2), matcher=Letters()))
    tokens = []
    while not scheduler.idle:
        tokens += [token for event in scheduler.step(4) if event.number == long for token in event.tokens]
    assert tokens == run([request(40, which=1)])[0][0][0]


# Memory.


def test_chats_that_take_turns_keep_their_cache_though_the_batch_has_one_row():
    scheduler = Scheduler(engine(), rows=4)
    dialogs = [prompt(90, i) for i in range(4)]
    for turn in range(3):
        for i, dialog in enumerate(dialogs):
            r = dataclasses.replace(request(1), tokens=dialog)
            rows, (event,) = run([r], on=scheduler)
            check_greedy([r], rows)
            assert event.reused == (0 if turn == 0 else len(dialog) - 5)
            dialogs[i] = [*dialog, *rows[0][0], *prompt(4, turn)]
    assert scheduler._engine.rows == 1 and len(scheduler._rows.parked) == 3
    crowd = [dataclasses.replace(request(1), tokens=dialog) for dialog in dialogs]
    rows, last = run(crowd, on=scheduler)  # all at once, in four rows: what was parked is there
    check_greedy(crowd, rows)
    assert all(event.reused >= 90 for event in last) and not scheduler._rows.parked


def test_fewer_rows_are_remembered_once_fewer_may_run():
    scheduler = Scheduler(engine(), rows=4)
    for i in range(4):
        run([request(90, new=1, which=i)], on=scheduler)
    assert len(scheduler._rows.parked) == 3
    scheduler.rows = 2
    _, (event,) = run([request(90, new=1, which=2)], on=scheduler)  # the newest of the parked ones
    assert event.reused == 89 and len(scheduler._rows.batch) + len(scheduler._rows.parked) == 2


def test_capacity_shrinks_after_a_rest_and_one_array_at_a_time_is_in_memory_twice(monkeypatch):
    e = engine(new_program())
    scheduler = Scheduler(e, rows=1)
    run([request(200)], on=scheduler)
    assert e.capacity == 256
    resize, resize_array, old, alive = e.resize, e.program.resize_array, [], []

    def remembered(*args, **options):
        old.extend(jax.tree.leaves(e.state.cache))
        resize(*args, **options)

    def watched(array, *args, **options):
        alive.append(sum(not a.is_deleted() for a in old))
        return resize_array(array, *args, **options)

    monkeypatch.setattr(e, "resize", remembered)
    monkeypatch.setitem(e.program.__dict__, "resize_array", watched)
    for i in range(40):
        run([request(5, which=i, new=1)], on=scheduler)
    assert e.capacity == 128
    assert alive == list(range(len(old), 0, -1))


def test_a_request_that_drafts_beside_one_that_looks_up_and_one_that_does_neither():
    mixed = [request(9, new=20, which=i, speculate=("draft", "lookup", "")[i]) for i in range(3)]
    plain, _ = run([dataclasses.replace(r, speculate="") for r in mixed])
    guessed, last = run(mixed, on=engine(new_program(draft=CONFIG), draft=params()))
    assert [tokens for tokens, _ in guessed] == [tokens for tokens, _ in plain]
    assert last[0].steps == 3  # the draft is the model itself: 8 tokens a step
    assert last[1].steps > 3


def test_a_crowd_that_comes_and_goes_at_random_is_answered_as_each_alone():
    crowd = Crowd(cases=10)
    rng = np.random.default_rng(1)
    crowd.steps(rng, 80)
    crowd.nothing_left()
    crowd.threads(rng, 3)
    crowd.nothing_left()
    assert crowd.ended > 20 and crowd.cancelled > 5 and crowd.failed >= 1
