"""`eval`: perplexity, lm_eval's tasks, the comparison of two models, and the cost of quantization.

jax is imported only after the flags are checked.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llama_jax import progress
from llama_jax.choices import QUANTIZATIONS
from llama_jax.cli import commands, parser, peer_flags
from llama_jax.errors import ConfigError

if TYPE_CHECKING:
    from llama_jax.eval.sliding_window import Perplexity, Sample
    from llama_jax.infer.llama import Llama

_COMMANDS = {
    "perplexity": "how well a model predicts texts or answers",
    "harness": "EleutherAI's lm_eval tasks (needs pip install lm_eval)",
    "compare": "two models on the same prompts: win, tie, loss",
    "quantization": "what rounding a model's weights costs",
}
_TEXT_ALIASES = {"-f": "--text", "--file": "--text", **dict.fromkeys(peer_flags.CONTEXT, "--context")}
_JUDGES = ("exact", "function", "model", "person")


def main(argv: Sequence[str]) -> int:
    """Run the evaluation that the arguments name, and return the exit status. Errors are raised."""
    name = commands.choose("eval", argv, _COMMANDS, "Measure Llama models.")
    if name is None:
        return 0
    run = {"perplexity": _perplexity, "harness": _harness, "compare": _compare, "quantization": _quantization}[name]
    return run(argv[1:])


def _batch_size(flags: parser.Parser) -> None:
    flags.add_argument("--batch_size", type=parser.whole(1), default=8, metavar="N", help="rows that run together")


def _perplexity_flags(argv: Sequence[str]) -> argparse.Namespace:
    examples = "examples:\n  PROGRAM runs/quickstart --text stdlib:validation\n"
    flags = parser.Parser("eval perplexity", "Measure how well a model predicts texts or answers.", examples=examples)
    add = flags.add_argument
    add("model", type=parser.path, metavar="MODEL", help=parser.MODEL)
    add(
        "--text",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files (.txt, .md, .jsonl, .parquet, .gz), folders, patterns, hf://datasets/..., or stdlib:validation. Of "
        "texts every token counts; of dialogs and completions the answers, as in training",
    )
    flags.aliases |= _TEXT_ALIASES
    add("--context", type=parser.whole(1), metavar="N", help="tokens of a window (default: 2048, or the model's own)")
    add("--stride", type=parser.whole(1), metavar="N", help="tokens between windows (default: half of --context)")
    add("--json", action="store_true", help="print one JSON object")
    _batch_size(flags)
    parser.add_model_flags(flags)
    return flags.parse(argv)


def _harness_flags(argv: Sequence[str]) -> argparse.Namespace:
    examples = "examples:\n  PROGRAM Llama-3.1-8B --tasks arc_easy,gsm8k --num_fewshot 5 --limit 100\n"
    flags = parser.Parser("eval harness", "Run tasks of EleutherAI's lm_eval.", examples=examples)
    add = flags.add_argument
    add("model", type=parser.path, metavar="MODEL", help=parser.MODEL)
    add("--tasks", required=True, metavar="NAME,...", help="tasks of lm_eval by name, or YAML files of tasks")
    add("--include", action="append", default=[], metavar="FOLDER", help="folder of more tasks; may be repeated")
    add("--num_fewshot", type=parser.whole(0), metavar="N", help="examples before each question (default: the task's)")
    add("--limit", type=parser.number(0), metavar="N", help="questions of each task; below 1 a share (default: all)")
    add("--apply_chat_template", action="store_true", help="put each question as a dialog")
    add("--system", metavar="TEXT", help="system message of these dialogs")
    add("--max_length", type=parser.whole(1), metavar="N", help="tokens that the model reads (default: all)")
    add("--log_samples", action="store_true", help="keep every question and answer in the file of --out")
    add("--seed", type=parser.whole(0), default=0, metavar="N", help="seed of tasks that draw their texts")
    add("--out", type=parser.path, default="results.json", metavar="FILE", help="file of the results")
    _batch_size(flags)
    flags.aliases |= {"-b": "--batch_size", **dict.fromkeys(peer_flags.CONTEXT, "--max_length")}
    parser.add_model_flags(flags)
    return flags.parse(argv)


def _compare_flags(argv: Sequence[str]) -> argparse.Namespace:
    examples = """\
examples:
  PROGRAM runs/sft Llama-3.1-8B --prompts prompts.jsonl --judge person --out evals/sft

prompts.jsonl holds a JSON value a line: a text, or {"prompt": TEXT} or {"messages": [...]}, with "reference" (the right
answer) and "category" where there are any. Everything is kept in the folder of --out as it comes, and the same command
continues from there.
"""
    flags = parser.Parser("eval compare", "Two models answer the same prompts; a judge compares.", examples=examples)
    add = flags.add_argument
    add("model_a", type=parser.path, metavar="MODEL_A", help=parser.MODEL)
    add("model_b", type=parser.path, metavar="MODEL_B", help="the same")
    add("--prompts", type=parser.path, required=True, metavar="FILE", help="JSON lines, as shown below")
    add("--judge", type=parser.one_of(_JUDGES), required=True, metavar="KIND", help="who compares the answers")
    add(
        "--judge_function",
        metavar="FILE.py:NAME",
        help='function of (prompt, a, b, reference) that returns "a", "b" or "tie"',
    )
    add("--judge_model", type=parser.path, metavar="MODEL", help="instruct model; asked twice, the answers swapped")
    add("--adapter_a", type=parser.path, metavar="PATH", help="LoRA adapter of MODEL_A")
    add("--adapter_b", type=parser.path, metavar="PATH", help="LoRA adapter of MODEL_B")
    add("--chat", action="store_true", help="put texts as a user's message instead of continuing them")
    add("--max_new_tokens", type=parser.whole(1), default=256, metavar="N", help="tokens of an answer")
    add(
        "--temperature",
        type=parser.number(0),
        metavar="X",
        help="0 takes the likeliest token (default: each model's own settings)",
    )
    add("--seed", type=parser.whole(0), default=0, metavar="N", help="seed of the answers and of their order on screen")
    add("--out", type=parser.path, default="comparison", metavar="FOLDER", help="folder that keeps everything")
    _batch_size(flags)
    parser.add_model_flags(flags, adapter=False)
    flags.aliases |= {"-n": "--max_new_tokens", "--max_tokens": "--max_new_tokens", "--temp": "--temperature"}
    return flags.parse(argv)


def _quantization_flags(argv: Sequence[str]) -> argparse.Namespace:
    examples = "examples:\n  PROGRAM smollm2 --text stdlib:validation --others smollm2.Q4_0.gguf\n"
    flags = parser.Parser("eval quantization", "Measure what rounding a model's weights costs.", examples=examples)
    add = flags.add_argument
    add("model", type=parser.path, metavar="MODEL", help=parser.MODEL)
    add("--text", nargs="+", required=True, metavar="FILE", help="as in eval perplexity")
    add(
        "--quantizations",
        default=",".join(QUANTIZATIONS),
        metavar="NAME,...",
        help="int8 and int4 weights, and a KV cache in int8; an empty text for none",
    )
    add("--others", nargs="+", type=parser.path, default=[], metavar="MODEL", help="quantized files of the same model")
    add(
        "--calibrate",
        nargs="+",
        default=[],
        metavar="FILE",
        help="texts by whose activations another int4 is rounded (GPTQ)",
    )
    add("--context", type=parser.whole(1), default=512, metavar="N", help="tokens of a window")
    flags.aliases |= _TEXT_ALIASES
    add("--json", action="store_true", help="print one JSON object a line")
    parser.add_model_flags(flags, adapter=False, quantize=False)
    return flags.parse(argv)


def _load(options: argparse.Namespace) -> Llama:
    from llama_jax import compilation_cache
    from llama_jax.infer.load import load

    compilation_cache.enable()
    return load(
        options.model,
        dtype=options.dtype,
        quantize=options.quantize,
        mesh=options.mesh,
        adapters=options.adapter,
        chat_format=options.chat_format,
    )


def _perplexity(argv: Sequence[str]) -> int:
    options = _perplexity_flags(argv)
    texts = samples(options.text)
    from llama_jax.eval import sliding_window

    result = sliding_window.perplexity(
        _load(options), texts, context=options.context, stride=options.stride, batch_size=options.batch_size
    )
    if options.json:
        row = {**vars(result), "perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
        print(json.dumps({key: value if math.isfinite(value) else None for key, value in row.items()}))
    else:
        print(_report(result))
    return 0


def _report(result: Perplexity) -> str:
    sign = "\N{PLUS-MINUS SIGN}"
    over = f"{result.documents:,} documents" if result.documents > 1 else f"{result.windows:,} windows of one document"
    one = math.isnan(result.standard_error)  # a single window
    error, last = (
        ("", "one window has no standard error")
        if one
        else (f" {sign} {result.standard_error:.4f}", f"{sign} is the standard error over {over}")
    )
    return "\n".join(
        [
            f"nats per token   {result.nats_per_token:.4f}{error}",
            f"perplexity       {result.perplexity:.4g}",
            f"bits per byte    {result.bits_per_byte:.4f}",
            f"tokens           {result.tokens:,} of {result.bytes:,} bytes",
            f"windows          {result.windows:,} of {result.context:,} tokens, {result.stride:,} apart",
            last,
        ]
    )


def samples(patterns: Sequence[str]) -> list[Sample]:
    """The texts, dialogs and completions in the files that match the patterns."""
    from llama_jax.data.records import BadLine, Pair
    from llama_jax.data.sources import documents_from

    found: list[Sample] = []
    for sample in documents_from(patterns):
        if isinstance(sample, BadLine):
            raise ConfigError(f"{sample.name}: {sample.reason}")
        if isinstance(sample, Pair):
            raise ConfigError(f"{sample.name} is a preference pair: give texts, dialogs or completions")
        found.append(sample)
    return found


def _harness(argv: Sequence[str]) -> int:
    options = _harness_flags(argv)
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
        _load(options),
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


def _compare(argv: Sequence[str]) -> int:
    options = _compare_flags(argv)
    from llama_jax import compilation_cache
    from llama_jax.eval import comparison, intervals

    compilation_cache.enable()
    names = [field for field in comparison.Asked.__dataclass_fields__]
    asked = comparison.Asked(**{name: getattr(options, name) for name in names})
    result = comparison.compare(
        asked,
        comparison.read_prompts(options.prompts),
        judge=options.judge,
        out=options.out,
        judge_function=options.judge_function,
        judge_model=options.judge_model,
        batch_size=options.batch_size,
        mesh=options.mesh,
        progress=progress.enabled and sys.stderr.isatty(),
    )
    if result.judged < result.total:
        print(f"judged {result.judged:,} of {result.total:,}: the same command continues with the rest")
    if result.judged:
        print(intervals.table(result.tallies, *asked.names))
    if result.unread:
        print(f"{result.unread:,} ties are verdicts that could not be read: see {result.folder}/comparison.jsonl")
    print(f"{result.picture or result.folder}")
    return 0


def _quantization(argv: Sequence[str]) -> int:
    options = _quantization_flags(argv)
    names = [name.strip() for name in options.quantizations.split(",") if name.strip()]
    wrong = [name for name in names if name not in QUANTIZATIONS]
    if wrong:
        raise ConfigError(f"--quantizations takes int8, int4 and kv_int8, got {wrong[0]!r}")
    if not names and not options.others:
        raise ConfigError("--quantizations and --others name nothing to measure: leave --quantizations out")
    if options.kv not in (None, "compute"):
        raise ConfigError("--kv would round the cache of the reference too: --quantizations kv_int8 measures it")
    texts, calibration = samples(options.text), samples(options.calibrate) if options.calibrate else []
    from llama_jax import compilation_cache
    from llama_jax.eval import quantization

    compilation_cache.enable()
    opened = {"dtype": options.dtype, "mesh": options.mesh, "chat_format": options.chat_format}
    results = quantization.measure(
        options.model,
        texts,
        quantizations=names,
        others=options.others,
        calibration=calibration,
        context=options.context,
        opened=opened,
    )
    if options.json:
        for result in results:
            print(json.dumps({**vars(result), "perplexity_change": result.perplexity_change}), flush=True)
    else:
        print(quantization.table(list(results)))
    return 0
