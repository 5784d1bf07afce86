"""Tool calls in the text of an answer, parsed into OpenAI's schema.

Models write calls in several forms, and a chat template does not say which one its model uses. These forms are read:

    {"name": "f", "parameters": {...}}                      Llama 3.1 and later; also "arguments", also several, a list
    <function=f>{...}</function>                            Llama 3.1, as its documents suggest for custom functions
    brave_search.call(query="...")                          Llama 3.1's built-in tools
    <tool_call>{"name": "f", "arguments": {...}}</tool_call>        Hermes, Qwen, SmolLM2; also with a list inside
    <TOOLCALL>[...]</TOOLCALL>, <|tool_call|>[...]          Nemotron, Granite
    [TOOL_CALLS] [{"name": "f", "arguments": {...}}]        Mistral; also [TOOL_CALLS]f[ARGS]{...}, [TOOL_CALLS]f{...}
    ... function<｜tool▁sep｜>f ```json {...} ``` ...         DeepSeek

Text that does not consist of calls alone remains content.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.text.messages import QUERY_TOOLS, arguments_of

_QUERY_CALL = re.compile(rf'({"|".join(QUERY_TOOLS)})\.call\(query="(.*)"\)', re.DOTALL)
_FUNCTION_TAG = re.compile(r"<function=([^<>{}]+)>(\{.*\})(?:</function>)?", re.DOTALL)
_TAGS = {"<tool_call>": "</tool_call>", "<TOOLCALL>": "</TOOLCALL>", "<|tool_call|>": "", "[TOOL_CALLS]": ""}
_OPENING = re.compile("|".join(map(re.escape, _TAGS)))
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")
_DEEPSEEK = re.compile(
    r"<｜tool▁call▁begin｜>function<｜tool▁sep｜>([^\n]+)\n```json\n(.*?)\n```\s*<｜tool▁call▁end｜>", re.DOTALL
)
_DEEPSEEK_BEGIN = "<｜tool▁calls▁begin｜>"


def parse(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Splits the text of an answer, in which control tokens are written as their names, into content and tool calls.

    Without calls the content is the whole text. With calls it is the text before the first one.
    """
    if calls := whole_calls(text):
        return "", calls
    if match := _OPENING.search(text):
        if calls := _tagged_calls(text[match.start() :]):
            return text[: match.start()], calls
    if _DEEPSEEK_BEGIN in text:
        before, _, after = text.partition(_DEEPSEEK_BEGIN)
        named = [(m[1], _json_values(m[2])) for m in _DEEPSEEK.finditer(after)]
        if named and all(len(values) == 1 and isinstance(values[0], dict) for _, values in named):
            return before, [call(name.strip(), values[0]) for name, values in named]
    return text, []


def whole_calls(text: str) -> list[dict[str, Any]]:
    """The calls of a text that consists of calls only, in Llama 3.1's form; [] for any other text."""
    text = text.strip()
    if match := _QUERY_CALL.fullmatch(text):
        return [call(match[1], {"query": match[2]})]
    if match := _FUNCTION_TAG.fullmatch(text):
        values = _json_values(match[2])
        return [call(match[1].strip(), values[0])] if len(values) == 1 and isinstance(values[0], dict) else []
    values = _json_values(text)
    return _calls_of(values) if all(isinstance(value, dict) for value in values) else []


def call(name: str, arguments: Mapping[str, Any], id: str | None = None) -> dict[str, Any]:
    """One call in OpenAI's shape, with an id if the model gave it one."""
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {**({"id": id} if id else {}), "type": "function", "function": function}


def with_ids(calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The calls, each with an id of nine letters or digits, as Mistral's templates require."""

    def own(number: int, call: Mapping[str, Any]) -> str:
        written = json.dumps([number, call["function"]])
        return hashlib.sha256(written.encode()).hexdigest()[:9]

    return [{"id": own(number, call), **call} for number, call in enumerate(calls)]


def same(parsed: Mapping[str, Any], message: Mapping[str, Any]) -> bool:
    """True if a message has the content and the calls of a parsed answer, so that it was not edited."""
    content = message.get("content") or ""
    return (parsed["content"] or "") == content and _calls_in(parsed) == _calls_in(message)


def _json_values(text: str) -> list[Any]:
    """The JSON objects and lists of a text that has only these, separated by space or ';'; otherwise [].

    Llama 3.1 writes several calls in a row with either separator, though Meta documents only single calls.
    """
    decoder, values, at = json.JSONDecoder(), [], 0
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        if not isinstance(value, dict | list):
            return []
        values.append(value)
        at += len(text) - at - len(text[at:].lstrip(" \t\r\n;"))
    return values


def _tagged_calls(text: str) -> list[dict[str, Any]]:
    """The calls of a text that consists only of tagged calls, or []."""
    calls: list[dict[str, Any]] = []
    text = text.strip()
    while text:
        match = _OPENING.match(text)
        if match is None:
            return []
        body, text = text[match.end() :], ""
        if closing := _TAGS[match[0]]:
            body, _, text = body.partition(closing)
        elif match[0] == "[TOOL_CALLS]" and "[TOOL_CALLS]" in body:
            body, _, text = body.partition("[TOOL_CALLS]")
            text = "[TOOL_CALLS]" + text
        named = _NAMED.match(body)
        values = _json_values(body[named.end() :].strip() if named else body.strip())
        if named and len(values) == 1 and isinstance(values[0], dict):
            values = [{"name": named[1], "arguments": values[0]}]
        own = _calls_of(values)
        if not own:
            return []
        calls += own
        text = text.strip()
    return calls


def _calls_of(values: list[Any]) -> list[dict[str, Any]]:
    """Converts JSON values to calls; [] if one of them is not a call."""
    calls = []
    for item in [item for value in values for item in (value if isinstance(value, list) else [value])]:
        if not isinstance(item, dict):
            return []
        function = item["function"] if isinstance(item.get("function"), dict) else item
        name, arguments = function.get("name"), function.get("parameters", arguments_of(function))
        if item.get("type", "function") != "function" or not isinstance(name, str) or not isinstance(arguments, dict):
            return []
        if "parameters" not in function and "arguments" not in function:
            return []
        calls.append(call(name, arguments, item["id"] if isinstance(item.get("id"), str) else None))
    return calls


def _calls_in(message: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    calls = message.get("tool_calls") or []
    functions = [c.get("function", c) if isinstance(c, Mapping) else {} for c in calls]
    return [(function.get("name"), arguments_of(function)) for function in functions]
