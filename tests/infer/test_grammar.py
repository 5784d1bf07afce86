"""Constrained outputs: everything that is produced parses, under any settings, with neighbors that are free."""

import functools
import json
import re
import time

import jax
import jsonschema
import numpy as np
import pytest

from helpers.inference import CONFIG
from helpers.tokenizers import byte_tokenizer
from llama_jax.cli import sampling_flags
from llama_jax.errors import ConfigError
from llama_jax.infer.grammar import Constraint, Grammars, _lark
from llama_jax.infer.llama import Llama
from llama_jax.params import init_params

pytest.importorskip("llguidance", reason="constrained decoding is an extra: pip install llguidance")

SCHEMAS = [
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 12}}, "required": ["a"]},
    {"enum": ["red", "green", 7, None]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"type": "string", "pattern": "^[a-c]{2,4}$"},
    {"anyOf": [{"const": {"x": 1}}, {"type": "string", "maxLength": 5}]},
    {
        "type": "object",
        "properties": {"kind": {"const": "point"}, "at": {"$ref": "#/$defs/pair"}},
        "required": ["kind", "at"],
        "additionalProperties": False,
        "$defs": {"pair": {"type": "array", "prefixItems": [{"type": "number"}, {"type": "number"}], "items": False}},
    },
]


@functools.cache
def llama():
    """A model of noise: whatever parses does so because of the mask."""
    return Llama(CONFIG, init_params(CONFIG, jax.random.key(0)), byte_tokenizer())


def test_every_output_of_a_schema_validates_or_says_that_it_was_cut():
    prompts = ["x"] * len(SCHEMAS) * 3
    overrides = [
        {"json_schema": schema, "temperature": t, "repetition_penalty": p}
        for schema in SCHEMAS
        for t, p in ((0.0, 1.0), (1.0, 1.0), (1.5, 1.3))
    ]
    results = llama().generate(prompts, overrides=overrides, max_new_tokens=60, top_p=1.0)
    whole = 0
    for own, result in zip(overrides, results, strict=True):
        if result.finish_reason == "stop":
            jsonschema.validate(json.loads(result.text), own["json_schema"])
            whole += 1
        else:
            assert len(result.tokens) == 60
    assert whole >= 9


@pytest.mark.parametrize("text", ["\n" * 10**6, " " * 10**6, "a\n" * 500_000, "a" * 10**6])
def test_a_long_text_is_looked_through_once_for_rules(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    assert _lark(text) == text
    with pytest.raises((ConfigError, OSError)):
        sampling_flags._grammar(text + ".")  # no rule: the name of a file
    assert time.perf_counter() - start < 5


def test_expressions_choices_and_grammars_hold_beside_free_rows():
    choices = ["yes!", "no (never)", "a.b|c", "é\n_"]
    overrides = [
        {"regex": r"[0-9]{4}-[0-9]{2}"},
        {},
        {"choices": choices, "seed": 4},
        {"grammar": 'start: "(" start ")" | "x"'},
        {},
        {"grammar": 'root ::= "(" root ")" | "x"  # the same in GBNF'},
    ]
    overrides = [{k: v for k, v in own.items() if k != "seed"} for own in overrides]
    options = {"max_new_tokens": 12, "temperature": 1.2, "top_p": 1.0, "top_logprobs": 1}
    results = llama().generate(["x"] * 6, overrides=overrides, seed=3, **options)
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}", results[0].text)
    assert results[2].text in choices
    for i in (3, 5):
        assert results[i].finish_reason == "length" or re.fullmatch(r"\(*x\)*", results[i].text)
    for i in (1, 4):
        assert results[i].tokens == llama().generate("x", seed=3 + i, **options).tokens


def test_choices_may_have_any_character():
    import llguidance

    tokenizer = llguidance.LLTokenizer("byte")
    choices = [f"a{chr(i)}b" for i in range(128)] + ["<yes>", "é_\n"]
    text = llguidance.LLMatcher.grammar_from_regex(Constraint.make("choices", choices).text)
    for choice in [*choices, "yes"]:
        matcher, data = llguidance.LLMatcher(tokenizer, text, log_level=0), list(choice.encode())
        taken = matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()
        assert taken == (choice in choices) and not matcher.is_error(), (choice, matcher.get_error())


def test_a_schema_that_allows_everything_changes_no_greedy_text():
    anything = r"(?s:.*)"
    plain = llama().generate("x", max_new_tokens=16, temperature=0, allowed_tokens=range(97, 123))
    free = llama().generate("x", max_new_tokens=16, temperature=0, allowed_tokens=range(97, 123), regex=anything)
    assert free.tokens == plain.tokens


def test_a_mask_has_a_bit_for_each_token_that_may_come_next():
    tokenizer = byte_tokenizer()
    grammars = Grammars(tokenizer, 600, tokenizer.stop_tokens)
    matcher = grammars.matcher(Constraint.make("regex", "ab?"))

    def allowed():
        bits = (matcher.mask()[:, None] >> np.arange(32, dtype=np.uint32)) & 1
        return np.flatnonzero(bits.reshape(-1)).tolist()

    assert allowed() == [ord("a")]
    matcher.consume([ord("a")])
    assert set(allowed()) >= {ord("b")} and set(allowed()) - {ord("b")} <= set(tokenizer.stop_tokens)
    assert set(allowed()) & set(tokenizer.stop_tokens)
    with pytest.raises(ValueError, match="does not match its grammar"):
        matcher.consume([ord("z")])


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("json_schema", 7, "json_schema must be a JSON schema"),
        ("json_schema", "[", "json_schema is not JSON"),
        ("json_schema", {"a": {1}}, "json_schema is not JSON"),
        ("choices", "abc", "choices must be a list of texts"),
        ("choices", ["a", ""], "none of them empty"),
        ("regex", "", "regex must be a text that is not empty"),
        ("grammar", None, "grammar must be a text"),
        ("regex", "a" * 1_000_001, "at most 1,000,000"),
    ],
)
def test_a_constraint_of_another_kind_is_refused(kind, value, message):
    with pytest.raises(ConfigError, match=message):
        Constraint.make(kind, value)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "boolean"}},
                "required": [key],
                "additionalProperties": False,
            },
        },
    }
    for name, key in (("switch", "on"), ("lock", "shut"))
]


def test_a_required_tool_call_has_a_name_and_arguments_of_its_schema():
    dialog = [{"role": "user", "content": "x"}]
    how = {"max_new_tokens": 120, "temperature": 1.0, "top_p": 1.0, "stop_tokens": [byte_tokenizer().eot_id]}
    how["logit_bias"] = dict.fromkeys([9, 10, 13, 32], -20.0)  # else the noise writes spaces until the limit
    for choice in ("required", "lock"):
        result = llama().chat(dialog, tools=TOOLS, tool_choice=choice, **how)
        assert result.finish_reason == "stop"
        (call,) = result.message["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        key = {"switch": "on", "lock": "shut"}[call["function"]["name"]]
        assert arguments[key] in (True, False) and (choice == "required" or call["function"]["name"] == choice)
    for choice, tools in (("lokc", TOOLS), ("required", None)):
        with pytest.raises(ConfigError, match="tool_choice (must be|needs)"):
            llama().chat(dialog, tools=tools, tool_choice=choice)


def test_a_constraint_needs_a_stop_token():
    with pytest.raises(ConfigError, match="needs a stop token"):
        llama().generate("x", regex="a", ignore_eos=True)
