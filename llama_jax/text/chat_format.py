"""The chat format of a model: how a dialog becomes token ids, and how the model's answer becomes a message again.

There are two kinds. `Llama3Format` is Meta's reference format (`chat`). `TemplateFormat` is the model's own chat
template, with the ids of transformers' `apply_chat_template`. `choose` picks one; sampling, training, evaluation and
export all use it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from llama_jax.text import chat, chat_template, rendering, template, tool_calls
from llama_jax.text.chat_template import ChatTemplate
from llama_jax.text.messages import plain_messages
from llama_jax.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]

AUTO, LLAMA3 = "auto", "llama3"
_START, _END = "\U000f0000", "\U000f0001"  # around the name of a control token in a content; private-use characters
_SPOKEN = re.compile(f"[{rendering.SPOKEN_START}{rendering.SPOKEN_END}]")
_PROBE = "zq7"  # the content of an assistant's message by which the end of a turn is found


class ChatFormat(Protocol):
    """What every chat format can do."""

    name: str
    """"llama3" or "template"."""

    template: ChatTemplate | None
    """The template that goes with the model wherever it is saved, or None for Meta's reference format."""

    fingerprint: str
    """A hash of all that ids depend on besides the tokenizer."""

    stop_tokens: tuple[int, ...]
    """Ids that end an answer in this format, in addition to those of the tokenizer."""

    def encode(
        self, messages: Messages, *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """Return the ids of a dialog."""

    def encode_for_training(
        self, messages: Messages, *, tools: Sequence[Any] | None = None, learn: Sequence[bool] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a whole dialog and a mask that is True for the tokens that the assistant says.

        `learn` has one flag for each message; the mask leaves out the assistant's messages whose flag is False.
        """

    def parse(self, ids: Iterable[int]) -> dict[str, Any]:
        """Return the message that the ids of an answer stand for, with its tool calls; see `chat.parse_assistant`."""


def choose(tokenizer: Tokenizer, own: ChatTemplate | None, setting: str = AUTO) -> ChatFormat:
    """The chat format of a model.

    Args:
        tokenizer: of the model.
        own: the model's own template, or None.
        setting: "auto" takes the model's own template, and Meta's reference format where it has none; "llama3" takes
            the reference format; anything else is the path of a file that holds a Jinja template.

    Raises:
        ConfigError: a setting that is neither of the two names nor a file.
        ValueError: a template file that cannot be read.
    """
    if setting == LLAMA3:
        return Llama3Format(tokenizer)
    if setting != AUTO:
        own = chat_template.read_file(setting, own.tokens if own else tokens_of(tokenizer))
    # The template that this package writes is the reference format itself.
    if own is None or set(own.sources.values()) == {template.CHAT_TEMPLATE}:
        return Llama3Format(tokenizer)
    return TemplateFormat(tokenizer, own)


def tokens_of(tokenizer: Tokenizer) -> dict[str, str]:
    """The variables of special tokens for a template, where no file names them."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    return {name: tokenizer.decode([i]) for name, i in ids.items() if i is not None}


class Llama3Format:
    """Meta's reference format; see `chat`."""

    name = LLAMA3
    template = None
    fingerprint = ""
    stop_tokens = ()

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take the tokenizer; one without the format's control tokens is refused when a dialog is encoded."""
        self.tokenizer = tokenizer

    def encode(
        self, messages: Messages, *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """Return the ids of a dialog; see `chat.encode_dialog`."""
        return chat.encode_dialog(
            self.tokenizer, messages, tools=tools, add_generation_prompt=add_generation_prompt
        )[0]

    def encode_for_training(
        self, messages: Messages, *, tools: Sequence[Any] | None = None, learn: Sequence[bool] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a dialog and the mask of what the assistant says; see `chat.encode_dialog`."""
        return chat.encode_dialog(self.tokenizer, messages, tools=tools, add_generation_prompt=False, learn=learn)

    def parse(self, ids: Iterable[int]) -> dict[str, Any]:
        """Return the message that an answer stands for; see `chat.parse_assistant`."""
        return chat.parse_assistant(ids, tokenizer=self.tokenizer)


class TemplateFormat:
    """A model's own chat template.

    The ids are those of `apply_chat_template` in transformers, control tokens included. Contents stay text: where a
    message or a tool holds the name of a control token, the name is marked before it is rendered, and is encoded as the
    plain text that it is (`apply_chat_template(..., sanitize_control_tokens=True)` gives the same ids).
    """

    name = "template"

    def __init__(self, tokenizer: Tokenizer, own: ChatTemplate, *, date: tuple[int, int, int] | None = None) -> None:
        """Take a tokenizer and a template. `date`: year, month and day of `strftime_now`; None is the current day."""
        self.tokenizer = tokenizer
        self.template = own
        self.date = date

    @property
    def fingerprint(self) -> str:
        """A hash of the template, its tokens and the date that it sees."""
        dated = any("strftime_now" in source for source in self.template.sources.values())
        return self.template.fingerprint + (f" {self.date}" if dated else "")

    @functools.cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """The control token that the template writes after what the assistant says, if there is one."""
        dialog = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
        try:
            text = self._render(dialog, None, add_generation_prompt=False).text
        except rendering.Refused:
            return ()
        found = self._names.search(text.rpartition(_PROBE)[2]) if _PROBE in text else None
        return (self.tokenizer.special_tokens[found[0]],) if found else ()

    def encode(
        self, messages: Messages, *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """Return the ids of a dialog.

        A message of `Llama.chat` that has its `tokens` keeps them, if the template writes that message and what comes
        before it as it stands.

        Raises:
            ValueError: no dialog, or one that the template refuses, with its reason.
            ConfigError: a template that cannot be used.
        """
        generated = self._generated(messages)
        cuts = [cut for i in generated for cut in ((i, True), (i + 1, False))]
        found = self._render(messages, tools, add_generation_prompt=add_generation_prompt, cuts=cuts)
        ids: list[int] = []
        at = 0
        for number, (_, tokens) in enumerate(generated.items()):
            (start, start_common), (end, end_common) = found.cuts[2 * number], found.cuts[2 * number + 1]
            closing = self.tokenizer.decode(tokens[-1:])
            place = found.text.rfind(closing, start, end)
            if start == start_common and end == end_common and place >= 0:
                ids += self._ids(found.text[at:start]) + tokens
                at = place + len(closing)
        return ids + self._ids(found.text[at:])

    def encode_for_training(
        self, messages: Messages, *, tools: Sequence[Any] | None = None, learn: Sequence[bool] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a whole dialog and a mask that is True for the tokens that the assistant says.

        What an assistant's message adds to the rendering, after the generation prompt, is what the assistant says. It
        ends with the last control token in it; white space after that is the template's. A template with the tag
        {% generation %} says itself where the assistant speaks.

        Raises:
            ValueError: no dialog, one that the template refuses, or one in which the rendering of the longer dialog
                does not begin with that of the shorter one.
            ConfigError: a template that cannot be used.
        """
        speakers = [i for i, message in enumerate(plain_messages(messages)) if message["role"] == "assistant"]
        if learn is not None and len(learn) != len(messages):
            raise ValueError(f"learn must have one flag for each of the {len(messages)} messages, got {len(learn)}")
        text, spans = self._tagged(messages, tools, len(speakers)) or self._prefixed(messages, tools, speakers)
        ids, offsets = self._ids_with_offsets(text)
        mask = [False] * len(ids)
        for speaker, (start, stop) in zip(speakers, spans, strict=True):
            if learn is None or learn[speaker]:
                for k in self._spoken(ids, offsets, start, stop):
                    mask[k] = True
        return ids, mask

    def parse(self, ids: Iterable[int]) -> dict[str, Any]:
        """Return the message that an answer stands for.

        Returns:
            `role`, `content`, `tool_calls` in OpenAI's shape, and `tokens`, by which `encode` writes the same ids.
        """
        tokens = [int(i) for i in ids]
        stops = {*self.tokenizer.stop_tokens, *self.stop_tokens}
        end = next((k for k, i in enumerate(tokens) if i in stops), len(tokens))
        text = self.tokenizer.decode(tokens[:end])
        content, calls = tool_calls.parse(text)
        content = self._names.sub("", content) if calls else self.tokenizer.decode(tokens[:end], skip_special=True)
        return {"role": "assistant", "content": content, "tool_calls": calls, "tokens": tokens[: end + 1]}

    # ---- rendering ----

    def _render(
        self,
        messages: Messages,
        tools: Sequence[Any] | None,
        *,
        add_generation_prompt: bool,
        cuts: Sequence[tuple[int, bool]] = (),
        mark: bool = False,
    ) -> rendering.Rendering:
        source = self.template.source(tools)
        dialog = plain_messages(messages, keeps_developer="developer" in source)
        builtin = [tool for tool in tools or () if isinstance(tool, str)]
        functions = [tool for tool in tools or () if not isinstance(tool, str)]
        if builtin and "builtin_tools" not in source:
            raise ValueError(f"the chat template has no built-in tools: give {builtin[0]!r} as the schema of a function")
        variables: dict[str, Any] = {
            **self.template.tokens,
            "messages": dialog,
            "tools": functions or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **({"builtin_tools": builtin} if builtin else {}),
        }
        variables = _marked(variables, ("messages", "tools", "builtin_tools"), self._names)
        try:
            found = rendering.render(source, variables, cuts=cuts, mark=mark, date=self.date)
        except rendering.Refused:
            if not _has_parts(dialog):
                raise
        else:
            if not any(str(message["content"]) in found.text for message in variables["messages"] if _parts(message)):
                return found
        joined = [{**m, "content": "".join(p["text"] for p in m["content"])} if _parts(m) else m for m in dialog]
        return self._render(joined, tools, add_generation_prompt=add_generation_prompt, cuts=cuts, mark=mark)

    def _generated(self, messages: Messages) -> dict[int, list[int]]:
        """The tokens of those messages that are answers of the model, as `parse` has them, by their place."""
        found = {}
        for i, message in enumerate(messages if isinstance(messages, list | tuple) else ()):
            tokens = message.get("tokens") if isinstance(message, Mapping) else None
            if tool_calls.are_tokens(tokens, self.tokenizer.vocab_size) and tool_calls.same(self.parse(tokens), message):
                if tokens[-1] in (*self.tokenizer.stop_tokens, *self.stop_tokens):
                    found[i] = list(tokens)
        return found

    # ---- what the assistant says ----

    def _tagged(self, messages: Messages, tools: Sequence[Any] | None, count: int) -> Any:
        """The rendering and the spans that {% generation %} encloses; None where they are not one for each message."""
        if not re.search(r"\{%-?\s*generation\s*-?%\}", self.template.source(tools)):
            return None
        text = self._render(messages, tools, add_generation_prompt=False).text
        parts = _SPOKEN.split(self._render(messages, tools, add_generation_prompt=False, mark=True).text)
        if "".join(parts) != text or len(parts) != 2 * count + 1:
            return None
        places = [0]
        for part in parts:
            places.append(places[-1] + len(part))
        return text, [(places[k], places[k + 1]) for k in range(1, len(parts), 2)]

    def _prefixed(
        self, messages: Messages, tools: Sequence[Any] | None, speakers: Sequence[int]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendering and the span that each of the assistant's messages adds to it."""
        cuts = [cut for i in speakers for cut in ((i, False), (i, True), (i + 1, False))]
        found = self._render(messages, tools, add_generation_prompt=False, cuts=[c for c in cuts if c[0] > 0])
        places = dict(zip((c for c in cuts if c[0] > 0), found.cuts, strict=True))
        spans = []
        for i in speakers:
            if i == 0:  # nothing asks for it, and most templates do not write an empty dialog
                spans.append((0, 0))
                continue
            for cut in ((i, False), (i + 1, False)):
                length, common = places[cut]
                if common < length:
                    raise ValueError(
                        f"the chat template writes the first {cut[0]} messages otherwise when more follow (from "
                        f"character {common:,} on: {found.text[common : common + 40]!r}), so that what the assistant "
                        "says cannot be told from the rest"
                    )
            # A generation prompt may go on, for example with <think>, where the message does not.
            spans.append((max(places[i, False][0], places[i, True][1]), places[i + 1, False][0]))
        return found.text, spans

    def _spoken(
        self, ids: Sequence[int], offsets: Sequence[tuple[int, int]], start: int, stop: int
    ) -> Iterable[int]:
        """The places of the tokens between two characters, without white space after the last control token."""
        inside = [k for k, (first, last) in enumerate(offsets) if first < stop and last > start and last > first]
        control = set(self.tokenizer.special_tokens.values())
        last = next((n for n in range(len(inside) - 1, -1, -1) if ids[inside[n]] in control), None)
        if last is not None and not self.tokenizer.decode([ids[k] for k in inside[last + 1 :]]).strip():
            return inside[: last + 1]
        return inside

    # ---- ids ----

    @functools.cached_property
    def _names(self) -> re.Pattern[str]:
        """Any name of a control token, the longest first."""
        names = sorted(self.tokenizer.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    @functools.cached_property
    def _marks(self) -> re.Pattern[str]:
        """A marked name of a control token, or a mark that a template has separated from its name."""
        return re.compile(f"{_START}({self._names.pattern}){_END}|[{_START}{_END}]")

    def _ids(self, text: str, marked: bool) -> list[int]:
        return [i for piece in self._pieces(text, marked) for i in piece.ids]

    def _pieces(self, text: str, marked: bool) -> Iterator[_Piece]:
        """The rendering cut at its marks, each piece with its ids."""
        at = 0
        for match in self._marks.finditer(text) if marked else ():
            if at < match.start():
                yield self._piece(text[at : match.start()], at, control=True)
            if match[1]:
                yield self._piece(match[1], match.start(1), control=False)
            at = match.end()
        if at < len(text):
            yield self._piece(text[at:], at, control=True)

    def _piece(self, text: str, start: int, *, control: bool) -> _Piece:
        """A piece and its ids, without the space that some tokenizers put before a text, unless it is the first."""
        encode = functools.partial(self.tokenizer.encode, special_tokens=control)
        newline = encode("\n")
        ids = encode("\n" + text) if start else []
        same = ids[: len(newline)] == newline
        return _Piece(text, start, ids[len(newline) :] if start and same else encode(text))


class _Piece(NamedTuple):
    """Part of a rendering: its text, its place in it, and its ids."""

    text: str
    start: int
    ids: list[int]
