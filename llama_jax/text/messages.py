"""Messages and tools of a dialog in OpenAI's shape: their checks, and their conversion to the input of a chat format.

`plain_messages` is for chat templates. `parse_messages` and `parse_tools` are for Meta's reference format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_jax.errors import brief, nearest

HEADER_OF_ROLE = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "ipython",
    "ipython": "ipython",
}
QUERY_TOOLS = ("brave_search", "wolfram_alpha", "photogen")
CODE_TOOL = "code_interpreter"
BUILTIN_TOOLS = (*QUERY_TOOLS, CODE_TOOL)

Messages = Sequence[Mapping[str, Any]]

# Names under which a message's reasoning is published. Templates read the first; transformers copies the others to it.
REASONING = ("reasoning_content", "thinking", "reasoning")
_OURS = ("tokens", "stop")  # keys of messages that Llama.chat returns


def check_list(messages: Any) -> Messages:
    """Returns the messages. ValueError unless they are a list of at least one dict."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(
            f"messages must be a list of dicts such as {{'role': 'user', 'content': 'Hi'}}, got {show(messages)}"
        )
    if not messages:
        raise ValueError("messages is empty; a dialog has at least one message, {'role': 'user', 'content': ...}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{index}] must be a dict with 'role' and 'content', got {show(message)}")
    return messages


def check_tools(tools: Any) -> Sequence[Any]:
    """Returns the tools, an empty list for None. ValueError unless they are a list of dicts and strings."""
    if tools is None:
        return ()
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise ValueError(f"tools must be a list of function schemas and built-in names, got {show(tools)}")
    for index, tool in enumerate(tools):
        if not isinstance(tool, str | Mapping):
            raise ValueError(
                f"tools[{index}] must be {{'type': 'function', 'function': {{'name', 'description', 'parameters'}}}} "
                f"or the name of a built-in tool, got {show(tool)}"
            )
    return tools


def check_reasoning(messages: Messages, learn: Sequence[bool] | None, source: str = "") -> None:
    """Checks that a chat format writes the reasoning that is to be learned.

    Args:
        messages: the dialog.
        learn: one flag for each message, or None if all are learned.
        source: the chat template. Meta's reference format writes no reasoning.

    Raises:
        ValueError: a message has reasoning, and the format leaves it out.
    """
    if any(key in source for key in REASONING):
        return
    for index, message in enumerate(messages):
        key = next((key for key in REASONING if message.get(key)), None)
        if key and (learn is None or any(learn[index : index + 1])):
            raise ValueError(
                f"messages[{index}]: {key!r} is not written by the chat format of the model, which would learn to "
                "answer without it: put it into 'content' (between <think> and </think>, for example), remove it, or "
                "set data.chat_format to a template that writes it"
            )


def check_written(calls: Sequence[Any], text: str, what: str) -> None:
    """Checks that a rendering has the names of some calls or tools. Built-in tools are not looked for.

    Args:
        calls: calls or tools in OpenAI's shape.
        text: the part of the rendering that must have them.
        what: the beginning of the error message, such as "tools: the tool".

    Raises:
        ValueError: a name is not in the text.
    """
    functions = (call.get("function", call) for call in calls if isinstance(call, Mapping))
    names = (function.get("name") for function in functions if isinstance(function, Mapping))
    lacking = next((name for name in names if isinstance(name, str) and name not in text), None)
    if lacking is not None:
        raise ValueError(
            f"{what} {lacking!r} is not written by the chat template of the model, which would learn to answer without "
            "it: leave it out, or set data.chat_format to a template that writes tools and calls"
        )


def show(value: object) -> str:
    """A value and its type, shortened, for an error message."""
    return f"{brief(value)} ({type(value).__name__})"


def arguments_of(function: Mapping[str, Any]) -> Any:
    """The arguments of a call as a dict: from a dict, from a JSON string, or an empty dict if there are none.

    Any other arguments are returned unchanged.
    """
    arguments = function.get("arguments")
    if arguments is None or arguments == "":  # some servers write a call without arguments so
        return {}
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return parsed if isinstance(parsed, Mapping) else arguments
    return arguments


# ---- for chat templates -------------------------------------------------------------------------------------


def plain_messages(messages: Messages, *, keeps_developer: bool = True) -> list[dict[str, Any]]:
    """Converts messages to the input of a chat template.

    As in transformers, keys that hold None are left out, and a message's reasoning is `reasoning_content`. An empty
    list of calls is left out too. Arguments of calls are dicts, as templates expect. The role "developer" is "system"
    unless the template knows it.

    Raises:
        ValueError: the messages are not a list of dicts that each have a role.
    """
    plain = []
    for index, message in enumerate(check_list(messages)):
        if not isinstance(message.get("role"), str):
            raise ValueError(
                f"messages[{index}]: role must be a string such as 'user', got {show(message.get('role'))}"
            )
        copy = {key: value for key, value in message.items() if value is not None and key not in _OURS}
        if copy["role"] == "developer" and not keeps_developer:
            copy["role"] = "system"
        reasoning = next((copy[key] for key in REASONING if key in copy), None)
        if reasoning is not None:
            copy = {"thinking": reasoning, **copy, "reasoning_content": reasoning}
        if not copy.get("tool_calls"):
            copy.pop("tool_calls", None)  # several templates take an empty list for a call
        else:
            calls = copy["tool_calls"]
            if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
                raise ValueError(f"messages[{index}]: tool_calls must be a list of calls, got {show(calls)}")
            copy["tool_calls"] = [_plain_call(call) for call in calls]
        plain.append(copy)
    return plain


def is_parts(content: Any) -> bool:
    """True if a message's content is a list of text parts."""
    listed = isinstance(content, list | tuple) and bool(content)
    return listed and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content)


def with_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its text parts joined to one string."""
    parts: Any = message.get("content")
    return {**message, "content": "".join(part["text"] for part in parts)} if is_parts(parts) else message


def _plain_call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": {**call["function"], "arguments": arguments_of(call["function"])}}
    return {**call, "arguments": arguments_of(call)}


# ---- for Meta's reference format ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """One message of Meta's reference format.

    Attributes:
        role: a key of HEADER_OF_ROLE.
        texts: the content, each part to be encoded by itself.
        calls: name of the function and text of each tool call.
        stop: "eot" or "eom" if the message has a key `stop`, which says how it ends, else None.
    """

    role: str
    texts: tuple[str, ...]
    calls: tuple[tuple[str, str], ...] = ()
    stop: str | None = None


def parse_messages(messages: Messages) -> list[Message]:
    """The messages, checked; ValueError names the first one that cannot be written and why."""
    return [_parse_message(message, index) for index, message in enumerate(check_list(messages))]


def _parse_message(message: Mapping[str, Any], index: int) -> Message:
    where = f"messages[{index}]"
    role = message.get("role")
    if not isinstance(role, str) or role not in HEADER_OF_ROLE:
        near = nearest(str(role).lower(), list(HEADER_OF_ROLE))
        raise ValueError(f"{where}: role {show(role)} is not known; allowed: {', '.join(HEADER_OF_ROLE)}{near}")
    if role == "assistant":
        return _parse_assistant(message, where)
    for key in ("tool_calls", "stop"):
        if message.get(key):
            raise ValueError(f"{where}: {key!r} is allowed on role assistant only, got role {role!r}")
    return Message(role, _texts(message.get("content"), where, role))


def _parse_assistant(message: Mapping[str, Any], where: str) -> Message:
    if message.get("function_call"):
        raise ValueError(f"{where}: 'function_call' is not supported; write it as 'tool_calls': [{{'function': ...}}]")
    stop = message.get("stop")
    if stop not in (None, "eot", "eom"):
        raise ValueError(f"{where}: stop {show(stop)} is not known; allowed: 'eot', 'eom'")
    calls = message.get("tool_calls") or ()
    if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
        raise ValueError(f"{where}: tool_calls must be a list of calls, got {show(calls)}")
    parsed = tuple(_parse_call(call, f"{where}: tool_calls[{i}]") for i, call in enumerate(calls))
    if len(parsed) > 1 and (builtin := [name for name, _ in parsed if name in BUILTIN_TOOLS]):
        raise ValueError(
            f"{where}: {builtin[0]} must be the only call of its message, got {len(parsed)} calls; the "
            "format has no mark between calls, so give each a message of its own"
        )
    content = message.get("content")
    texts = () if content is None and parsed else _texts(content, where, "assistant")
    return Message("assistant", texts, parsed, stop)


def _texts(content: Any, where: str, role: str) -> tuple[str, ...]:
    if isinstance(content, str):
        return (content,)
    if content is None:
        or_calls = " (an assistant may have tool_calls instead)" if role == "assistant" else ""
        raise ValueError(f"{where}: {role} message has no content; give a str, '' if it is meant to be empty{or_calls}")
    if not isinstance(content, list | tuple):
        raise ValueError(
            f"{where}: content must be a str or a list of {{'type': 'text', 'text': str}}, got {show(content)}"
        )
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"{where}: content[{i}] must be {{'type': 'text', 'text': str}} (the model reads text only), "
                f"got {show(part)}"
            )
    return tuple(part["text"] for part in content)


def _parse_call(call: Any, where: str) -> tuple[str, str]:
    """The name and the text of one call, as Meta's `ToolUtils.encode_tool_call` writes it."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{where} must be {{'function': {{'name': str, 'arguments': ...}}}}, got {show(call)}")
    name, arguments = function["name"], arguments_of(function)
    if not isinstance(arguments, Mapping):
        given = show(function.get("arguments"))
        raise ValueError(f"{where}: arguments of {name} must be a dict or a JSON string of one, got {given}")
    if name in BUILTIN_TOOLS:
        key = "code" if name == CODE_TOOL else "query"
        if set(arguments) != {key} or not isinstance(arguments[key], str):
            raise ValueError(f"{where}: arguments of {name} must be {{{key!r}: str}}, got {show(arguments)}")
        return name, arguments[key] if name == CODE_TOOL else f'{name}.call(query="{arguments[key]}")'
    try:
        return name, json.dumps({"type": "function", "name": name, "parameters": dict(arguments)}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: arguments of {name} cannot be written as JSON: {error}") from None


def parse_tools(tools: Sequence[Any] | None) -> tuple[list[str], list[Mapping[str, Any]]]:
    """The names of built-in tools and the schemas of functions, checked; ValueError names the first wrong one."""
    builtin, functions = [], []
    for i, tool in enumerate(check_tools(tools)):
        if isinstance(tool, str):
            if tool not in BUILTIN_TOOLS:
                raise ValueError(
                    f"tools[{i}]: {show(tool)} is not a built-in tool; allowed: {', '.join(BUILTIN_TOOLS)}, "
                    f"or a dict with the schema of a function{nearest(tool, BUILTIN_TOOLS)}"
                )
            builtin.append(tool)
        else:
            functions.append(_function(tool, f"tools[{i}]"))
    return builtin, functions


def _function(tool: Any, where: str) -> Mapping[str, Any]:
    """The schema of a function in OpenAI's shape, from one with or without its outer dict."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(
            f"{where} must be {{'type': 'function', 'function': {{'name', 'description', 'parameters'}}}} or the name "
            f"of a built-in tool, got {show(tool)}"
        )
    if function["name"] in BUILTIN_TOOLS:
        raise ValueError(f"{where}: {function['name']} is a built-in tool; give its name as a str, or rename it")
    wrapped = {"type": "function", "function": function}
    try:
        json.dumps(wrapped, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: the schema cannot be written as JSON: {error}") from None
    return wrapped
