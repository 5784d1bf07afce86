"""`inspect`: prints the facts of a model (format, size, config, dtypes, tokenizer), or the data of a run."""

from __future__ import annotations

import collections
import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama_jax.cli import parser
from llama_jax.cli.convert import size_of
from llama_jax.cli.run_flags import parse_run_flags
from llama_jax.errors import ConfigError, one_line
from llama_jax.storage import size_text

if TYPE_CHECKING:
    from llama_jax.weights.source import Source

_EXAMPLES = """\
examples:
  PROGRAM Llama-3.1-8B-Instruct-Q4_K_M.gguf
  PROGRAM data --config quickstart --config.data.train='chats/*.jsonl'

`PROGRAM data --config FILE` takes the flags of train, and prints what that run would learn from.
"""


def main(argv: Sequence[str]) -> int:
    """Print the model or the data, and return the exit status. Errors are raised."""
    if _asks_for_data(argv):
        return _inspect_data(argv[1:])
    flags = parser.Parser(
        "inspect",
        "Print what a model is: format, size, config, dtypes and tokenizer. Or what a run would learn from.",
        examples=_EXAMPLES,
    )
    flags.add_argument("source", type=parser.path, metavar="SOURCE", help=f"{parser.MODEL}; or data")
    flags.positional = "inspect takes one, a model; `inspect data --config FILE` shows the data of a run"
    return _inspect(flags.parse(argv).source)


def _asks_for_data(argv: Sequence[str]) -> bool:
    """True for `inspect data --config ...`. Without the flag, `data` is a folder like any other."""
    flags = {arg.partition("=")[0].partition(".")[0].lstrip("-") for arg in argv[1:]}
    return list(argv[:1]) == ["data"] and bool(flags & {"config", "help", "h", "keys"})


def _inspect_data(argv: Sequence[str]) -> int:
    run, options = parse_run_flags(argv, command="inspect data")  # before jax is imported: a typo is answered at once
    if options.rows is not None and options.rows < 0:
        raise ConfigError(f"--rows must be 0 or more, got {options.rows}")
    from llama_jax.data.inspect import show
    from llama_jax.train import setup

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # data holds characters that a terminal may lack
    setup.check_sources(run)
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    show(run, setup.chosen_encoder(run, print), color=color, rows=options.rows, full=options.full)
    return 0


def _inspect(name: str) -> int:
    from llama_jax.weights.open import open_source

    source = open_source(name)
    config = source.config
    print(f"{source.path}: {source.description}, {size_text(size_of(source.path))}")
    print(f"parameters  {config.num_params:,}")
    for key, value in config.to_dict().items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        print(f"  {key:<16} {value}")
    _print_tensors(source)
    _print_tokenizer(source)
    return 0


def _print_tensors(source: Source) -> None:
    from llama_jax.weights.source import FileSource

    if not isinstance(source, FileSource):
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
    stops = dict.fromkeys([*source.metadata.stop_tokens, *tokenizer.stop_tokens])
    print(f"  stops at         {', '.join(map(str, stops)) or 'nothing'}")
