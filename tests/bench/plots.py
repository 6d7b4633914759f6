"""Pictures of docs/bench/results.csv, as SVG beside it: the same bytes for the same rows.

    python -m tests.bench.plots [--csv FILE] [--out FOLDER]

Each takes the newest row of every figure, of the device that the newest of its rows was measured on. One that has no
rows is not drawn, and an older picture of it is left alone.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from tests.bench.record import RESULTS

Row = dict[str, str]
OURS, PEER, GREY = "#0072b2", "#b0b0b0", "#666666"
COLOURS = ("#0072b2", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#56b4e9", "#000000")
STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "svg.fonttype": "none",
    "svg.hashsalt": "refopt",
}
PEERS = ("torch", "bitsandbytes", "torchao", "FlashOptim", "optimi")


def read(path: Path) -> list[Row]:
    """All rows, oldest first."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def newest(rows: Sequence[Row], bench: str, metric: str, work: str = "") -> dict[tuple[str, str], Row]:
    """{(work, subject): its last row} of a metric, on the device of the last of all; `work` is a regular expression."""
    some = [r for r in rows if r["bench"] == bench and r["metric"] == metric and re.fullmatch(work or ".*", r["work"])]
    out: dict[tuple[str, str], Row] = {}
    for r in some:
        if r["device"] == some[-1]["device"]:
            out.pop((r["work"], r["subject"]), None)  # the order of keys is that of the rows kept
            out[r["work"], r["subject"]] = r
    return out


def caption(figure: Figure, rows: Sequence[Row]) -> None:
    """Device and commits, small, below."""
    devices, commits = ({r[key] for r in rows} for key in ("device", "commit"))
    figure.supxlabel(f"{', '.join(sorted(devices))} · {', '.join(sorted(commits))}", fontsize=7, color=GREY)


def is_peer(subject: str) -> bool:
    return subject.split()[0] in PEERS


# ------------------------------------------------------------------------------------------------------------- pictures


def of_copy(rows: Sequence[Row]) -> Figure | None:
    """Bars: the fraction of a copy's bandwidth that each step of Llama-3.2-1B reaches, ours and the peers'."""
    found = sorted(newest(rows, "gpu_optim", "of_copy", "llama1b").values(), key=lambda r: float(r["ratio"]))
    if not found:
        return None
    figure = Figure(figsize=(8.5, 0.8 + 0.26 * len(found)), layout="constrained")
    ax = figure.subplots()
    share = [100 * float(r["ratio"]) for r in found]
    ax.barh(range(len(found)), share, color=[PEER if is_peer(r["subject"]) else OURS for r in found], height=0.7)
    for k, x in enumerate(share):
        ax.annotate(f" {x:.1f} %", (x, k), va="center", color=GREY, fontsize=9)
    ax.axvline(100, color=GREY, linewidth=1, linestyle=":")
    ax.set_yticks(range(len(found)), [r["subject"] for r in found])
    ax.set_xlim(0, max(112, *share))
    ax.set_xlabel("% of the bandwidth of a copy on the device; ours blue")
    figure.suptitle("One step over the 146 tensors of Llama-3.2-1B, bf16 weights and gradients", x=0.01, ha="left")
    caption(figure, found)
    return figure


def lora(rows: Sequence[Row]) -> Figure | None:
    """Bars on a logarithmic axis: milliseconds of the device and until step() returns, for 448 small tensors."""
    device, wall = (newest(rows, "gpu_optim", metric, "lora7b") for metric in ("ms", "wall_ms"))
    found = sorted((r for key, r in device.items() if key in wall), key=lambda r: -float(r["value"]))
    if not found:
        return None
    figure = Figure(figsize=(8.5, 0.8 + 0.3 * len(found)), layout="constrained")
    ax = figure.subplots()
    for k, r in enumerate(found):
        shade = PEER if is_peer(r["subject"]) else OURS
        ax.barh(k, float(r["value"]), color=shade, height=0.7)
        ax.plot(float(wall["lora7b", r["subject"]]["value"]), k, "|", color="black", markersize=11, markeredgewidth=2)
    ax.set_xscale("log")
    ax.set_yticks(range(len(found)), [r["subject"] for r in found])
    ax.set_xlabel("milliseconds of the device (bars; ours blue), and until step() returns (strokes)")
    figure.suptitle(
        "LoRA of rank 16 on Llama-2-7B: 448 tensors, 40M parameters, new gradients every step", x=0.01, ha="left"
    )
    caption(figure, found)
    return figure


def millions(work: str) -> float:
    """flat268m: 268; flat4b: 4000."""
    number, unit = re.fullmatch(r"flat(\d+)([mb])", work).groups()  # type: ignore[union-attr]
    return float(number) * (1000 if unit == "b" else 1)


def sizes(rows: Sequence[Row]) -> Figure | None:
    """Time against size, both logarithmic, and the line on which time is size."""
    found = {k: r for k, r in newest(rows, "gpu_optim", "ms", r"flat\d+[mb]").items() if k[1] in ("AdamW", "AdamW8bit")}
    if not found:
        return None
    figure = Figure(figsize=(6.5, 4.4), layout="constrained")
    ax = figure.subplots()
    for shade, subject in zip(COLOURS, sorted({s for _, s in found}), strict=False):
        points = sorted((millions(w), float(r["value"])) for (w, s), r in found.items() if s == subject)
        x, y = np.array(points).T
        ax.plot(x, y, "o", color=shade, label=subject)
        ax.plot(x, y[-1] * x / x[-1], color=shade, linewidth=1, linestyle=":")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("millions of parameters in one tensor")
    ax.set_ylabel("milliseconds")
    ax.set_title("Time of a step (dotted: proportional to size)")
    ax.legend(frameon=False)
    caption(figure, list(found.values()))
    return figure


def blocks(rows: Sequence[Row]) -> Figure | None:
    """The fraction of a copy for blocks of 64 to 2048 elements."""
    every = newest(rows, "gpu_optim", "of_copy", "flat268m")
    found = [(*s.split(" block "), r) for (_, s), r in every.items() if " block " in s]
    if not found:
        return None
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    ax = figure.subplots()
    for shade, subject in zip(COLOURS, sorted({f[0] for f in found}), strict=False):
        points = sorted((int(f[1]), 100 * float(f[2]["ratio"])) for f in found if f[0] == subject)
        ax.plot(*np.array(points).T, "o-", color=shade, label=subject)
    ax.set_xscale("log", base=2)
    ticks = sorted({int(f[1]) for f in found})
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.set_ylim(0, 105)
    ax.set_xlabel("elements that share a scale")
    ax.set_ylabel("% of a copy")
    ax.set_title("Block sizes, 268M parameters")
    ax.legend(frameon=False)
    caption(figure, [f[2] for f in found])
    return figure


def convergence(rows: Sequence[Row]) -> Figure | None:
    """Curves of held-out loss, the mean of the seeds; and where each seed ended."""
    ends = ended(rows)
    if not ends:
        return None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    for k, (subject, seeds) in enumerate(ends.items()):
        shade = COLOURS[k % len(COLOURS)]
        curve = curve_of(rows, subject, seeds)
        if curve:
            steps = sorted(curve)
            left.plot(steps, [np.mean(curve[s]) for s in steps], color=shade, label=subject, linewidth=1.8)
        values = [float(r["value"]) for r in seeds.values()]
        right.plot(values, [k] * len(values), "o", color=shade, alpha=0.7)
        mean, noise = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0
        right.errorbar(mean, k + 0.25, xerr=noise, color=shade, capsize=4, marker="|", markersize=10)
    left.set_xlabel("step")
    left.set_ylabel("nats a byte")
    left.set_title("Held-out loss, mean of the seeds")
    left.legend(frameon=False)
    right.set_yticks(range(len(ends)), list(ends))
    right.invert_yaxis()
    right.set_xlabel("nats a byte")
    right.set_title("Where each seed ended, mean, deviation", loc="right")
    caption(figure, [r for seeds in ends.values() for r in seeds.values()])
    return figure


def ended(rows: Sequence[Row], bench: str = "convergence") -> dict[str, dict[str, Row]]:
    """{subject: {seed: row of the last loss}} of the job with most seeds, the newest of such."""
    works = list(dict.fromkeys(r["work"] for r in reversed(rows) if (r["bench"], r["metric"]) == (bench, "loss")))
    jobs: list[dict[str, dict[str, Row]]] = []
    for work in works:
        of: dict[str, dict[str, Row]] = {}
        for (_, label), r in newest(rows, bench, "loss", re.escape(work)).items():
            subject, _, seed = label.rpartition(" seed ")
            of.setdefault(subject, {})[seed] = r
        jobs.append(of)
    return max(jobs, key=lambda of: min(map(len, of.values())), default={})


def curve_of(
    rows: Sequence[Row], subject: str, seeds: dict[str, Row], metric: str = "loss at ", bench: str = "convergence"
) -> dict[int, list[float]]:
    """{step: losses of the seeds} of one subject, where every seed has one."""
    (work,) = {r["work"] for r in seeds.values()}
    out: dict[int, dict[str, float]] = {}
    for r in rows:
        if r["bench"] == bench and r["work"] == work and r["metric"].startswith(metric):
            name, _, seed = r["subject"].rpartition(" seed ")
            if name == subject:
                out.setdefault(int(r["metric"].removeprefix(metric)), {})[seed] = float(r["value"])
    return {step: list(by_seed.values()) for step, by_seed in out.items() if len(by_seed) == len(seeds)}


def finetune(rows: Sequence[Row]) -> Figure | None:
    """Training losses, the mean of the seeds; and where each seed ended on held-out text."""
    ends = ended(rows, "finetune")
    if not ends:
        return None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    every = [r for seeds in ends.values() for r in seeds.values()]
    before = newest(rows, "finetune", "loss before", re.escape(every[0]["work"])).values()
    for k, (method, seeds) in enumerate(ends.items()):
        shade = COLOURS[k % len(COLOURS)]
        curve = curve_of(rows, method, seeds, "training loss at ", "finetune")
        steps = sorted(curve)
        left.plot(steps, [np.mean(curve[s]) for s in steps], "o-", color=shade, label=method, markersize=3)
        right.plot([float(r["value"]) for r in seeds.values()], [k] * len(seeds), "o", color=shade, alpha=0.7)
        start = [float(r["value"]) for r in before if r["subject"].startswith(f"{method} seed ")]
        right.plot(start, [k] * len(start), "|", color=shade, markersize=14, label="before" if k == 0 else None)
    left.set_xlabel("step")
    left.set_ylabel("nats a token")
    left.set_title("Training loss, mean of the seeds")
    left.legend(frameon=False)
    right.set_yticks(range(len(ends)), list(ends))
    right.set_ylim(len(ends) - 0.5, -0.5)
    right.set_xlabel("nats a token")
    right.set_title("Held out: before, and each seed after")
    right.legend(frameon=False, loc="lower right")
    figure.suptitle("SmolLM2-135M, whose weights were 4-bit once, fine-tuned", x=0.01, ha="left")
    caption(figure, every)
    return figure


PICTURES: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
    "of_copy": of_copy,
    "lora": lora,
    "sizes": sizes,
    "blocks": blocks,
    "convergence": convergence,
    "finetune": finetune,
}


def draw(path: Path, folder: Path) -> list[Path]:
    """Every picture that there are rows for; returns the files that were written."""
    rows, written = read(path), []
    for name, picture in PICTURES.items():
        with rc_context(STYLE):
            figure = picture(rows)
            if figure is None:
                print(f"{name}: no rows yet")
                continue
            written.append(folder / f"{name}.svg")
            figure.savefig(written[-1], format="svg", metadata={"Date": None})
    return written


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=RESULTS.parent)
    args = parser.parse_args(argv)
    for path in draw(args.csv, args.out):
        print(path)


if __name__ == "__main__":
    main()
