"""A helper of the tests: a small model, requests that run through a scheduler, and the full forward pass to compare
with.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import config as configs
from llama_jax import model
from llama_jax.infer.engine import Engine
from llama_jax.infer.program import Program
from llama_jax.infer.request import Request
from llama_jax.infer.scheduler import Scheduler
from llama_jax.params import init_params, unstack
from llama_jax.sampling_params import SamplingParams

CONFIG = configs.size("tiny")
GREEDY = SamplingParams(temperature=0.0, top_p=1.0)
WARM = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, repetition_penalty=1.1, presence_penalty=0.2)


@functools.cache
def params():
    sharp = init_params(CONFIG, jax.random.key(0))
    return unstack(jax.tree.map(lambda a: a * 6 if a.ndim > 2 else a, sharp))  # else texts stall at once


def new_program(**options):
    return Program.make(CONFIG, **{"mesh": None, "dtype": jnp.float32, **options})


@functools.cache
def shared_program():
    return new_program()


def engine(program=None, **options):
    return Engine(program or shared_program(), params(), **{"max_chunk": 64, **options})


def prompt(length, seed=0):
    return np.random.default_rng([seed, length]).integers(0, CONFIG.vocab_size, length).tolist()


def request(length, *, new=6, sampling=GREEDY, seed=0, which=0, **more):
    return Request(tokens=prompt(length, which), max_new_tokens=new, sampling=sampling, seed=seed, **more)


def run(requests, *, on=None, rows=4, **options):
    """Runs requests. Returns (tokens, logprobs) of each request, and its last event."""
    scheduler = on if isinstance(on, Scheduler) else Scheduler(on or engine(), rows=rows)
    numbers, events = scheduler.start(requests, **options)
    texts, last = {n: ([], []) for n in numbers}, {}
    for event in events:
        texts[event.number][0].extend(event.tokens)
        texts[event.number][1].extend(event.logprobs)
        last[event.number] = event
    return [texts[n] for n in numbers], [last[n] for n in numbers]


@jax.jit
def full_logits(tokens_BT):
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden, _ = model.forward(CONFIG, params(), tokens_BT, positions, None)
    return model.unembed(CONFIG, params(), hidden)


def check_greedy(requests, rows, *, atol=2e-4):
    """Checks that each new token is the likeliest one of the full forward pass, with the same log-probability."""
    width = max(len(r.tokens) + r.max_new_tokens for r in requests)
    width = -(-width // 64) * 64
    tokens_BT = np.zeros((len(requests), width), np.int32)
    for row, r, (new, _) in zip(tokens_BT, requests, rows, strict=True):
        row[: len(r.tokens) + len(new)] = [*r.tokens, *new]
    logits = np.asarray(full_logits(tokens_BT))
    for at, r, (new, logprobs) in zip(logits, requests, rows, strict=True):
        assert len(new) == r.max_new_tokens
        before = at[len(r.tokens) - 1 : len(r.tokens) - 1 + len(new)]
        assert new == before.argmax(-1).tolist(), f"prompt of {len(r.tokens)}"
        expected = before.max(-1) - np.log(np.exp(before - before.max(-1, keepdims=True)).sum(-1)) - before.max(-1)
        np.testing.assert_allclose(logprobs, expected, atol=atol)
