"""The public optimizers on one GPU beside the peers that are installed: time, memory, and the fraction of a copy.

    python -m tests.bench.gpu_optim [--parts llama1b,lora7b] [--only AdamW8bit,AdamW] [--quick] [--commit HASH]

ms        of the device, between events, the queue kept full
wall_ms   until step() returns
of_copy   (p and g read, p written, states read and written) / ms / bandwidth of a copy on the device: the fewest bytes
of_passes ms / (bytes of the rule's passes at the bandwidth of the copy): `moved.PASSES`
state     bytes a parameter, counted from the states' tensors; of peers, what the first step left allocated
extra     bytes a parameter that a later step holds beside, at its worst
first     seconds of the first step in a fresh process, compilers' caches empty and filled

A subject that fails prints why, and the next one begins. Rows are saved as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from refopt_cuda.train.subjects import state_bytes
from tests.bench import clocks, models, moved
from tests.bench.models import Work
from tests.bench.record import Limit, Recorder, arguments, names, software
from tests.bench.subjects import OURS, PEERS, Missing, Subject, named

PACKAGES = ("torch", "cupy-cuda13x", "numpy", "bitsandbytes", "torchao", "flashoptim", "torch-optimi")
AGED = 2000
"""Steps with g = 0 before dead rows are timed."""
FIRST = ("AdamW8bit", "AdamW", "AdamW8bit + bf16_rem16", "AdamW4bit", "Adafactor")

Goal = tuple[str, float, float]
COPY = {"AdamW": (0.88, 0.94), "AdamW8bit": (0.88, 0.95), "AdamW8bit + bf16_rem16": (0.85, 0.93)}
COPY |= {"AdamWFp8": (0.80, 0.90), "AdamW4bit": (0.80, 0.90), "Lion8bit": (0.85, 0.93), "SGD8bit": (0.85, 0.93)}
COPY |= {"AdEMAMix8bit": (0.75, 0.90)}
GOALS: dict[tuple[str, str], tuple[Goal, ...]] = {
    **{("llama1b", name): (("of_copy", *wanted),) for name, wanted in COPY.items()},
    **{("llama1b", name): (("of_passes", 1.8, 1.3),) for name in ("Adafactor", "CAME", "LAMB")},
    ("llama1b", "Muon"): (("faster", 2.0, 4.0),),
    ("lora7b", "AdamW8bit"): (("ms", 0.35, 0.2), ("wall_ms", 0.6, 0.35)),
    ("lora7b", "AdamW"): (("ms", 0.45, 0.33), ("wall_ms", 0.6, 0.35)),
}
"""What is asked for: (metric, must, goal)."""
EVERY: tuple[Goal, ...] = (("first_cold", 5, 2), ("first_warm", 0.3, 0.1), ("dead_rows", 0.95, 0.95))
"""What is asked of all of ours."""
LESS = {"ms", "wall_ms", "of_passes", "first_cold", "first_warm"}
"""Metrics of which less is better."""


@dataclass
class Bench:
    """One run of this script: where it runs, what it compares with, what it has found."""

    rec: Recorder
    args: argparse.Namespace
    limit: Limit
    argv: Sequence[str] = ()
    copy: float = 0.0
    tried: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        return str(self.args.device)

    @property
    def times(self) -> int:
        return 5 if self.args.quick else 20

    def chosen(self, subjects: Iterable[Subject]) -> Iterator[Subject]:
        """Those that were asked for; slow ones not in a hurry."""
        for s in subjects:
            if s.name in self.args.only or not (self.args.only or (self.args.quick and s.slow)):
                yield s

    def work(self, work: Work) -> Work:
        return work.smaller(self.args.smaller)

    def tries(self, work: str, subject: str, measure: Callable[[], Any], seconds: float = 0) -> None:
        """Measure it, if there is time; what goes wrong is printed, and the next one finds clean memory."""
        label = f"{work}/{subject}"
        if label in self.args.skip or not self.limit.allows(label, seconds):
            return
        self.tried.append(label)
        try:
            measure()
        except Missing as error:
            print(f"{work:<16} {subject:<34} not there: {error}", flush=True)
        except Exception as error:
            print(f"{work:<16} {subject:<34} FAILED: {type(error).__name__}: {str(error)[:300]}", flush=True)
            if self.args.trace:
                traceback.print_exc()
        self.keep()

    def keep(self) -> None:
        """Save what was found and free memory. A device that this process has lost is taken up by a new one."""
        if not self.args.dry:
            self.rec.save()
        try:
            clocks.synchronize(self.device)
            clocks.tidy(self.device)
        except Exception as error:
            print(f"the device is lost ({type(error).__name__}); a new process goes on\n{table(self)}", flush=True)
            skip, rest = ",".join([*self.args.skip, *self.tried]), self.limit.end - time.monotonic()
            again = [*self.argv, "--skip", skip, "--limit", f"{rest:.3f}"]
            os.execv(sys.executable, [sys.executable, "-m", "tests.bench.gpu_optim", *again])

    def value(self, work: str, subject: str, metric: str) -> float | None:
        """What was found in this run; the ratio, of fractions."""
        for row in reversed(self.rec.rows):
            if (row["work"], row["subject"], row["metric"]) == (work, subject, metric):
                return float(row["ratio"] or row["value"])
        return None


# ---------------------------------------------------------------------------------------------------------- one subject


def measure(b: Bench, work: Work, subject: Subject, params: Sequence[torch.nn.Parameter], **options: Any) -> None:
    """Every metric but the first step's, in rows."""
    before = clocks.allocated(b.device)
    opt = subject.make(params, **options)
    opt.step()
    clocks.synchronize(b.device)
    states = state_bytes(opt) if not subject.peer else clocks.allocated(b.device) - before
    opt.step()
    extra = clocks.extra_bytes(opt.step, b.device)
    fresh = (lambda: models.reallocate(params)) if work.fresh else clocks.nothing
    wall = clocks.wall_ms(opt.step, b.device, b.times, before=fresh)
    ms = clocks.device_ms(opt.step, b.device, b.times, before=fresh, ahead=1.5 * wall)
    name, count = subject.name, sum(p.numel() for p in params)
    b.rec.add(work.name, name, "ms", ms, "ms")
    b.rec.add(work.name, name, "wall_ms", wall, "ms")
    speed(b, work, subject, params, states, ms)
    b.rec.add(work.name, name, "state", states / count, "B/param")
    b.rec.add(work.name, name, "extra", extra / count, "B/param")


def speed(b: Bench, work: Work, subject: Subject, params: Sequence[torch.nn.Parameter], states: int, ms: float) -> None:
    """`of_copy`, and `of_passes` of a rule that passes more than once."""
    p, g = (sum(x.numel() * x.element_size() for x in params) for _ in range(2))
    least = moved.must_move("element", p, g, states)
    reached = least / (ms * 1e-3)
    b.rec.add(work.name, subject.name, "of_copy", reached / 1e9, "GB/s", "device copy", reached / b.copy)
    if subject.passes == "element":
        return
    for passes, metric in ((moved.PASSES, "of_passes"), (moved.CLIPPED, "of_passes_clipped")):
        if subject.passes in passes:
            bytes_ = moved.must_move(subject.passes, p, g, states, passes)
            floor = bytes_ / b.copy * 1e3
            baseline = f"{bytes_ / work.size:.2f} B/param at copy"
            b.rec.add(work.name, subject.name, metric, ms, "ms", baseline, ms / floor)


def only_time(b: Bench, work: Work, subject: Subject, **options: Any) -> float:
    """Time and `of_copy` in rows, for tensors made for this; returns milliseconds."""
    params = models.parameters(work, b.device)
    opt = subject.make(params, **options)
    ms = clocks.device_ms(opt.step, b.device, b.times, ahead=2.0)
    b.rec.add(work.name, subject.name, "ms", ms, "ms")
    speed(b, work, subject, params, state_bytes(opt), ms)
    return ms


# ---------------------------------------------------------------------------------------------------------------- parts


def side_by_side(b: Bench, work: Work, subjects: Sequence[Subject]) -> None:
    """Ours and the peers over the same tensors."""
    params = models.parameters(work, b.device)
    matrices = [p for p in params if p.ndim == 2]
    for s in b.chosen(subjects):
        mine, its = (matrices, work.matrices()) if s.matrices else (params, work)
        b.tries(work.name, s.name, partial(measure, b, its, s, mine), seconds=60 if s.slow else 0)


def llama(b: Bench) -> None:
    work = b.work(models.llama1b())
    side_by_side(b, work, [s for s in (*OURS, *PEERS) if not s.slow and s.name != "GaLoreAdamW"])
    mine, torchs = b.value(work.name, "Muon", "ms"), b.value(work.name, "torch Muon", "ms")
    if mine and torchs:
        b.rec.add(work.name, "Muon", "faster", mine, "ms", f"torch Muon {torchs:.4g} ms", torchs / mine)


def galore(b: Bench) -> None:
    """One block alone: the first step looks for the directions of every matrix."""
    side_by_side(b, b.work(models.block1b()), named("GaLoreAdamW", "AdamW"))


def slow(b: Bench) -> None:
    """Peers that compile for long."""
    side_by_side(b, b.work(models.llama1b()), [s for s in PEERS if s.slow])


def lora(b: Bench) -> None:
    side_by_side(b, b.work(models.lora7b()), [s for s in (*OURS, *PEERS) if not s.slow and not s.matrices])


def first(b: Bench) -> None:
    """The first step in a process of its own, with an empty cache of compiled kernels and with the one that it left."""
    for s in b.chosen(named(*FIRST[: 2 if b.args.quick else None])):
        b.tries("llama1b", s.name, partial(first_of, b, s), seconds=40)


def first_of(b: Bench, subject: Subject) -> None:
    with tempfile.TemporaryDirectory() as cache:
        for metric in ("first_cold", "first_warm"):
            found = in_fresh_process(b, subject, cache)
            baseline = f"CuPy imported in {found['cupy']:.2f} s, torch SGD's first step {found['torch']:.2f} s"
            b.rec.add("llama1b", subject.name, metric, found["seconds"], "s", baseline)


def in_fresh_process(b: Bench, subject: Subject, cache: str) -> dict[str, float]:
    """What `tests.bench.first_step` prints."""
    command = [sys.executable, "-m", "tests.bench.first_step", subject.name, b.device, str(b.args.smaller)]
    env = os.environ | {"CUPY_CACHE_DIR": cache, "CUDA_CACHE_PATH": cache}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def dead(b: Bench, work: Work | None = None) -> None:
    """A fifth of the rows of every matrix without gradient for 2,000 steps: states live on, smaller and smaller."""
    work = b.work(work or Work("rows16384", ((16384, 16384),)))
    for s in b.chosen(named("AdamW8bit", "AdamW")):
        for beta2 in (0.999, 0.95):
            name = f"{s.name} beta2 {beta2}"
            b.tries(work.name, name, partial(age, b, work, s, name, beta2), seconds=30)


def age(b: Bench, work: Work, subject: Subject, name: str, beta2: float) -> None:
    params = models.parameters(work, b.device)
    opt = subject.make(params, betas=(0.9, beta2))
    dense = clocks.device_ms(opt.step, b.device, b.times, warm=20, ahead=2.0)
    models.deaden(params)
    for _ in range(AGED if b.device == "cuda" else 20):
        opt.step()
    ms = clocks.device_ms(opt.step, b.device, b.times, ahead=2.0)
    b.rec.add(work.name, name, "dead_rows", ms, "ms", f"dense {dense:.4g} ms", dense / ms)


def dead_llama(b: Bench) -> None:
    dead(b, models.llama1b())


def each(b: Bench, subjects: Sequence[Subject], works: Sequence[Work]) -> None:
    """The time alone of every subject on every work."""
    for s in b.chosen(subjects):
        for work in map(b.work, works):
            b.tries(work.name, s.name, partial(only_time, b, work, s))


def sizes(b: Bench) -> None:
    """1M to 4B elements in one tensor."""
    each(b, named("AdamW8bit", "AdamW"), [models.flat(2**power) for power in (20, 22, 24, 26, 28, 30, 32)])


def dtypes(b: Bench) -> None:
    """Weights and gradients in other dtypes."""
    each(b, named("AdamW8bit", "AdamW"), [models.llama1b().of(d) for d in (torch.float32, torch.float16)])


def ragged(b: Bench) -> None:
    """Rows that are not whole tiles, or not even in eights of elements."""
    each(
        b,
        named("AdamW8bit", "AdamW4bit", "AdamWFp8", "Lion8bit", "AdEMAMix8bit", "AdamW"),
        [models.rows(columns) for columns in (16, 40, 96, 264, 576, 896, 1000, 1001, 1024)],
    )


def blocks(b: Bench) -> None:
    """One flat tensor in blocks of every size."""
    for s in b.chosen(named("AdamW8bit", "AdamW4bit")):
        for block in (64, 128, 256, 512, 1024, 2048):
            work, sized = b.work(models.flat()), replace(s, name=f"{s.name} block {block}")
            b.tries(work.name, sized.name, partial(only_time, b, work, sized, block=block))


PARTS: dict[str, Callable[[Bench], None]] = {
    "llama1b": llama,
    "lora7b": lora,
    "first": first,
    "dead": dead,
    "sizes": sizes,
    "blocks": blocks,
    "dtypes": dtypes,
    "ragged": ragged,
    "galore": galore,
    "slow": slow,
    "dead-llama1b": dead_llama,
}
USUAL = tuple(PARTS)[:-1]
"""Parts that run unless others are named; the last one takes a minute, and `dead` says much the same."""


# ---------------------------------------------------------------------------------------------------------------- table


METRICS = ("ms", "wall_ms", "of_copy", "of_passes", "faster", "dead_rows", "state", "extra", "first_cold", "first_warm")


def table(b: Bench) -> str:
    """A line for each work and subject, and what was asked for beside it."""
    lines = [f"{'work':<16} {'subject':<32} " + " ".join(f"{m:>10}" for m in METRICS)]
    for work, subject in dict.fromkeys((r["work"], r["subject"]) for r in b.rec.rows):
        found = {m: b.value(work, subject, m) for m in METRICS}
        cells = " ".join(f"{'' if v is None else format(v, '.4g'):>10}" for v in found.values())
        lines.append(f"{work:<16} {subject:<32} {cells}  {verdict(work, subject, found)}".rstrip())
    return "\n".join(lines)


def verdict(work: str, subject: str, found: dict[str, float | None]) -> str:
    """Whether figures are what was asked for: `goal`, `kept` or `MISSED`."""
    said = []
    for metric, must, goal in (*GOALS.get((work, subject), ()), *EVERY):
        value = found.get(metric)
        if value is not None:
            sign = -1 if metric in LESS else 1
            word = "goal" if sign * value >= sign * goal else "kept" if sign * value >= sign * must else "MISSED"
            said.append(f"{word}: {metric} {must} ({goal})")
    return ", ".join(said)


def options() -> argparse.ArgumentParser:
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--parts", type=names, default=USUAL, help=f"of {','.join(PARTS)}")
    parser.add_argument("--limit", type=float, default=570, help="seconds, after which nothing new begins")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script, with --dry")
    parser.add_argument("--smaller", type=int, default=1, help="divide every side of every tensor, to try the script")
    parser.add_argument("--skip", type=names, default=(), metavar="WORK/SUBJECT,...", help="leave these out")
    parser.add_argument("--trace", action="store_true", help="print where a subject failed")
    return parser


def main(argv: Sequence[str] | None = None) -> Bench:
    args = options().parse_args(argv)
    unknown = [p for p in args.parts if p not in PARTS]
    if unknown:
        raise SystemExit(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    try:
        named(*args.only)
    except ValueError as error:
        raise SystemExit(f"--only: {error}") from None
    gpu = args.device == "cuda"
    if not (gpu and args.smaller == 1) and not args.dry:
        raise SystemExit("--device cpu and --smaller are for trying this script: add --dry")
    device = torch.cuda.get_device_name() if gpu else f"CPU {platform.machine()}"
    rec = Recorder("gpu_optim", device, software(*PACKAGES), args.commit, args.out)
    b = Bench(rec, args, Limit(args.limit), sys.argv[1:] if argv is None else argv)
    if not args.dry:
        b.rec.check()
    b.copy = clocks.copy_bandwidth(args.device, 2**30 if gpu else 2**20)
    b.rec.add("flat1b", "device copy", "bandwidth", b.copy / 1e9, "GB/s")
    for part in args.parts:
        if b.limit.allows(part):
            PARTS[part](b)
    if not args.dry:
        b.rec.save()
    print(table(b))
    b.limit.say()
    return b


if __name__ == "__main__":
    main()
