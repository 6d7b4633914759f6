"""Held-out loss at GPT-2-small's size: the main job's model, text and schedule, six optimizers, three seeds, one GPU.

    python -m tests.bench.convergence [--only AdamW8bit,torch.AdamW] [--seeds 0,1,2] [--limit 560] [--commit HASH]

12 layers of width 768 as in GPT-2 small, bytes instead of its vocabulary; the feed-forward part is as wide as makes
124M weights. Every run is saved when it ends, and one that the csv holds already is not run again: a script that ran
out of time goes on where it stopped. Checkpoints and samples of text, which take longer than the figures, are left out.
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from refopt_cuda.train import loop, plan
from refopt_cuda.train.errors import InputError
from refopt_cuda.train.plan import Plan
from refopt_cuda.train.subjects import parse
from tests.bench.record import Limit, Recorder, arguments, names, software

BENCH = "convergence"
SUBJECTS = ("torch.AdamW", "AdamW8bit", "AdamW8bit:p=bf16_rem16", "AdamW4bit", "Lion8bit", "Adafactor")
POINTS = 10
"""Of a curve, in rows; the loop measures twice as many."""


class Run(loop.Run):
    """A run that keeps no checkpoint and writes no text."""

    def save(self) -> None: ...

    def write(self, length: int, temperature: float = 0.7) -> str:
        return ""


def small(args: argparse.Namespace) -> Plan:
    """The plan of every run."""
    return Plan(
        optimizers=SUBJECTS,
        seeds=args.seeds,
        steps=args.steps,
        batch=args.batch,
        layers=args.layers,
        width=args.width,
        heads=max(1, args.width // 64),
        hidden=args.width * 9 // 2,
        context=args.context,
        lr=args.lr,
        samples=args.samples,
        device=args.device,
        deterministic=False,
    )


def work_of(p: Plan) -> str:
    """What the rows are about: size, steps, batch, context."""
    return f"bytes{p.sizes.parameters() / 1e6:.1f}m-{p.steps}x{p.batch}x{p.context}"


def done(path: Path, work: str, bench: str = BENCH) -> set[str]:
    """Subjects with their seeds that the csv holds an end of."""
    if not path.exists():
        return set()
    with path.open(encoding="utf-8", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["bench"] == bench and r["work"] == work]
    return {r["subject"] for r in rows if r["metric"] == "loss"}


class Trainer:
    """Runs of one plan, one after the other."""

    def __init__(self, p: Plan, rec: Recorder, limit: Limit, dry: bool) -> None:
        self.plan, self.rec, self.limit, self.dry = p, rec, limit, dry
        self.text, self.held = plan.load_text(p).split()
        self.longest = 0.0

    def each(self, subjects: Sequence[str]) -> None:
        """Every seed of every subject, seed by seed, so that what is there when time is up can be compared."""
        work = work_of(self.plan)
        known = set() if self.dry else done(self.rec.path, work)
        for seed in self.plan.seeds:
            for name in subjects:
                label = f"{name} seed {seed}"
                if label in known:
                    print(f"{work} {label}: there already", flush=True)
                elif self.limit.allows(label, self.longest):
                    self.one(work, name, seed, label)
        self.limit.say()

    def one(self, work: str, name: str, seed: int, label: str) -> None:
        """One run; what goes wrong is printed."""
        start = time.monotonic()
        try:
            self.record(work, label, self.train(name, seed, label))
        except InputError as error:
            print(f"{work} {label}: not there: {error}", flush=True)
            return
        except Exception as error:
            print(f"{work} {label}: FAILED: {type(error).__name__}: {str(error)[:300]}", flush=True)
            traceback.print_exc()
        finally:
            if self.plan.device == "cuda":
                torch.cuda.empty_cache()
        self.longest = max(self.longest, time.monotonic() - start)

    def train(self, name: str, seed: int, label: str) -> loop.Record:
        with tempfile.TemporaryDirectory() as folder:
            run = Run(self.plan, seed, parse(name), (self.text, self.held), Path(folder))
            run.start()
            began = time.monotonic()

            def tick(r: loop.Record) -> None:
                if r.step == 20:
                    left = (time.monotonic() - began) / 20 * (self.plan.steps - 20)
                    print(f"{label}: about {left:.0f} s to go", flush=True)

            return run.train(tick, lambda: False)

    def record(self, work: str, label: str, r: loop.Record) -> None:
        p, add = self.plan, self.rec.add
        add(work, label, "loss", r.heldout, "nats/byte")
        for row in r.rows[::-1][:: max(1, len(r.rows) // POINTS)][::-1]:
            add(work, label, f"loss at {int(row['step'])}", row["heldout"], "nats/byte")
        add(work, label, "bytes_per_param", r.state_bytes / p.sizes.parameters(), "B/param")
        add(work, label, "step_ms", float(np.median(r.step_ms)) if r.step_ms else math.nan, "ms")
        add(work, label, "tokens_per_s", r.timed * p.batch * p.context / r.seconds if r.seconds else math.nan, "1/s")
        if r.replayed and not label.startswith("torch."):
            add(work, label, "equal_steps", r.equal, "steps", "sampled steps", r.equal / r.replayed)
        if not self.dry:
            self.rec.save()


def options() -> argparse.ArgumentParser:
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, names(text))), default=(0, 1, 2))
    parser.add_argument("--limit", type=float, default=560, help="seconds; no run begins that would not end by then")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    for name, usual in (("steps", 400), ("batch", 32), ("context", 256), ("layers", 12), ("width", 768)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--samples", type=int, default=2, help="steps of each run that the reference takes again")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of AdamW")
    return parser


def main(argv: Sequence[str] | None = None) -> Recorder:
    args = options().parse_args(argv)
    if args.quick:
        args.steps, args.seeds = args.steps // 10, args.seeds[:1]
    gpu = args.device == "cuda"
    device = torch.cuda.get_device_name() if gpu else f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    versions = software("torch", "numpy", *(["cupy-cuda13x"] if gpu else ["numba"]))
    rec = Recorder(BENCH, device, versions, args.commit, args.out)
    if not args.dry:
        rec.check()
    torch.set_float32_matmul_precision("high")
    Trainer(small(args), rec, Limit(args.limit), args.dry).each(args.only or SUBJECTS)
    return rec


if __name__ == "__main__":
    main()
