"""A dialog at the terminal: `infer --chat`.

At a terminal, prompt_toolkit edits the line, keeps a history and takes pasted text of several lines as one message.
Input from a file or a pipe is read line by line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from llama_jax.cli import exits
from llama_jax.errors import nearest, one_line
from llama_jax.files import expanded, read_small, write_json
from llama_jax.text.tokenizer import require_tokenizer

if TYPE_CHECKING:
    from llama_jax.infer.llama import Llama

HELP = """\
/help           this list
/system TEXT    another system message, and a new dialog; without TEXT none
/reset          a new dialog with the same system message
/undo           take back the last question and its answer
/save FILE      write the dialog as JSON, as --messages reads it
/load FILE      go on with the dialog of a file
/speed          tokens/s after each answer, on or off
/quit           leave; so does Ctrl-D
Ctrl-C stops an answer. Alt-Enter starts a new line in a message."""
_HINT = "/help lists the commands, /quit or Ctrl-D leaves, Ctrl-C stops an answer"
_NEW = 512  # default limit of an answer, in tokens
_MOST_BYTES = 100_000_000  # of a file of /load


def run(llama: Llama, system: str | None, settings: Mapping[str, Any], *, verbose: bool = False) -> int:
    """Talk until /quit or the end of the input, and return the exit status."""
    require_tokenizer(llama.tokenizer, "--chat")
    with exits.surviving_ctrl_c():
        return Chat(llama, system, settings, speed=verbose).run(_reader())


class Chat:
    """A dialog with a model, and the commands that change it.

    Attributes:
        messages: The dialog so far, the system message included.
    """

    def __init__(self, llama: Llama, system: str | None, settings: Mapping[str, Any], *, speed: bool = False):
        """An empty dialog.

        Args:
            llama: The model, with a tokenizer.
            system: The system message, or None.
            settings: Arguments of `Llama.stream_chat`.
            speed: Print tokens/s after each answer.
        """
        self._llama, self._settings, self._speed = llama, dict(settings), speed
        self._first = _system(system)
        self.messages: list[dict[str, Any]] = list(self._first)
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: _say(HELP),
            "/system": self._set_system,
            "/reset": lambda _: self._reset(),
            "/undo": lambda _: self._undo(),
            "/save": self._save,
            "/load": self._load,
            "/speed": lambda _: self._toggle_speed(),
            "/?": lambda _: _say(HELP),  # as in ollama
            "/clear": lambda _: self._reset(),
        }

    def run(self, read: Callable[[str], str]) -> int:
        """Read messages and commands with `read(prompt)` until /quit or the end of the input."""
        _say(_HINT)
        while True:
            try:
                line = read("> ").strip()
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                _say(f"\n{_HINT}")
                continue
            if line in ("/quit", "/exit", "/bye"):
                return 0
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._ask(line)

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        command = self._commands.get(name)
        if command is None:
            _say(f"unknown command {one_line(name)}{nearest(name, list(self._commands), cutoff=0.6) or ':'} {_HINT}")
            return
        try:
            command(argument.strip())
        except (ValueError, OSError) as error:
            _say(f"error: {one_line(error)}")

    def _ask(self, text: str) -> None:
        """Print the answer to a message while it is generated. An answer that Ctrl-C stopped stays in the dialog."""
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            room = self._llama.config.max_seq_len - len(self._llama.encode_dialog(asked, self._settings.get("tools")))
        except ValueError as error:
            _say(f"error: {one_line(error)}")
            return
        if room < 1:
            _say(f"the dialog fills the model's {self._llama.config.max_seq_len:,} positions: /reset or /undo")
            return
        settings = {**self._settings, "max_new_tokens": min(self._settings.get("max_new_tokens") or _NEW, room)}
        answer, start = "", time.perf_counter()
        pieces = self._llama.stream_chat(asked, **settings)
        try:
            for piece in pieces:
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        print(flush=True)
        result = pieces.result
        if self._speed:
            tokens, seconds = len(result.tokens) if result else 0, time.perf_counter() - start
            _say(f"[{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s]")
        message: dict[str, Any] = {"role": "assistant", "content": answer}
        # The ids let the next turn find the answer in the cache. Those of a stop string are not part of the answer.
        if result and result.finish_reason == "stop" and not isinstance(result.stop, str):
            message = self._llama.answer(result)
        self.messages = [*asked, message]

    def _set_system(self, text: str) -> None:
        self._first = _system(text)
        self._reset()

    def _reset(self) -> None:
        self.messages = list(self._first)

    def _undo(self) -> None:
        last = max((i for i, message in enumerate(self.messages) if message.get("role") == "user"), default=None)
        if last is None:
            raise ValueError("there is no question to take back")
        del self.messages[last:]

    def _save(self, file: str) -> None:
        if not file:
            raise ValueError("/save needs the name of a file")
        path = expanded(file)
        if path.exists():
            raise ValueError(f"{path} exists: name another file")
        write_json(path, [{k: v for k, v in message.items() if k != "tokens"} for message in self.messages])
        _say(f"{path}: {len(self.messages)} messages")

    def _load(self, file: str) -> None:
        if not file:
            raise ValueError("/load needs the name of a file")
        try:
            messages = json.loads(read_small(expanded(file), max_bytes=_MOST_BYTES))
        except RecursionError:
            raise ValueError(f"{file} is nested too deeply") from None
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError(f'{file} must be a JSON list of messages such as [{{"role": "user", "content": "Hello"}}]')
        self._llama.encode_dialog(messages)  # raises where the model's format cannot hold them
        self.messages = messages
        _say(f"{file}: {len(messages)} messages")

    def _toggle_speed(self) -> None:
        self._speed = not self._speed
        _say(f"tokens/s {'on' if self._speed else 'off'}")


def _system(text: str | None) -> list[dict[str, Any]]:
    return [{"role": "system", "content": text}] if text else []


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _reader() -> Callable[[str], str]:
    """The function that reads a message: prompt_toolkit's at a terminal, else `input`."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    history: History = InMemoryHistory()
    try:
        folder = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "llama_jax"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "chat_history"
        path.touch(mode=0o600)
        if os.access(path, os.R_OK | os.W_OK):
            history = FileHistory(path)
    except OSError:
        pass  # a history of this session only
    session: PromptSession[str] = PromptSession(multiline=True, key_bindings=bindings, history=history)
    return session.prompt
