"""AdamW on the CPU: the compiled loops beside torch's fused kernel and bitsandbytes' CPU path, with the same threads.

    python -m tests.bench.cpu_optim [--only AdamW,AdamW8bit] [--threads 2] [--dtype bfloat16] [--commit HASH]

Subjects of a comparison take turns, step by step, in one order and in the other, so that whatever else the machine does
troubles them alike. One tensor; weights and gradients in float32, or as --dtype says. `ratio` is the peer's median time
over ours: above 1, ours is faster. DeepSpeed's CPUAdam is a peer where it is installed; it is built when it is
first made, with g++ and ninja.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Sequence

import numba
import torch

from refopt_cuda.train.subjects import state_bytes
from tests.bench import models
from tests.bench.record import Recorder, arguments, software
from tests.bench.subjects import Missing, Subject, named

TORCH = Subject("torch AdamW fused", "AdamW", {"fused": True}, "torch.optim")
FOREACH = Subject("torch AdamW foreach", "AdamW", {"foreach": True}, "torch.optim")
DEEPSPEED = Subject("DeepSpeed CPUAdam", "DeepSpeedCPUAdam", {"adamw_mode": True}, "deepspeed.ops.adam")
HOST = Subject("CPUAdamW", "CPUAdamW")
PAIRS: tuple[tuple[str, tuple[Subject, ...]], ...] = (
    ("CPUAdamW", (TORCH, DEEPSPEED)),
    ("AdamW", (TORCH, FOREACH, *named("bitsandbytes AdamW32bit"))),
    ("AdamW8bit", named("bitsandbytes AdamW8bit")),
    ("Lion8bit", named("bitsandbytes Lion8bit")),
    ("AdamWFp8", ()),
    ("AdamW4bit", ()),
)
"""Ours, and the peers that it is compared with."""


PAUSE = 0.02
"""Seconds before each step: threads that worked last wait awake for a while, and would hold up the others'."""


def turns(optimizers: Sequence[torch.optim.Optimizer], times: int) -> list[list[float]]:
    """Milliseconds of the steps of each; they take turns, after two steps that are not counted."""
    taken: list[list[float]] = [[] for _ in optimizers]
    for k in range(times + 2):
        for opt, mine in zip(optimizers, taken, strict=True):
            time.sleep(PAUSE)
            start = time.perf_counter()
            opt.step()
            if k >= 2:
                mine.append(1e3 * (time.perf_counter() - start))
    return taken


def medians(work: models.Work, subjects: Sequence[Subject], times: int) -> tuple[list[float], int]:
    """Of each subject, over both orders, since what is made first lies worse in memory; and the first one's bytes."""
    taken: list[list[float]] = [[] for _ in subjects]
    for order in (range(len(subjects)), range(len(subjects) - 1, -1, -1)):
        made = {k: subjects[k].make(models.parameters(work, "cpu")) for k in order}
        for k, more in zip(made, turns(list(made.values()), times), strict=True):
            taken[k] += more
    return [statistics.median(mine) for mine in taken], state_bytes(made[0])


def there(work: models.Work, subjects: Sequence[Subject]) -> list[Subject]:
    """Those that can be made; of the others it is said."""
    out = []
    for subject in subjects:
        try:
            subject.make([torch.nn.Parameter(torch.zeros(16))])
            out.append(subject)
        except (Missing, RuntimeError) as error:  # or its build failed
            print(f"{work.name:<16} {subject.name:<34} not there: {error}", flush=True)
    return out


def compare(rec: Recorder, work: models.Work, ours: Subject, peers: Sequence[Subject], times: int) -> None:
    """Rows of our time, bytes and bandwidth, and of each peer's time."""
    subjects = there(work, (ours, *peers))
    if ours not in subjects:
        return
    (mine, *others), states = medians(work, subjects, times)
    moved = work.size * 3 * work.dtype.itemsize + 2 * states
    rec.add(work.name, ours.name, "ms", mine, "ms")
    rec.add(work.name, ours.name, "moved", moved / (mine * 1e-3) / 1e9, "GB/s")
    rec.add(work.name, ours.name, "state", states / work.size, "B/param")
    for peer, ms in zip(subjects[1:], others, strict=True):
        rec.add(work.name, peer.name, "ms", ms, "ms")
        rec.add(work.name, ours.name, "faster", mine, "ms", f"{peer.name} {ms:.4g} ms", ms / mine)


def options() -> argparse.ArgumentParser:
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, Numba and OpenMP")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of weights")
    parser.add_argument("--elements", type=int, default=2**26, help="of the tensor")
    return parser


def main(argv: Sequence[str] | None = None) -> Recorder:
    args = options().parse_args(argv)
    torch.set_num_threads(args.threads)
    numba.set_num_threads(min(args.threads, numba.config.NUMBA_NUM_THREADS))
    versions = software("torch", "numba", "numpy", "bitsandbytes", "deepspeed")
    rec = Recorder("cpu_optim", f"CPU {platform.machine()}, {args.threads} threads", versions, args.commit, args.out)
    dtype = getattr(torch, args.dtype)
    work = models.Work(f"flat{models.count(args.elements)}", ((args.elements,),)).of(dtype)
    for name, peers in PAIRS:
        if args.only and name not in args.only:
            continue
        try:
            ours = HOST if name == HOST.name else named(name)[0]
            compare(rec, work, ours, peers, 3 if args.quick else 10)
        except Exception as error:
            print(f"{work.name:<16} {name:<34} FAILED: {type(error).__name__}: {error}", flush=True)
    if not args.dry:
        rec.save()
    return rec


if __name__ == "__main__":
    main()
