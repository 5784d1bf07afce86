"""Regular expressions from untrusted files, matched against the names of modules in bounded time.

Python's own matcher backtracks, and an expression such as (a+)+$ takes it exponential time. Here an expression maps a
set of start positions to the set of end positions (Thompson, 1968), so that no position is visited twice for one node.
Python's parser reads the expression; backreferences, lookbehind, flags and possessive repeats are refused, because
they are not regular or would need more than a set of positions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from re import _constants as codes  # type: ignore[attr-defined]  # mypy's stubs lack both
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from llama_jax.errors import ConfigError, brief

_MAX_LENGTH = 2000  # characters of an expression
_MAX_STEPS = 2_000_000  # nodes visited for all expressions and all names: about two seconds

_SINGLE = (codes.ANY, codes.LITERAL, codes.NOT_LITERAL, codes.IN)  # nodes that take one character
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    codes.CATEGORY_DIGIT: str.isdecimal,
    codes.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    codes.CATEGORY_SPACE: str.isspace,
    codes.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    codes.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    codes.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}


def full_matches(patterns: Iterable[str], names: Collection[str], source: str) -> dict[str, set[str]]:
    """The names that `re.fullmatch` would match, by pattern.

    Args:
        patterns: regular expressions in Python's syntax.
        names: names without newlines.
        source: the words that an error begins with.

    Raises:
        ConfigError: an expression is damaged, too long or not regular, or all together take too long.
    """
    matcher = _Matcher()
    return {pattern: _full_matches(matcher, pattern, names, source) for pattern in patterns}


def _full_matches(matcher: _Matcher, pattern: str, names: Iterable[str], source: str) -> set[str]:
    if len(pattern) > _MAX_LENGTH:
        raise ConfigError(f"{source}: {brief(pattern)} is longer than {_MAX_LENGTH:,} characters: write names instead")
    try:
        tree = parser.parse(pattern)
        if tree.state.flags != re.UNICODE:
            raise _UnsupportedError("sets flags")
        return {name for name in names if matcher.matches(tree, name)}
    except _UnsupportedError as error:
        raise ConfigError(
            f"{source}: the expression {brief(pattern)} {error}, which is not supported: write names of modules, or "
            "expressions of literals, classes, groups, alternatives, repeats and lookahead"
        ) from None
    except (re.error, RecursionError, OverflowError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else brief(str(error))
        raise ConfigError(f"{source}: {brief(pattern)} is not a regular expression: {reason}") from None


class _UnsupportedError(Exception):
    pass


class _Matcher:
    """Matches expressions against names, within one budget of steps."""

    def __init__(self) -> None:
        self._steps = 0
        self._name = ""
        self._ends: dict[tuple[int, int], frozenset[int]] = {}

    def matches(self, tree: Any, name: str) -> bool:
        self._name = name
        self._ends = {}
        return len(name) in self._sequence(tree, frozenset({0}))

    def _sequence(self, nodes: Any, starts: frozenset[int]) -> frozenset[int]:
        for node in nodes:
            starts = self._from_all(node, starts)
        return starts

    def _from_all(self, node: Any, starts: Iterable[int]) -> frozenset[int]:
        return frozenset().union(*(self._from(node, start) for start in starts))

    def _from(self, node: Any, start: int) -> frozenset[int]:
        key = (id(node), start)
        if key not in self._ends:
            self._ends[key] = self._visit(node, start)
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise _UnsupportedError("takes too many steps")
        return self._ends[key]

    def _visit(self, node: Any, start: int) -> frozenset[int]:
        kind, value = node
        if kind is codes.AT:
            return frozenset({start}) if self._at(value, start) else frozenset()
        if kind is codes.SUBPATTERN:
            _, added, removed, inner = value
            if added or removed:
                raise _UnsupportedError("sets flags")
            return self._sequence(inner, frozenset({start}))
        if kind in (codes.ASSERT, codes.ASSERT_NOT):
            direction, inner = value
            if direction < 0:
                raise _UnsupportedError("looks behind")
            follows = bool(self._sequence(inner, frozenset({start})))
            return frozenset({start}) if follows == (kind is codes.ASSERT) else frozenset()
        if kind is codes.BRANCH:
            return frozenset().union(*(self._sequence(branch, frozenset({start})) for branch in value[1]))
        if kind in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            low, high, inner = value
            return self._repeat(low, high, inner, start)
        if kind not in _SINGLE:
            raise _UnsupportedError(f"has a {_kind(kind)}")
        matched = start < len(self._name) and _accepts(kind, value, self._name[start])
        return frozenset({start + 1}) if matched else frozenset()

    def _repeat(self, low: int, high: int, inner: Any, start: int) -> frozenset[int]:
        """End positions of `inner` repeated `low` to `high` times; they stop changing after len(name) + 1 rounds."""
        (node,) = inner if len(inner) == 1 else (None,)
        step = (lambda at: self._from_all(node, at)) if node else (lambda at: self._sequence(inner, at))
        here, count = frozenset({start}), 0
        while count < low:
            after = step(here)
            if after == here or not after:  # further rounds give the same
                here = after
                break
            here, count = after, count + 1
        ends = frontier = here
        while frontier and (high is codes.MAXREPEAT or count < high):
            count += 1
            frontier = step(frontier) - ends
            ends |= frontier
        return ends

    def _at(self, where: Any, position: int) -> bool:
        if where in (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING):
            return position == 0
        if where in (codes.AT_END, codes.AT_END_STRING):
            return position == len(self._name)
        if where in (codes.AT_BOUNDARY, codes.AT_NON_BOUNDARY):
            word = _CATEGORIES[codes.CATEGORY_WORD]
            before, after = self._name[position - 1 : position], self._name[position : position + 1]
            edge = (before != "" and word(before)) != (after != "" and word(after))
            return edge == (where is codes.AT_BOUNDARY)
        raise _UnsupportedError(f"has {str(where).lower()}")


def _accepts(kind: Any, value: Any, character: str) -> bool:
    """True if a regular expression node for one character matches `character`."""
    if kind is codes.ANY:
        return True
    if kind is codes.LITERAL:
        return ord(character) == value
    if kind is codes.NOT_LITERAL:
        return ord(character) != value
    if kind is codes.RANGE:
        return value[0] <= ord(character) <= value[1]
    if kind is codes.CATEGORY:
        return _CATEGORIES[value](character)
    if kind is codes.IN:
        negated = value[0][0] is codes.NEGATE
        return any(_accepts(item, its, character) for item, its in value[negated:]) != negated
    raise ValueError(f"the regular expression node {kind} does not match a single character")


def _kind(kind: Any) -> str:
    return "backreference" if kind is codes.GROUPREF else str(kind).lower().replace("_", " ")
