"""The picture of a comparison: shares of wins, ties and losses as horizontal stacked bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama_jax.eval.intervals import Rate, Tally

# Blue and vermilion of Okabe and Ito's palette, which color-blind readers distinguish, and gray; with readable inks.
_COLORS = ("#0072B2", "#D3D3D3", "#D55E00")
_INKS = ("white", "black", "black")
_NARROW = 5.5  # percent: a narrower bar holds no label


def draw(tallies: Sequence[Tally], path: Path, *, name_a: str, name_b: str, judge: str) -> Path:
    """Draw one bar for each tally as PNG, with percentages inside and the intervals of win and loss on the right.

    Args:
        tallies: rows from the top down; those without a verdict are left out.
        path: file of the picture.
        name_a: name of the model whose wins are on the left.
        name_b: name of the other model.
        judge: name of the judge, for the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in tallies if row.n]
    figure = Figure(figsize=(10, 1.3 + 0.52 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for y, row in enumerate(rows):
        left = 0.0
        for rate, color, ink in zip(row.rates, _COLORS, _INKS, strict=True):
            width = 100 * rate.share
            axes.barh(y, width, left=left, height=0.66, color=color, edgecolor="white", linewidth=0.8)
            if width >= _NARROW:
                axes.text(left + width / 2, y, _percent(width), ha="center", va="center", color=ink, fontsize=10)
            elif width > 0:  # a sliver: won or lost above the bar, a tie below, as two of them may be neighbours
                middle = min(max(left + width / 2, 1.5), 98.5)
                beyond, side = (y + 0.35, "top") if rate is row.tie else (y - 0.35, "bottom")
                axes.text(middle, beyond, _percent(width), ha="center", va=side, color="black", fontsize=7)
            left += width
        label = f"n = {row.n:,}   win {_interval(row.win)}   loss {_interval(row.loss)}"
        axes.text(101.5, y, label, ha="left", va="center", color="#444444", fontsize=8.5)
    axes.text(101.5, -0.5, "95 % confidence intervals", ha="left", va="bottom", color="#444444", fontsize=8.5)
    axes.set_ylim(len(rows) - 0.45, -0.6)
    axes.set_xlim(0, 100)
    axes.set_yticks(range(len(rows)), [_short(row.name, 24) for row in rows], fontsize=10)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    names = (f"{_short(name_a)} wins", "tie", f"{_short(name_b)} wins")
    handles = [axes.barh(0, 0, color=color, label=name) for color, name in zip(_COLORS, names, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
    figure.suptitle(f"{_short(name_a)} against {_short(name_b)}, judged by {judge}", fontsize=12, x=0.01, ha="left")
    figure.savefig(path, dpi=160)
    return path


def _percent(value: float) -> str:
    return f"{value:.0f} %" if value >= 0.95 or value == 0 else f"{value:.1f} %"


def _interval(rate: Rate) -> str:
    return f"{100 * rate.low:.0f}\u2013{100 * rate.high:.0f} %"


def _short(name: str, most: int = 44) -> str:
    return _plain(name if len(name) <= most else f"{name[: most // 2 - 1]}\u2026{name[-(most // 2) :]}")


def _plain(text: str) -> str:
    """The text with its dollar signs escaped, which would begin a formula."""
    return text.replace("$", r"\$")
