"""Random sampling settings, compared with the logits processors that transformers builds from the same settings.

    PYTHONPATH=.. python -m helpers.processors --count 10000      # in tests/; needs torch and transformers

Each row has random logits, a prompt, some new tokens and settings. Transformers computes in float64. A token on the
border of a cut may fall on either side of it, because this project sums float32: a row whose tokens differ must agree
with transformers for thresholds that are changed by a millionth, and is counted.

Letters: B rows, V vocab.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.ops import sampling
from llama_jax.sampling_params import SamplingParams

V, ROWS, PROMPT, NEW = 160, 250, 12, 3
STOPS = (3, 77)
NUDGE = 1e-6


def draw(rng):
    """Random settings. Each is off in half of the rows."""

    def maybe(value, off):
        return value if rng.random() < 0.5 else off

    ids = rng.permutation(V).tolist()
    return SamplingParams(
        temperature=maybe(float(np.exp(rng.uniform(-2, 1))), float(rng.choice([0, 1]))),
        top_k=maybe(int(rng.integers(1, 2 * V)), 0),
        top_p=maybe(float(rng.uniform(0.01, 1)), 1.0),
        min_p=maybe(float(rng.uniform(0, 1) ** 2), 0.0),
        typical_p=maybe(float(rng.uniform(0.01, 1)), 1.0),
        repetition_penalty=maybe(float(rng.uniform(0.5, 2)), 1.0),
        presence_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        frequency_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        min_tokens=maybe(int(rng.integers(1, 7)), 0),
        logit_bias=maybe({i: float(rng.normal(0, 5)) for i in ids[:5]}, {}),
        allowed_tokens=maybe(ids[5 : 5 + int(rng.integers(3, V - 25))], None),
        banned_tokens=maybe(ids[-int(rng.integers(1, 20)) :], ()),
    )


@jax.jit
def ours(logits_BV, state, new_BN):
    """The penalized logits, and the scaled ones that the cuts leave, after the new tokens."""
    for i in range(NEW):
        state = sampling.record(state, new_BN[:, i], jnp.ones(new_BN.shape[0], bool))
    control = state.controls
    penalized_BV = sampling.penalize(sampling.constrain(logits_BV, state), state)
    names = ("top_k_B", "top_p_B", "min_p_B", "typical_p_B")
    scaled_BV = sampling.scale(penalized_BV, jnp.where(control.temperature_B == 0, 1, control.temperature_B))
    return penalized_BV, sampling.cut(scaled_BV, **{name: getattr(control, name) for name in names})


def first_state(rows, prompts):
    """The state of rows whose prompts have been read."""
    seen_BV = np.zeros((len(rows), V), bool)
    np.put_along_axis(seen_BV, prompts, True, axis=1)
    return sampling.SamplingState(
        controls=jax.tree.map(jnp.asarray, sampling.controls(rows, [0] * len(rows))),
        seen_BV=jnp.asarray(seen_BV),
        counts_BV=jnp.zeros((len(rows), V), jnp.int32),
        bias_BV=jnp.asarray(np.stack([sampling.bias(params, V) for params in rows])),
        allowed_BW=jnp.zeros((len(rows), -(-V // 32)), jnp.uint32),
        stops_BN=jnp.asarray([STOPS] * len(rows), jnp.int32),
    )


def theirs(model, params, prompt, new, logits, nudge=(0, 0, 0)):
    """The scores of transformers for one row, float64 (V,). `nudge` changes top_p, min_p and typical_p."""
    import torch
    from transformers import GenerationConfig

    top_p, min_p, typical_p = (
        value if value in (0, 1) else min(max(value + sign * NUDGE, 0), 1)
        for value, sign in zip((params.top_p, params.min_p, params.typical_p), nudge, strict=True)
    )
    settings = GenerationConfig(
        num_beams=1,
        num_return_sequences=1,
        do_sample=params.temperature > 0,
        temperature=params.temperature or 1.0,
        top_k=params.top_k,
        top_p=top_p,
        min_p=min_p or None,
        typical_p=typical_p,
        repetition_penalty=params.repetition_penalty,
        min_new_tokens=params.min_tokens or None,
        sequence_bias={(i,): bias for i, bias in params.logit_bias.items()} or None,
        suppress_tokens=list(params.banned_tokens) or None,
        eos_token_id=list(STOPS),
    )
    settings._eos_token_tensor = torch.tensor(STOPS)
    counts = torch.from_numpy(np.bincount(new, minlength=V))

    def openai(ids, scores):  # transformers has no such penalties: the formula of OpenAI's guide
        return scores - counts * params.frequency_penalty - (counts > 0) * params.presence_penalty

    allowed = None if params.allowed_tokens is None else lambda batch, ids: list(params.allowed_tokens)
    processors = model._get_logits_processor(
        settings, input_ids_seq_length=PROMPT, prefix_allowed_tokens_fn=allowed, logits_processor=[openai], device="cpu"
    )
    ids = torch.tensor([[*prompt, *new]])
    return processors(ids, torch.from_numpy(logits.astype(np.float64))[None])[0].numpy()


def probabilities(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def compare(model, rng):
    """Compares one batch of rows. Returns the number of rows with a token on a border."""
    rows = [draw(rng) for _ in range(ROWS)]
    logits = (rng.normal(size=(ROWS, V)) * rng.uniform(0.5, 5, (ROWS, 1))).astype(np.float32)
    prompts, new = rng.integers(0, V, (ROWS, PROMPT)), rng.integers(0, V, (ROWS, NEW))
    penalized, kept = map(np.asarray, ours(logits, first_state(rows, prompts), new))
    borders = 0
    for i, params in enumerate(rows):
        expected = theirs(model, params, prompts[i], new[i], logits[i])
        if params.temperature == 0:
            assert penalized[i].argmax() == expected.argmax(), params
            continue
        result = probabilities(kept[i].astype(np.float64))
        if np.abs(result - probabilities(expected)).max() < 1e-5:
            continue
        borders += 1
        nudged = itertools.product((-1, 0, 1), repeat=3)
        others = (theirs(model, params, prompts[i], new[i], logits[i], nudge) for nudge in nudged)
        assert any(np.abs(result - probabilities(other)).max() < 1e-5 for other in others), params
    return borders


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.set_verbosity_error()

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, **small))
    rng = np.random.default_rng(options.seed)
    batches = -(-options.count // ROWS)
    borders = sum(compare(model, rng) for _ in range(batches))
    print(f"{batches * ROWS:,} settings agree; {borders} of them have a token on the border of a cut")


if __name__ == "__main__":
    main()
