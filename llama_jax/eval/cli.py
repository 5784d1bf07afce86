"""`python -m llama_jax eval`: perplexity, lm_eval's tasks, and two models side by side. No jax until it is needed."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llama_jax.errors import ConfigError, nearest
from llama_jax.infer.cli import mesh_sizes

if TYPE_CHECKING:
    from llama_jax.infer.llama import Llama

_EXAMPLES = """\
examples:
  python -m llama_jax eval perplexity runs/quickstart --text stdlib:validation
  python -m llama_jax eval harness Llama-3.1-8B --tasks arc_easy,gsm8k --num_fewshot 5 --limit 100
  python -m llama_jax eval compare runs/sft Llama-3.1-8B --prompts prompts.jsonl --judge person --out evals/sft

prompts.jsonl holds a JSON value a line: a text, or {"prompt": TEXT} or {"messages": [...]}, perhaps with "reference"
(the right answer) and "category". compare keeps everything in its folder as it comes: the same command goes on.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (python -m llama_jax eval --help shows how)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command after `eval` and its flags; ConfigError on any mistake."""
    parser = _Parser(
        prog="python -m llama_jax eval",
        description="Measure Llama models: on text, on lm_eval's tasks, or one against another.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(
        dest="command", metavar="perplexity|harness|compare", parser_class=_Parser, required=True
    )
    each = [_perplexity_flags(commands), _harness_flags(commands), _compare_flags(commands)]
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        mine = next(sub for sub in each if sub.prog.endswith(options.command))
        flags = [flag for action in mine._actions for flag in action.option_strings]
        word = unknown[0].partition("=")[0]
        parser.error(f"unknown argument {word!r}{nearest(word, flags)}")
    return options


def _perplexity_flags(commands: Any) -> argparse.ArgumentParser:
    sub = commands.add_parser("perplexity", help="how well a model predicts text", allow_abbrev=False)
    sub.add_argument("model", metavar="MODEL", help="whatever infer.py --model takes")
    sub.add_argument(
        "--text",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files (.txt, .md, .jsonl, .parquet, .gz), folders, patterns, or stdlib:validation",
    )
    sub.add_argument("--context", type=int, metavar="N", help="tokens of a window (2048, or the model's own)")
    sub.add_argument("--stride", type=int, metavar="N", help="tokens that it moves on by (half of the context)")
    sub.add_argument("--adapter", metavar="PATH", help="a LoRA adapter of the model, as peft writes it")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    _common(sub)
    return sub


def _harness_flags(commands: Any) -> argparse.ArgumentParser:
    sub = commands.add_parser("harness", help="EleutherAI's lm_eval (pip install lm_eval)", allow_abbrev=False)
    sub.add_argument("model", metavar="MODEL", help="whatever infer.py --model takes")
    sub.add_argument("--tasks", required=True, metavar="NAME,...", help="lm_eval's tasks, or YAML files of tasks")
    sub.add_argument("--include", action="append", default=[], metavar="FOLDER", help="of more tasks; may be repeated")
    sub.add_argument("--num_fewshot", type=int, metavar="N", help="examples before each question (the task's own)")
    sub.add_argument("--limit", type=float, metavar="N", help="questions of each task; below 1 a share (all)")
    sub.add_argument("--apply_chat_template", action="store_true", help="put each question as a dialog")
    sub.add_argument("--system", metavar="TEXT", help="the system message of these dialogs")
    sub.add_argument("--max_length", type=int, metavar="N", help="tokens the model is given (all that it has)")
    sub.add_argument("--log_samples", action="store_true", help="keep every question and answer in the file")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of tasks that draw their texts (0)")
    sub.add_argument("--out", metavar="FILE", default="results.json", help="where the results go (results.json)")
    sub.add_argument("--adapter", metavar="PATH", help="a LoRA adapter of the model, as peft writes it")
    _common(sub)
    return sub


def _compare_flags(commands: Any) -> argparse.ArgumentParser:
    sub = commands.add_parser("compare", help="two models on the same prompts: win, tie, loss", allow_abbrev=False)
    sub.add_argument("model_a", metavar="MODEL_A", help="whatever infer.py --model takes")
    sub.add_argument("model_b", metavar="MODEL_B")
    sub.add_argument("--prompts", required=True, metavar="FILE", help="JSON lines, as `eval --help` shows them")
    sub.add_argument("--judge", required=True, metavar="KIND", help="exact, function, model or person")
    sub.add_argument("--judge_function", metavar="FILE.py:NAME", help='of (prompt, a, b, reference): "a", "b" or "tie"')
    sub.add_argument("--judge_model", metavar="MODEL", help="an instruct model; asked twice, the answers swapped")
    sub.add_argument("--adapter_a", metavar="PATH", help="a LoRA adapter of MODEL_A")
    sub.add_argument("--adapter_b", metavar="PATH", help="a LoRA adapter of MODEL_B")
    sub.add_argument("--chat", action="store_true", help="put texts as a user's message, not to be continued")
    sub.add_argument("--max_new_tokens", type=int, default=256, metavar="N", help="of an answer (256)")
    sub.add_argument("--temperature", type=float, metavar="X", help="0 is greedy (each model's own sampling)")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of answers, and of what a person sees first (0)")
    sub.add_argument("--out", default="comparison", metavar="FOLDER", help="keeps everything (comparison)")
    _common(sub)
    return sub


def _common(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--batch_size", type=int, default=8, metavar="N", help="rows that run together (8)")
    sub.add_argument("--dtype", metavar="NAME", help="float32 or bfloat16 (as infer.py)")
    sub.add_argument("--quantize", metavar="NAME", help="int8 or int4 (as infer.py)")
    sub.add_argument("--mesh", metavar="AXIS=N,...", help="devices: data=1,tensor=2 (one device)")


def main(argv: Sequence[str]) -> int:
    """Do what the command says; the exit status. Errors are raised: ConfigError, ValueError, OSError."""
    options = parse(argv)
    mesh = mesh_sizes(options.mesh)
    if options.command == "perplexity":
        return _perplexity(options, mesh)
    return _harness(options, mesh) if options.command == "harness" else _compare(options, mesh)


def _load(options: argparse.Namespace, mesh: Mapping[str, int] | None) -> Llama:
    from llama_jax import compilation_cache
    from llama_jax.infer.llama import load

    compilation_cache.enable()
    return load(options.model, dtype=options.dtype, quantize=options.quantize, mesh=mesh, adapters=options.adapter)


def _perplexity(options: argparse.Namespace, mesh: Mapping[str, int] | None) -> int:
    texts = _texts(options.text)
    from llama_jax.eval import sliding_window

    found = sliding_window.perplexity(
        _load(options, mesh), texts, context=options.context, stride=options.stride, batch_size=options.batch_size
    )
    if options.json:
        row = {**vars(found), "perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}
        print(json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}))
        return 0
    over = f"{found.documents:,} documents" if found.documents > 1 else f"{found.windows:,} windows of one document"
    print(f"nats per token   {found.nats_per_token:.4f} \N{PLUS-MINUS SIGN} {found.standard_error:.4f}")
    print(f"perplexity       {found.perplexity:.4g}")
    print(f"bits per byte    {found.bits_per_byte:.4f}")
    print(f"tokens           {found.tokens:,} of {found.bytes:,} bytes")
    print(f"windows          {found.windows:,} of {found.context:,} tokens, {found.stride:,} apart")
    print(f"\N{PLUS-MINUS SIGN} is the standard error over {over}")
    return 0


def _texts(patterns: Sequence[str]) -> list[str]:
    from llama_jax.data.corpus import Document
    from llama_jax.data.records import BadLine
    from llama_jax.data.sources import documents_from

    texts = []
    for sample in documents_from(patterns):
        if isinstance(sample, BadLine):
            raise ConfigError(f"{sample.name}: {sample.reason}")
        if not isinstance(sample, Document):
            kind = type(sample).__name__.lower()
            raise ConfigError(f'{sample.name} is a {kind}: perplexity is of texts, such as {{"text": ...}}')
        texts.append(sample.text)
    return texts


def _harness(options: argparse.Namespace, mesh: Mapping[str, int] | None) -> int:
    path = Path(options.out)
    if path.exists():
        raise ConfigError(f"--out {path} is there already: name another file")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: no folder {path.parent}")
    limit = options.limit
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
        raise ConfigError(f"--limit must be a whole number of questions, or a share below 1, got {limit:g}")
    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not tasks:
        raise ConfigError("--tasks names no task: give them as --tasks arc_easy,gsm8k")
    if options.system is not None and not options.apply_chat_template:
        raise ConfigError("--system goes with --apply_chat_template")
    from llama_jax.eval import harness

    manager = harness.find_tasks(tasks, options.include)
    model = harness.LlamaLM(
        _load(options, mesh),
        name=str(options.model),
        max_length=options.max_length,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    results = harness.evaluate(
        model,
        tasks,
        manager=manager,
        num_fewshot=options.num_fewshot,
        limit=limit if limit is None or limit < 1 else int(limit),
        apply_chat_template=options.apply_chat_template,
        system=options.system,
        log_samples=options.log_samples,
    )
    harness.write(results, path)
    print(harness.table(results))
    print(f"results: {path}")
    return 0


def _compare(options: argparse.Namespace, mesh: Mapping[str, int] | None) -> int:
    from llama_jax import compilation_cache
    from llama_jax.eval import comparison, intervals

    compilation_cache.enable()
    names = [field for field in comparison.Asked.__dataclass_fields__]
    asked = comparison.Asked(**{name: getattr(options, name) for name in names})
    found = comparison.compare(
        asked,
        comparison.read_prompts(options.prompts),
        judge=options.judge,
        out=options.out,
        judge_function=options.judge_function,
        judge_model=options.judge_model,
        batch_size=options.batch_size,
        mesh=mesh,
        progress=sys.stderr.isatty(),
    )
    if found.judged < found.total:
        print(f"judged {found.judged:,} of {found.total:,}: the same command goes on with the rest")
    if found.judged:
        print(intervals.table(found.tallies, *asked.names))
    if found.unread:
        print(
            f"{found.unread:,} ties are answers of the judge that hold no verdict: see {found.folder}/comparison.jsonl"
        )
    print(f"{found.picture or found.folder}")
    return 0
