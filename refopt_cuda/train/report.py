"""What a job came to: a line as each run ends, the table, and report.html."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2
import numpy as np
from rich.console import Console
from rich.table import Table

import refopt
from refopt import models
from refopt_cuda.train import picture, subjects
from refopt_cuda.train.job import Job, Result, Yardsticks
from refopt_cuda.train.plan import GIB

COLUMNS = (
    "optimizer",
    "loss",
    "bits/\nbyte",
    "state\nbytes",
    "byte/\nparam",
    "on 7B\nGiB",
    "step\nms",
    "ktok\n/s",
    "peak\nGiB",
    "equal\nNumPy",
)
NOTES = (
    "loss: nats a byte on held-out text. state bytes: counted from the tensors. on 7B: the same states for the shapes "
    "of Llama 2 7B. step: median of the optimizer's part. ktok/s: thousands of bytes trained on in a second. peak: "
    "{peak}. equal NumPy: sampled steps that the reference took again, with every bit of weights and states the same."
)


@dataclass(frozen=True)
class Difference:
    """Held-out bits per byte against the baseline, seed by seed."""

    name: str
    baseline: str
    bits: tuple[float, ...]
    spread: float = float("nan")
    """Standard deviation of the baseline's own held-out bits over the seeds."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.bits))

    @property
    def half(self) -> float:
        """Half of the 95 % interval of the mean (Student's t)."""
        n = len(self.bits)
        return float(student(n - 1) * np.std(self.bits, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")

    def __str__(self) -> str:
        each = ", ".join(f"{b:+.4f}" for b in self.bits)
        verdict = "within noise" if abs(self.mean) <= self.half else "beyond noise"
        beside = f"{self.baseline}'s own seeds differ by {self.spread:.4f}"
        return f"{self.name} − {self.baseline}: {self.mean:+.4f} ± {self.half:.4f} bits ({each}): {verdict}; {beside}"


def student(degrees: int, level: float = 0.95) -> float:
    """The t that a Student variable's size stays below with this probability, from its density."""
    x = np.linspace(0, 200, 2_000_001)
    tail = 2 * 200 ** -float(degrees) * degrees ** ((degrees - 1) / 2)  # of the unscaled density, both sides
    density = (1 + x * x / degrees) ** (-(degrees + 1) / 2)
    inside = np.cumsum(density[1:] + density[:-1]) * (x[1] - x[0])
    return float(x[1:][np.searchsorted(inside, level * (inside[-1] + tail))])


def differences(results: list[Result]) -> list[Difference]:
    """Every optimizer against AdamW (or the first one), paired by seed; empty for a single seed."""
    names = list(dict.fromkeys(r.subject.name for r in results))
    base = "AdamW" if "AdamW" in names else names[0]
    bits = {n: np.array([r.bits for r in results if r.subject.name == n]) for n in names}
    if len(bits[base]) < 2:
        return []
    spread = float(np.std(bits[base], ddof=1))
    return [Difference(n, base, tuple(bits[n] - bits[base]), spread) for n in names if n != base]


def heading(job: Job) -> str:
    """What is about to happen."""
    p, size = job.plan, job.plan.sizes.parameters()
    runs = f"{len(p.runs)} runs of {p.steps} steps, {p.batch} x {p.context} bytes a step"
    text = f"{job.text.name}, {len(job.text.data) / 1e6:.1f} MB"
    return f"{size / 1e6:.2f}M weights, {runs}, on {p.device}; {text} → {job.folder}"


def line(r: Result) -> str:
    """One run, as it ends."""
    equal = f"{r.record.equal} of {r.record.replayed} steps equal NumPy's"
    return f"{r.subject.name:<20} {r.bits:6.3f} bits/byte {r.record.state_bytes / 1e6:7.2f} MB  {equal}"


def cells(r: Result) -> tuple[str, ...]:
    """One run as a row of the table."""
    rec, count = r.record, r.plan.sizes.parameters()
    seven = subjects.bytes_for(r.subject, models.named("llama-2-7b").shapes)
    name = r.subject.name if len(r.plan.seeds) == 1 else f"{r.subject.name} ({r.seed})"
    return (
        name,
        f"{rec.heldout:.3f}",
        f"{r.bits:.3f}",
        f"{rec.state_bytes:,}",
        f"{rec.state_bytes / count:.3f}",
        f"{seven / GIB:.1f}",
        f"{r.step_ms:.2f}",
        f"{r.tokens_per_second / 1e3:.1f}",
        f"{rec.peak_bytes / GIB:.2f}",
        f"{rec.equal}/{rec.replayed}",
    )


def verdicts(results: list[Result]) -> list[str]:
    """A sentence for every optimizer of ours about the steps that the reference took again."""
    out = []
    for r in results:
        rec, seed = r.record, f", seed {r.seed}" if len(r.plan.seeds) > 1 else ""
        if rec.replayed and not r.subject.torchs:
            equal = f"{rec.equal} of {rec.replayed} sampled steps, bit for bit"
            out.append(f"{r.subject.name}{seed}: equal to the NumPy reference: {equal}")
    return out


def notes(job: Job, y: Yardsticks) -> list[str]:
    """What the table leaves out."""
    peak = "of the GPU's allocator" if job.plan.device == "cuda" else "of the whole process"
    return [
        f"On the same held-out bytes: xz -9e {y.xz:.3f} bits/byte, a trigram model {y.trigram:.3f}.",
        NOTES.format(peak=peak),
    ]


def show(console: Console, job: Job, results: list[Result]) -> None:
    """Print the table and write the report."""
    y, pairs = job.yardsticks(), differences(results)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for k, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if k else "left", no_wrap=True)
    for r in results:
        table.add_row(*cells(r))
    console.print(table)
    for text in [*notes(job, y), *map(str, pairs), *verdicts(results)]:
        console.print(text, markup=False, highlight=False)
    page = write(job, results, y, pairs)
    console.print("\nNext:")
    for text in following(page):
        console.print(f"  {text}", markup=False, highlight=False, soft_wrap=True)


def following(page: Path) -> list[str]:
    """Three things to type next."""
    return [
        f"python -m webbrowser {page}    # curves, memory, samples",
        "refopt train --seeds 3 --optimizers AdamW AdamW8bit    # is the difference noise?",
        "refopt trace adamw --codec dynamic8    # every equation of a step, with the numbers in it",
    ]


def write(job: Job, results: list[Result], y: Yardsticks, pairs: list[Difference]) -> Path:
    """report.html and loss_and_bytes.png in the job's folder; returns the page."""
    figure = picture.draw(results, y)
    figure.savefig(job.folder / "loss_and_bytes.png", dpi=160)
    svg = picture.as_svg(figure)
    template = resources.files("refopt_cuda.train").joinpath("report.html.j2").read_text("utf-8")
    page = (
        jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            heading=heading(job),
            figure=base64.b64encode(svg).decode(),
            columns=COLUMNS,
            rows=[cells(r) for r in results],
            notes=notes(job, y),
            pairs=[str(d) for d in pairs],
            verdicts=verdicts(results),
            samples=[(cells(r)[0], r.record.sample) for r in results],
            plan=job.plan.as_dict(),
            text=y,
            version=refopt.__version__,
        )
    )
    path = job.folder / "report.html"
    path.write_text(page, "utf-8")
    return path
