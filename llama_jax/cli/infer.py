"""`infer`: prompts from the command line, a file or a dialog; text or JSON out. No jax until the flags are checked."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.cli import chat, parser
from llama_jax.errors import ConfigError, brief

if TYPE_CHECKING:
    from llama_jax.infer.llama import Llama, Result

_EXAMPLES = """\
examples:
  PROGRAM --model runs/quickstart --prompt "Once upon a time"
  PROGRAM --model runs/sft_quickstart --ask "What does math.gcd do?"
  PROGRAM --model Llama-3.1-8B-Instruct --chat --temperature 0.7
  PROGRAM --model Llama-3.1-8B --prompt_file prompts.txt --json > out.jsonl

Flags of llama.cpp, vLLM and transformers work where they mean the same: -m, -p, -f, -n, -s, --temp, --n_predict,
--max_tokens, --lora, --repeat_penalty, -sys. Hyphens and underscores are the same.
"""
_ALIASES = {
    "-p": "--prompt",
    "-f": "--prompt_file",
    "--file": "--prompt_file",
    "-sys": "--system",
    "--system_prompt": "--system",
    "-cnv": "--chat",
    "--conversation": "--chat",
    "--interactive": "--chat",
    "-b": "--batch_size",
}
_NO_STRINGS = "a text ends at the model's stop tokens or after --max_new_tokens; stop strings are not available"
_MOST_BYTES = 1 << 30  # of a file of prompts or messages


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of the command line; ConfigError for any mistake."""
    flags = parser.Parser("infer", "Sample text from a Llama.", examples=_EXAMPLES)
    flags.add_argument("--model", type=parser.path, metavar="PATH", help=parser.MODEL)
    _add_inputs(flags)
    parser.add_sampling_flags(flags)
    parser.add_model_flags(flags)
    flags.aliases |= _ALIASES
    flags.refused |= {"--stop": _NO_STRINGS, "--reverse_prompt": _NO_STRINGS, "-r": _NO_STRINGS}
    options = flags.parse(argv)
    if options.model is None:
        flags.error(f"no model: give --model PATH, {parser.MODEL}")
    _check_inputs(flags, options)
    return options


def _add_inputs(flags: parser.Parser) -> None:
    """Add the flags of the prompts and of the output."""
    group = flags.add_argument_group("what to answer (one of the first five)")
    add = group.add_argument
    add("--prompt", action="append", metavar="TEXT", help="text to continue; repeat it for several")
    add(
        "--prompt_file",
        type=parser.path,
        metavar="FILE",
        help="a prompt a line; in a .jsonl file a JSON value a line: a string, a list of token ids, or an object with "
        '"prompt"; - reads lines from standard input',
    )
    add("--ask", action="append", metavar="TEXT", help="question to answer; repeat it for several, each a dialog")
    add("--chat", action="store_true", help="talk to the model; /help lists the commands of a chat")
    add(
        "--messages",
        type=parser.path,
        metavar="FILE",
        help='dialog to answer, a JSON list of {"role": ..., "content": ...}; - reads standard input',
    )
    add("--system", metavar="TEXT", help="system message of --ask and --chat")
    add(
        "--tools",
        type=parser.path,
        metavar="FILE",
        help="functions that the model may call in a dialog: a JSON list of schemas in OpenAI's shape; the names of "
        "Llama 3.1's built-in tools are allowed too",
    )
    add(
        "--parse_special",
        action="store_true",
        default=None,
        help="read names of control tokens in prompts, such as <|eot_id|>, as these tokens: for prompts that were "
        "rendered with a chat template (default: plain text, with a warning)",
    )
    add("--no_parse_special", dest="parse_special", action="store_false", help="keep them as text without a warning")
    add("--batch_size", type=parser.whole(1), default=8, metavar="N", help="prompts that run together")
    add("--json", action="store_true", help="print a JSON object a prompt: text, tokens, logprobs, finish_reason, ...")


def _check_inputs(flags: parser.Parser, options: argparse.Namespace) -> None:
    modes = [name for name in ("prompt", "prompt_file", "ask", "chat", "messages") if getattr(options, name)]
    if len(modes) != 1:
        named = " and ".join(f"--{name}" for name in modes) or "none of them"
        flags.error(f"give one of --prompt, --prompt_file, --ask, --chat and --messages; got {named}")
    if options.json and options.chat:
        flags.error("--json does not go with --chat; use --messages FILE --json")
    if options.system is not None and not (options.chat or options.ask):
        flags.error("--system goes with --ask and --chat; put a system message into the file of --messages")
    if options.tools is not None and not (options.chat or options.ask or options.messages):
        flags.error("--tools goes with --ask, --chat and --messages")
    if options.parse_special is not None and not (options.prompt or options.prompt_file):
        flags.error("--parse_special goes with --prompt and --prompt_file; messages of dialogs are always plain text")


def main(argv: Sequence[str]) -> int:
    """Run inference as the flags say, and return the exit status. Errors are raised."""
    options = parse(argv)
    prompts = _prompts(options)
    dialogs = [_messages(options.messages)] if options.messages else _dialogs(options.system, options.ask or ())
    settings = dict(parser.sampling_settings(options))  # before the weights are read
    dialog = bool(options.chat or dialogs)
    settings["max_new_tokens"] = options.max_new_tokens or (512 if dialog else 128)
    settings["seed"] = options.seed
    if dialog:
        settings["tools"] = None if options.tools is None else _tools(options.tools)
    else:
        settings["parse_special"] = options.parse_special

    from llama_jax import compilation_cache
    from llama_jax.infer.load import load

    compilation_cache.enable()
    llama = load(
        options.model,
        dtype=options.dtype,
        quantize=options.quantize,
        mesh=options.mesh,
        adapters=options.adapter,
        chat_format=options.chat_format,
    )
    if options.chat:
        return chat.run(llama, options.system, settings, verbose=options.verbose)
    if dialogs:
        _answer_dialogs(llama, dialogs, settings, as_json=options.json)
    else:
        _continue_prompts(llama, prompts, settings, options)
    return 0


def _answer_dialogs(
    llama: Llama, dialogs: Sequence[list[dict[str, Any]]], settings: Mapping[str, Any], *, as_json: bool
) -> None:
    """Print the answer to each dialog. Dialog i draws from seed + i."""
    start = time.perf_counter()
    own = [{**settings, "seed": settings["seed"] + i} for i in range(len(dialogs))]
    if as_json:
        results = [llama.chat(dialog, **options) for dialog, options in zip(dialogs, own, strict=True)]
        _print_results(results, time.perf_counter() - start, as_json=True, ids=llama.tokenizer is None)
        return
    for dialog, options in zip(dialogs, own, strict=True):
        if len(dialogs) > 1:
            print(f"> {dialog[-1]['content']}")
        _print_stream(llama.stream_chat(dialog, **options))


def _continue_prompts(
    llama: Llama, prompts: Sequence[str | list[int]], settings: Mapping[str, Any], options: argparse.Namespace
) -> None:
    """Print the text after each prompt: one prompt as it comes, several or JSON at the end."""
    if len(prompts) == 1 and not options.json:
        _print_stream(llama.stream(prompts[0], **settings))
        return
    start = time.perf_counter()
    progress = False if options.quiet else None
    results = llama.generate(prompts, batch_size=options.batch_size, progress=progress, **settings)
    _print_results(results, time.perf_counter() - start, as_json=options.json, ids=llama.tokenizer is None)


def _prompts(options: argparse.Namespace) -> list[str | list[int]]:
    """The prompts of --prompt or of the file of --prompt_file."""
    if options.prompt_file is None:
        return options.prompt or []
    path = Path(options.prompt_file)
    prompts: list[str | list[int]] = []
    for number, line in enumerate(_text(options.prompt_file).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(line)
            continue
        value = _json(line, f"{path}: line {number}")
        value = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(value, (str, list)):
            raise ConfigError(f'{path}: line {number} must be a string, a list of ids, or an object with "prompt"')
        prompts.append(value)
    if not prompts:
        raise ConfigError(f"{path} holds no prompt: write one a line")
    return prompts


def _text(file: str) -> str:
    """The text of a UTF-8 file, or of standard input for "-"."""
    try:
        if file == "-":
            return sys.stdin.read()
        with open(file, encoding="utf-8", newline="\n") as opened:
            text = opened.read(_MOST_BYTES)
            if opened.read(1):
                raise ConfigError(f"{file} is longer than {_MOST_BYTES:,} characters: split it")
        return text
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8: {error}") from None


def _json(text: str, name: str) -> Any:
    """The JSON value in a text; ConfigError names `name`."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ConfigError(f"{name} is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{name} is not JSON: {error}") from None


def _messages(file: str) -> list[dict[str, Any]]:
    """The dialog in a file of --messages."""
    messages = _json(_text(file), file)
    if not isinstance(messages, list) or not messages:
        example = '[{"role": "user", "content": "Hello"}]'
        raise ConfigError(f"{file} must be a JSON list of messages such as {example}, got {brief(messages)}")
    return messages


def _tools(file: str) -> list[Any]:
    """The schemas in a file of --tools."""
    tools = _json(_text(file), file)
    tools = tools.get("tools") if isinstance(tools, dict) and "tools" in tools else tools
    if not isinstance(tools, list) or not all(isinstance(tool, (dict, str)) for tool in tools):
        example = '[{"type": "function", "function": {"name": ..., "parameters": {...}}}]'
        raise ConfigError(f"{file} must be a JSON list of schemas of functions: {example}, got {brief(tools)}")
    return tools


def _dialogs(system: str | None, questions: Sequence[str]) -> list[list[dict[str, Any]]]:
    """A dialog for each question."""
    first = [{"role": "system", "content": system}] if system else []
    return [[*first, {"role": "user", "content": question}] for question in questions]


def _print_results(results: Sequence[Result], seconds: float, *, as_json: bool, ids: bool) -> None:
    """Print results; tokens per second are those of the whole call, compilation included."""
    speed = round(sum(len(result.tokens) for result in results) / seconds, 2)
    for i, result in enumerate(results):
        if as_json:
            row = {
                "text": result.text,
                "tokens": result.tokens,
                "logprobs": result.logprobs,
                "finish_reason": result.finish_reason,
                "tokens_per_second": speed,
                **({} if result.message is None else {"message": result.message}),
            }
            print(json.dumps(row, ensure_ascii=False), flush=True)
        else:
            shown = " ".join(map(str, result.tokens)) if ids else result.text
            print(f"{'' if i == 0 else chr(10)}=== prompt {i}\n{shown}", flush=True)
    logging.getLogger(__name__).info("%.2f tokens/s, compilation included", speed)


def _print_stream(pieces: Iterator[str] | Iterator[int]) -> None:
    """Print pieces as they come, and the end of the line. Ids (of a model without a tokenizer) get spaces between."""
    start, count = time.perf_counter(), 0
    try:
        for piece in pieces:
            count += 1
            print(piece if isinstance(piece, str) else f"{piece} ", end="", flush=True)
    finally:
        print(flush=True)
    seconds = time.perf_counter() - start
    logging.getLogger(__name__).info("%d pieces in %.1f s, compilation included", count, seconds)
