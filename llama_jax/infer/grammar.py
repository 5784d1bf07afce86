"""Constrained decoding: JSON schemas, regular expressions, choices and grammars, by the llguidance library.

A `Constraint` says what an output must be. A `Grammars` compiles constraints for one tokenizer, and a `Matcher` follows
one output: before each token the host asks it for the allowed tokens (`mask`), and afterwards it reads the token.
The mask goes to the device as one bit a token (see `ops.sampling.SamplingState`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_jax.errors import ConfigError, brief, json_fault, nearest, one_line
from llama_jax.infer.schema import rewritten

if TYPE_CHECKING:
    from llama_jax.text.tokenizer import Tokenizer

KINDS = ("json_schema", "regex", "choices", "grammar")
_LONGEST = 1_000_000  # characters of a schema, an expression or a grammar


@dataclasses.dataclass(frozen=True)
class Constraint:
    """The form that an output must have.

    Attributes:
        kind: one of KINDS.
        text: the JSON schema as JSON, the regular expression (Rust's syntax), or the grammar (Lark's syntax, in the
            dialect of llguidance, or llama.cpp's GBNF). Choices are written as a regular expression.
    """

    kind: str
    text: str

    @classmethod
    def make(cls, kind: str, value: Any) -> Constraint:
        """A constraint from an argument of `generate`.

        Args:
            kind: one of KINDS.
            value: for "json_schema" a dict, a bool or JSON text; for "choices" a list of texts; else a text.

        Raises:
            ConfigError: the value is of another type, empty, or too long.
        """
        if kind == "json_schema":
            text = _schema_text(value)
        elif kind == "choices":
            listed = not isinstance(value, str) and isinstance(value, Sequence)
            if not listed or not value or not all(isinstance(item, str) and item for item in value):
                raise ConfigError(f"choices must be a list of texts, none of them empty, got {brief(value)}")
            # In Rust's syntax, \< and \> are ends of words, and only ASCII may be escaped.
            text = "|".join(
                re.sub(r"[^\w\s<>]", lambda m: "\\" + m[0] if m[0].isascii() else m[0], item) for item in value
            )
            text = f"(?s:{text})"
        else:
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{kind} must be a text that is not empty, got {brief(value)}")
            text = value
        if len(text) > _LONGEST:
            raise ConfigError(f"{kind} has {len(text):,} characters: at most {_LONGEST:,} are allowed")
        return cls("regex" if kind == "choices" else kind, text)


def _schema_text(value: Any) -> str:
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(rewritten(schema))
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"json_schema is not JSON: {json_fault(error)}") from None
    if not isinstance(schema, (Mapping, bool)):
        raise ConfigError(f'json_schema must be a JSON schema such as {{"type": "object"}}, got {brief(value)}')
    return text


def call_schema(tools: Sequence[Any] | None, choice: str) -> dict[str, Any]:
    """The JSON schema of a tool call in Llama 3.1's form, {"name": ..., "parameters": {...}}.

    Args:
        tools: functions in OpenAI's schema.
        choice: "required" for a call of any of them, or the name of one.

    Raises:
        ConfigError: there are no such functions.
    """
    functions = [tool.get("function", tool) for tool in tools or () if isinstance(tool, Mapping)]
    named = {str(function.get("name")): function.get("parameters") or {"type": "object"} for function in functions}
    if choice != "required" and choice not in named:
        near = nearest(str(choice), list(named))
        raise ConfigError(f'tool_choice must be "required" or the name of a tool, got {brief(choice)}{near}')
    if not named:
        raise ConfigError("tool_choice needs tools: a list of functions in OpenAI's schema")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": parameters},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name, parameters in named.items()
        if choice in ("required", name)
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


class Grammars:
    """Compiles constraints for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_tokens: Sequence[int]):
        """A compiler for outputs in a vocabulary.

        Args:
            tokenizer: the tokenizer.
            vocab_size: rows of the model's embedding. Ids beyond the tokenizer's are never allowed.
            stop_tokens: ids that may end an output once it is complete.

        Raises:
            ConfigError: llguidance is not installed, or there is no stop token.
        """
        try:
            import llguidance
        except ImportError:
            raise ConfigError('constrained decoding needs llguidance: pip install "llguidance>=1.3,<2"') from None
        if not stop_tokens:
            raise ConfigError("constrained decoding needs a stop token, which ends the output: give stop_tokens")
        self._library = llguidance
        self.vocab_size = vocab_size
        rows = min(tokenizer.vocab_size, vocab_size)
        control = set(tokenizer.special_tokens.values()) | set(stop_tokens)
        by_id = tokenizer.vocabulary.by_id
        wrapped: Any = _Wrapped(
            eos_token_id=stop_tokens[0],
            bos_token_id=tokenizer.bos_id,
            # A control token has no text of its own: its bytes must not match a grammar.
            tokens=[b"\xff[%d]" % i if i in control or i >= rows else by_id[i] for i in range(vocab_size)],
            special_token_ids=sorted(control | set(range(rows, vocab_size))),
            encode=lambda text: tokenizer.encode(text.decode("utf-8", "replace")),
        )
        self._tokenizer = llguidance.LLTokenizer(wrapped, n_vocab=vocab_size, eos_token=list(stop_tokens))

    def matcher(self, constraint: Constraint) -> Matcher:
        """A matcher at the start of an output; ConfigError if the constraint cannot be compiled."""
        library = self._library.LLMatcher
        make: dict[str, Any] = {
            "json_schema": library.grammar_from_json_schema,
            "regex": library.grammar_from_regex,
            "grammar": lambda text: library.grammar_from_lark(_lark(text)),
        }
        try:
            inner = library(self._tokenizer, make[constraint.kind](constraint.text), log_level=0)
        except ValueError as error:
            raise ConfigError(f"{constraint.kind} cannot be used: {one_line(error)[:300]}") from None
        if inner.is_error():
            raise ConfigError(f"{constraint.kind} cannot be used: {_reason(inner.get_error())}")
        return Matcher(inner, self.vocab_size)


def _lark(text: str) -> str:
    """A grammar in Lark's syntax, into which llama.cpp's GBNF is translated; ValueError if that is not possible."""
    if not re.search(r"^[ \t]*[\w-]+[ \t]*::=", text, re.MULTILINE):
        return text
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

    try:
        return gbnf_to_lark(text)
    except GbnfToLarkError as error:
        raise ValueError(f"as GBNF: {error}") from None
    except RecursionError:
        raise ValueError("as GBNF: it is nested too deeply") from None


def _reason(message: str) -> str:
    """The reason of llguidance for not compiling a constraint, in one line that says what to do."""
    keys = re.search(r"Unimplemented keys: \[(.*?)\]", message)
    if keys:
        return f"{keys[1]} cannot be enforced while a text is sampled: leave it out, or say the same in other words"
    missing = re.search(r"Resource '(.*?)' is not present", message)
    if missing:
        return f"the schema refers to {brief(missing[1])}, and other documents are not read: put it into $defs"
    if "oneOf constraints are not supported" in message:
        return (
            "an output could match several schemas of oneOf: give them properties that exclude each other, or use anyOf"
        )
    return one_line(message)[:300]


@dataclasses.dataclass(frozen=True)
class _Wrapped:
    """An adapter that gives a tokenizer the interface which llguidance expects."""

    eos_token_id: int
    bos_token_id: int | None
    tokens: list[bytes]
    special_token_ids: list[int]
    encode: Any
    is_tokenizer_wrapper: bool = True

    def __call__(self, text: str | bytes) -> list[int]:
        return self.encode(text.encode() if isinstance(text, str) else text)


class Matcher:
    """The state of one constrained output."""

    def __init__(self, inner: Any, vocab_size: int):
        """Wraps a matcher of llguidance."""
        self._inner = inner
        self._words = -(-vocab_size // 32)

    def mask(self) -> np.ndarray:
        """uint32 (W,): the tokens that may come next, one bit a token. ValueError if the grammar has failed."""
        mask = np.zeros(self._words, np.uint32)
        self._inner.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._inner.is_error():  # such as a limit of its parser; the mask then allows the end only
            raise ValueError(
                f"the schema or grammar allows no further text, refers to itself without an end, or is too large "
                f"(llguidance: {self._failure()})"
            )
        return mask

    def consume(self, tokens: Sequence[int]) -> None:
        """Reads tokens of the output, without the stop token. ValueError if one was not allowed."""
        if tokens and not self._inner.consume_tokens(list(tokens)):
            raise ValueError(f"a token does not match its grammar: {self._failure()}")

    def _failure(self) -> str:
        """The reason that llguidance gives for a failure, without the state of its parser."""
        return one_line(self._inner.get_error().partition("<state>")[0]).strip()[:300]
