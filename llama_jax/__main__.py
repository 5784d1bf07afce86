"""`python -m llama_jax`: convert, inspect and measure models, and inspect data. No jax until it is needed."""

from __future__ import annotations

import argparse
import collections
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from llama_jax.cli import fail, parse_run
from llama_jax.errors import ConfigError, nearest, one_line
from llama_jax.infer.cli import quiet_pipe

if TYPE_CHECKING:
    from llama_jax.weights.source import Source

_EXAMPLES = """\
examples:
  python -m llama_jax inspect Llama-3.1-8B-Instruct-Q4_K_M.gguf
  python -m llama_jax inspect data --config configs/quickstart.py --config.data.train='chats/*.jsonl'
  python -m llama_jax convert runs/quickstart quickstart.gguf --to gguf --dtype q8_0
  python -m llama_jax convert ~/.llama/checkpoints/Llama3.1-8B llama-8b --to hf --dtype bfloat16

SOURCE is a run folder of train.py, a Hugging Face folder or hub id (owner/name), Meta's download, a .gguf file, or an
old Flax folder. `inspect data` with --config shows what that run (see train.py --help) would learn from.
"""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"{message} (python -m llama_jax --help shows how)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command and its flags; leaves with status 2 and one line on any mistake."""
    parser = _Parser(
        prog="python -m llama_jax",
        description="Convert, inspect and measure Llama models, and inspect data.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(
        dest="command", metavar="inspect|convert|eval", parser_class=_Parser, required=True
    )
    inspect = commands.add_parser(
        "inspect", help="print what a model is: format, size, config, types, tokenizer; or what data is"
    )
    inspect.add_argument("source", metavar="SOURCE")
    convert = commands.add_parser("convert", help="write a model as Hugging Face's, Meta's or llama.cpp's own files")
    convert.add_argument("source", metavar="SOURCE")
    convert.add_argument("dest", metavar="DEST", help="a folder to make; for gguf the file")
    convert.add_argument("--to", required=True, metavar="FORMAT", help="hf, meta or gguf")
    convert.add_argument("--adapter", metavar="PATH", help="a LoRA adapter of SOURCE, to merge into it")
    convert.add_argument(
        "--dtype",
        metavar="NAME",
        help="float32, float16, bfloat16, and for gguf also q8_0 and q4_0 (by default as it is stored; unpacked to "
        "float32, which is exact, where that is a type that cannot be written)",
    )
    convert.add_argument("--shard_size", metavar="SIZE", default="5G", help="of a file of hf, at most: 500M, 5G (5G)")
    commands.add_parser("eval", help="measure models: perplexity, lm_eval's tasks, two side by side; see eval --help")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Do what the command says; returns the exit status: 2 after an error, which is one line on standard error."""
    try:
        with quiet_pipe():
            return _main(argv)
    except (ConfigError, ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        return 130


def _main(argv: Sequence[str]) -> int:
    if _asks_for_data(argv):
        return _inspect_data(argv[2:])
    if list(argv[:1]) == ["eval"]:
        from llama_jax.eval import cli

        return cli.main(argv[1:])
    options = parse(argv)
    return _convert(options) if options.command == "convert" else _inspect(options.source)


def _asks_for_data(argv: Sequence[str]) -> bool:
    """Whether it is `inspect data --config ...`; without the flag, `data` is a folder like any other."""
    flags = [arg.partition("=")[0].partition(".")[0] for arg in argv[2:]]
    return list(argv[:2]) == ["inspect", "data"] and ("--config" in flags or "-config" in flags)


def _inspect_data(argv: Sequence[str]) -> int:
    run, _ = parse_run(["inspect data", *argv])  # before jax is imported: a typo is answered at once
    from llama_jax.train.show import show

    sys.stdout.reconfigure(errors="replace")  # data holds characters that a terminal may lack
    show(run, colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    return 0


def _convert(options: argparse.Namespace) -> int:
    size = _bytes(options.shard_size)
    from llama_jax.weights import adapters, export
    from llama_jax.weights.formats import peft
    from llama_jax.weights.source import UnknownTokenizer, open_source

    export.check(options.to, options.dtype)
    source = open_source(options.source)
    start = time.perf_counter()
    opened = None if options.adapter is None else peft.open_adapter(options.adapter, source.config)
    leaves, config = source.leaves, source.config
    if leaves is None:
        leaves = export.leaves_of(config, source.load(None, None, "none"))
    if opened is not None:
        leaves, config = adapters.merge_adapter(leaves, opened), opened.config
    tokenizer, without = None, "the source has none"
    try:
        tokenizer = source.tokenizer()
    except UnknownTokenizer as error:
        without = str(error)
    stops = dict.fromkeys([*source.stop_tokens, *(tokenizer.stop_tokens if tokenizer else ())])
    bos = tokenizer.bos_id if source.bos_token is None and tokenizer else source.bos_token
    files = source.tokenizer_files
    if tokenizer is not None and not any(file.name == "tokenizer.json" for file in files):
        files = ()  # transformers is given one anew
    card = export.Card(tokenizer, bos, tuple(stops), source.sampling, source.chat_template, files)
    dtype = options.dtype or export.default_dtype(leaves, options.to)
    path = export.save(options.dest, config, leaves, card, format=options.to, dtype=options.dtype, shard_bytes=size)
    seconds = time.perf_counter() - start
    print(f"{path}: {options.to} in {dtype}, {_human(_size(path))} in {seconds:.1f} s")
    if tokenizer is None and not (files and options.to == "hf"):
        print(f"warning: written without a tokenizer: {without}", file=sys.stderr)
    return 0


def _inspect(name: str) -> int:
    from llama_jax.weights.source import open_source

    source = open_source(name)
    config = source.config
    print(f"{source.path}: {source.kind}, {_human(_size(source.path))}")
    print(f"parameters  {config.num_params:,}")
    for key, value in config.to_dict().items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        print(f"  {key:<16} {value}")
    _print_tensors(source)
    _print_tokenizer(source)
    return 0


def _print_tensors(source: Source) -> None:
    if source.leaves is None:
        print("tensors     float32, in the newest of its checkpoints")
        return
    kinds: dict[str, collections.Counter[str]] = {}
    shapes = {}
    for path, entry in source.leaves.items():
        name = ".".join(str(key) for key in path if key != "layers" and not isinstance(key, int))
        kinds.setdefault(name, collections.Counter())[entry.kind] += 1
        shapes[name] = entry.shape
    print(f"tensors     {len(source.leaves)}, each where it should be and as long as it should be")
    for name, counts in kinds.items():
        types = ", ".join(f"{n} x {kind}" if sum(counts.values()) > 1 else kind for kind, n in counts.items())
        print(f"  {name:<22} {' x '.join(map(str, shapes[name])):<16} {types}")


def _print_tokenizer(source: Source) -> None:
    try:
        tokenizer = source.tokenizer()
    except ValueError as error:
        print(f"tokenizer   cannot be used: {one_line(error)}")
        return
    if tokenizer is None:
        print("tokenizer   none: give prompts as token ids")
        return
    print(f"tokenizer   {tokenizer.vocab_size:,} ids, sha256 {tokenizer.fingerprint[:16]}")
    print(f"  begins with      {tokenizer.bos_id}")
    stops = dict.fromkeys([*source.stop_tokens, *tokenizer.stop_tokens])
    print(f"  stops at         {', '.join(map(str, stops)) or 'nothing'}")


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def _human(size: float) -> str:
    power = min(4, int(math.log10(max(1, size)) // 3))
    return f"{size / 10 ** (3 * power):.3g} {['', 'k', 'M', 'G', 'T'][power]}B"


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if not match or float(match[1]) == 0:
        raise ConfigError(
            f"--shard_size must be a size such as 500M or 5G, got {text!r}{nearest(text, ['500M', '5G'])}"
        )
    return int(float(match[1]) * _UNITS[match[2]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
