"""JSON schemas in the words that llguidance knows: rewriting that changes no meaning.

llguidance implements most of JSON Schema and refuses the rest by name. Several of the words that it refuses can be said
with others, and some say nothing where they stand. What cannot be rewritten is left as it is, and is refused by name.

The meaning is that of draft 2020-12 (https://json-schema.org/draft/2020-12/json-schema-validation), in which `format`
is an annotation: an unknown format forbids nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from llama_jax.errors import ConfigError, brief

# Words whose value is a schema, a list of schemas, or schemas by name. All other values are data and stay as they are.
_ONE: tuple[str, ...] = ("additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then")
_ONE += ("unevaluatedItems", "unevaluatedProperties", "additionalItems", "contentSchema")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas")
_COUNTS: tuple[str, ...] = ("maxItems", "minItems", "maxLength", "minLength", "maxProperties", "minProperties")
_COUNTS += ("maxContains", "minContains")
# Words that apply other schemas to the same value. With one of these, more properties or items are evaluated.
_IN_PLACE = ("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas")
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
_DEEPEST = 200


def rewritten(schema: Any) -> Any:
    """The schema with the same meaning in fewer words.

    Raises:
        ConfigError: it is nested too deeply, or drafts differ about the meaning of a reference.
    """
    dynamic = _dynamic_anchors(schema, 0)
    declared = schema.get("$schema") if isinstance(schema, Mapping) else None
    if not (isinstance(declared, str) and "/draft/20" in declared):  # 2019-09 and later
        for reference in _references_beside_ids(schema):
            raise ConfigError(
                f"json_schema has $id beside the reference {brief(reference)}, which drafts read differently: name one "
                'by "$schema": "https://json-schema.org/draft/2020-12/schema", or leave $id out'
            )
    return _rewrite(schema, {name for name in dynamic if dynamic.count(name) == 1}, 0)


def _dynamic_anchors(value: Any, depth: int) -> list[str]:
    """The names of all dynamic anchors, as often as each occurs."""
    if depth > _DEEPEST:
        raise ConfigError(f"json_schema is nested more than {_DEEPEST} levels deep")
    if isinstance(value, Mapping):
        own = [name] if isinstance(name := value.get("$dynamicAnchor"), str) else []
        return own + [name for item in value.values() for name in _dynamic_anchors(item, depth + 1)]
    return [name for item in value for name in _dynamic_anchors(item, depth + 1)] if isinstance(value, list) else []


def _references_beside_ids(value: Any) -> Iterator[str]:
    """References to other addresses in schemas with an $id, which changes the address since draft 2019-09 only."""
    if isinstance(value, Mapping):
        reference = value.get("$ref")
        if isinstance(value.get("$id"), str) and isinstance(reference, str) and not reference.startswith("#"):
            yield reference
        for item in value.values():
            yield from _references_beside_ids(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references_beside_ids(item)


def _rewrite(schema: Any, single: set[str], depth: int) -> Any:
    if depth > _DEEPEST:
        raise ConfigError(f"json_schema is nested more than {_DEEPEST} levels deep")
    if not isinstance(schema, Mapping):
        return schema

    def inner(value: Any) -> Any:
        return _rewrite(value, single, depth + 1)

    new: dict[str, Any] = {}
    for word, value in schema.items():
        if word in _LISTS and isinstance(value, list):
            new[word] = [inner(item) for item in value]
        elif word in _NAMED and isinstance(value, Mapping):
            new[word] = {name: inner(item) for name, item in value.items()}
        elif word in _ONE:
            new[word] = inner(value)
        elif word in _COUNTS and isinstance(value, float) and value.is_integer():
            new[word] = int(value)
        else:
            new[word] = value
    _drop_empty(new)
    _dynamic(new, single)
    _unevaluated(new)
    more = _conditions(new)
    if more:
        new["allOf"] = [*new.get("allOf", []), *more]
    return new


def _drop_empty(schema: dict[str, Any]) -> None:
    """Removes words that forbid nothing where they stand.

    Beside `unevaluatedItems` and `unevaluatedProperties`, `contains` and `if` also decide what is evaluated.
    """
    free = not any(word in schema for word in ("unevaluatedItems", "unevaluatedProperties"))
    if "contains" not in schema:
        schema.pop("minContains", None)
        schema.pop("maxContains", None)
    elif free and schema.get("minContains") == 0 and "maxContains" not in schema:
        del schema["contains"], schema["minContains"]
    if "if" not in schema:
        schema.pop("then", None)
        schema.pop("else", None)
    elif free and schema.get("then", True) is True and schema.get("else", True) is True:
        for word in ("if", "then", "else"):
            schema.pop(word, None)
    for word, nothing in (("uniqueItems", False), ("propertyNames", True), ("not", False)):
        if schema.get(word) is nothing:
            del schema[word]
    for word in ("unevaluatedProperties", "unevaluatedItems"):
        if schema.get(word) is True or schema.get(word) == {}:
            del schema[word]
    if isinstance(schema.get("format"), str) and schema["format"] not in _FORMATS:
        del schema["format"]
    # An array of fewer than two items has no two that are equal.
    prefix = schema.get("prefixItems", [])
    most = schema.get("maxItems", len(prefix) if schema.get("items") is False and isinstance(prefix, list) else 2)
    if schema.get("uniqueItems") is True and isinstance(most, int) and most < 2:
        del schema["uniqueItems"]


def _dynamic(schema: dict[str, Any], single: set[str]) -> None:
    """A dynamic reference to an anchor that occurs once is a plain one."""
    name = schema.get("$dynamicAnchor")
    if name in single and "$anchor" not in schema:
        schema["$anchor"] = schema.pop("$dynamicAnchor")
    to = schema.get("$dynamicRef")
    if isinstance(to, str) and to.startswith("#") and to[1:] in single and "$ref" not in schema:
        schema["$ref"] = schema.pop("$dynamicRef")


def _unevaluated(schema: dict[str, Any]) -> None:
    """Without words that apply other schemas to the same value, what is not evaluated is what is additional."""
    if any(word in schema for word in _IN_PLACE):
        return
    if "unevaluatedProperties" in schema:
        value = schema.pop("unevaluatedProperties")
        schema.setdefault("additionalProperties", value)
    if "unevaluatedItems" in schema and "contains" not in schema:
        value = schema.pop("unevaluatedItems")
        listed = isinstance(schema.get("items"), list)  # before draft 2020-12
        schema.setdefault("additionalItems" if listed else "items", value)


def _conditions(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The words for dependencies and names of properties, as schemas that say the same in other words."""
    more: list[dict[str, Any]] = []
    for word in ("dependentRequired", "dependentSchemas", "dependencies"):
        value = schema.get(word)
        if isinstance(value, Mapping):
            del schema[word]
            for name, need in value.items():
                need = {"required": need} if isinstance(need, list) else need
                more.append({"anyOf": [{"properties": {name: False}}, need]})
    names = schema.get("propertyNames")
    pattern = _names_pattern(names)
    if pattern is not None:
        del schema["propertyNames"]
        more.append({"patternProperties": {pattern: True}, "additionalProperties": False})
    return more


def _names_pattern(names: Any) -> str | None:
    """The regular expression of names that a schema with no other words allows, or None."""
    if names is False or (isinstance(names, Mapping) and names.get("enum") == []):
        return "^[^\\s\\S]$"
    if not isinstance(names, Mapping):
        return None
    words = set(names) - {"type"}
    if names.get("type", "string") != "string":
        return None
    if words == {"pattern"}:
        return names["pattern"]
    listed = names.get("enum") if words == {"enum"} else [names["const"]] if words == {"const"} else None
    if listed is not None and all(isinstance(name, str) for name in listed):
        return f"^({'|'.join(re.escape(name) for name in listed)})$"
    if words and words <= {"minLength", "maxLength"}:
        return f"^[\\s\\S]{{{names.get('minLength', 0)},{names.get('maxLength', '')}}}$"
    return None
