"""The picture of a job: loss curves on the left, bytes of state on the right."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from refopt import models
from refopt_cuda.train import subjects
from refopt_cuda.train.job import Result, Yardsticks
from refopt_cuda.train.plan import GIB

COLOURS = ("#7f7f7f", "#0072b2", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#56b4e9", "#b3a200", "#000000")
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "svg.fonttype": "none",
    "svg.hashsalt": "refopt",
    "font.family": "sans-serif",
}


def draw(results: list[Result], y: Yardsticks) -> Figure:
    """Held-out bits per byte over steps (the mean of the seeds), and bytes of state per parameter."""
    names = list(dict.fromkeys(r.subject.name for r in results))
    colour = {n: COLOURS[k % len(COLOURS)] for k, n in enumerate(names)}
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        _curves(left, results, colour, y)
        _bars(right, results, colour)
    return figure


def as_svg(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes every time."""
    out = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _curves(ax: Any, results: list[Result], colour: dict[str, str], y: Yardsticks) -> None:
    ends = []
    for k, (name, shade) in enumerate(colour.items()):
        rows = [r.record.rows for r in results if r.subject.name == name]
        steps = [int(x["step"]) for x in rows[0]]
        bits = np.array([[x["heldout"] / math.log(2) for x in row] for row in rows]).mean(0)
        dashed = (0, (4, 2)) if k == 0 else "-"
        ax.plot(steps, bits, color=shade, linestyle=dashed, label=name, linewidth=2.2, zorder=3 + (k == 0))
        ends += [bits[-1], *bits[: len(bits) // 2]]
    finite = [e for e in ends if math.isfinite(e)]
    low = min([*finite, y.trigram])
    high = min(max([*finite, y.trigram + 1]), y.trigram + 3)
    ax.set_ylim(low - 0.1 * (high - low), high)
    ax.axhline(y.trigram, color="#999999", linewidth=1, linestyle=":")
    ax.annotate(
        "trigram model", (1, y.trigram), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="#666666"
    )
    broken = [n for n in colour if not all(np.isfinite([r.bits for r in results if r.subject.name == n]))]
    if broken:
        ax.annotate(
            f"{', '.join(broken)}: no number any more", (0.98, 0.97), xycoords="axes fraction", ha="right", va="top"
        )
    ax.set_title("Held-out loss")
    ax.set_xlabel("step")
    ax.set_ylabel("bits per byte")
    ax.grid(axis="y", color="#eeeeee")
    ax.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.93 if broken else 1))


def _bars(ax: Any, results: list[Result], colour: dict[str, str]) -> None:
    by_name = {r.subject.name: r for r in results}
    shapes = models.named("llama-2-7b").shapes
    for k, (name, r) in enumerate(by_name.items()):
        each = r.record.state_bytes / r.plan.sizes.parameters()
        seven = subjects.bytes_for(r.subject, shapes) / GIB
        ax.barh(k, each, color=colour[name], height=0.62)
        ax.annotate(f" {each:.2f}   ({seven:.1f} GiB on 7B)", (each, k), va="center", color="#333333")
    ax.set_yticks(range(len(by_name)), list(by_name))
    ax.invert_yaxis()
    ax.set_xlim(0, 1.75 * max(r.record.state_bytes / r.plan.sizes.parameters() for r in results) or 1)
    ax.set_title("Optimizer state, bytes per parameter")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
