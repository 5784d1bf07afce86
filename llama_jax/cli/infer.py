"""`infer`: continues prompts or answers dialogs, and prints text or JSON.

jax is imported only after the flags are checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.cli import chat, parser, peer_flags, plan, sampling_flags
from llama_jax.errors import ConfigError, brief, json_fault
from llama_jax.files import naming

if TYPE_CHECKING:
    from llama_jax.infer.llama import Llama, Result

_EXAMPLES = """\
examples:
  PROGRAM --model runs/quickstart --prompt "Once upon a time"
  PROGRAM --model runs/sft_quickstart --ask "What does math.gcd do?"
  PROGRAM --model Llama-3.1-8B-Instruct --chat --temperature 0.7
  PROGRAM --model Llama-3.1-8B --prompt_file prompts.txt --json > out.jsonl
  PROGRAM --model llama3.1-70b --plan v5p:2x2x2 --batch_size 32 --capacity 32768

Flags of llama.cpp, vLLM and transformers work where they mean the same: -m, -p, -f, -n, -s, --temp, --n_predict,
--max_tokens, --lora, --repeat_penalty, -sys. Those that change no text, such as -ngl, -c and -t, are ignored with a
line that says so. Hyphens and underscores are the same.
"""
_DRAFT = "small model of the same vocabulary, for --speculate draft: as --model"
_MOST_BYTES = 1 << 30  # of a file of prompts or messages


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of the command line; ConfigError for any mistake."""
    flags = parser.Parser("infer", "Sample text from a Llama.", examples=_EXAMPLES)
    flags.add_argument("--model", type=parser.path, metavar="PATH", help=parser.MODEL)
    _add_inputs(flags)
    sampling_flags.add(flags)
    parser.add_model_flags(flags)
    flags.add_argument("--draft", type=parser.path, metavar="PATH", help=_DRAFT)
    group = flags.add_argument_group("plan")
    group.add_argument(
        "--plan",
        metavar="DEVICE",
        help="print what prefill and decoding of the model need on DEVICE, e.g. v5e:8 or h100:8, and generate nothing; "
        "--batch_size, --capacity, --mesh, --dtype, --kv and --quantize describe the batch",
    )
    group.add_argument(
        "--capacity", type=parser.whole(1), metavar="N", help="positions of a row for --plan (default: 8192)"
    )
    flags.aliases |= peer_flags.INFER_ALIASES
    flags.ignored |= peer_flags.INFER_IGNORED
    flags.refused |= peer_flags.INFER_REFUSED
    flags.positional = "write --model MODEL, and --prompt TEXT or --ask TEXT"
    options = flags.parse(argv)
    if options.model is None:
        flags.error(f"no model: give --model PATH, {parser.MODEL}")
    if options.plan is None:
        _check_inputs(flags, options)
    return options


def _add_inputs(flags: parser.Parser) -> None:
    """Add the flags of the prompts and of the output."""
    group = flags.add_argument_group("what to answer (one of the first six)")
    add = group.add_argument
    add("--prompt", action="append", metavar="TEXT", help="text to continue; repeat it for several")
    add("--file", type=parser.path, metavar="FILE", help="the text of this file is the prompt; - is standard input")
    add(
        "--prompt_file",
        type=parser.path,
        metavar="FILE",
        help="a prompt a line; in a .jsonl file a JSON value a line: a string, a list of token ids, or an object with "
        '"prompt", an "id" that --json prints again, and its own "seed", "temperature" and so on; - is standard input',
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
        help="functions that the model may call in a dialog: a JSON list of schemas in OpenAI's shape, or a file of "
        "it; the names of Llama 3.1's built-in tools are allowed too",
    )
    add(
        "--tool_choice",
        metavar="NAME",
        help="required: the answer is a call of one of the tools, with arguments of its schema; a name chooses one",
    )
    add(
        "--parse_special",
        action="store_true",
        default=None,
        help="read names of control tokens in prompts, such as <|eot_id|>, as these tokens: for prompts that were "
        "rendered with a chat template (default: plain text, with a warning)",
    )
    add("--no_parse_special", dest="parse_special", action="store_false", help="keep them as text without a warning")
    _add_outputs(add)


def _add_outputs(add: Callable[..., Any]) -> None:
    """Add the flags of the number of answers, and of their form, to the group of `_add_inputs`."""
    add("--batch_size", type=parser.whole(1), default=8, metavar="N", help="prompts that run together")
    add("--num_samples", type=parser.whole(1), default=1, metavar="N", help="answers to each prompt (default: 1)")
    add(
        "--best_of",
        type=parser.whole(1),
        metavar="N",
        help="sample N answers to each prompt, and keep those of the highest mean log-probability",
    )
    add("--json", action="store_true", help="print a JSON object an answer: index, text, tokens, logprobs, ...")


def _check_inputs(flags: parser.Parser, options: argparse.Namespace) -> None:
    modes = [name for name in ("prompt", "file", "prompt_file", "ask", "chat", "messages") if getattr(options, name)]
    if len(modes) != 1:
        named = " and ".join(f"--{name}" for name in modes) or "none of them"
        flags.error(f"give one of --prompt, --file, --prompt_file, --ask, --chat and --messages; got {named}")
    if options.capacity is not None:
        flags.error("--capacity goes with --plan")
    if options.json and options.chat:
        flags.error("--json does not go with --chat; use --messages FILE --json")
    if options.chat and _collected(options):
        flags.error("--num_samples and --best_of do not go with --chat, which prints one answer as it comes")
    if options.system is not None and not (options.chat or options.ask):
        flags.error("--system goes with --ask and --chat; put a system message into the file of --messages")
    if options.tools is not None and not (options.chat or options.ask or options.messages):
        flags.error("--tools goes with --ask, --chat and --messages")
    if options.tool_choice is not None and options.tools is None:
        flags.error("--tool_choice goes with --tools")
    if options.tool_choice is not None and options.chat:
        flags.error("--tool_choice goes with --ask and --messages")
    if options.parse_special is not None and not (options.prompt or options.file or options.prompt_file):
        flags.error("--parse_special goes with prompts and their files; messages of dialogs are always plain text")


def main(argv: Sequence[str]) -> int:
    """Run inference as the flags say, and return the exit status. Errors are raised."""
    options = parse(argv)
    if options.plan is not None:
        return plan.of_inference(
            options.model,
            options.plan,
            options.mesh,
            as_json=options.json,
            rows=options.batch_size,
            capacity=options.capacity,
            dtype=options.dtype,
            kv=options.kv,
            quantize=options.quantize,
        )
    prompts, overrides = _prompts(options)
    dialogs = [_messages(options.messages)] if options.messages else _dialogs(options.system, options.ask or ())
    settings = sampling_flags.options_of(options)  # before the weights are read
    if options.draft is not None:
        settings.setdefault("speculate", "draft")
    dialog = bool(options.chat or dialogs)
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
        kv=options.kv or "compute",
        draft=options.draft,
    )
    if options.chat:
        return chat.run(llama, options.system, settings, verbose=options.verbose)
    if dialogs:
        return _answer_dialogs(llama, dialogs, settings, options)
    return _continue_prompts(llama, prompts, overrides, settings, options)


def _answer_dialogs(
    llama: Llama, dialogs: Sequence[list[dict[str, Any]]], settings: dict[str, Any], options: argparse.Namespace
) -> int:
    """Print the answer to each dialog: one as it comes, several or JSON at the end. Returns the exit status."""
    tools = settings.pop("tools")
    if len(dialogs) == 1 and not _collected(options) and options.tool_choice is None:
        return _print_stream(llama.stream_chat(dialogs[0], tools=tools, **settings))
    start = time.perf_counter()
    found = llama.chat(dialogs, tools=tools, tool_choice=options.tool_choice, **settings, **_of_call(options))
    names = [f"> {dialog[-1]['content']}" for dialog in dialogs]
    return _print_results(found, names, time.perf_counter() - start, as_json=options.json, ids=False)


def _continue_prompts(
    llama: Llama,
    prompts: list[str | list[int]],
    overrides: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    options: argparse.Namespace,
) -> int:
    """Print the text after each prompt: one as it comes, several or JSON at the end. Returns the exit status."""
    if len(prompts) == 1 and not _collected(options) and not overrides[0]:
        return _print_stream(llama.stream(prompts[0], **settings))
    start = time.perf_counter()
    labels = [own["id"] if "id" in own else None for own in overrides]
    overrides = [{name: value for name, value in own.items() if name != "id"} for own in overrides]
    found = llama.generate(prompts, overrides=overrides, **settings, **_of_call(options))
    names = [f"{chr(10) if i else ''}=== prompt {i}" for i in range(len(prompts))]
    ids = llama.tokenizer is None
    return _print_results(found, names, time.perf_counter() - start, as_json=options.json, ids=ids, labels=labels)


def _collected(options: argparse.Namespace) -> bool:
    """True if an answer cannot be printed as it comes."""
    return options.json or options.num_samples > 1 or options.best_of is not None


def _of_call(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Llama.generate` that apply to the whole call, and not to one continuation."""
    return {
        "batch_size": options.batch_size,
        "progress": False if options.quiet else None,
        "n": options.num_samples,
        "best_of": options.best_of,
    }


def _prompts(options: argparse.Namespace) -> tuple[list[str | list[int]], list[dict[str, Any]]]:
    """The prompts of --prompt, --file or --prompt_file, and the options that each has of its own."""
    if options.file is not None:
        return [_text(options.file).removesuffix("\n").removesuffix("\r")], [{}]
    if options.prompt_file is None:
        prompts = options.prompt or []
        return prompts, [{}] * len(prompts)
    path = Path(options.prompt_file)
    prompts, overrides = [], []
    for number, line in enumerate(_text(options.prompt_file).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        own: dict[str, Any] = {}
        value: Any = line
        if path.suffix == ".jsonl":
            value = _json(line, f"{path}: line {number}")
            if isinstance(value, dict):
                own = dict(value)
                value = own.pop("prompt", None)
            if not isinstance(value, (str, list)):
                raise ConfigError(f'{path}: line {number} must be a string, a list of ids, or an object with "prompt"')
        prompts.append(value)
        overrides.append(own)
    if not prompts:
        raise ConfigError(f"{'standard input' if str(path) == '-' else path} holds no prompt: write one a line")
    return prompts, overrides


def _text(file: str) -> str:
    """The text of a UTF-8 file, or of standard input for "-"."""
    try:
        if file == "-":
            return sys.stdin.read()
        with naming(file), open(file, encoding="utf-8-sig", newline="\n") as opened:  # Windows writes a mark first
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
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not JSON: {json_fault(error)}") from None


def _messages(file: str) -> list[dict[str, Any]]:
    """The dialog in a file of --messages."""
    text, file = _text(file), "standard input" if file == "-" else file
    messages = _json(text, file)
    if not isinstance(messages, list) or not messages:
        example = '[{"role": "user", "content": "Hello"}]'
        raise ConfigError(f"{file} must be a JSON list of messages such as {example}, got {brief(messages)}")
    return messages


def _tools(value: str) -> list[Any]:
    """The schemas of --tools, which is a file or the JSON itself."""
    is_json = value.lstrip().startswith(("[", "{")) and not os.path.exists(value)
    file = "--tools" if is_json else value
    tools = _json(value if is_json else _text(value), file)
    tools = tools.get("tools") if isinstance(tools, dict) and "tools" in tools else tools
    if not isinstance(tools, list) or not all(isinstance(tool, (dict, str)) for tool in tools):
        example = '[{"type": "function", "function": {"name": ..., "parameters": {...}}}]'
        raise ConfigError(f"{file} must be a JSON list of schemas of functions: {example}, got {brief(tools)}")
    return tools


def _dialogs(system: str | None, questions: Sequence[str]) -> list[list[dict[str, Any]]]:
    """A dialog for each question."""
    first = [{"role": "system", "content": system}] if system else []
    return [[*first, {"role": "user", "content": question}] for question in questions]


def _print_results(
    found: Sequence[Result | list[Result]],
    names: Sequence[str],
    seconds: float,
    *,
    as_json: bool,
    ids: bool,
    labels: Sequence[Any] = (),
) -> int:
    """Print results, and return 1 if one failed. The speed is that of the whole call, compilation included. `labels`
    are the values of "id" in the lines of the prompts, or None.
    """
    groups = [group if isinstance(group, list) else [group] for group in found]
    speed = round(sum(len(result.tokens) for group in groups for result in group) / seconds, 2)
    for group, name, label in itertools.zip_longest(groups, names, labels):
        if not as_json and len(groups) > 1:
            print(name, flush=True)
        for result in group:
            if as_json:
                row = _row(result, speed) if label is None else {"id": label, **_row(result, speed)}
                print(json.dumps(row, ensure_ascii=False), flush=True)
            else:
                shown = " ".join(map(str, result.tokens)) if ids else result.text
                print(f"--- {shown}" if len(group) > 1 else shown, flush=True)
    logging.getLogger(__name__).info("%.2f tokens/s, compilation included", speed)
    return int(any(result.error for group in groups for result in group))


def _row(result: Result, speed: float) -> dict[str, Any]:
    """A result as the JSON object that --json prints. Fields that were not asked for are left out."""
    row = dataclasses.asdict(result) | {"tokens_per_second": speed}
    optional = ("message", "top_logprobs", "prompt_logprobs", "prompt_top_logprobs", "error")
    return {name: value for name, value in row.items() if name not in optional or value}


def _print_stream(pieces: Iterator[str] | Iterator[int]) -> int:
    """Print pieces of text while they are generated, and then a line end. Ids (of a model without a tokenizer) get
    spaces between.
    """
    start, count = time.perf_counter(), 0
    try:
        for piece in pieces:
            count += 1
            print(piece if isinstance(piece, str) else f"{piece} ", end="", flush=True)
    finally:
        print(flush=True)
    seconds = time.perf_counter() - start
    logging.getLogger(__name__).info("%d pieces in %.1f s, compilation included", count, seconds)
    return 0
