"""Rates of wins, ties and losses with their confidence intervals. Imports no jax."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable

VERDICTS = ("a", "tie", "b")  # who won
_Z = 1.959963984540054  # 95 % of a normal distribution are within this many standard deviations


@dataclasses.dataclass(frozen=True)
class Rate:
    """A share of n with its 95 % confidence interval, all from 0 to 1."""

    share: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Tally:
    """The rates of a set of verdicts, from A's side.

    Attributes:
        name: name of the set: "overall", or a category.
        n: number of verdicts.
        win, tie, loss: shares of n with their intervals.
    """

    name: str
    n: int
    win: Rate
    tie: Rate
    loss: Rate

    @property
    def rates(self) -> tuple[Rate, Rate, Rate]:
        """Win, tie and loss."""
        return self.win, self.tie, self.loss


def wilson(hits: int, n: int) -> Rate:
    """The share hits / n with Wilson's score interval, which covers 95 % for few verdicts and rates of 0 and 1 too.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), z = 1.96 (Wilson 1927, J. Am. Stat. Assoc.
    22, 209). Without verdicts the share is nan and the interval is from 0 to 1.
    """
    if n == 0:
        return Rate(math.nan, 0.0, 1.0)
    p, square = hits / n, _Z * _Z / n
    middle = p + square / 2
    reach = _Z * math.sqrt(p * (1 - p) / n + square / (4 * n))
    low = 0.0 if hits == 0 else (middle - reach) / (1 + square)
    high = 1.0 if hits == n else (middle + reach) / (1 + square)
    return Rate(p, low, high)


def tally(verdicts: Iterable[tuple[str | None, str]]) -> list[Tally]:
    """The overall Tally, followed by one for each category in the order of their first verdicts.

    Args:
        verdicts: pairs of a category, or None, and one of VERDICTS.
    """
    counts: dict[str | None, collections.Counter[str]] = {None: collections.Counter()}
    for category, verdict in verdicts:
        for group in {None, category}:
            counts.setdefault(group, collections.Counter())[verdict] += 1
    return [
        Tally(name or "overall", n.total(), *(wilson(n[verdict], n.total()) for verdict in VERDICTS))
        for name, n in counts.items()
    ]


def table(tallies: list[Tally], name_a: str, name_b: str) -> str:
    """The tallies as a table in plain text."""
    cells = [["", "n", "A wins", "tie", "B wins"]]
    for row in tallies:
        rates = [f"{r.share:6.1%} [{r.low:.1%}, {r.high:.1%}]" if row.n else "-" for r in row.rates]
        cells.append([row.name, f"{row.n:,}", *rates])
    widths = [max(len(line[i]) for line in cells) for i in range(5)]
    lines = [f"A: {name_a}", f"B: {name_b}", ""]
    for line in cells:
        text = [
            line[0].ljust(widths[0]),
            line[1].rjust(widths[1]),
            *(c.ljust(w) for c, w in zip(line[2:], widths[2:], strict=True)),
        ]
        lines.append("  ".join(text).rstrip())
    return "\n".join([*lines, "", "[95 % confidence intervals by Wilson's score]"])
