"""Rows of a plan as stacked bars, beside what the card holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refopt.planner.cards import GIGA
from refopt.planner.table import Plan, Row

COLORS = {
    "weights": "#0072B2",
    "frozen": "#56B4E9",
    "gradients": "#D55E00",
    "master": "#CC79A7",
    "states": "#E69F00",
    "scratch": "#7F7F7F",
    "activations": "#009E73",
}


def draw(found: Plan, rows: list[Row]) -> Any:
    """A matplotlib Figure: a bar a row, a mark at its peak, a line where the card ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.6 + 0.3 * len(rows)), layout="constrained")
    axes, y = figure.subplots(), range(len(rows))
    left = [0.0] * len(rows)
    for part, color in COLORS.items():
        wide = [getattr(row.parts, part) / GIGA for row in rows]
        if any(wide):
            axes.barh(y, wide, left=left, color=color, label=part)
        left = [a + b for a, b in zip(left, wide, strict=True)]
    axes.plot([row.peak / GIGA for row in rows], y, "k|", ms=12, mew=2, label="peak")
    axes.axvline(found.run.card.usable / GIGA, color="black", ls=":", label=f"{found.run.card.name}, for tensors")
    axes.set_yticks(y, [row.setup.label for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="GB of one device, each part at its largest")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def save(found: Plan, rows: list[Row], path: Path) -> None:
    """Draw into a file. Raises ValueError for one that is no picture."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot must end in .png, .svg or .pdf, got {str(path)!r}")
    draw(found, rows).savefig(path, dpi=120)
