"""Conversion of published styles of dialog messages to one style: OpenAI's, with a learn flag for each message.

The supported styles are OpenAI's chat and fine-tuning messages, ShareGPT turns (`from` and `value`), the roles of
LLaMA-Factory and ms-swift for calls and results, and Anthropic's content blocks. Reasoning before an answer is
`reasoning_content`, also from the keys `thinking` and `reasoning`. A message may have a mark that says
whether it is learned. The spellings are OpenAI's and mistral-finetune's `weight`, axolotl's `train` and `training`,
verl's `loss_mask` and `trainable`, ms-swift's and AgentTuning's `loss`, and torchtune's `masked`, which means the
opposite. An unknown key is refused, and the error names it, because it may change what is learned.

Sources: platform.openai.com/docs/guides/fine-tuning, docs.axolotl.ai/docs/dataset-formats/conversation.html,
github.com/verl-project/verl/issues/5316, swift.readthedocs.io (Custom-dataset), torchtune.data.Message.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from llama_jax.errors import brief, nearest
from llama_jax.text.messages import REASONING

ROLES = {
    "system": "system",
    "developer": "developer",  # each chat format encodes it in its own way
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}
MARKS = ("weight", "train", "training", "trainable", "loss", "loss_mask")  # true or 1: the message is learned
_NOT_LEARNED = "masked"  # true or 1: the message is not learned
_PARTIAL = ("train_detail", "training_detail", "loss_scale")  # marks for parts of a message, or of other strengths
_FIELDS = ("role", "from", "content", "value", "name", "tool_calls", "function_call", "tool_call_id", "stop", "refusal")
_KNOWN = (*_FIELDS, *REASONING, *MARKS, _NOT_LEARNED)
_TEXT_PARTS = ("text", "input_text", "output_text")  # the last two are those of OpenAI's Responses API
_WITHOUT_EFFECT = {"type", "cache_control", "citations", "annotations", "logprobs"}  # keys of a part


class Message(NamedTuple):
    """One message in OpenAI's style, with a flag that says whether the loss counts it."""

    content: dict[str, Any]
    learn: bool


def read(value: object, key: str) -> list[Message]:
    """The messages of a list in any of the styles above.

    Args:
        value: the list, or a string of JSON that holds one, as tables may have it.
        key: name of the list in error messages, such as `messages`.

    Raises:
        ValueError: something in the list cannot be used. The message names its index.
    """
    value = from_json(value, opening="[")
    if not isinstance(value, list):
        raise ValueError(
            f"{key} must be a list of dicts such as {{'role': 'user', 'content': 'Hi'}}, got {brief(value)}"
        )
    messages: list[Message] = []
    after_call = False
    for index, item in enumerate(value):
        is_call = isinstance(item, dict) and ROLES.get(_first(item, "role", "from")) == "call"
        for message in _read_one(item, f"{key}[{index}]"):
            if is_call and after_call and message.learn == messages[-1].learn:  # parallel calls are one turn
                messages[-1].content["tool_calls"] += message.content["tool_calls"]
            else:
                messages.append(message)
        after_call = is_call
    return messages


def from_json(value: object, *, opening: str) -> object:
    """The value of a JSON string that begins with `opening`. Any other argument is returned unchanged."""
    if isinstance(value, str) and value.lstrip().startswith(opening):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def present(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without the keys that hold null, which count as absent: tables have every column in every row."""
    return {key: value for key, value in record.items() if value is not None}


def _read_one(item: object, where: str) -> Iterator[Message]:
    """Converts one item of a list to messages, usually one."""
    if not isinstance(item, dict):
        raise ValueError(f"{where} must be a dict with 'role' and 'content', got {brief(item)}")
    item = present(item)
    if {"human", "assistant"} <= item.keys() and not {"role", "from"} & item.keys():  # a round of ms-swift
        if strange := item.keys() - {"human", "assistant"}:
            raise ValueError(_unknown(where, str(min(strange)), ("human", "assistant")))
        yield Message({"role": "user", "content": item["human"]}, False)
        yield Message({"role": "assistant", "content": item["assistant"]}, True)
        return
    _refuse_unknown_keys(item, where)
    role = _role(item, where)
    learn = _learn(item, role, where)
    if role == "call":
        calls = _calls_in_text(_first(item, "content", "value"), where)
        yield Message({"role": "assistant", "tool_calls": calls}, learn)
        return
    content, blocks = _content(_first(item, "content", "value"), where)
    if content is None and role == "assistant":
        content = item.get("refusal")
    for block in blocks:
        if block.get("type") == "tool_result":
            yield Message(_tool_result(block, role, where), False)
    calls = _calls(item, where) + [_call(block, where) for block in blocks if block.get("type") == "tool_use"]
    message = {"role": role, "content": content, "tool_calls": calls or None}
    message |= {key: item.get(key) for key in ("name", "tool_call_id", "stop")}
    message["reasoning_content"] = _reasoning(item, blocks, role, where)
    if content is not None or not blocks or calls or message["reasoning_content"]:
        yield Message(present(message), learn)


def _first(item: Mapping[str, Any], *keys: str) -> Any:
    """The value of the first key that the item has, or None."""
    return next((item[key] for key in keys if key in item), None)


# ---- keys ---------------------------------------------------------------------------------------------------


def _refuse_unknown_keys(item: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a key that is not read and holds something, and for two keys that say the same thing."""
    for key, value in item.items():
        if key in _PARTIAL:
            raise ValueError(
                f"{where}: {key!r} marks parts of a message, and a message is learned whole or not at all: "
                "mark it with 'train': true or false"
            )
        if key not in _KNOWN and value not in ("", [], {}):
            raise ValueError(_unknown(where, key, _KNOWN))
    for one, other in (("role", "from"), ("content", "value")):
        if one in item and other in item:
            raise ValueError(f"{where} has both {one!r} and {other!r}: keep one of them")


def _unknown(where: str, key: str, known: tuple[str, ...]) -> str:
    hint = nearest(key, known) or "; remove it"
    return f"{where}: the key {brief(key)} is not known{hint} (known keys: {', '.join(known)})"


def _role(item: Mapping[str, Any], where: str) -> str:
    role = _first(item, "role", "from")
    if not isinstance(role, str) or role.lower() not in ROLES:
        near = nearest(role.lower(), list(ROLES)) if isinstance(role, str) else ""
        raise ValueError(f"{where}: role {brief(role)} is not known; allowed: {', '.join(ROLES)}{near}")
    return ROLES[role.lower()]


def _learn(item: Mapping[str, Any], role: str, where: str) -> bool:
    """True if the loss counts a message: by its marks, or without a mark, if it is the assistant's."""
    marks: dict[str, bool] = {}
    for key in (*MARKS, _NOT_LEARNED):
        if key in item:
            if not isinstance(item[key], bool | int | float) or item[key] not in (0, 1):
                raise ValueError(f"{where}: {key!r} must be true, false, 1 or 0, got {brief(item[key])}")
            marks[key] = bool(item[key]) != (key == _NOT_LEARNED)
    if len(set(marks.values())) > 1:
        said = " and ".join(f"{key!r}: {item[key]!r}" for key in marks)
        raise ValueError(f"{where}: {said} contradict each other: keep one of them")
    spoken = role in ("assistant", "call")
    if True in marks.values() and not spoken:
        key = next(iter(marks))
        raise ValueError(
            f"{where}: {key!r}: {item[key]!r} marks a message of the {role} to be learned, and only those of the "
            "assistant are: remove the mark (data.loss_on='all' counts every message)"
        )
    return spoken and False not in marks.values()


def _reasoning(item: Mapping[str, Any], blocks: list[dict[str, Any]], role: str, where: str) -> str | None:
    """The reasoning before an answer: in a key of the message, or in Anthropic's blocks of thinking."""
    texts = [(key, item[key]) for key in REASONING if item.get(key) not in (None, "")]
    thinking = [block.get("thinking") for block in blocks if block.get("type") == "thinking"]
    thoughts = [thought for thought in thinking if isinstance(thought, str)]
    if thoughts and len(thoughts) == len(thinking):
        texts.append(("thinking", "\n\n".join(thoughts)))
    for key, text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{where}: {key!r} must be a string, got {brief(text)}")
        if role != "assistant":
            raise ValueError(f"{where}: {key!r} is allowed on role assistant only, got role {role!r}")
        if text != texts[0][1]:
            raise ValueError(f"{where}: {texts[0][0]!r} and {key!r} say different things: keep one of them")
    return texts[0][1] if texts else None


# ---- content and calls --------------------------------------------------------------------------------------


def _content(content: object, where: str) -> tuple[object, list[dict[str, Any]]]:
    """A message's text, as a string or parts of text, and Anthropic's blocks of calls and results in it.

    The text is None where there is none. What is neither text nor blocks is returned as it is, for the encoder of
    dialogs to refuse.
    """
    if not isinstance(content, list):
        return content, []
    texts: list[dict[str, Any]] = []
    blocks: list[dict[str, Any]] = []
    for index, part in enumerate(content):
        part = present(part) if isinstance(part, dict) else part
        name = part.get("type") if isinstance(part, dict) else None
        if name in ("tool_use", "tool_result") or (name == "thinking" and isinstance(part.get("thinking"), str)):
            blocks.append(part)
        elif name in _TEXT_PARTS and isinstance(part.get("text"), str):
            if strange := {key for key in part if part[key] not in ("", [], {})} - _WITHOUT_EFFECT - {"text"}:
                raise ValueError(_unknown(f"{where}: content[{index}]", str(min(strange)), ("type", "text")))
            texts.append({"type": "text", "text": part["text"]})
        else:
            raise ValueError(
                f"{where}: content[{index}] must be {{'type': 'text', 'text': str}}, or a 'tool_use' or 'tool_result' "
                f"block (the model reads text only), got {brief(part)}"
            )
    if len(texts) == 1:
        return texts[0]["text"], blocks
    return (texts if texts or not blocks else None), blocks


def _tool_result(block: Mapping[str, Any], role: str, where: str) -> dict[str, Any]:
    """Converts a `tool_result` block of a user's message to a message of the tool."""
    if role != "user":
        raise ValueError(f"{where}: a 'tool_result' block is allowed in a message of the user only, got role {role!r}")
    content, nested = _content(block.get("content", ""), where)
    if nested:
        raise ValueError(f"{where}: a 'tool_result' block must hold text, got {brief(nested[0])}")
    return present({"role": "tool", "content": content, "tool_call_id": block.get("tool_use_id")})


def _calls(item: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The calls in `tool_calls`, or in `function_call`, its name before OpenAI had several calls in a message."""
    calls = from_json(item.get("tool_calls") or [], opening="[")
    if not isinstance(calls, list):
        raise ValueError(f"{where}: tool_calls must be a list of calls, got {brief(calls)}")
    old = [item["function_call"]] if item.get("function_call") else []
    return [_call(call, f"{where}: tool_calls[{i}]") for i, call in enumerate([*calls, *old])]


def _calls_in_text(text: object, where: str) -> list[dict[str, Any]]:
    """The calls that a message of role `function_call` or `tool_call` holds as JSON: one, or a list of several."""
    calls = from_json(from_json(text, opening="{"), opening="[")
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not calls:
        raise ValueError(f"{where} must hold JSON such as {{'name': str, 'arguments': {{...}}}}, got {brief(text)}")
    return [_call(call, where) for call in calls]


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call in OpenAI's style with its arguments as a dict, from OpenAI's or Anthropic's.

    An empty string of arguments means none. Arguments that are no dict are left for the encoder to refuse.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} must be {{'function': {{'name': str, 'arguments': ...}}}}, got {brief(call)}")
    arguments = _first(present(function), "arguments", "input", "parameters")
    arguments = from_json({} if arguments is None or arguments == "" else arguments, opening="{")
    number = {"id": call["id"]} if call.get("id") else {}
    return {**number, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


# ---- tools --------------------------------------------------------------------------------------------------


def read_tools(record: Mapping[str, Any]) -> list[Any] | None:
    """The tools of a record in OpenAI's style: its `tools`, also in Anthropic's style, or the older `functions`.

    Raises:
        ValueError: they are no list, nor a string of JSON that holds one, or there are both.
    """
    keys = [key for key in ("tools", "functions") if record.get(key) not in (None, "", [])]
    if not keys:
        return None
    if len(keys) > 1:
        raise ValueError("'tools' and 'functions' say the same thing: keep 'tools'")
    tools = from_json(record[keys[0]], opening="[")
    if isinstance(tools, str) and not tools.strip():
        return None
    if not isinstance(tools, list):
        raise ValueError(f"{keys[0]!r} must be a list, or one as a string of JSON, found {brief(tools)}")
    return [_tool(tool) for tool in tools] or None


def _tool(tool: Any) -> Any:
    """One tool in OpenAI's style; names of built-in tools, and what is no tool, are returned as they are."""
    if not isinstance(tool, dict) or not isinstance(tool.get("function", tool), dict):
        return tool
    function = dict(tool.get("function", tool))
    if "input_schema" in function:  # Anthropic's name
        function["parameters"] = function.pop("input_schema")
    if "parameters" in function:
        function["parameters"] = from_json(function["parameters"], opening="{")
    return {"type": "function", "function": function}
