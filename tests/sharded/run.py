"""Run the sharded checks and print how many comparisons each made, by number of ranks.

    python -m tests.sharded.run steps|checkpoints [--worlds 1,2,3,4]     gloo ranks, forked here
    torchrun --nproc-per-node N -m tests.sharded.run steps checkpoints   one rank a process, NCCL where there are GPUs

Ends with a line of JSON ({"cases": {ranks: {claim: count}}, "wrong": [...]}) and 1 where something differs.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.sharded import checkpoints, disk, lane, models, steps, within
from tests.sharded.cases import Reference, Work, clipped_works, element_works, whole_works
from tests.sharded.world import Report, World, ranks

RESHARDED = (
    "AdamW-dynamic8",
    "AdamW-bf16_sr-q4",
    "AdamW-bf16_rem16-q4",
    "AdamW-fp8.e4m3",
    "AdamW-compand8.f16",
    "Adagrad8bit",
    "Lion8bit",
    "Adafactor-3",
    "Muon-bf16",
    "GaLoreAdamW8bit",
)
"""What is saved and loaded; the first one also as flat keys and as whole tensors."""
FEWER = ((31, 256), (33, 384), (7, 16), (1,), (2, 2048))
MESHES = ("AdamW-dynamic8", "AdamW-bf16_sr-q4", "AdamW-bf16_rem16-q4", "Lion8bit")


class Steps:
    """Ten steps of everything, in shards and whole."""

    def __init__(self, device: str) -> None:
        self.works, self.whole, self.clipped = element_works(), whole_works(), clipped_works()
        self.filed = [w._replace(shapes=FEWER, label=f"{w}-few") for w in self.works if w.label in MESHES[1:3]]
        every = self.works + self.whole + self.clipped + self.filed
        self.references = {w.label: Reference(w, device, steps.LOOKS) for w in every}

    def rank(self, world: World) -> None:
        """What one rank does."""
        some = [w for w in self.works if w.label in MESHES]
        steps.every_element_rule(world, self.works, self.references)
        steps.every_whole_rule(world, self.whole, self.references)
        steps.meshes(world, some, self.references)
        steps.last_dimension(world, some[0])
        steps.columns(world, [w for w in some if "bf16_sr" not in w.label])
        steps.refusals(world)
        within.places(world, some, self.references)
        disk.steps(world, self.filed[world.size % 2], self.references)
        within.norm(world, self.clipped, self.references)
        within.scaled(world, some[-1])
        within.captured(world, some[0])

    def forked(self, sizes: Sequence[int], folder: Path) -> dict[int, list[Any]]:
        return {n: ranks(n, folder, self.rank) for n in sizes}


class Models:
    """A model under fully_shard; the step that is taken again."""

    def __init__(self, device: str) -> None:
        self.device = device

    def rank(self, world: World, folder: Path | None = None) -> None:
        """What one rank does."""
        models.trained(world)
        models.swapped(world)
        models.job(world, (folder or scratch()) / f"job{world.size}")
        if self.device == "cpu":
            lane.checked(world)

    def forked(self, sizes: Sequence[int], folder: Path) -> dict[int, list[Any]]:
        return {n: ranks(n, folder, lambda world: self.rank(world, folder)) for n in sizes}


class Checkpoints:
    """Saved by every number of ranks, loaded by every one; a rank killed while it saves."""

    def __init__(self, device: str) -> None:
        works = [w._replace(shapes=FEWER) for w in element_works()] + whole_works()
        self.works = [w for w in works if w.label in RESHARDED]
        self.works.append(checkpoints.paged(self.works[0]))
        self.references = {w.label: Reference(w, device, (checkpoints.SAVED, checkpoints.END)) for w in self.works}

    def rank(self, world: World, folder: Path | None = None) -> None:
        """What one rank of a single world does: what it saved is what it loads."""
        where = folder or scratch()
        self.save(world, where)
        dist.barrier()
        for saved in sorted(int(f.name[2:]) for f in where.glob("of*") if f.is_dir()):
            self.load(world, where, saved)

    def filed(self, world: World, path: Path) -> Work:
        """The first one with states in files; its reference needs none."""
        work = disk.on_disk(world, self.works[0], path)
        self.references[work.label] = self.references[self.works[0].label]
        return work

    def save(self, world: World, folder: Path) -> None:
        checkpoints.save(world, [*self.works, self.filed(world, folder / f"disk{world.size}")], folder)
        if world.size != 3:  # time
            disk.agreed(world, self.works[0], self.references[self.works[0].label], folder)
        for work in (self.works[-1], self.filed(world, folder / "large")):
            checkpoints.save_from_the_host(world, work, folder)
        for work in self.works:
            checkpoints.fresh(world, work, self.references[work.label])

    def load(self, world: World, folder: Path, saved: int) -> None:
        works = [*self.works]
        if world.device == "cuda" or world.size == 5 - saved:
            works.append(self.filed(world, folder / f"disk{saved}at{world.size}"))
        checkpoints.load(world, works, self.references, folder, saved)

    def forked(self, sizes: Sequence[int], folder: Path) -> dict[int, list[Any]]:
        found = {n: ranks(n, folder, lambda world: self.save(world, folder)) for n in sizes}
        for n in sizes:
            found[n] += ranks(n, folder, lambda world: [self.load(world, folder, saved) for saved in sizes])
        if max(sizes) > 1:
            work = self.works[0]
            ends = ranks(2, folder, lambda world: checkpoints.save_and_die(world, work, folder))
            found[1 if 1 in sizes else sizes[0]] += [end for end in ends if end not in (3, -9)]
            last = lambda world: checkpoints.load_after_death(world, work, self.references[work.label], folder)  # noqa: E731
            for n in sizes:
                found[n] += ranks(n, folder, last)
        return found


def scratch() -> Path:
    """Where all ranks of torchrun write: REFOPT_SHARDED_FOLDER, or a new folder of rank 0's."""
    found = [os.environ.get("REFOPT_SHARDED_FOLDER") or (tempfile.mkdtemp() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(found, device=torch.device("cpu"))
    folder = Path(str(found[0]))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


SUITES = {"steps": Steps, "models": Models, "checkpoints": Checkpoints}


def main(argv: Sequence[str]) -> int:
    faulthandler.enable()
    parser = argparse.ArgumentParser(description="sharded steps beside unsharded ones")
    parser.add_argument("suites", nargs="+", choices=SUITES)
    parser.add_argument("--worlds", default="1,2,3,4", help="numbers of ranks to fork")
    parser.add_argument("--device", default=None, help="cpu or cuda, for a process of torchrun [cuda if there is one]")
    args = parser.parse_args(argv)
    if "RANK" in os.environ:
        return under_torchrun(args)
    torch.set_num_threads(1)  # a process with threads may not be forked
    found: dict[int, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.suites:
            done = SUITES[name]("cpu").forked([int(n) for n in args.worlds.split(",")], Path(folder))
            for n, reports in done.items():
                found.setdefault(n, []).extend(reports)
    return say(found)


def under_torchrun(args: argparse.Namespace) -> int:
    """One rank of a job that torchrun started."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    world = World(device)
    for name in args.suites:
        SUITES[name](device).rank(world)
    reports: list[Any] = [None] * world.size
    dist.all_gather_object(reports, world.report)
    status = say({world.size: reports}) if world.rank == 0 else int(any(r.wrong for r in reports))
    dist.destroy_process_group()
    return status


def say(found: dict[int, list[Report | int]]) -> int:
    """Print what every world found."""
    cases: dict[int, dict[str, int]] = {}
    wrong = []
    for n, reports in sorted(found.items()):
        for report in reports:
            if isinstance(report, int):
                wrong.append(f"{n} ranks: one ended with {report}")
                continue
            mine = cases.setdefault(n, {})
            for claim, count in report.counts.items():
                mine[claim] = mine.get(claim, 0) + count
            wrong += report.wrong
        print(f"{n} ranks: {sum(cases.get(n, {}).values())} comparisons {cases.get(n, {})}", flush=True)
    print(json.dumps({"cases": cases, "wrong": wrong[:40], "failures": len(wrong)}), flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
