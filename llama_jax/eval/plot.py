"""Win, tie and loss as horizontal stacked bars, the way comparisons of two models are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama_jax.eval.intervals import Rate, Tally

# Blue and vermilion of Okabe and Ito's palette, which the colour-blind tell apart, and grey; and ink to read on each.
_COLOURS = ("#0072B2", "#D3D3D3", "#D55E00")
_INKS = ("white", "black", "black")
_NARROW = 5.5  # per cent: a label does not fit into less


def draw(tallies: Sequence[Tally], path: Path, *, name_a: str, name_b: str, judge: str) -> Path:
    """Write the bars as PNG: one for each tally, with percentages in them and the intervals of win and loss beside.

    Args:
        tallies: from the top down; those without a verdict are left out.
        path: of the picture.
        name_a: of the model that wins on the left.
        name_b: of the other.
        judge: who said so, for the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in tallies if row.n]
    figure = Figure(figsize=(10, 1.3 + 0.52 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        left = 0.0
        for rate, colour, ink in zip(row.rates, _COLOURS, _INKS, strict=True):
            width = 100 * rate.share
            axes.barh(place, width, left=left, height=0.66, color=colour, edgecolor="white", linewidth=0.8)
            if width >= _NARROW:
                axes.text(left + width / 2, place, _percent(width), ha="center", va="center", color=ink, fontsize=10)
            elif width > 0:  # a sliver: won or lost above the bar, a tie below, as two of them may be neighbours
                middle = min(max(left + width / 2, 1.5), 98.5)
                beyond, side = (place + 0.35, "top") if rate is row.tie else (place - 0.35, "bottom")
                axes.text(middle, beyond, _percent(width), ha="center", va=side, color="black", fontsize=7)
            left += width
        beside = f"n = {row.n:,}   win {_interval(row.win)}   loss {_interval(row.loss)}"
        axes.text(101.5, place, beside, ha="left", va="center", color="#444444", fontsize=8.5)
    axes.text(101.5, -0.5, "95 % confidence intervals", ha="left", va="bottom", color="#444444", fontsize=8.5)
    axes.set_ylim(len(rows) - 0.45, -0.6)
    axes.set_xlim(0, 100)
    axes.set_yticks(range(len(rows)), [_short(row.name, 24) for row in rows], fontsize=10)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    names = (f"{_short(name_a)} wins", "tie", f"{_short(name_b)} wins")
    handles = [axes.barh(0, 0, color=colour, label=name) for colour, name in zip(_COLOURS, names, strict=True)]
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
    """With no dollar sign, which would begin a formula."""
    return text.replace("$", r"\$")
