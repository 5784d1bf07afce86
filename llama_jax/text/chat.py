"""Llama 3.1's dialog format: messages to token ids with a mask of the assistant's tokens, and back.

Source: Meta's "Llama 3.1 - Prompt Formats" (llama-models, `llama3_1/prompt_format.md`) and `chat_format.py`:

    <|begin_of_text|><|start_header_id|>ROLE<|end_header_id|>\\n\\nCONTENT<|eot_id|> ...

Content is encoded apart from the format around it. It is not stripped, and names of control tokens in it stay text.
The chat template that is published with Llama 3.1 differs from this in plain dialogs: it strips content, and it always
writes a system message that begins with "Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n". A
model that has such a template is used with it (see `chat_format`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_jax.errors import ConfigError
from llama_jax.text import tool_calls
from llama_jax.text.messages import BUILTIN_TOOLS, CODE_TOOL, HEADER_OF_ROLE, Message, parse_messages, parse_tools
from llama_jax.text.tokenizer import Tokenizer

_IPYTHON = "Environment: ipython"
TOOLS_BEFORE = (
    "Answer the user's question by making use of the following functions if needed.\n"
    "If none of the function can be used, please say so.\n"
    "Here is a list of functions in JSON format:\n"
)
TOOLS_AFTER = "\nReturn function calls in JSON format."
_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def encode_dialog(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[str | Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    learn: Sequence[bool] | None = None,
    generated: Mapping[int, Sequence[int]] | None = None,
) -> tuple[list[int], list[bool]]:
    """Returns the ids of a dialog and a mask that is True for exactly the tokens that the assistant says.

    These are its content, its tool calls (with <|python_tag|>) and the closing <|eot_id|> or <|eom_id|>. Its header is
    not among them.

    Messages are dicts in OpenAI's shape. The role is system or developer (the same thing, in any place), user,
    assistant, tool or ipython (the same thing). `content` is a string, or a list of {"type": "text", "text": str} that
    are encoded one by one. An assistant with `tool_calls` may leave it out; otherwise it comes before the calls. Other
    keys, such as `name` and `tool_call_id`, are not part of the format and are ignored.

    `tool_calls` are {"type": "function", "function": {"name": str, "arguments": dict or string of JSON}}. The built-in
    tools brave_search, wolfram_alpha and photogen take {"query": str}, and code_interpreter takes {"code": str}. A call
    of one of the four opens with <|python_tag|> and closes with <|eom_id|>, because its result must follow. Any other
    name is a custom function, written as JSON. Its call has the tag and <|eom_id|> only in an ipython environment.
    `stop` ("eot" or "eom") of an assistant's message overrides how it closes, and with that the tag of a custom call.

    Args:
        tokenizer: tokenizer with Llama 3's control tokens.
        messages: the dialog.
        tools: tools that the assistant may call. Any entry turns the ipython environment on. A string names a built-in
            tool and joins the "Environment: ipython / Tools: ..." head of the system message, where code_interpreter
            needs no mention. A dict is the schema of a function in OpenAI's shape. As Meta documents, all schemas
            together become one user message of instructions after the system message. A system message that itself
            begins with "Environment: ipython" turns the environment on too.
        add_generation_prompt: end with the open header of an assistant's message.
        learn: one flag for each message. The mask leaves out the assistant's messages whose flag is False. None keeps
            all of them.
        generated: ids by index of the message, for messages of the assistant that the model generated. They are written
            instead of the message.

    Returns:
        ids, from begin_of_text on, and the mask, of the same length.

    Raises:
        ValueError: a message or tool is malformed. The message names its index, what was given and what is allowed.
        ConfigError: the vocabulary lacks a control token of the format.
    """
    parsed = parse_messages(messages)
    flags = [True] * len(parsed) if learn is None else list(learn)
    if len(flags) != len(parsed):
        raise ValueError(f"learn must have one flag for each of the {len(parsed)} messages, got {len(flags)}")
    builtin, functions = parse_tools(tools)
    begins = HEADER_OF_ROLE[parsed[0].role] == "system"
    system, ipython = _system(parsed[0].texts if begins else None, builtin, functions)
    out = _Writer(tokenizer)
    out.control("<|begin_of_text|>")
    if system is not None:
        out.message("system", system)
    if functions:
        listing = "".join(f"{_pretty(function)}\n" for function in functions)
        out.message("user", [TOOLS_BEFORE + listing + TOOLS_AFTER])
    generated = generated or {}
    for i, message in enumerate(parsed):
        if i in generated:
            out.answer(generated[i], spoken=flags[i])
        elif message.role == "assistant":
            out.assistant(message, ipython=ipython, spoken=flags[i])
        elif i > 0 or not begins:
            out.message(HEADER_OF_ROLE[message.role], message.texts)
    if add_generation_prompt:
        out.header("assistant")
    tokenizer.check_rows(out.ids)
    return out.ids, out.mask


def parse_assistant(source: str | Iterable[int], *, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Parses an assistant's output into a message; the inverse of `encode_dialog`.

    Tool calls are read as in `tool_calls`. After <|python_tag|>, and only there, anything that is not a call is Python
    code. Output that is not entirely a call is content, and so is text before <|python_tag|>. Unexpected output never
    raises.

    Args:
        source: ids that the model generated, in which a control token cannot be confused with text that spells its
            name; or that text, with or without control tokens. A leading assistant header is dropped. So is everything
            after the first stop token (in text, a stop token counts only at the end).
        tokenizer: tokenizer of the ids.

    Returns:
        {"role": "assistant", "content": str, "tool_calls": [...]} with the calls in OpenAI's shape, `arguments` as a
        string of JSON, and `stop` ("eot" or "eom") if the output ended with one of the two.
    """
    if isinstance(source, str):
        before, tagged, stop = _cut_text(source)
    else:
        before, tagged, stop = _cut_ids([int(i) for i in source], tokenizer)
    if tagged is None:
        content, calls = tool_calls.parse(before)
    else:
        content, calls = before, []
        if tagged.strip():
            calls = tool_calls.whole_calls(tagged) or [tool_calls.call(CODE_TOOL, {"code": tagged})]
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    return message | ({"stop": stop} if stop else {})


# ---- writing -----------------------------------------------------------------------------------------------


class _Writer:
    """Collects the ids of a dialog, and the mask of the assistant's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
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
                f"the tokenizer has no {name}, which Llama 3's chat format needs: give a chat template "
                "(--chat_format FILE, data.chat_format of a run), or give text instead of dialogs"
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

    def assistant(self, message: Message, *, ipython: bool, spoken: bool) -> None:
        builtin = any(name in BUILTIN_TOOLS for name, _ in message.calls)
        stop = message.stop or ("eom" if message.calls and (builtin or ipython) else "eot")
        self.header("assistant")
        for text in message.texts:
            self.text(text, spoken=spoken)
        if builtin or (message.calls and stop == "eom"):
            self.control("<|python_tag|>", spoken=spoken)
        for _, call in message.calls:
            self.text(call, spoken=spoken)
        self.control(f"<|{stop}_id|>", spoken=spoken)

    def answer(self, ids: Sequence[int], *, spoken: bool) -> None:
        self.header("assistant")
        self.ids += ids
        self.mask += [spoken] * len(ids)


def _system(
    texts: Sequence[str] | None, builtin: Sequence[str], functions: Sequence[Any]
) -> tuple[list[str] | None, bool]:
    """The texts of the first system message, or None, and whether the dialog is in an ipython environment."""
    ipython = bool(builtin or functions)
    if texts is not None and "".join(texts).startswith("Environment:"):
        if builtin:
            raise ValueError(
                f"tools: {', '.join(builtin)} would be announced twice: messages[0] has its own "
                "'Environment:' lines; take them out, or name the built-in tools there alone"
            )
        return list(texts), ipython or "".join(texts).startswith(_IPYTHON)
    if not ipython:
        return None if texts is None else list(texts), False
    head = _environment(builtin, has_content=bool(texts and "".join(texts)))
    return ([head + texts[0], *texts[1:]] if texts else [head]), True


def _environment(builtin: Sequence[str], *, has_content: bool) -> str:
    """The head of the system message, to the byte as in the examples of Meta's document."""
    listed = [name for name in builtin if name != CODE_TOOL]
    if listed:
        return f"{_IPYTHON}\nTools: {', '.join(listed)}\n"
    return f"{_IPYTHON}\n\n" if has_content else _IPYTHON


def _pretty(value: Any, indent: str = "") -> str:
    """JSON as Meta's prompts lay it out: indented by four, lists of plain values on one line."""
    inner = indent + "    "
    if isinstance(value, Mapping) and value:
        rows = (f"{json.dumps(str(k), ensure_ascii=False)}: {_pretty(v, inner)}" for k, v in value.items())
        return "{\n" + ",\n".join(inner + row for row in rows) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(v, Mapping | list | tuple) for v in value):
        return "[\n" + ",\n".join(inner + _pretty(v, inner) for v in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


# ---- reading back ------------------------------------------------------------------------------------------


def _cut_text(text: str) -> tuple[str, str | None, str | None]:
    """The text before <|python_tag|>, the text after it (None without a tag), and the stop."""
    text = text.removeprefix("<|begin_of_text|>").removeprefix(_HEADER)
    stop = None
    for name, kind in (("<|eot_id|>", "eot"), ("<|eom_id|>", "eom"), ("<|end_of_text|>", None)):
        if text.endswith(name):
            text, stop = text.removesuffix(name), kind
            break
    before, tag, after = text.partition("<|python_tag|>")
    return before, after if tag else None, stop


def _cut_ids(ids: list[int], tokenizer: Tokenizer | None) -> tuple[str, str | None, str | None]:
    """As `_cut_text`, for token ids."""
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
