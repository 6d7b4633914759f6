"""All that shards must show on several GPUs, in one call, and what each number of ranks found.

    python -m tests.sharded.gpus [--parts suites,checkpoints,...] [--commit HASH] [--out FILE] [--limit 520]

suites       every rule and codec beside whole tensors, models under fully_shard, on all GPUs and on two
checkpoints  saved by two ranks, loaded by one and by all, and every other pair of these
bench        time and bytes a device beside torch's and torchao's optimizers (tests/bench/gpu_sharded.py)
train        `refopt train --sharded` of a model that one GPU, most of whose memory is taken, refuses
examples     the scripts of examples/torchrun

A part that would begin behind the limit (seconds) is left out and named. `--dry` takes the ranks from a CPU and makes
everything small, to try the script. Ends with 1 where anything failed or was left out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.bench.record import names

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("suites", "checkpoints", "train", "bench", "examples")
SIZES = {"layers": 12, "width": 1536, "hidden": 4096, "heads": 12, "batch": 8, "context": 256}
"""A model of 340M weights."""
PEERS = ("bitsandbytes", "torchao")
"""What they cannot do is printed, and no failure of ours."""
TINY = {"layers": 1, "width": 32, "hidden": 64, "heads": 2, "batch": 4, "context": 16}


@dataclass
class Job:
    """One command on so many ranks (0: one process that no launcher started)."""

    name: str
    ranks: int
    argv: Sequence[str]
    env: dict[str, str] = field(default_factory=dict)
    wrong: Callable[[int, str], str] = lambda status, said: f"ended with {status}" if status else ""
    """What is wrong with an exit status and an output; nothing is the empty string."""
    cwd: Path = ROOT

    @property
    def command(self) -> list[str]:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        return [sys.executable, *(launch if self.ranks else []), *self.argv]


@dataclass
class Outcome:
    """How a job went."""

    job: Job
    seconds: float
    fault: str
    found: str


def run(job: Job, seconds: float) -> Outcome:
    """Run a job and all that it starts for so long at most."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env, start = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "4", "COLUMNS": "200"} | job.env, time.monotonic()
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen(
            job.command, cwd=job.cwd, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status, late = child.wait(seconds), ""
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            status, late = child.wait(), f"took more than {seconds:.0f} s"
        out.seek(0)
        said = out.read()
    fault = late or job.wrong(status, said)
    print(f"\n=== {job.name} on {job.ranks or 1}: {fault or 'good'}\n{tail(said, 40 if fault else 24)}", flush=True)
    return Outcome(job, time.monotonic() - start, fault, comparisons(said))


def tail(said: str, lines: int) -> str:
    """The end of an output, without its JSON and with lines cut."""
    kept = [line[:400] for line in said.splitlines() if not line.startswith('{"cases"')]
    return "\n".join(kept[-lines:])


def comparisons(said: str) -> str:
    """What the suites counted."""
    for line in reversed(said.splitlines()):
        if line.startswith('{"cases"'):
            found = json.loads(line)
            count = sum(sum(counts.values()) for counts in found["cases"].values())
            return f"{count} comparisons, {found['failures']} failed"
    return ""


def suites(worlds: Sequence[int], args: argparse.Namespace, folder: Path) -> Iterator[Job]:
    for n in worlds:
        yield Job("suites", n, ["-m", "tests.sharded.run", "steps", "models"])


def checkpoints(worlds: Sequence[int], args: argparse.Namespace, folder: Path) -> Iterator[Job]:
    """Two ranks save first; whoever comes later saves, too, and loads all that there is."""
    env = {"REFOPT_SHARDED_FOLDER": str(folder / "checkpoints")}
    for n in dict.fromkeys((worlds[-1], 1, *worlds)):
        yield Job("checkpoints", n, ["-m", "tests.sharded.run", "checkpoints"], env)


def bench(worlds: Sequence[int], args: argparse.Namespace, folder: Path) -> Iterator[Job]:
    more = ["--device", "cpu", "--smaller", "64", "--dry", "--quick"] if args.dry else ["--commit", args.commit]
    more += ["--out", str(args.out)] if args.out else []

    def wrong(status: int, said: str) -> str:
        failed = [line for line in said.splitlines() if ": FAILED: " in line and not line.startswith(PEERS)]
        return f"ended with {status}" if status else "; ".join(failed)

    for n in worlds:
        yield Job("bench", n, ["-m", "tests.bench.gpu_sharded", *more], {}, wrong)


def train(worlds: Sequence[int], args: argparse.Namespace, folder: Path) -> Iterator[Job]:
    """One GPU refuses, all of them train; whoever else is there leaves too little memory for one."""
    sizes = TINY if args.dry else SIZES
    words = ["-m", "refopt", "train", "--optimizers", "AdamW8bit", "--steps", "12", "--seeds", "1", "--samples", "0"]
    words += [x for name, value in sizes.items() for x in (f"--{name}", str(value))]
    words += ["--device", "cpu" if args.dry else "cuda"]

    def refused(status: int, said: str) -> str:
        return "" if status and "not enough memory" in said else f"was not refused, ended with {status}"

    if not args.dry:
        yield Job("train, alone", 0, words, wrong=refused, cwd=folder)
    for n in worlds:
        yield Job("train --sharded", n, [*words, "--sharded", "--name", f"of{n}"], cwd=folder)


def examples(worlds: Sequence[int], args: argparse.Namespace, folder: Path) -> Iterator[Job]:
    """The last of these numbers of ranks saves; the first goes on with that."""
    where = ROOT / "examples" / "torchrun"
    for n in reversed(worlds):
        yield Job("fsdp2.py", n, [str(where / "fsdp2.py"), str(folder / "fsdp2")])
    for path in sorted(where.glob("*.py")):
        if path.name != "fsdp2.py":
            yield Job(path.name, worlds[0], [str(path), str(folder / path.stem)])


class Holder:
    """Memory that somebody else has, on every GPU, until this is closed: so much is left that one is too few."""

    def __init__(self, dry: bool) -> None:
        self.held: list[torch.Tensor] = []
        if dry:
            return
        from refopt_cuda.train.plan import make, need_bytes

        leave = int(0.85 * need_bytes(make(dict(SIZES))))
        for k in range(torch.cuda.device_count()):
            free, _ = torch.cuda.mem_get_info(k)
            self.held.append(torch.empty(max(0, free - leave), dtype=torch.uint8, device=f"cuda:{k}"))
        print(f"every GPU has {leave / 2**30:.1f} GiB free", flush=True)

    def close(self) -> None:
        self.held.clear()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--parts", type=names, default=PARTS, help="what to run")
    parser.add_argument("--worlds", type=names, default=(), help="numbers of ranks, the most first [all GPUs, 2]")
    parser.add_argument("--commit", default="", help="commit that is measured, for bench")
    parser.add_argument("--out", type=Path, help="where bench appends its rows")
    parser.add_argument("--limit", type=float, default=520, help="seconds")
    parser.add_argument("--dry", action="store_true", help="ranks of a CPU, small")
    args = parser.parse_args(argv)
    most = 2 if args.dry else torch.cuda.device_count()
    worlds = [int(n) for n in args.worlds] or [*dict.fromkeys((most, min(2, most)))]
    end, done, left = time.monotonic() + args.limit, list[Outcome](), list[str]()
    with tempfile.TemporaryDirectory() as scratch:
        for part in args.parts:
            holder = Holder(args.dry) if part == "train" else None
            for job in PLANS[part](worlds, args, Path(scratch)):
                seconds = end - time.monotonic()
                if seconds > 20:
                    done.append(run(job, seconds))
                else:
                    left.append(f"{job.name} on {job.ranks or 1}")
            if holder is not None:
                holder.close()
    print("\n=== summary")
    for o in done:
        print(f"{o.job.name:<20} {o.job.ranks or 1:>2} {o.seconds:>6.1f} s  {o.fault or 'good'}  {o.found}")
    print(f"left out, no time: {'; '.join(left)}" if left else "nothing was left out", flush=True)
    return int(bool(left) or any(o.fault for o in done))


PLANS = {"suites": suites, "checkpoints": checkpoints, "bench": bench, "train": train, "examples": examples}

if __name__ == "__main__":
    sys.exit(main())
