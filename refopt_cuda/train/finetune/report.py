"""What a fine-tuning came to: tables of losses and bytes, printed and as report.md with a picture, and metrics.csv."""

from __future__ import annotations

import csv
import json
import statistics
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from refopt.memory import GB
from refopt_cuda.train.finetune import methods, picture
from refopt_cuda.train.finetune.data import Blocks
from refopt_cuda.train.finetune.plan import Plan
from refopt_cuda.train.finetune.run import HELD, Result

PARTS = ("weights", "frozen", "gradients", "states", "scratch", "activations")
LOSSES = ("method", "seed", "trained weights", "before", "after", "change", "s/step", "peak GB")
MEMORY = ("method", "part", "counted MB", "predicted MB")
PICTURE = "loss_and_bytes.png"


def loss_rows(plan: Plan, results: list[Result]) -> list[tuple[str, ...]]:
    """One row a run, and where there are several seeds the mean and spread of each method."""
    out: list[tuple[str, ...]] = [
        (
            r.method,
            str(r.seed),
            f"{r.trained:,}",
            f"{r.before:.4f}",
            f"{r.after:.4f}",
            f"{r.after - r.before:+.4f}",
            f"{r.seconds / plan.steps:.2f}",
            f"{r.peak / GB:.2f}",
        )
        for r in results
    ]
    for method in plan.methods if len(plan.seeds) > 1 else ():
        after = [r.after for r in results if r.method == method]
        spread = f"{statistics.mean(after):.4f} ± {statistics.stdev(after):.4f}"
        out.append((method, "all", "", "", spread, "", "", ""))
    return out


def memory_rows(plan: Plan, results: list[Result]) -> list[tuple[str, ...]]:
    """Each part of the first run of each method: counted from the tensors, and predicted before there were any."""
    out: list[tuple[str, ...]] = []
    for r in [next(r for r in results if r.method == method) for method in plan.methods]:
        need, most = methods.predicted(plan, r.method), methods.predicted(plan, r.method, most=True)
        for part in PARTS:
            counted = _megabytes(r.counted.get(part))
            out.append((r.method, called(part, r.method), counted, _megabytes(need and getattr(need, part), "unknown")))
        if need is not None and need.host:
            out.append((r.method, "on the host", "", _megabytes(need.host)))
        peak = r.peak if plan.device == "cuda" else None
        out.append((r.method, "peak", _megabytes(peak), _megabytes(most and most.total, "unknown")))
    return out


def called(part: str, method: str) -> str:
    """What trains are adapters, but where all weights do."""
    return {"weights": "weights" if method == "full" else "adapters", "frozen": "frozen weights"}.get(part, part)


def _megabytes(size: int | None, unknown: str = "") -> str:
    return unknown if size is None else f"{size / 1e6:.2f}"


def notes(plan: Plan, blocks: Blocks) -> list[str]:
    """What the tables leave out."""
    peak = "the GPU's allocator" if plan.device == "cuda" else "the whole process, everything before included"
    return [
        f"{blocks.name}, sha256 {blocks.sha256}: {len(blocks.train)} blocks of {plan.context} tokens to train on "
        f"({blocks.tokens:,} labels), {len(blocks.held)} held out.",
        f"before, after: nats a token on {min(len(blocks.held), HELD)} held-out blocks. peak: of {peak}. "
        "counted: from the tensors; activations, on a GPU, from the allocator: what a forward and backward pass added, "
        "gradients that came meanwhile included. predicted: refopt.memory.train, each part at its largest, frozen "
        "weights outside linear layers in bfloat16, as on a GPU; peak: refopt.memory.peak, the largest moment.",
    ]


def show(console: Console, plan: Plan, blocks: Blocks, results: list[Result], folder: Path) -> None:
    """Print the tables and write report.md, loss_and_bytes.png and metrics.csv."""
    losses, parts = loss_rows(plan, results), memory_rows(plan, results)
    for columns, rows in ((LOSSES, losses), (MEMORY, parts)):
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
        for k, column in enumerate(columns):
            table.add_column(column, justify="right" if k else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for text in notes(plan, blocks):
        console.print(text, markup=False, highlight=False)
    picture.draw(plan, results).savefig(folder / PICTURE, dpi=160)
    page = [
        "# refopt finetune",
        "",
        f"![losses and bytes]({PICTURE})",
        "",
        *_markdown(LOSSES, losses),
        "",
        *_markdown(MEMORY, parts),
        "",
    ]
    page += [*notes(plan, blocks), "", "```json", json.dumps(asdict(plan), indent=2), "```", ""]
    (folder / "report.md").write_text("\n".join(page), "utf-8")
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["method", "seed", "step", "loss"])
        for r in results:
            out.writerow([r.method, r.seed, "before", r.before])
            out.writerows([r.method, r.seed, k, loss] for k, loss in enumerate(r.losses, 1))
            out.writerow([r.method, r.seed, "after", r.after])
    console.print(f"\n{folder / 'report.md'}", markup=False, highlight=False, soft_wrap=True)


def _markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (columns, ("---",) * len(columns), *rows)]
