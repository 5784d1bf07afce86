"""The settings against a numpy restatement of Hugging Face's logits processors, and against these (golden file).

Letters: B batch, V vocab.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import ConfigError
from llama_jax.ops import sampling
from llama_jax.sampling_params import SamplingParams

V = 64
sample = jax.jit(sampling.sample)


def reference_penalty(logits, seen, penalty):
    return np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def reference_probs(logits, params, seen=None):
    """The distribution that transformers' processors leave of one row."""
    x = np.asarray(logits, np.float64)
    if seen is not None:
        x = reference_penalty(x, seen, params.repetition_penalty)
    x = x / params.temperature
    if params.top_k:
        x = np.where(x < np.sort(x)[-min(params.top_k, len(x))], -np.inf, x)
    if params.top_p < 1:
        order = np.argsort(x, kind="stable")
        remove = np.cumsum(softmax(x[order])) <= 1 - params.top_p
        remove[-1] = False
        x = np.where(np.isin(np.arange(len(x)), order[remove]), -np.inf, x)
    if params.min_p:
        p = softmax(x)
        x = np.where(p < params.min_p * p.max(), -np.inf, x)
    if params.typical_p < 1:
        p = softmax(x)
        entropy = -np.nansum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0))
        surprise = np.abs(np.where(p > 0, -np.log(np.maximum(p, 1e-300)), np.inf) - entropy)
        order = np.argsort(surprise, kind="stable")
        last = min((np.cumsum(p[order]) < params.typical_p).sum(), len(x) - 1)
        x = np.where(surprise > surprise[order[last]], -np.inf, x)
    return softmax(x)


def kept(logits_BV, rows):
    control = sampling.controls(rows, [0] * len(rows))
    names = ("top_k_B", "top_p_B", "min_p_B", "typical_p_B")
    scaled = sampling.scale(logits_BV, control.temperature_B)
    return np.asarray(sampling.cut(scaled, **{name: getattr(control, name) for name in names}))


def state(rows, seeds, V, *, seen=None, counts=None, stops=(), allowed=None):
    """The sampling state of rows over V tokens."""
    B = len(rows)
    words = np.zeros((B, -(-V // 32)), np.uint32)
    for token in () if allowed is None else allowed:
        words[:, token // 32] |= np.uint32(1 << token % 32)
    return sampling.SamplingState(
        controls=sampling.controls(rows, seeds, masked=[allowed is not None] * B),
        seen_BV=jnp.broadcast_to(jnp.zeros(V, bool) if seen is None else jnp.asarray(seen), (B, V)),
        counts_BV=jnp.broadcast_to(jnp.zeros(V, jnp.int32) if counts is None else jnp.asarray(counts), (B, V)),
        bias_BV=jnp.asarray(np.stack([sampling.bias(params, V) for params in rows])),
        allowed_BW=jnp.asarray(words),
        stops_BN=jnp.asarray([[*stops, -1]] * B, jnp.int32),
    )


def adjusted(logits, params, **of_state):
    given = state([params], [0], len(logits), **of_state)
    return np.asarray(sampling.penalize(sampling.constrain(jnp.asarray(logits)[None], given), given))[0]


def draws(logits, params, count, *, seen=None):
    tokens, logprobs = sample(
        jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits))),
        state([params] * count, range(count), len(logits), seen=seen),
        jnp.full(count, 7, jnp.int32),
    )
    return np.asarray(tokens), np.asarray(logprobs)


SETTINGS = [
    SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m, typical_p=y)
    for t in (0.3, 1.0, 1.7)
    for k in (0, 1, 5, 64, 1000)
    for p in (0.05, 0.5, 0.9, 0.999, 1.0)
    for m in (0.0, 0.1, 1.0)
    for y in (0.2, 0.7, 1.0)
]


def test_the_cuts_leave_hugging_faces_distribution_for_every_setting_in_one_mixed_batch():
    logits = np.random.default_rng(0).normal(size=(len(SETTINGS), V)).astype(np.float32) * 3
    probs = np.asarray(jax.nn.softmax(kept(logits, SETTINGS), axis=-1))
    for row, params, p in zip(logits, SETTINGS, probs, strict=True):
        np.testing.assert_allclose(p, reference_probs(row, params), atol=2e-6, err_msg=str(params))


def test_the_cuts_agree_on_a_vocabulary_of_128256():
    logits = np.random.default_rng(1).normal(size=(2, 128_256)).astype(np.float32) * 2
    rows = [SamplingParams(temperature=0.7, top_k=50, top_p=0.95), SamplingParams(temperature=1.0, top_p=0.8)]
    for row, params, cut in zip(logits, rows, kept(logits, rows), strict=True):
        expected = reference_probs(row, params) > 0
        # A border that two orders of summing 128,256 float32 numbers put one or two tokens apart.
        assert abs(np.isfinite(cut).sum() - expected.sum()) <= 2


def test_equal_logits_at_the_border_are_all_kept():
    logits = np.array([[3.0, 2.0, 2.0, 2.0, 1.0]], np.float32)
    assert np.isfinite(kept(logits, [SamplingParams(temperature=1.0, top_k=2, top_p=1.0)])).sum() == 4
    assert np.isfinite(kept(logits, [SamplingParams(temperature=1.0, top_p=0.6)])).sum() == 4


def test_the_token_that_crosses_top_p_is_kept():
    logits = np.log(np.array([[0.5, 0.3, 0.2]], np.float32))
    for top_p, count in ((0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3)):
        assert np.isfinite(kept(logits, [SamplingParams(temperature=1.0, top_p=top_p)])).sum() == count


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, top_p=1.0),
        SamplingParams(temperature=1.6, top_k=6, top_p=0.95),
        SamplingParams(temperature=1.8, top_p=0.9, min_p=0.05),
        SamplingParams(temperature=1.0, top_p=1.0, repetition_penalty=1.8),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params):
    rng = np.random.default_rng(3)
    logits, seen = rng.normal(size=16).astype(np.float32) * 1.5, rng.random(16) < 0.4
    count = 20_000
    tokens, _ = draws(logits, params, count, seen=seen)
    expected = reference_probs(logits, params, seen) * count
    observed = np.bincount(tokens, minlength=16)
    assert observed[expected == 0].sum() == 0
    likely = expected > 0
    chi_square = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
    degrees = likely.sum() - 1
    assert degrees >= 3
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)  # four deviations


def test_greedy_rows_take_the_likeliest_token_beside_rows_that_draw():
    logits = np.random.default_rng(4).normal(size=(6, V)).astype(np.float32)
    rows = [SamplingParams(temperature=0.0, top_k=3, top_p=0.1), SamplingParams(temperature=5.0, top_p=1.0)] * 3
    tokens, logprobs = sampling.sample(jnp.asarray(logits), state(rows, range(6), V), jnp.zeros(6, jnp.int32))
    assert (np.asarray(tokens)[::2] == logits.argmax(-1)[::2]).all()
    assert (np.asarray(tokens)[1::2] != logits.argmax(-1)[1::2]).any()
    for row, token, logprob in zip(logits, tokens, logprobs, strict=True):
        assert logprob == pytest.approx(np.log(softmax(row.astype(np.float64)))[token], abs=1e-5)


def test_the_penalty_is_hugging_faces_and_greedy_rows_obey_it():
    logits = np.array([2.0, 1.5, -1.0], np.float32)
    seen = np.array([True, False, True])
    np.testing.assert_allclose(adjusted(logits, SamplingParams(repetition_penalty=2.0), seen=seen), [1.0, 1.5, -2.0])
    tokens, logprobs = draws(logits, SamplingParams(temperature=0.0, repetition_penalty=2.0), 1, seen=seen)
    assert tokens[0] == 1
    assert logprobs[0] == pytest.approx(np.log(softmax(logits)[1]), abs=1e-6)  # of the model, not of the penalty


def test_a_tiny_temperature_is_greedy_and_nothing_overflows():
    logits = np.random.default_rng(5).normal(size=V).astype(np.float32) * 50
    tokens, logprobs = draws(logits, SamplingParams(temperature=1e-30, top_k=9, top_p=0.9, min_p=0.1), 32)
    assert (tokens == logits.argmax()).all() and np.isfinite(logprobs).all()


def test_noise_depends_on_seed_and_position_only():
    logits = np.zeros((3, V), np.float32)
    params = SamplingParams(temperature=1.0, top_p=1.0)

    def tokens(seeds, positions):
        out, _ = sample(jnp.asarray(logits[: len(seeds)]), state([params] * len(seeds), seeds, V), jnp.array(positions))
        return out.tolist()

    three = tokens([1, 2, 3], [10, 11, 12])
    assert [tokens([s], [p])[0] for s, p in ((1, 10), (2, 11), (3, 12))] == three
    assert len({tokens([1], [p])[0] for p in range(40)}) > 15
    assert len({tokens([s], [0])[0] for s in range(40)}) > 15


def test_presence_and_frequency_penalties_are_those_of_the_openai_api():
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, as its guide to advanced usage defines them."""
    logits = np.array([2.0, 1.0, 0.0, -1.0], np.float32)
    counts = np.array([0, 1, 3, 0])
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    np.testing.assert_allclose(adjusted(logits, params, counts=counts), [2.0, 0.25, -1.25, -1.0])


def test_bias_and_lists_of_tokens_decide_what_may_be_sampled():
    logits = np.array([2.0, 1.0, 0.0, -1.0], np.float32)
    bias = SamplingParams(logit_bias={1: 3.0, "2": -float("inf")}, banned_tokens=[0])
    np.testing.assert_allclose(adjusted(logits, bias), [-np.inf, 4.0, -np.inf, -1.0])
    allowed = SamplingParams(allowed_tokens=[1, 3], logit_bias={3: 1.0})
    np.testing.assert_allclose(adjusted(logits, allowed), [-np.inf, 1.0, -np.inf, 0.0])


def test_a_grammar_masks_all_but_its_tokens():
    logits = np.arange(70, dtype=np.float32)
    out = adjusted(logits, SamplingParams(), allowed=[0, 31, 32, 69])
    assert np.flatnonzero(np.isfinite(out)).tolist() == [0, 31, 32, 69]


def test_numbers_of_numpy_are_settings():
    given = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), logit_bias={np.int32(2): np.float32(1)})
    assert repr(given) == repr(SamplingParams(temperature=0.5, top_k=3, logit_bias={2: 1.0}))


def test_no_stop_token_comes_before_min_tokens():
    logits = jnp.asarray([[0.0, 5.0, 4.0, 3.0]])
    now = state([SamplingParams(temperature=0.0, min_tokens=2)], [0], 4, stops=(1, 2))
    tokens = []
    for position in range(4):
        token_B, _ = sample(logits, now, jnp.array([position]))
        now = sampling.record(now, token_B, jnp.array([True]))
        tokens.append(int(token_B[0]))
    assert tokens == [3, 3, 1, 1]
    assert now.counts_BV.tolist() == [[0, 2, 0, 2]] and now.seen_BV.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": float("nan")},
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"temperature": 1e39},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_k": True},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"typical_p": 0.0},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": "much"},
        {"min_tokens": -1},
        {"banned_tokens": "text"},
        {"allowed_tokens": [-1]},
    ],
    ids=str,
)
def test_an_absurd_setting_is_refused_by_name(bad):
    (name,) = bad
    with pytest.raises(ConfigError, match=f"^{name} must be .*got"):
        SamplingParams(**bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"allowed_tokens": []}, "allowed_tokens is empty"),
        ({"allowed_tokens": [1, 2], "banned_tokens": [2, 1]}, "no token could be sampled"),
        ({"logit_bias": [1]}, "logit_bias must be numbers by token id"),
        ({"logit_bias": {"x": 1}}, "logit_bias names 'x'"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias of token 3 must be a finite number or -inf"),
    ],
    ids=str,
)
def test_an_absurd_list_of_tokens_is_refused(bad, message):
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**bad)
