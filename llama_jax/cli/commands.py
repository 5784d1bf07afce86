"""The program `llama-jax COMMAND ...`, which is also `python -m llama_jax COMMAND ...`.

It imports jax only where a command needs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

from llama_jax.cli import parser
from llama_jax.errors import ConfigError, brief, nearest

# Each command is a module with main(argv) -> exit status. train.py and infer.py at the top of the repository are the
# first two.
COMMANDS = {
    "train": "train or fine-tune a model",
    "infer": "sample text from a model, or talk to it",
    "convert": "write a model in the files of transformers, Meta's code or llama.cpp",
    "eval": "measure models: perplexity, lm_eval's tasks, or two models side by side",
    "plan": "print what a training run would need on TPUs or GPUs that need not be here",
    "inspect": "print what a model is, or what a run would learn from",
}
# Commands of other programs, by the command here.
_ALIASES = {
    "train": "finetune fine-tune sft dpo pretrain",
    "infer": "chat generate run cli sample complete",
    "convert": "quantize export merge save",
    "eval perplexity": "perplexity ppl",
    "eval harness": "lm-eval lm_eval",
    "eval compare": "compare",
}
_ANSWERS = {
    **dict.fromkeys(
        ("serve", "server"),
        "there is no server: `infer --chat` talks at a terminal, and `infer "
        "--prompt_file FILE --json` answers many prompts",
    ),
    **dict.fromkeys(
        ("bench", "benchmark"),
        "`infer --verbose` prints the time of an answer, and benchmarks/ of the repository has programs that measure",
    ),
    **dict.fromkeys(("embedding", "embeddings"), "llama_jax.load(MODEL).hidden(texts) gives them in Python"),
    **dict.fromkeys(("tokenize", "tokenizer"), "llama_jax.load(MODEL).tokenizer.encode(text) gives ids in Python"),
    **dict.fromkeys(
        ("download", "pull", "login"),
        "models are downloaded when they are first used; `hf auth login` and `hf download` come with huggingface_hub",
    ),
}
_BY_ALIAS = {alias: command for command, aliases in _ALIASES.items() for alias in aliases.split()}


def main(argv: Sequence[str]) -> int:
    """Run the command that the arguments name, and return its exit status. Errors are raised."""
    name = choose("", argv, COMMANDS, "Train, sample, convert and measure Llama 3.1 models in JAX.")
    return 0 if name is None else importlib.import_module(f"llama_jax.cli.{name}").main(argv[1:])


def choose(command: str, argv: Sequence[str], choices: Mapping[str, str], description: str) -> str | None:
    """The first argument as one of `choices`, or None after --help and --version.

    Args:
        command: The command so far, e.g. "eval", or "" for the program itself.
        argv: The arguments after it.
        choices: The commands that may follow, each with a line of help.
        description: First paragraph of --help.

    Raises:
        ConfigError: no command or an unknown one.
    """
    program = parser.program(command)
    if not argv or argv[0] in ("-h", "--help", "help"):
        lines = [f"usage: {program} COMMAND ...", "", description, "", "commands:"]
        lines += [f"  {name:<11} {text}" for name, text in choices.items()]
        print("\n".join([*lines, "", f"{program} COMMAND --help prints the flags of a command."]))
        if not argv:
            raise ConfigError(f"no command: give one of {', '.join(choices)}")
        return None
    if argv[0] in ("--version", "-V"):
        print(parser.version())
        return None
    if argv[0].startswith("-"):
        first = next(iter(choices))
        raise ConfigError(f"{program} takes a command before flags, e.g. {program} {first}: {', '.join(choices)}")
    if argv[0] not in choices:
        if not command and argv[0] in _ANSWERS:
            raise ConfigError(f"{program} has no command {argv[0]!r}: {_ANSWERS[argv[0]]}")
        meant = "" if command else _BY_ALIAS.get(argv[0])
        near = f"; did you mean {meant!r}?" if meant else nearest(argv[0], list(choices), cutoff=0.6)
        raise ConfigError(f"{program} has no command {brief(argv[0])}{near or ';'} commands: {', '.join(choices)}")
    return argv[0]
