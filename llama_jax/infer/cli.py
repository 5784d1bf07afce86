"""infer.py's flags: prompts from the command line, a file or a dialog; text or JSON out. No jax until it is needed."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llama_jax.errors import ConfigError, nearest, one_line

if TYPE_CHECKING:
    from llama_jax.infer.llama import Llama

_EXAMPLES = """\
examples:
  python infer.py --model runs/quickstart --prompt "Once upon a time"
  python infer.py --model runs/sft_quickstart --ask "What does math.gcd do?"
  python infer.py --model Llama-3.1-8B-Instruct --chat --temperature 0.7
  python infer.py --model Llama-3.1-8B --prompt_file prompts.txt --json > out.jsonl
"""
_CHAT_HELP = "/reset forgets the dialog, /quit or Ctrl-D leaves, Ctrl-C stops an answer"
_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the nearest flag."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (python infer.py --help lists the flags)", file=sys.stderr)
        sys.exit(2)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of a command line, without the program's name; leaves with status 2 and one line on any mistake."""
    parser = _Parser(
        prog="infer.py",
        description="Sample text from a Llama. A model's own defaults of sampling come before those in parentheses.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="PATH",
        help="a run folder of train.py, a Hugging Face folder or hub id, Meta's download, or a .gguf file",
    )
    add("--adapter", metavar="PATH", help="a LoRA adapter of that model, as peft writes it: its folder or hub id")
    add("--prompt", action="append", metavar="TEXT", help="text to continue; repeat it for several")
    add(
        "--prompt_file",
        metavar="FILE",
        help="a prompt a line, or with .jsonl one JSON value a line: a string, a list of token ids, or an object "
        'with "prompt"; - reads lines from standard input',
    )
    add("--ask", action="append", metavar="TEXT", help="a user's question to answer; repeat it for several, each alone")
    add("--chat", action="store_true", help=f"talk to it; {_CHAT_HELP}")
    add("--messages", metavar="FILE", help='a dialog as a JSON list of {"role": ..., "content": ...}')
    add("--system", metavar="TEXT", help="the system message of --ask and --chat")
    add("--max_new_tokens", type=int, metavar="N", help="for each prompt (128; in a dialog 512)")
    add("--temperature", type=float, metavar="X", help="0 takes the likeliest token each time (0.6)")
    add("--top_k", type=int, metavar="K", help="keep the K likeliest tokens; 0 is off (0)")
    add(
        "--top_p",
        type=float,
        metavar="P",
        help="keep the likeliest tokens up to this mass; 1 is off (0.9)",
    )
    add("--min_p", type=float, metavar="P", help="keep tokens P times as likely as the likeliest; 0 is off (0)")
    add("--repetition_penalty", type=float, metavar="X", help="above 1 avoids what was said; 1 is off (1)")
    add("--seed", type=int, default=0, metavar="N", help="of the first prompt; the next ones count on (0)")
    add("--batch_size", type=int, default=8, metavar="N", help="prompts that run together (8)")
    add("--json", action="store_true", help="one JSON object a prompt: text, tokens, logprobs, finish_reason, ...")
    add("--dtype", metavar="NAME", help="float32 or bfloat16 (the checkpoint's own, where the machine is fast at it)")
    add("--quantize", metavar="NAME", help="int8 or int4: round the matrices of all layers while they are read")
    add("--mesh", metavar="AXIS=N,...", help="devices: data=1,tensor=2 (one device)")
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        word = unknown[0].partition("=")[0]
        parser.error(f"unknown argument {word!r}{nearest(word, flags)}")
    if options.model is None:
        parser.error("no model: give --model PATH, a run folder, a Hugging Face folder or hub id, or a .gguf file")
    modes = [name for name in ("prompt", "prompt_file", "ask", "chat", "messages") if getattr(options, name)]
    if len(modes) != 1:
        given = " and ".join(f"--{name}" for name in modes) or "nothing"
        parser.error(f"give one of --prompt, --prompt_file, --ask, --chat and --messages; got {given}")
    if options.json and options.chat:
        parser.error("--json does not go with --chat; use --messages FILE --json")
    if options.system is not None and not (options.chat or options.ask):
        parser.error("--system goes with --ask and --chat; put a system message into the file of --messages")
    return options


def main(argv: Sequence[str]) -> int:
    """Do what the flags say; returns the exit status: 2 after an error, which is one line on standard error."""
    options = parse(argv)
    try:
        with quiet_pipe():
            return _run(options)
    except (ConfigError, ValueError, OSError) as error:
        print("error: " + one_line(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace) -> int:
    prompts = _prompts(options)
    dialogs = [_messages(options.messages)] if options.messages else _asked(options.system, options.ask or ())
    mesh = mesh_sizes(options.mesh)
    settings = {name: getattr(options, name) for name in _SETTINGS if getattr(options, name) is not None}

    from llama_jax.sampling_params import SamplingParams

    SamplingParams(**settings)  # an absurd value is told before the weights are read
    from llama_jax import compilation_cache
    from llama_jax.infer.llama import load

    compilation_cache.enable()
    llama = load(options.model, dtype=options.dtype, quantize=options.quantize, mesh=mesh, adapters=options.adapter)
    settings["max_new_tokens"] = options.max_new_tokens or (512 if options.chat or dialogs else 128)
    settings["seed"] = options.seed
    if options.chat:
        return _chat(llama, options.system, settings)
    start = time.perf_counter()
    ids = llama.tokenizer is None
    if dialogs and options.json:
        seeded = [settings | {"seed": options.seed + i} for i in range(len(dialogs))]
        results = [llama.chat(messages, **own) for messages, own in zip(dialogs, seeded, strict=True)]
        _print_results(results, time.perf_counter() - start, as_json=True, ids=ids)
    elif dialogs:
        for i, messages in enumerate(dialogs):
            if len(dialogs) > 1:
                print(f"> {messages[-1]['content']}")
            _print_stream(llama.stream_chat(messages, **settings | {"seed": options.seed + i}))
    elif options.json or len(prompts) > 1:
        results = llama.generate(prompts, batch_size=options.batch_size, **settings)
        _print_results(results, time.perf_counter() - start, as_json=options.json, ids=ids)
    else:
        _print_stream(llama.stream(prompts[0], **settings))
    return 0


def _prompts(options: argparse.Namespace) -> list[str | list[int]]:
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens must be at least 1, got {options.max_new_tokens}")
    if options.prompt_file is None:
        return options.prompt or []
    path = Path(options.prompt_file)
    lines = _text(options.prompt_file).split("\n")
    prompts: list[Any] = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(line)
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}: line {number} is not JSON: {error}") from None
        value = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(value, (str, list)):
            raise ConfigError(f'{path}: line {number} must be a string, a list of ids, or an object with "prompt"')
        prompts.append(value)
    if not prompts:
        raise ConfigError(f"{path} holds no prompt: one a line")
    return prompts


def _text(file: str) -> str:
    """A UTF-8 file, or standard input for -. Lines end at a newline only: JSON may hold Unicode's other separators."""
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8: {error}") from None


def _messages(file: str) -> list[dict[str, Any]]:
    text = _text(file)
    try:
        messages = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f'{file} must be a JSON list of messages: [{{"role": "user", "content": "Hello"}}]')
    return messages


def _asked(system: str | None, questions: Sequence[str]) -> list[list[dict[str, Any]]]:
    """A dialog of each question."""
    first = [{"role": "system", "content": system}] if system else []
    return [[*first, {"role": "user", "content": question}] for question in questions]


def mesh_sizes(text: str | None) -> dict[str, int] | None:
    """What --mesh says: sizes by axis, or None without it."""
    if text is None:
        return None
    sizes = {}
    for part in text.split(","):
        axis, equals, size = part.strip().partition("=")
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise ConfigError(f"--mesh {text}: expected AXIS=N,..., such as data=1,tensor=2, got {part!r}") from None
    return sizes


def _print_results(results: Sequence[Any], seconds: float, *, as_json: bool, ids: bool) -> None:
    speed = round(sum(len(r.tokens) for r in results) / seconds, 2)  # of the whole call, compilation included
    for i, result in enumerate(results):
        if as_json:
            row = {
                "text": result.text,
                "tokens": result.tokens,
                "logprobs": result.logprobs,
                "finish_reason": result.finish_reason,
                "tokens_per_second": speed,
            }
            print(json.dumps(row, ensure_ascii=False), flush=True)
        else:
            shown = _shown(result.tokens if ids else result.text)
            print(f"{'' if i == 0 else chr(10)}=== prompt {i}\n{shown}", flush=True)


def _shown(piece: Any) -> str:
    """Text as it is; ids of a model without a tokenizer with spaces between them."""
    return piece if isinstance(piece, str) else " ".join(map(str, piece)) if isinstance(piece, list) else f"{piece} "


def _print_stream(pieces: Iterator[Any]) -> str:
    """Print pieces as they come, and a line's end; returns what was printed, also of an answer that Ctrl-C cut."""
    said = ""
    try:
        for piece in pieces:
            said += _shown(piece)
            print(_shown(piece), end="", flush=True)
    finally:
        print(flush=True)
    return said


def _chat(llama: Llama, system: str | None, settings: dict[str, Any]) -> int:
    first = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    if llama.tokenizer is None:
        raise ConfigError("--chat needs a tokenizer: put tokenizer.model or tokenizer.json in the model's folder")
    print(_CHAT_HELP, file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print(f"\n{_CHAT_HELP}", file=sys.stderr)
            continue
        if line in ("/quit", "/exit"):
            return 0
        if line == "/reset":
            messages = list(first)
        elif line.startswith("/"):
            print(f"unknown command {line.split()[0]}; {_CHAT_HELP}", file=sys.stderr)
        elif line:
            messages.append({"role": "user", "content": line})
            answer = _answer(llama, messages, settings)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


def _answer(llama: Llama, messages: list[dict[str, Any]], settings: dict[str, Any]) -> str | None:
    """Print the answer as it comes. What Ctrl-C left of it is the answer; None where there is no room for one."""
    used = len(llama.encode_dialog(messages))
    room = llama.config.max_seq_len - used
    if room < 1:
        print(f"the dialog fills the model's {llama.config.max_seq_len:,} positions: /reset", file=sys.stderr)
        return None
    settings = {**settings, "max_new_tokens": min(settings["max_new_tokens"], room)}
    said: list[str] = []
    try:
        for piece in llama.stream_chat(messages, **settings):
            said.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print(flush=True)
    return "".join(said)


class quiet_pipe:
    """Leave without a traceback, and with the shell's status for it, when the reader of our output has gone."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            kind = BrokenPipeError
        if kind is not None and issubclass(kind, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
