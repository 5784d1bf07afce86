"""Guesses change the number of steps and never the text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.inference import CONFIG, GREEDY, WARM, engine, new_program, params, prompt, request, run, shared_program
from llama_jax.errors import ConfigError
from llama_jax.infer import speculation
from llama_jax.infer.engine import Engine
from llama_jax.infer.request import Request
from llama_jax.params import init_params, unstack
from llama_jax.sampling_params import SamplingParams

LOOK_UP = jax.jit(speculation.look_up, static_argnums=2)


def looked_up(ids, guesses):
    padded = jnp.asarray([[*ids, *[7] * (40 - len(ids))]])
    return LOOK_UP(padded, jnp.array([len(ids) - 1]), guesses)[0].tolist()


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3, 9, 8, 1, 2, 3], [9, 8, 1, 2]),
        ([4, 3, 5, 6, 2, 3, 7, 2, 3], [7, 2, 3, 7]),  # two tokens beat a later single one, and the end repeats
        ([5, 1, 5, 2, 5], [2, 5, 2, 5]),  # the latest occurrence of the last token
        ([1, 2, 3, 4], [0, 0, 0, 0]),  # nothing occurs again
        ([6, 6], [6, 6, 6, 6]),
        ([3], [0, 0, 0, 0]),
    ],
    ids=str,
)
def test_a_look_up_finds_what_followed_the_last_tokens(ids, expected):
    assert looked_up(ids, 4) == expected


def test_a_look_up_is_that_of_a_plain_search_on_random_rows():
    rng = np.random.default_rng(0)
    for _ in range(30):
        ids = rng.integers(0, 4, int(rng.integers(2, 30))).tolist()
        end = len(ids) - 1
        found = -1
        for n in (3, 2, 1):
            if end >= n - 1:
                places = [j for j in range(n - 1, end) if ids[j - n + 1 : j + 1] == ids[end - n + 1 :]]
                if places and found < 0:
                    found = places[-1]
        period = end - found
        expected = [ids[found + 1 + i % period] for i in range(5)] if found >= 0 else [0] * 5
        assert looked_up(ids, 5) == expected, ids


def requests():
    """Greedy and drawn ones of several lengths, of which some repeat themselves and one has stop tokens."""
    rng = np.random.default_rng(3)
    listed = []
    for i in range(8):
        tokens = prompt(5, i) * int(rng.integers(1, 6))
        cold = SamplingParams(temperature=0.2, top_p=1.0, allowed_tokens=(5,))  # it repeats itself
        listed.append(
            Request(
                tokens=tokens,
                max_new_tokens=(int(rng.integers(1, 30)), 40)[i % 3 == 2],
                sampling=(GREEDY, WARM, cold)[i % 3],
                seed=i,
                stop_tokens=(3, 5, 8, 13) if i == 6 else (),
                top_logprobs=2 if i == 2 else 0,
            )
        )
    return listed


def test_prompt_look_up_gives_the_same_text_in_fewer_steps():
    plain, _ = run(requests())
    fast, last = run([dataclasses.replace(r, speculate="lookup") for r in requests()])
    for (tokens, logprobs), (own, own_logprobs) in zip(plain, fast, strict=True):
        assert own == tokens
        np.testing.assert_allclose(own_logprobs, logprobs, atol=1e-4)
    for r, event, (tokens, _) in zip(requests(), last, fast, strict=True):
        assert event.steps <= len(tokens)
        if r.sampling.allowed_tokens:
            assert event.steps < 0.6 * len(tokens)


@pytest.mark.parametrize("same", [True, False], ids=["the_model_itself", "another_model"])
def test_a_draft_model_gives_the_same_text_in_as_few_steps_as_it_is_good(same):
    other = params() if same else unstack(init_params(CONFIG, jax.random.key(9)))
    program = new_program(draft=CONFIG)
    plain, _ = run(requests())
    drafted = [dataclasses.replace(r, speculate="draft") for r in requests()]
    fast, last = run(drafted, on=engine(program, draft=other))
    assert [tokens for tokens, _ in fast] == [tokens for tokens, _ in plain]
    for r, event, (tokens, _) in zip(drafted, last, fast, strict=True):
        if same and r.sampling is not WARM:  # penalties on the way change nothing; a guess in time is always right
            assert event.steps == -(-len(tokens) // 8)
        if not same and not r.sampling.allowed_tokens:
            assert event.steps >= 0.5 * len(tokens)


def test_a_draft_model_of_another_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="a draft needs the same vocabulary"):
        new_program(draft=dataclasses.replace(CONFIG, vocab_size=100))


def test_a_request_that_guesses_beside_one_that_does_not():
    mixed = [request(9, new=20, which=i, speculate="lookup" if i % 2 else "") for i in range(4)]
    plain, _ = run([dataclasses.replace(r, speculate="") for r in mixed])
    assert [t for t, _ in run(mixed, on=Engine(shared_program(), params(), max_chunk=64))[0]] == [t for t, _ in plain]
