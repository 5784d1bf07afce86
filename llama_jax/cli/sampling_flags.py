"""The flags of one continuation: limits, sampling settings, stop strings, constraints and speculation."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

from llama_jax.cli.parser import Parser, number, one_of, whole
from llama_jax.errors import ConfigError, brief
from llama_jax.files import expanded, read_small

_MOST_BYTES = 10_000_000  # of a file of a schema or a grammar
_ALIASES = {
    "-n": "--max_new_tokens",
    "--n_predict": "--max_new_tokens",
    "--predict": "--max_new_tokens",
    "--max_tokens": "--max_new_tokens",
    "--temp": "--temperature",
    "-s": "--seed",
    "--repeat_penalty": "--repetition_penalty",
    "-r": "--stop",
    "--reverse_prompt": "--stop",
    "--typical": "--typical_p",
    "--min_new_tokens": "--min_tokens",
    "--logprobs": "--top_logprobs",
    "-j": "--json_schema",
    "-jf": "--json_schema",
    "--json_schema_file": "--json_schema",
    "--grammar_file": "--grammar",
    "--model_draft": "--draft",
    "-md": "--draft",
}
# Flags whose values are arguments of `generate` of the same name.
_SAME = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "stop",
    "top_logprobs",
    "prompt_logprobs",
    "regex",
    "speculate",
)


def add(parser: Parser) -> None:
    """Add the flags of a continuation, and --seed."""
    _add_settings(parser)
    _add_ends(parser)
    group = parser.add_argument_group("constraints and speed")
    add = group.add_argument
    add(
        "--json_schema",
        metavar="FILE",
        help="the text is JSON that validates against this schema: a file, or the schema itself",
    )
    add("--regex", metavar="EXPRESSION", help="the text matches this regular expression as a whole")
    add("--choice", action="append", metavar="TEXT", help="the text is this one; repeat it for several")
    add(
        "--grammar",
        metavar="FILE",
        help="the text matches this grammar (Lark's syntax, as llguidance reads it, or llama.cpp's GBNF): a file, or "
        "the grammar itself",
    )
    add(
        "--speculate",
        type=one_of(("lookup", "draft")),
        metavar="NAME",
        help="guess several tokens at once: lookup repeats what followed the last tokens earlier in the text, draft "
        "asks the model of --draft; the text stays the same",
    )
    parser.aliases |= _ALIASES


def _add_settings(parser: Parser) -> None:
    group = parser.add_argument_group(
        "sampling", "The defaults of the model (generation_config.json) come before those shown here."
    )
    add = group.add_argument
    add(
        "--max_new_tokens",
        type=_limit,
        metavar="N",
        help="new tokens for each prompt (default: 128; 512 in a dialog)",
    )
    add(
        "--temperature",
        type=number(0, note="0: the likeliest token"),
        metavar="X",
        help="divides the logits (default: 0.6)",
    )
    add("--top_k", type=whole(0), metavar="K", help="keep the K likeliest tokens; 0 keeps all (default: 0)")
    add(
        "--top_p",
        type=number(1e-6, 1),
        metavar="P",
        help="keep the likeliest tokens up to this mass; 1 keeps all (default: 0.9)",
    )
    add(
        "--min_p",
        type=number(0, 1),
        metavar="P",
        help="keep tokens at least P times as likely as the likeliest; 0 keeps all (default: 0)",
    )
    _add_penalties(add)


def _limit(text: str) -> int:
    """The value of --max_new_tokens, with a reason where it is llama.cpp's word for no limit."""
    if text in ("-1", "-2"):
        raise argparse.ArgumentTypeError(
            f"{text} is no limit in llama.cpp, but here the KV cache is as long as the limit needs: give the most new "
            "tokens that you want, such as 2048"
        )
    return whole(1)(text)


_limit.allowed = whole(1).allowed  # type: ignore[attr-defined]


def _seed(text: str) -> int:
    """The value of --seed; -1 is llama.cpp's word for a random one."""
    return random.SystemRandom().randrange(1 << 31) if text == "-1" else whole(0)(text)


_seed.allowed = "of at least 0; -1 draws one"  # type: ignore[attr-defined]


def _add_penalties(add: Callable[..., Any]) -> None:
    """Add the rest of the settings to the group of `_add_settings`."""
    add(
        "--typical_p",
        type=number(1e-6, 1),
        metavar="P",
        help="keep the tokens of the most typical surprise up to this mass; 1 keeps all (default: 1)",
    )
    add(
        "--repetition_penalty",
        type=number(1e-3, 1e6),
        metavar="X",
        help="above 1 makes tokens of the prompt and the text so far less likely; 1 is off (default: 1)",
    )
    for name, what in (("presence", "that the text so far holds"), ("frequency", "times its count in the text so far")):
        add(
            f"--{name}_penalty",
            type=number(-1e6, 1e6),
            metavar="X",
            help=f"subtracted from the logit of each token {what} (default: 0)",
        )
    add(
        "--logit_bias",
        action="append",
        metavar="ID=X",
        help="add X to the logit of a token; -inf bans it; repeat it for several, or give a JSON object",
    )
    add("--seed", type=_seed, default=0, metavar="N", help="seed of the first prompt; prompt i draws from seed + i")


def _add_ends(parser: Parser) -> None:
    group = parser.add_argument_group("where a text ends, and what is reported of it")
    add = group.add_argument
    add(
        "--stop",
        action="append",
        metavar="TEXT",
        help="text that ends the answer; repeat it for several",
    )
    add("--ignore_eos", action="store_true", default=None, help="go on after the model's stop tokens")
    add("--min_tokens", type=whole(0), metavar="N", help="no stop token before N new ones (default: 0)")
    add(
        "--top_logprobs",
        type=whole(0),
        metavar="K",
        help="with --json: the K likeliest tokens at each new position (default: 0)",
    )
    add(
        "--prompt_logprobs",
        type=whole(0),
        metavar="K",
        help="with --json: the log-probability of each token of the prompt, and the K likeliest there",
    )


def options_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `Llama.generate` that the command line gave, checked as far as possible without a model.

    Raises:
        ConfigError: a setting out of its bounds, or a file that cannot be read.
    """
    from llama_jax.sampling_params import SamplingParams

    given = {name: getattr(options, name) for name in _SAME if getattr(options, name) is not None}
    if options.ignore_eos:
        given["ignore_eos"] = True
    if options.logit_bias:
        given["logit_bias"] = _bias(options.logit_bias)
    if options.json_schema is not None:
        given["json_schema"] = _schema(options.json_schema)
    if options.choice:
        given["choices"] = options.choice
    if options.grammar is not None:
        given["grammar"] = _grammar(options.grammar)
    known = SamplingParams.__dataclass_fields__
    SamplingParams(**{name: value for name, value in given.items() if name in known})
    if "" in given.get("stop", ()):
        raise ConfigError("--stop is empty: it would end every text at once")
    return given


def _bias(values: list[str]) -> dict[str, float]:
    """The pairs of --logit_bias."""
    bias: dict[str, float] = {}
    for value in values:
        token, separator, number = value.partition("=")
        if signed := re.fullmatch(r"(\d{1,18})([+-][\d.]{1,18})", value):  # llama.cpp's form, 15043-1
            token, separator, number = signed[1], "=", signed[2]
        try:
            found = json.loads(value) if value.startswith("{") else {token: float(number)} if separator else None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, Mapping):
            raise ConfigError(f"--logit_bias must be ID=X or a JSON object, such as 128009=-5, got {brief(value)}")
        bias |= found
    return bias


def _grammar(value: str) -> str:
    """The text of --grammar, from a file or as it is. A grammar has rules, `start: ...` or `root ::= ...`."""
    if not value.strip():
        raise ConfigError("--grammar is empty: give a file, or the grammar itself")
    if re.search(r"^[ \t]*(start[ \t]*:|[\w-]+[ \t]*::=)", value, re.MULTILINE) and not os.path.exists(value):
        return value
    return read_small(expanded(value), max_bytes=_MOST_BYTES).decode("utf-8", "replace")


def _schema(value: str) -> str:
    """The JSON text of --json_schema, from a file or as it is."""
    if not value.strip():
        raise ConfigError("--json_schema is empty: give a file, or the schema itself")
    if value.lstrip().startswith(("{", "[", "true", "false")) and not os.path.exists(value):
        return value
    return read_small(expanded(value), max_bytes=_MOST_BYTES).decode("utf-8", "replace")
