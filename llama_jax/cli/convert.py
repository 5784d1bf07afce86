"""`convert`: write a model in the files of transformers, Meta's code or llama.cpp."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llama_jax.cli import parser
from llama_jax.errors import DTYPE_ALIASES, ConfigError, brief, nearest
from llama_jax.storage import size_text

if TYPE_CHECKING:
    from llama_jax.weights import name_table

_EXAMPLES = """\
examples:
  PROGRAM runs/quickstart quickstart.gguf --to gguf --dtype q8_0
  PROGRAM ~/.llama/checkpoints/Llama3.1-8B llama-8b --to hf --dtype bfloat16
"""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_LARGEST = 10**15  # bytes of a shard: more than any disk
FORMATS = ("hf", "meta", "gguf")
DTYPES = ("float32", "float16", "bfloat16", "int8", "int4", "q8_0", "q4_0")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of the command line; ConfigError for any mistake."""
    flags = parser.Parser(
        "convert", "Write a model in the files of transformers, Meta's code or llama.cpp.", examples=_EXAMPLES
    )
    add = flags.add_argument
    add("source", type=parser.path, metavar="SOURCE", help=parser.MODEL)
    add("dest", type=parser.path, metavar="DEST", help="folder to make; for gguf the file")
    add("--to", type=parser.one_of(FORMATS), metavar="FORMAT", help="format to write (default: gguf for DEST.gguf)")
    add(
        "--adapter",
        action=parser.OneAdapter,
        type=parser.path,
        metavar="PATH",
        help="LoRA adapter of SOURCE, which is merged",
    )
    add(
        "--dtype",
        type=_dtype,
        metavar="NAME",
        help="dtype to write; int8 and int4 are q8_0 and q4_0 in gguf, and meta has neither (default: as stored; a "
        "type that cannot be written is unpacked to float32, which is exact)",
    )
    add(
        "--shard_size",
        type=shard_bytes,
        default="5G",
        metavar="SIZE",
        help="largest size of a file of hf, such as 500M or 5G",
    )
    add(
        "--calibrate",
        nargs="+",
        default=[],
        metavar="FILE",
        help="texts of the kind that the model will see; GPTQ rounds to int4 and q4_0 for the activations that they "
        "give. The model runs over them, so that it must fit into memory",
    )
    flags.aliases |= {"--lora": "--adapter", "--outtype": "--dtype", "--max_shard_size": "--shard_size"}
    flags.positional = "convert takes two, SOURCE and DEST; flags set the rest, such as --dtype q8_0"
    options = flags.parse(argv)
    if options.to is None and not options.dest.endswith(".gguf"):
        flags.error(f"give the format: --to {', --to '.join(FORMATS)}")
    options.to = options.to or "gguf"
    return options


def _dtype(text: str) -> str:
    """The value of --dtype, with a reason for llama.cpp's types that are not written."""
    if text.lower() not in DTYPES and re.fullmatch(r"[it]?q\d_\w+|mxfp4|nvfp4", text.lower()):
        raise argparse.ArgumentTypeError(f"{brief(text)} is a type of GGUF that is not written: q8_0 and q4_0 are")
    return parser.one_of(DTYPES, {**DTYPE_ALIASES, "q8": "q8_0", "q4": "q4_0"})(text)


_dtype.allowed = ", ".join(DTYPES)  # type: ignore[attr-defined]


def main(argv: Sequence[str]) -> int:
    """Convert as the flags say, and return the exit status. Errors are raised."""
    options = parse(argv)
    from llama_jax.weights import adapters, export
    from llama_jax.weights.formats import peft
    from llama_jax.weights.open import open_source
    from llama_jax.weights.source import UnknownTokenizer

    options.dtype = export.written_dtype(options.to, options.dtype)
    source = open_source(options.source)
    start = time.perf_counter()
    leaves, config, adapter = source.merged_leaves(), source.config, None
    if options.adapter is not None:
        adapter = peft.open_adapter(options.adapter, config)
        leaves, config = adapters.merge_adapter(leaves, adapter), adapter.config
    tokenizer, without = None, "the source has none"
    try:
        tokenizer = source.tokenizer()
    except UnknownTokenizer as error:
        without = str(error)
    metadata = source.metadata.with_tokenizer(tokenizer)
    if adapter is not None:
        metadata = peft.adapted_metadata(metadata, adapter, source.config)
    dtype = options.dtype or export.default_dtype(leaves, options.to)
    if options.calibrate:
        leaves = _calibrated(options, dtype)
    path = export.save(
        options.dest,
        config,
        leaves,
        metadata,
        format=options.to,
        dtype=options.dtype,
        shard_bytes=options.shard_size,
    )
    seconds = time.perf_counter() - start
    print(f"{path}: {options.to} in {dtype}, {size_text(size_of(path))} in {seconds:.1f} s")
    if metadata.tokenizer is None and not (metadata.tokenizer_files and options.to == "hf"):
        print(f"warning: written without a tokenizer: {without}", file=sys.stderr)
    return 0


def _calibrated(options: argparse.Namespace, dtype: str) -> name_table.Leaves:
    """The tensors of the source, rounded to 4 bits by the texts of --calibrate."""
    if dtype not in ("int4", "q4_0"):
        raise ConfigError(f"--calibrate goes with --dtype int4 or q4_0, not with {dtype}")
    if options.adapter is not None:
        raise ConfigError("--calibrate takes a model without --adapter: merge the adapter first")
    from llama_jax.cli.eval import samples
    from llama_jax.eval import calibration
    from llama_jax.infer.load import load
    from llama_jax.weights import export

    llama = load(options.source, quantize="none")
    return export.leaves_of(llama.config, calibration.quantized(llama, samples(options.calibrate)))


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files below a folder."""
    if not path.is_dir():
        return path.stat().st_size
    total = 0
    for parent, _, names in os.walk(path):  # which passes over folders that a training run deletes meanwhile
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def shard_bytes(text: str) -> int:
    """The number of bytes of a size such as 500M or 5G."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)I?B?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not 0 < size <= _LARGEST:
        near = nearest(text, ["500M", "5G"])
        raise argparse.ArgumentTypeError(f"must be a size such as 500M or 5G, got {brief(text)}{near}")
    return size
