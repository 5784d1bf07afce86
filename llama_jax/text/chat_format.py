"""The chat format of a model: it encodes dialogs as token ids, and parses the model's answers into messages.

There are two kinds. `Llama3Format` is Meta's reference format (`chat`). `TemplateFormat` is the model's own chat
template, with the ids of transformers' `apply_chat_template`. `choose` picks one of them for sampling, training,
evaluation and export alike.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

from llama_jax.text import alignment, chat, chat_template, control_tokens, llama3_template, rendering, tool_calls
from llama_jax.text.chat_template import ChatTemplate
from llama_jax.text.messages import (
    Messages,
    check_list,
    check_reasoning,
    check_tools,
    check_written,
    is_parts,
    plain_messages,
    with_text,
)
from llama_jax.text.tokenizer import Tokenizer

AUTO, LLAMA3 = "auto", "llama3"

_START, _END = control_tokens.MARKS
_SPOKEN = re.compile(f"[{rendering.SPOKEN_START}{rendering.SPOKEN_END}]")
_PROBE = "zq7"  # content of an assistant's message that is rendered to find the end of a turn

Date = tuple[int, int, int]


class ChatFormat(Protocol):
    """The interface of chat formats.

    Attributes:
        name: "llama3" or "template".
        template: the template that is saved with the model, so that others write the same dialogs. None if it would be
            Meta's reference format and the tokenizer lacks its control tokens.
        fingerprint: hash of everything that ids depend on besides the tokenizer; "" for Meta's reference format.
        stop_tokens: ids that end an answer in this format, in addition to those of the tokenizer.
    """

    name: str

    @property
    def template(self) -> ChatTemplate | None: ...  # noqa: D102

    @property
    def fingerprint(self) -> str: ...  # noqa: D102

    @property
    def stop_tokens(self) -> tuple[int, ...]: ...  # noqa: D102

    def encode(
        self, messages: Messages, *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """Returns the ids of a dialog. A message that `Llama.chat` returned keeps the ids that were generated."""

    def encode_for_training(
        self, messages: Messages, *, tools: Sequence[Any] | None = None, learn: Sequence[bool] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Returns the ids of a whole dialog and a mask that is True for the assistant's tokens.

        `learn` has one flag for each message; the mask leaves out the assistant's messages whose flag is False.
        """

    def parse(self, ids: Iterable[int]) -> dict[str, Any]:
        """Parses the ids of an answer into a message.

        It has `role`, `content` and `tool_calls` in OpenAI's schema, and `tokens`, which `encode` uses for it later.
        """


def choose(
    tokenizer: Tokenizer, own: ChatTemplate | str | None, setting: str = AUTO, *, date: Date | None = None
) -> ChatFormat:
    """The chat format of a model.

    Args:
        tokenizer: tokenizer of the model.
        own: the model's own template, also as its Jinja source alone, or None.
        setting: "auto" is the model's own template, or Meta's reference format if it has none. "llama3" is the
            reference format. Anything else is the path of a file that holds a Jinja template.
        date: the day that a template's `strftime_now` returns; None is the current day.

    Raises:
        ConfigError: the setting is neither of the two names nor a file.
        ValueError: a template file that cannot be read.
    """
    if setting == LLAMA3:
        return Llama3Format(tokenizer)
    if isinstance(own, str):
        own = ChatTemplate({chat_template.DEFAULT: own}, tokens_of(tokenizer))
    if setting != AUTO:
        own = chat_template.read_file(setting, own.tokens if own else tokens_of(tokenizer))
    # The template that this package writes into its exports is the reference format itself.
    if own is None or set(own.sources.values()) == {llama3_template.CHAT_TEMPLATE}:
        return Llama3Format(tokenizer)
    return TemplateFormat(tokenizer, own, date=date)


def tokens_of(tokenizer: Tokenizer) -> dict[str, str]:
    """The variables of special tokens for a template, for models whose files do not define them."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    return {name: tokenizer.decode([i]) for name, i in ids.items() if i is not None}


class Llama3Format:
    """Meta's reference format; see `chat`."""

    name = LLAMA3
    fingerprint = ""
    stop_tokens: tuple[int, ...] = ()

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Takes a tokenizer. One without the format's control tokens is refused when a dialog is encoded."""
        self.tokenizer = tokenizer
        fits = llama3_template.fits(tokenizer.vocabulary)
        source = {chat_template.DEFAULT: llama3_template.CHAT_TEMPLATE}
        self.template = ChatTemplate(source, tokens_of(tokenizer)) if fits else None

    def encode(
        self, messages: Messages, *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """Returns the ids of a dialog; errors as in `chat.encode_dialog`."""
        generated = _generated(messages, self.parse, self.tokenizer.vocab_size, self.tokenizer.stop_tokens)
        return chat.encode_dialog(
            self.tokenizer, messages, tools=tools, add_generation_prompt=add_generation_prompt, generated=generated
        )[0]

    def encode_for_training(
        self, messages: Messages, *, tools: Sequence[Any] | None = None, learn: Sequence[bool] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Returns the ids of a dialog and a mask of the assistant's tokens; errors as in `chat.encode_dialog`."""
        check_reasoning(check_list(messages), learn)
        return chat.encode_dialog(self.tokenizer, messages, tools=tools, add_generation_prompt=False, learn=learn)

    def parse(self, ids: Iterable[int]) -> dict[str, Any]:
        """Parses an answer into a message; see `chat.parse_assistant`."""
        tokens = _to_stop(ids, self.tokenizer.stop_tokens)
        message = chat.parse_assistant(tokens, tokenizer=self.tokenizer)
        return {**message, "tool_calls": tool_calls.with_ids(message["tool_calls"]), "tokens": tokens}


class TemplateFormat:
    """A model's own chat template.

    Ids are those of `apply_chat_template` in transformers. Contents stay text: a control token's name in a message or a
    tool is marked before rendering, and is then encoded as plain text. The ids are then those of
    `apply_chat_template(..., sanitize_control_tokens=True)`.
    """

    name = "template"

    def __init__(self, tokenizer: Tokenizer, own: ChatTemplate, *, date: Date | None = None) -> None:
        """Takes a tokenizer, a template, and the day that `strftime_now` returns (None is the current day)."""
        self.tokenizer = tokenizer
        self.template = own
        self.date = date

    @property
    def fingerprint(self) -> str:
        """Hash of the template, its tokens and the date that it reads."""
        dated = any("strftime_now" in source for source in self.template.sources.values())
        return self.template.fingerprint + (f" {self.date}" if dated else "")

    @functools.cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """The control token that the template writes after the assistant's text, if there is one."""
        name = self._names.search(self._after_probe(add_generation_prompt=False))
        return (self.tokenizer.special_tokens[name[0]],) if name else ()

    @functools.cached_property
    def _always_prompts(self) -> bool:
        """True if the template ends every dialog with a generation prompt, as the first one of Llama 3 does."""
        after = self._after_probe(add_generation_prompt=False)
        name = self._names.search(after)
        return (
            after == self._after_probe(add_generation_prompt=True)
            and name is not None
            and bool(after[name.end() :].strip())
        )

    def _after_probe(self, *, add_generation_prompt: bool) -> str:
        """The text that the template writes after the last message of the assistant, or "" if it drops the message."""
        dialog = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
        try:
            text = self._render(dialog, None, add_generation_prompt=add_generation_prompt).text
        except ValueError:
            return ""
        return text.rpartition(_PROBE)[2] if _PROBE in text else ""

    def encode(
        self, messages: Messages, *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """Returns the ids of a dialog.

        A message that `Llama.chat` returned is encoded as its `tokens`, if the template renders the part before them
        unchanged.

        Raises:
            ValueError: no dialog, or one that the template refuses; the message has the template's reason.
            ConfigError: the template cannot be used.
        """
        stops = (*self.tokenizer.stop_tokens, *self.stop_tokens) if _have_tokens(messages) else ()
        generated = _generated(messages, self.parse, self.tokenizer.vocab_size, stops)
        cuts = [cut for i in generated for cut in ((i, True), (i + 1, False))]
        rendered = self._render(messages, tools, add_generation_prompt=add_generation_prompt, cuts=cuts)
        ids: list[int] = []
        at = 0
        for tokens, before, after in zip(generated.values(), rendered.cuts[::2], rendered.cuts[1::2], strict=True):
            closing = self.tokenizer.decode(tokens[-1:])
            place = rendered.text.rfind(closing, before.length, after.length)
            if before.common == before.length and after.common == after.length and place >= 0:
                ids += self._ids(rendered.text[at : before.length], rendered.marked) + tokens
                at = place + len(closing)
        return ids + self._ids(rendered.text[at:], rendered.marked)

    def encode_for_training(
        self, messages: Messages, *, tools: Sequence[Any] | None = None, learn: Sequence[bool] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Returns the ids of a whole dialog and a mask that is True for the tokens that the assistant says.

        The assistant's text is the part that its message adds to the rendering after the generation prompt, up to and
        including the last control token; white space after that belongs to the template. A template with the tag
        {% generation %} marks the assistant's text itself. An assistant's message that begins the dialog is not in the
        mask, because no prompt precedes it.

        Raises:
            ValueError: no dialog, one that the template refuses, one whose tools or calls it leaves out, or one in
                which the rendering of the longer dialog does not begin with that of the shorter one.
            ConfigError: the template cannot be used.
        """
        speakers = [i for i, message in enumerate(plain_messages(messages)) if message["role"] == "assistant"]
        if learn is not None and len(learn) != len(messages):
            raise ValueError(f"learn must have one flag for each of the {len(messages)} messages, got {len(learn)}")
        check_reasoning(messages, learn, self.template.source(tools))
        tagged = self._tagged(messages, tools, len(speakers))
        rendered, spans = tagged or self._added(messages, tools, speakers)
        check_written(tools or (), rendered.text, "tools: the tool")
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []  # in bytes of the rendering
        for piece in self._pieces(rendered.text, rendered.marked):
            start = alignment.length(rendered.text[: piece.start])
            tokens = [self.tokenizer.decode_bytes([i]) for i in piece.ids]
            own = alignment.byte_offsets(alignment.utf8(piece.text), tokens)
            ids += piece.ids
            offsets += [(start + first, start + last) for first, last in own]
        mask = [False] * len(ids)
        for speaker, (start, stop) in zip(speakers, spans, strict=True):
            if learn is None or learn[speaker]:
                if start < stop:
                    calls = messages[speaker].get("tool_calls") or ()
                    check_written(calls, rendered.text[start:stop], f"messages[{speaker}]: the call of")
                first, last = alignment.length(rendered.text[:start]), alignment.length(rendered.text[:stop])
                inside = [k for k, (begin, end) in enumerate(offsets) if begin < last and end > first]
                for k in inside if tagged else self._without_space(inside, ids):
                    mask[k] = True
        return ids, mask

    def parse(self, ids: Iterable[int]) -> dict[str, Any]:
        """Parses an answer into a message. Tool calls may have any of the forms in `tool_calls`."""
        stops = (*self.tokenizer.stop_tokens, *self.stop_tokens)
        tokens = _to_stop(ids, stops)
        said = tokens[:-1] if tokens and tokens[-1] in stops else tokens
        content, calls = tool_calls.parse(self.tokenizer.decode(said))
        if not calls:  # the name of a control token is text where it was generated as text
            content = self.tokenizer.decode(said, skip_special=True)
        content = self._names.sub("", content) if calls else content
        return {
            "role": "assistant",
            "content": content,
            "tool_calls": tool_calls.with_ids(calls),
            "tokens": tokens,
        }

    def render(
        self, messages: Messages, *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = True
    ) -> str:
        """Returns the text of a dialog, in which control tokens are written as their names, as in other libraries.

        Errors are those of `encode`.
        """
        return self._render(messages, tools, add_generation_prompt=add_generation_prompt, marked=False).text

    # ---- rendering ----

    def _render(
        self,
        messages: Messages,
        tools: Sequence[Any] | None,
        *,
        add_generation_prompt: bool,
        cuts: Sequence[tuple[int, bool]] = (),
        mark: bool = False,
        marked: bool | None = None,
    ) -> _Rendered:
        """Renders a dialog. `marked` marks names of control tokens in its strings; None marks them if there are any."""
        tools = check_tools(tools)
        source = self.template.source(tools)
        dialog = plain_messages(messages, keeps_developer="developer" in source)
        builtin = [tool for tool in tools if isinstance(tool, str)]
        if builtin and "builtin_tools" not in source:
            raise ValueError(
                f"the chat template has no built-in tools: give {builtin[0]!r} as the schema of a function"
            )
        inputs: dict[str, Any] = {
            "messages": dialog,
            "tools": [tool for tool in tools if not isinstance(tool, str)] or None,
        }
        inputs |= {"builtin_tools": builtin} if builtin else {}
        if marked is None:
            marked = any(self._names.search(text) for text in control_tokens.strings(inputs))
        if marked:
            inputs = control_tokens.mark(inputs, self._names)
        variables = {
            **self.template.tokens,
            **inputs,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        parts = [str(message["content"]) for message in inputs["messages"] if is_parts(message.get("content"))]
        try:
            rendered = rendering.render(source, variables, cuts=cuts, mark=mark, date=self.date)
            if not any(text in rendered.text for text in parts):
                return _Rendered(rendered.text, rendered.cuts, marked)
        except rendering.Refused:
            if not parts:
                raise
        # The template takes only strings as contents.
        joined = [with_text(message) for message in dialog]
        return self._render(
            joined, tools, add_generation_prompt=add_generation_prompt, cuts=cuts, mark=mark, marked=marked
        )

    def _tagged(
        self, messages: Messages, tools: Sequence[Any] | None, count: int
    ) -> tuple[_Rendered, list[tuple[int, int]]] | None:
        """The rendering, and the spans that {% generation %} encloses; None unless there are `count` spans."""
        if not re.search(r"\{%-?\s*generation\s*-?%\}", self.template.source(tools)):
            return None
        rendered = self._render(messages, tools, add_generation_prompt=False)
        parts = _SPOKEN.split(self._render(messages, tools, add_generation_prompt=False, mark=True).text)
        if "".join(parts) != rendered.text or len(parts) != 2 * count + 1:
            return None
        places = [0]
        for part in parts:
            places.append(places[-1] + len(part))
        return rendered, [(places[k], places[k + 1]) for k in range(1, len(parts), 2)]

    def _added(
        self, messages: Messages, tools: Sequence[Any] | None, speakers: Sequence[int]
    ) -> tuple[_Rendered, list[tuple[int, int]]]:
        """The rendering and the span that each of the assistant's messages adds to it."""
        cuts = [cut for i in speakers if i for cut in ((i, False), (i, True), (i + 1, False))]
        rendered = self._render(messages, tools, add_generation_prompt=False, cuts=cuts)
        places = dict(zip(cuts, rendered.cuts, strict=True))
        spans = []
        for i in speakers:
            if i == 0:
                spans.append((0, 0))
                continue
            prompt, before = places[i, True], places[i, False]
            start = prompt.length
            if prompt.common < prompt.length:
                # The prompt may go on, for example with <think>, where the message does not.
                start = max(self._end(before, i, rendered.text, exactly=True), prompt.common)
            if self._always_prompts:
                names = self._names.finditer(rendered.text, start)
                ends = (name.end() for name in names if rendered.text[name.start() - 1] != _START)
                spans.append((start, next(ends)))
            else:
                spans.append((start, self._end(places[i + 1, False], i + 1, rendered.text)))
        return rendered, spans

    def _end(self, cut: rendering.Cut, count: int, text: str, *, exactly: bool = False) -> int:
        """The position in the rendering of the whole dialog where its first messages end.

        Some templates write one more control token at the end of a whole dialog. It is no part of the messages, and is
        allowed unless `exactly`.

        Raises:
            ValueError: the rendering of the first messages is not the beginning of the whole.
        """
        if cut.common == cut.length:
            return cut.length
        bare = cut.tail.rstrip()
        last = next((match for match in self._names.finditer(bare) if match.end() == len(bare)), None)
        if last and not exactly and cut.length - len(cut.tail) + last.start() <= cut.common:
            return cut.length - len(cut.tail) + last.start()
        raise ValueError(
            f"the chat template writes the first {count} messages in another way when more follow (from character "
            f"{cut.common:,} on: {text[cut.common : cut.common + 40]!r}), so that the assistant's tokens cannot be "
            "distinguished from the others"
        )

    def _without_space(self, places: Sequence[int], ids: Sequence[int]) -> Sequence[int]:
        """The positions of tokens, without those of white space after the last control token among them."""
        control = set(self.tokenizer.special_tokens.values())
        last = next((n for n in range(len(places) - 1, -1, -1) if ids[places[n]] in control), None)
        if last is not None and not self.tokenizer.decode([ids[k] for k in places[last + 1 :]]).strip():
            return places[: last + 1]
        return places

    # ---- ids ----

    @property
    def _names(self) -> re.Pattern[str]:
        return control_tokens.pattern(self.tokenizer)

    @functools.cached_property
    def _marks(self) -> re.Pattern[str]:
        """Matches a marked name of a control token, or a mark that the template has separated from its name."""
        return re.compile(f"{_START}({self._names.pattern}){_END}|[{_START}{_END}]")

    def _ids(self, text: str, marked: bool) -> list[int]:
        return [i for piece in self._pieces(text, marked) for i in piece.ids]

    def _pieces(self, text: str, marked: bool) -> Iterator[_Piece]:
        """Splits the rendering at its marks, and yields each piece with its ids."""
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
        """Encodes a piece. Only the first of a rendering gets the space that some tokenizers put before a text."""
        encode = functools.partial(self.tokenizer.encode, special_tokens=control)
        if start:
            newline, ids = encode("\n"), encode("\n" + text)
            if ids[: len(newline)] == newline:
                return _Piece(text, start, ids[len(newline) :])
        return _Piece(text, start, encode(text))


class _Rendered(NamedTuple):
    """A rendering.

    Attributes:
        text: the rendered text.
        cuts: positions in it (see `rendering.Cut`).
        marked: True if names of control tokens in it are marked.
    """

    text: str
    cuts: list[rendering.Cut]
    marked: bool


class _Piece(NamedTuple):
    """A part of a rendering: its text, its position in the rendering, and its ids."""

    text: str
    start: int
    ids: list[int]


def _generated(
    messages: Any, parse: Callable[[list[int]], dict[str, Any]], vocab_size: int, stops: Sequence[int]
) -> dict[int, list[int]]:
    """The ids of messages that a model generated and that were not edited, by index of the message."""
    kept = {}
    for i, message in enumerate(messages if _have_tokens(messages) else ()):
        tokens = message.get("tokens") if isinstance(message, Mapping) and message.get("role") == "assistant" else None
        if _are_ids(tokens, vocab_size) and tokens[-1] in stops and tool_calls.same(parse(tokens), message):
            kept[i] = list(tokens)
    return kept


def _are_ids(value: Any, vocab_size: int) -> TypeGuard[list[int]]:
    """True if a value is a list of at least one token id of the vocabulary."""
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(type(i) is int and 0 <= i < vocab_size for i in value)


def _have_tokens(messages: Any) -> bool:
    listed = isinstance(messages, list | tuple)
    return listed and any(isinstance(message, Mapping) and "tokens" in message for message in messages)


def _to_stop(ids: Iterable[int], stops: Sequence[int]) -> list[int]:
    """The ids up to the first stop token, and that one."""
    tokens = [int(i) for i in ids]
    return tokens[: next((k for k, i in enumerate(tokens) if i in stops), len(tokens)) + 1]
