"""Rewritten schemas mean what they meant: jsonschema, which knows every word, decides alike for every instance."""

import itertools

import jsonschema
import pytest

from llama_jax.errors import ConfigError
from llama_jax.infer.schema import rewritten

OBJECTS = [dict(zip(names, (1, "x", 2), strict=False)) for n in range(4) for names in itertools.permutations("abc", n)]
ARRAYS = [list(items) for n in range(4) for items in itertools.product([1, "x"], repeat=n)]
INSTANCES = [*OBJECTS, *ARRAYS, {"abcd": 1}, {"": 1}, {"a": "x"}, {"a": {"a": 1, "z": 2}}, 1, 2.5, "x", "", None, True]


def decides(schema):
    validator = jsonschema.Draft202012Validator(schema)
    return [validator.is_valid(instance) for instance in INSTANCES]


@pytest.mark.parametrize(
    ("schema", "gone"),
    [
        ({"maxItems": 2.0, "minLength": 1.0, "maxProperties": 1.0}, "."),
        ({"minContains": 2, "maxContains": 3}, "Contains"),
        ({"contains": {"type": "string"}, "minContains": 0}, "ontains"),
        ({"if": {"type": "string"}}, "if"),
        ({"then": {"type": "string"}, "else": False}, "then"),
        ({"uniqueItems": False, "propertyNames": True, "not": False}, "uniqueItems"),
        ({"uniqueItems": True, "maxItems": 1}, "uniqueItems"),
        ({"uniqueItems": True, "prefixItems": [{}], "items": False}, "uniqueItems"),
        ({"unevaluatedProperties": {}, "unevaluatedItems": True}, "unevaluated"),
        ({"properties": {"a": {}}, "unevaluatedProperties": False}, "unevaluated"),
        ({"patternProperties": {"^a": {}}, "unevaluatedProperties": {"type": "integer"}}, "unevaluated"),
        ({"additionalProperties": {"type": "string"}, "unevaluatedProperties": False}, "unevaluated"),
        ({"prefixItems": [{"type": "integer"}], "unevaluatedItems": {"type": "string"}}, "unevaluated"),
        ({"unevaluatedItems": {"type": "string"}}, "unevaluated"),
        ({"dependentRequired": {"a": ["b"], "b": ["c"]}}, "dependent"),
        ({"dependentSchemas": {"a": {"properties": {"b": {"type": "string"}}, "maxProperties": 2}}}, "dependent"),
        ({"allOf": [{"required": ["a"]}], "dependentRequired": {"a": ["c"]}}, "dependent"),
        ({"propertyNames": {"pattern": "^[ab]$"}}, "propertyNames"),
        ({"propertyNames": {"maxLength": 3, "minLength": 1}}, "propertyNames"),
        ({"propertyNames": {"enum": ["a", "abcd"]}, "maxProperties": 1}, "propertyNames"),
        ({"propertyNames": {"const": "a"}, "properties": {"a": {"type": "integer"}}}, "propertyNames"),
        ({"propertyNames": False}, "propertyNames"),
        ({"propertyNames": {"enum": []}}, "propertyNames"),
        (
            {"$dynamicAnchor": "n", "properties": {"a": {"anyOf": [{"type": "integer"}, {"$dynamicRef": "#n"}]}}},
            "dynamic",
        ),
        ({"properties": {"a": {"uniqueItems": False}}, "items": {"if": {}}, "anyOf": [{"not": False}]}, "not"),
    ],
    ids=str,
)
def test_words_are_replaced_and_mean_the_same(schema, gone):
    new = rewritten(schema)
    assert gone not in str(new)
    assert decides(new) == decides(schema)
    assert len(set(decides(schema))) == 2 or decides(schema) == [True] * len(INSTANCES)


@pytest.mark.parametrize(
    "schema",
    [
        {"not": {"type": "string"}},
        {"contains": {"type": "string"}},
        {"contains": {}, "unevaluatedItems": False},
        {"contains": {"type": "string"}, "minContains": 0, "unevaluatedItems": False},
        {"if": {"properties": {"a": {}}}, "unevaluatedProperties": False},
        {"uniqueItems": True},
        {"propertyNames": {"pattern": "a", "maxLength": 3}},
        {"allOf": [{"properties": {"a": {}}}], "unevaluatedProperties": False},
        {"if": {"type": "string"}, "then": {"maxLength": 1}, "else": {"type": "object"}},
        {
            "$defs": {"x": {"$dynamicAnchor": "n"}, "y": {"$dynamicAnchor": "n"}},
            "properties": {"a": {"$dynamicRef": "#n"}},
        },
        {"enum": [{"minContains": 1}, {"if": 1}], "const": {"uniqueItems": False}, "default": {"format": "z"}},
        True,
        False,
    ],
    ids=str,
)
def test_what_cannot_be_said_in_other_words_and_what_is_data_stay(schema):
    assert rewritten(schema) == schema


def test_a_format_that_nobody_knows_is_an_annotation():
    assert rewritten({"format": "zip-code", "type": "string"}) == {"type": "string"}
    assert rewritten({"format": "date"}) == {"format": "date"}


def test_items_after_a_list_of_items_are_additional_ones():
    schema = {"items": [{"type": "string"}], "unevaluatedItems": False}
    assert rewritten(schema) == {"items": [{"type": "string"}], "additionalItems": False}


def test_a_reference_that_drafts_read_differently_is_refused_without_a_draft():
    schema = {"$defs": {"a": {"$id": "b/", "$ref": "c"}}}
    with pytest.raises(ConfigError, match=r"\$id beside the reference 'c'"):
        rewritten(schema)
    for good in ({"$schema": "https://json-schema.org/draft/2020-12/schema"}, {"$id": "x", "$ref": "#/$defs/a"}):
        rewritten({**schema, **good} if "$schema" in good else good)


def test_a_schema_that_is_nested_too_deeply_is_refused():
    schema = {}
    for _ in range(300):
        schema = {"items": schema}
    with pytest.raises(ConfigError, match="nested more than 200 levels"):
        rewritten(schema)
