"""Expressions from untrusted files: the matches of Python's `re`, in bounded time, or one line."""

import random
import re
import time

import pytest

from helpers.errors import refusal
from llama_jax.errors import ConfigError
from llama_jax.weights.formats import name_patterns
from llama_jax.weights.formats.name_patterns import full_matches

LAYERS = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1, 12) for p in "qk"]
NAMES = [*LAYERS, "lm_head", "aab", "a.b", "aaa"]
ATOMS = ["a", "b", ".", "q", r"\.", r"\d", r"\w", r"\S", "[ab]", "[^a]", "(a|b)", "(?:ab|a)", "(?P<x>l?)", "layers"]
ATOMS += ["^", "$", r"\b", r"\B", ".*", "[0-9]", r"[\w.]", "(a*)*", "(a|)+", r"\A", r"\Z"]
REPEATS = ["", "", "", "*", "+", "?", "{1,2}", "{0,3}", "*?", "+?", "{2}", "{3,}"]


def random_pattern(rng):
    pattern = "".join(rng.choice(ATOMS) + rng.choice(REPEATS) for _ in range(rng.randint(1, 6)))
    pattern = f"(?:{pattern}){rng.choice(REPEATS)}" if rng.random() < 0.3 else pattern
    return pattern + (f"|{rng.choice(ATOMS)}" if rng.random() < 0.3 else "")


def test_matches_are_those_of_re():
    compared, rng = 0, random.Random(0)
    for _ in range(6000):
        pattern = random_pattern(rng)
        try:
            expected = {name for name in NAMES if re.fullmatch(pattern, name)}
        except re.error:
            continue
        try:
            found = full_matches([pattern], NAMES, "here")[pattern]
        except ConfigError as error:
            assert "possessive" in str(error)  # a++
            continue
        assert found == expected, pattern
        compared += bool(expected)
    assert compared > 500


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?!.*lm_head).*_proj",
        r"^model(?=\.).*\.(q|v)_proj$",
        r".*(?=q_proj$).*",
        r"(?:(?!mlp|norm).)*",
        r"(.*\.)?(?=q|up)\w+",
        r"(?=.*self(?!_attn\.k)).*",
    ],
)
def test_lookahead_matches_as_in_re(pattern):
    assert full_matches([pattern], LAYERS, "here")[pattern] == {n for n in LAYERS if re.fullmatch(pattern, n)} != set()


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("(a)?(?(1)b|c)", "has a groupref exists, which is not supported"),
        ("(?>a+)b", "has a atomic group"),
        ("(?<=m)odel.*", "looks behind"),
        ("(?i:MODEL).*", "sets flags"),
        ("(", "is not a regular expression"),
        ("(" * 900 + ")" * 900, "is not a regular expression: it is nested too deeply"),
        ("((((.{0,90}){0,90}){0,90}){0,90}){0,90}z", "takes too many steps"),
        ("(.*.*.*.*.*.*.*.*.*.*x)*" * 20, "takes too many steps"),
    ],
)
def test_what_is_not_regular_or_takes_too_long_is_refused_in_one_line(monkeypatch, pattern, words):
    monkeypatch.setattr(name_patterns, "_MAX_STEPS", 2_000)
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=words) as error:
        full_matches([pattern], LAYERS, "here")
    assert "here: " in refusal(error) and time.perf_counter() - start < 10


def test_expressions_that_backtracking_takes_ages_for_are_matched():
    for pattern in ("([a-z_]+)+!", "(a|a)*(a|a)*b", "(([a-z]+.?)+)+[0-9]", "(.|.)*(.|.)*x", "(x?){2000000000}y"):
        assert full_matches([pattern], LAYERS, "here") == {pattern: set()}
    assert full_matches([r"((model|layers|\d+|[a-z_]+)\.?)+"], LAYERS, "here").popitem()[1] == set(LAYERS)
