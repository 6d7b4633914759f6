"""The picture of a fine-tuning: losses on the left, bytes of every part on the right, counted and predicted."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from refopt.memory import GB
from refopt_cuda.train.finetune import methods
from refopt_cuda.train.finetune.plan import Plan
from refopt_cuda.train.finetune.run import Result
from refopt_cuda.train.picture import COLOURS, STYLE

PARTS = {
    "weights": "#0072b2",
    "frozen": "#7f7f7f",
    "gradients": "#e69f00",
    "states": "#009e73",
    "scratch": "#cc79a7",
    "activations": "#56b4e9",
}
"""Parts of a device's memory, and their colours."""


def draw(plan: Plan, results: list[Result]) -> Figure:
    """The mean over seeds of each method's losses; for each method a bar of what was counted, and one of what was
    predicted."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
        _curves(left, plan, results)
        _bars(right, plan, results)
    return figure


def smooth(losses: np.ndarray, over: int) -> np.ndarray:
    """The mean of each value and of those before it, `over` at most."""
    total = np.concatenate([[0.0], np.cumsum(losses)])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(0, ends - over)
    return (total[ends] - total[starts]) / (ends - starts)


def _curves(ax: Any, plan: Plan, results: list[Result]) -> None:
    for shade, method in zip(COLOURS[1:], plan.methods, strict=False):
        some = [r for r in results if r.method == method]
        steps = np.arange(1, plan.steps + 1)
        mean = np.mean([r.losses for r in some], axis=0)
        ax.plot(steps, smooth(mean, max(1, plan.steps // 20)), color=shade, label=method, linewidth=1.6)
        for r in some:
            ax.plot([0, plan.steps], [r.before, r.after], "o", color=shade, markersize=5, alpha=0.7)
    ax.set_title("Loss: training (line), held out before and after (dots)")
    ax.set_xlabel("step")
    ax.set_ylabel("nats a token")
    ax.grid(axis="y", color="#eeeeee")
    ax.legend(frameon=False, loc="upper right")


def _bars(ax: Any, plan: Plan, results: list[Result]) -> None:
    firsts = [next(r for r in results if r.method == method) for method in plan.methods]
    names = []
    for k, r in enumerate(firsts):
        need = methods.predicted(plan, r.method)
        rows = {"counted": r.counted, "predicted": {} if need is None else need._asdict()}
        for j, (label, found) in enumerate(rows.items()):
            _bar(ax, 3 * k + j, found, 1.0 if label == "counted" else 0.55)
            names.append(f"{r.method}, {label}" if found else f"{r.method}: unknown")
    ax.set_yticks([3 * k + j for k in range(len(firsts)) for j in range(2)], names)
    ax.invert_yaxis()
    ax.set_title("GB, part by part")
    ax.legend(handles=_handles(), frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)


def _bar(ax: Any, at: int, found: dict[str, int], alpha: float) -> None:
    left = 0.0
    for part, shade in PARTS.items():
        size = found.get(part, 0) / GB
        ax.barh(at, size, left=left, color=shade, alpha=alpha, height=0.8)
        left += size
    if found:
        ax.annotate(f" {left:.2f}", (left, at), va="center", color="#333333")


def _handles() -> list[Any]:
    from matplotlib.patches import Patch

    return [Patch(color=shade, label=part) for part, shade in PARTS.items()]
