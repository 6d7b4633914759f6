"""All runs of a plan in one folder, one after the other: started, stopped, resumed, and gathered into results."""

from __future__ import annotations

import csv
import gc
import json
import math
import os
import signal
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from refopt_cuda.train import data, loop, subjects
from refopt_cuda.train.errors import InputError
from refopt_cuda.train.plan import Plan, load_text

RUNS = Path("runs")
PLAN = "plan.json"


@dataclass(frozen=True)
class Result:
    """What one run came to."""

    seed: int
    subject: subjects.Subject
    record: loop.Record
    plan: Plan

    @property
    def bits(self) -> float:
        """Held-out bits per byte."""
        return self.record.heldout / math.log(2)

    @property
    def step_ms(self) -> float:
        """Median milliseconds of an optimizer step."""
        return statistics.median(self.record.step_ms) if self.record.step_ms else float("nan")

    @property
    def tokens_per_second(self) -> float:
        r = self.record
        return r.timed * self.plan.batch * self.plan.context / r.seconds if r.seconds else float("nan")


@dataclass(frozen=True)
class Yardsticks:
    """The text, and what compares with a model's bits per byte on the held-out part of it."""

    name: str
    size: int
    sha256: str
    held: int
    xz: float
    trigram: float


class Stop:
    """Becomes true with the first Ctrl-C; the second one interrupts as usual."""

    asked = False

    def __call__(self) -> bool:
        return self.asked

    @contextmanager
    def listening(self) -> Iterator[None]:
        def hear(number: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        try:
            before = signal.signal(signal.SIGINT, hear)
        except ValueError:  # not in the main thread
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def folder_for(name: str | None, command: str = "train") -> Path:
    """A new folder under runs/ for `refopt COMMAND`. Raises InputError where it exists or cannot be made."""
    if name is not None and (not name or Path(name).name != name):
        raise InputError(f"--name must be the name of a folder in {RUNS}, got {name!r}")
    folder = RUNS / (name or datetime.now().strftime("%Y-%m-%d-%H%M%S"))
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"--name: {folder} exists; continue it with `refopt {command} --resume --name {folder.name}`")
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{folder} cannot be written: no permission in {parent.resolve()}")
    return folder


def folder_to_resume(name: str | None, plan: str = PLAN) -> Path:
    """The folder of that name, or the newest one, with a plan in it. Raises InputError where there is none."""
    if name is None:
        found = sorted(RUNS.glob(f"*/{plan}"), key=lambda f: f.stat().st_mtime)
        if not found:
            raise InputError(f"--resume: {RUNS.resolve()} holds no run")
        return found[-1].parent
    if not (RUNS / name / plan).is_file():
        raise InputError(f"--resume: {RUNS / name} holds no {plan}; there is nothing to go on with")
    return RUNS / name


class Job:
    """A folder, the plan in it, and the text."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.text = load_text(plan)
        self.folder, self.plan = folder, replace(plan, sha256=self.text.sha256)
        self.train, self.held = self.text.split()

    @classmethod
    def resumed(cls, folder: Path) -> Job:
        try:
            plan = Plan.from_dict(json.loads((folder / PLAN).read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise InputError(f"--resume: {folder / PLAN} is not readable: {error}") from None
        if plan.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--resume: the run began on a GPU, and torch sees none here")
        return cls(folder, plan)

    def begin(self) -> None:
        """Make the folder and keep the plan."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / PLAN).write_text(json.dumps(self.plan.as_dict(), indent=2) + "\n", "utf-8")

    def yardsticks(self) -> Yardsticks:
        """xz and a trigram model on the same bytes."""
        at = data.held_out_starts(len(self.held), self.plan.context, loop.FINAL)
        trigram = data.trigram_bits(self.train, self.held, at, self.plan.context)
        t = self.text
        return Yardsticks(t.name, len(t.data), t.sha256, len(self.held), data.xz_bits(self.held), trigram)

    def run(self, console: Console, stop: Stop) -> Iterator[Result]:
        """Train what is not trained yet; a result as each run ends. Raises loop.Stopped after a Ctrl-C."""
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("", total=len(self.plan.runs) * self.plan.steps)
            for k, (seed, subject) in enumerate(self.plan.runs):
                name = subject.name if len(self.plan.seeds) == 1 else f"{subject.name}, seed {seed}"
                run = self.kind(self.plan, seed, subject, (self.train, self.held), self.place(seed, subject))
                run.start()

                def tick(r: loop.Record, k: int = k, name: str = name) -> None:
                    bits = f"{r.rows[-1]['heldout'] / math.log(2):.3f} bits" if r.rows else ""
                    bar.update(task, completed=k * self.plan.steps + r.step, description=f"{name:<24} {bits:<10}")

                record = run.record if run.record.done else run.train(tick, stop)
                tick(record)
                del run
                gc.collect()
                yield Result(seed, subject, record, self.plan)

    @property
    def kind(self) -> type[loop.Run]:
        """How a run is carried out: by this process alone, or by all ranks."""
        if not self.plan.ranks:
            return loop.Run
        from refopt_cuda.train import sharded

        return sharded.Run

    def place(self, seed: int, subject: subjects.Subject) -> Path:
        """Where a run's checkpoint lies."""
        safe = "".join(c if c.isalnum() or c in "._" else "-" for c in subject.name)
        return self.folder / f"seed{seed}" / safe

    def write_metrics(self, results: list[Result]) -> None:
        """metrics.csv: losses in nats a byte, exact, so that two runs can be compared by `diff`."""
        with (self.folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file, lineterminator="\n")
            out.writerow(["seed", "optimizer", "step", "train_loss", "heldout_loss"])
            for r in results:
                out.writerows([r.seed, r.subject.name, int(x["step"]), x["train"], x["heldout"]] for x in r.record.rows)
                out.writerow([r.seed, r.subject.name, "end", "", r.record.heldout])
