"""Llama 3.1's dialog format: messages to token ids with a mask of what the assistant spoke, and back.

Source: Meta's "Llama 3.1 - Prompt Formats" (llama-models, `llama3_1/prompt_format.md`) and `chat_format.py`:

    <|begin_of_text|><|start_header_id|>ROLE<|end_header_id|>\\n\\nCONTENT<|eot_id|> ...

Content is encoded apart from the format around it and is neither stripped nor scanned for control tokens.
Hugging Face's chat template differs from this in plain dialogs: it strips content, and it always writes a
system message that begins with "Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n". To
have the same ids here, strip the content and put those lines into the system message.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_jax.errors import ConfigError

if TYPE_CHECKING:
    from llama_jax.text.tokenizer import Tokenizer

HEADER_OF_ROLE = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "ipython",
    "ipython": "ipython",
}
QUERY_TOOLS = ("brave_search", "wolfram_alpha", "photogen")
CODE_TOOL = "code_interpreter"
BUILTIN_TOOLS = (*QUERY_TOOLS, CODE_TOOL)

_IPYTHON = "Environment: ipython"
TOOLS_BEFORE = (
    "Answer the user's question by making use of the following functions if needed.\n"
    "If none of the function can be used, please say so.\n"
    "Here is a list of functions in JSON format:\n"
)
TOOLS_AFTER = "\nReturn function calls in JSON format."


def encode_dialog(
    tokenizer: "Tokenizer",
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[str | Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> tuple[list[int], list[bool]]:
    """Return the ids of a dialog and a mask that is True for exactly the tokens the assistant spoke.

    The assistant's tokens are its content, its tool calls (with <|python_tag|>) and the closing <|eot_id|> or
    <|eom_id|>; its header is not among them.

    Args:
        tokenizer: the vocabulary.
        messages: dicts in OpenAI's style. `role` is system (first only), user, assistant, tool or ipython
            (one and the same). `content` is a str or a list of {"type": "text", "text": str}, each encoded by
            itself; an assistant with `tool_calls` may leave it out, and what it has comes before the calls.
            Keys such as `name` and `tool_call_id` have no place in the format and are not read.
            `tool_calls` are {"type": "function", "function": {"name": ..., "arguments": dict or JSON
            string}}. brave_search, wolfram_alpha and photogen take {"query": str}, code_interpreter takes
            {"code": str}; all four open with <|python_tag|> and close with <|eom_id|>, since a continuation
            must follow. Any other name is a custom function, written as JSON; it has the tag and <|eom_id|>
            in an ipython environment and neither without. `stop` ("eot" or "eom") on an assistant message
            overrides how it closes, and with that the tag of a custom call.
        tools: what the assistant may call; any entry turns the ipython environment on. A str names a built-in
            tool and joins the "Environment: ipython / Tools: ..." head of the system message, where
            code_interpreter needs no mention. A dict is a function in OpenAI's schema; those become, as Meta
            documents, one user message of instructions between the system message and the rest. A system
            message that itself begins with "Environment: ipython" turns it on too.
        add_generation_prompt: end with an open assistant header.

    Returns:
        ids, from begin_of_text on, and the mask, of the same length.

    Raises:
        ValueError: a message or tool is malformed; names its index, what was given and what is allowed.
        ConfigError: the vocabulary lacks a control token of the format.
    """
    parsed = _parse_messages(messages)
    builtin, functions = _parse_tools(tools)
    system = list(parsed.pop(0).texts) if parsed[0].role == "system" else None
    ipython = bool(builtin or functions)
    if system is not None and "".join(system).startswith("Environment:"):
        if builtin:
            raise ValueError(
                f"tools: {', '.join(builtin)} would be announced twice: messages[0] has its own "
                "'Environment:' lines; take them out, or name the built-in tools there alone"
            )
        ipython = ipython or "".join(system).startswith(_IPYTHON)
    elif ipython:
        head = _environment(builtin, has_content=bool(system and "".join(system)))
        system = [head + system[0], *system[1:]] if system else [head]

    out = _Writer(tokenizer)
    out.control("<|begin_of_text|>")
    if system is not None:
        out.message("system", system)
    if functions:
        listing = "".join(f"{_pretty(function)}\n" for function in functions)
        out.message("user", [TOOLS_BEFORE + listing + TOOLS_AFTER])
    for message in parsed:
        if message.role == "assistant":
            out.assistant(message, ipython=ipython)
        else:
            out.message(HEADER_OF_ROLE[message.role], message.texts)
    if add_generation_prompt:
        out.header("assistant")
    return out.ids, out.mask


def parse_assistant(source: str | Iterable[int], *, tokenizer: "Tokenizer | None" = None) -> dict[str, Any]:
    """Return the message that an assistant's output stands for; the inverse of `encode_dialog`.

    Understood as tool calls: custom calls in JSON (also several, also `<function=name>{...}</function>`),
    `brave_search.call(query="...")` and its siblings, and, after <|python_tag|> only, anything else as Python
    code. Whatever is not wholly one of these is content; so is text before <|python_tag|>. Odd output never
    raises.

    Args:
        source: the ids the model produced, in which a control token cannot be confused with text that looks
            like it, or that text, with or without control tokens. A leading assistant header is dropped; what
            follows the first stop token is too (in text: a stop token counts at the end only).
        tokenizer: needed for ids.

    Returns:
        {"role": "assistant", "content": str, "tool_calls": [...]}, the calls in OpenAI's style with
        `arguments` as a JSON string, and `stop` ("eot" or "eom") if the output came with one.
    """
    if isinstance(source, str):
        before, tagged, stop = _cut_text(source)
    else:
        before, tagged, stop = _cut_ids([int(i) for i in source], tokenizer)
    content = before
    if tagged is None:
        calls = _parse_calls(before)
        content = "" if calls else before
    elif tagged.strip():
        calls = _parse_calls(tagged) or [_call(CODE_TOOL, {"code": tagged})]
    else:
        calls = []
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    return message | ({"stop": stop} if stop else {})


# ---- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Message:
    role: str
    texts: tuple[str, ...]
    calls: tuple[tuple[str, str], ...] = ()  # (function name, the text of the call)
    stop: str | None = None


class _Writer:
    """Collects ids, each marked as spoken by the assistant or not."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.mask: list[bool] = []

    def text(self, text: str, *, spoken: bool = False) -> None:
        ids = self.tokenizer.encode(text)
        self.ids += ids
        self.mask += [spoken] * len(ids)

    def control(self, name: str, *, spoken: bool = False) -> None:
        if name not in self.tokenizer.special_tokens:
            raise ConfigError(
                f"the tokenizer has no {name}, so that it cannot write Llama 3's dialogs: give the model text instead, "
                "or use the tokenizer of a Llama 3 Instruct"
            )
        self.ids.append(self.tokenizer.special_tokens[name])
        self.mask.append(spoken)

    def header(self, name: str) -> None:
        self.control("<|start_header_id|>")
        self.text(name)
        self.control("<|end_header_id|>")
        self.text("\n\n")

    def message(self, header: str, texts: Iterable[str]) -> None:
        self.header(header)
        for text in texts:
            self.text(text)
        self.control("<|eot_id|>")

    def assistant(self, message: _Message, *, ipython: bool) -> None:
        builtin = any(name in BUILTIN_TOOLS for name, _ in message.calls)
        stop = message.stop or ("eom" if message.calls and (builtin or ipython) else "eot")
        self.header("assistant")
        for text in message.texts:
            self.text(text, spoken=True)
        if builtin or (message.calls and stop == "eom"):
            self.control("<|python_tag|>", spoken=True)
        for _, call in message.calls:
            self.text(call, spoken=True)
        self.control(f"<|{stop}_id|>", spoken=True)


def _environment(builtin: Sequence[str], *, has_content: bool) -> str:
    """Return the head of the system message, to the byte as in the examples of Meta's document."""
    listed = [name for name in builtin if name != CODE_TOOL]
    if listed:
        return f"{_IPYTHON}\nTools: {', '.join(listed)}\n"
    return f"{_IPYTHON}\n\n" if has_content else _IPYTHON


def _pretty(value: Any, indent: str = "") -> str:
    """Return JSON as Meta's prompts lay it out: indented by four, lists of plain values on one line."""
    inner = indent + "    "
    if isinstance(value, Mapping) and value:
        rows = (f"{json.dumps(str(k), ensure_ascii=False)}: {_pretty(v, inner)}" for k, v in value.items())
        return "{\n" + ",\n".join(inner + row for row in rows) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(v, Mapping | list | tuple) for v in value):
        return "[\n" + ",\n".join(inner + _pretty(v, inner) for v in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


# ---- checking ----------------------------------------------------------------------------------------------


def _parse_messages(messages: Sequence[Mapping[str, Any]]) -> list[_Message]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(
            f"messages must be a list of dicts such as {{'role': 'user', 'content': 'Hi'}}, got {_show(messages)}"
        )
    if not messages:
        raise ValueError("messages is empty; a dialog has at least one message, {'role': 'user', 'content': ...}")
    return [_parse_message(message, index) for index, message in enumerate(messages)]


def _parse_message(message: Mapping[str, Any], index: int) -> _Message:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must be a dict with 'role' and 'content', got {_show(message)}")
    role = message.get("role")
    if not isinstance(role, str) or role not in HEADER_OF_ROLE:
        near = difflib.get_close_matches(str(role).lower(), HEADER_OF_ROLE, n=1)
        raise ValueError(
            f"{where}: role {_show(role)} is not known; allowed: {', '.join(HEADER_OF_ROLE)}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    if role == "system" and index > 0:
        raise ValueError(f"{where}: a system message may only come first; move it to messages[0] and join the texts")
    if role != "assistant":
        for key in ("tool_calls", "stop"):
            if message.get(key):
                raise ValueError(f"{where}: {key!r} is allowed on role assistant only, got role {role!r}")
        return _Message(role, _texts(message.get("content"), where, role))
    if message.get("function_call"):
        raise ValueError(f"{where}: 'function_call' is not read; write it as 'tool_calls': [{{'function': ...}}]")
    stop = message.get("stop")
    if stop not in (None, "eot", "eom"):
        raise ValueError(f"{where}: stop {_show(stop)} is not known; allowed: 'eot', 'eom'")
    calls = message.get("tool_calls") or ()
    if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
        raise ValueError(f"{where}: tool_calls must be a list of calls, got {_show(calls)}")
    parsed = tuple(_parse_call(call, f"{where}: tool_calls[{i}]") for i, call in enumerate(calls))
    if len(parsed) > 1 and (builtin := [name for name, _ in parsed if name in BUILTIN_TOOLS]):
        raise ValueError(
            f"{where}: {builtin[0]} must be the only call of its message, got {len(parsed)} calls; the "
            "format has no mark between calls, so give each a message of its own"
        )
    content = message.get("content")
    texts = () if content is None and parsed else _texts(content, where, role)
    return _Message(role, texts, parsed, stop)


def _texts(content: Any, where: str, role: str) -> tuple[str, ...]:
    if isinstance(content, str):
        return (content,)
    if content is None:
        or_calls = " (an assistant may have tool_calls instead)" if role == "assistant" else ""
        raise ValueError(f"{where}: {role} message has no content; give a str, '' if it is meant to be empty{or_calls}")
    if not isinstance(content, list | tuple):
        raise ValueError(
            f"{where}: content must be a str or a list of {{'type': 'text', 'text': str}}, got {_show(content)}"
        )
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"{where}: content[{i}] must be {{'type': 'text', 'text': str}} (the model reads text only), "
                f"got {_show(part)}"
            )
    return tuple(part["text"] for part in content)


def _parse_call(call: Any, where: str) -> tuple[str, str]:
    """Return the name and the text of one call, as Meta's `ToolUtils.encode_tool_call` writes it."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{where} must be {{'function': {{'name': str, 'arguments': ...}}}}, got {_show(call)}")
    name, arguments = function["name"], function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            pass  # refused below, with what was given
    if not isinstance(arguments, Mapping):
        given = _show(function.get("arguments"))
        raise ValueError(f"{where}: arguments of {name} must be a dict or a JSON string of one, got {given}")
    if name in BUILTIN_TOOLS:
        key = "code" if name == CODE_TOOL else "query"
        if set(arguments) != {key} or not isinstance(arguments[key], str):
            raise ValueError(f"{where}: arguments of {name} must be {{{key!r}: str}}, got {_show(arguments)}")
        return name, arguments[key] if name == CODE_TOOL else f'{name}.call(query="{arguments[key]}")'
    try:
        return name, json.dumps({"type": "function", "name": name, "parameters": dict(arguments)}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: arguments of {name} cannot be written as JSON: {error}") from None


def _parse_tools(tools: Sequence[Any] | None) -> tuple[list[str], list[Mapping[str, Any]]]:
    """Return the names of built-in tools and the schemas of functions."""
    if tools is None:
        return [], []
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise ValueError(f"tools must be a list of function schemas and built-in names, got {_show(tools)}")
    builtin, functions = [], []
    for i, tool in enumerate(tools):
        if isinstance(tool, str):
            if tool not in BUILTIN_TOOLS:
                near = difflib.get_close_matches(tool, BUILTIN_TOOLS, n=1)
                raise ValueError(
                    f"tools[{i}]: {_show(tool)} is not a built-in tool; allowed: {', '.join(BUILTIN_TOOLS)}, "
                    "or a dict with the schema of a function" + (f"; did you mean {near[0]!r}?" if near else "")
                )
            builtin.append(tool)
            continue
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"tools[{i}] must be "
                f"{{'type': 'function', 'function': {{'name', 'description', 'parameters'}}}} or the name of "
                f"a built-in tool, got {_show(tool)}"
            )
        if function["name"] in BUILTIN_TOOLS:
            raise ValueError(f"tools[{i}]: {function['name']} is a built-in tool; give its name as a str, or rename it")
        wrapped = {"type": "function", "function": function}
        try:
            json.dumps(wrapped, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"tools[{i}]: the schema cannot be written as JSON: {error}") from None
        functions.append(wrapped)
    return builtin, functions


# ---- reading back ------------------------------------------------------------------------------------------

_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_QUERY_CALL = re.compile(rf'({"|".join(QUERY_TOOLS)})\.call\(query="(.*)"\)', re.DOTALL)
_FUNCTION_TAG = re.compile(r"<function=([^<>{}]+)>(\{.*\})(?:</function>)?", re.DOTALL)


def _cut_text(text: str) -> tuple[str, str | None, str | None]:
    """Return the text before <|python_tag|>, the text after it (None without a tag), and the stop."""
    text = text.removeprefix("<|begin_of_text|>").removeprefix(_HEADER)
    stop = None
    for name, kind in (("<|eot_id|>", "eot"), ("<|eom_id|>", "eom"), ("<|end_of_text|>", None)):
        if text.endswith(name):
            text, stop = text.removesuffix(name), kind
            break
    before, tag, after = text.partition("<|python_tag|>")
    return before, after if tag else None, stop


def _cut_ids(ids: list[int], tokenizer: "Tokenizer | None") -> tuple[str, str | None, str | None]:
    if tokenizer is None:
        raise TypeError("parse_assistant needs tokenizer= to read ids")
    special = tokenizer.special_tokens
    end = next((k for k, i in enumerate(ids) if i in tokenizer.stop_tokens), len(ids))
    stop = {tokenizer.eot_id: "eot", tokenizer.eom_id: "eom"}.get(ids[end]) if end < len(ids) else None
    ids = ids[:end]
    start, close = special.get("<|start_header_id|>"), special.get("<|end_header_id|>")
    if start in ids[:2] and close in ids:
        ids = ids[ids.index(close) + 1 :]
        newlines = tokenizer.encode("\n\n")
        ids = ids[len(newlines) :] if ids[: len(newlines)] == newlines else ids
    tag = special.get("<|python_tag|>")
    at = ids.index(tag) if tag in ids else len(ids)
    before = tokenizer.decode(ids[:at], skip_special=True)
    return before, tokenizer.decode(ids[at + 1 :], skip_special=True) if at < len(ids) else None, stop


def _parse_calls(text: str) -> list[dict[str, Any]]:
    """Return the calls that `text` wholly consists of, or []."""
    text = text.strip()
    if match := _QUERY_CALL.fullmatch(text):
        return [_call(match[1], {"query": match[2]})]
    if match := _FUNCTION_TAG.fullmatch(text):
        objects = _json_objects(match[2])
        return [_call(match[1].strip(), objects[0])] if len(objects) == 1 else []
    calls = []
    for item in _json_objects(text):
        name, arguments = item.get("name"), item.get("parameters", item.get("arguments"))
        if item.get("type", "function") != "function" or not isinstance(name, str) or not isinstance(arguments, dict):
            return []
        calls.append(_call(name, arguments))
    return calls


def _json_objects(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects that follow one another in `text`, space or ';' between; [] if there is more.

    The model writes several calls in a row with either mark, though Meta documents a single call only.
    """
    decoder, objects, at = json.JSONDecoder(), [], 0
    while at < len(text):
        try:
            item, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        if not isinstance(item, dict):
            return []
        objects.append(item)
        at += len(text) - at - len(text[at:].lstrip(" \t\r\n;"))
    return objects


def _call(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
    }


def _show(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
