"""States of shards in files: a directory a rank, checkpoints from there, and the step that all ranks go on with."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from refopt.spec import StateError
from refopt_cuda.optim.filing import OnDisk
from tests.sharded.cases import Reference, Work
from tests.sharded.checkpoints import END, SAVED, Run
from tests.sharded.steps import walk
from tests.sharded.world import World

PAGE_BYTES = 6000
"""Few enough that larger matrices are cut."""


def on_disk(world: World, work: Work, path: Path | str, **more: Any) -> Work:
    """The same with states in files, in small pages; a run of before may have left some there."""
    for left in Path(path).glob(f"rank{world.rank}of{world.size}*"):
        shutil.rmtree(left)
    options = {"place": "disk", "path": str(path), "page_bytes": PAGE_BYTES, **more}
    return work._replace(label=f"{work}-disk", options=work.options | options)


def steps(world: World, work: Work, references: Mapping[str, Reference]) -> None:
    """The bits of one rank, from the rank's own directory, with no memory held between steps; on more than two ranks
    as a GPU is served, through a ring."""
    usual, OnDisk.rehearsal = OnDisk.rehearsal, world.device == "cpu" and world.size > 2
    with tempfile.TemporaryDirectory() as mine:
        found: list[Any] = [mine]
        dist.broadcast_object_list(found, device=torch.device("cpu"))
        opt = walk(world, "disk shards", on_disk(world, work, found[0]), references[work.label])
        _lives(world, work, opt, Path(found[0]))
        dist.barrier()  # the directory is the first rank's to remove
    OnDisk.rehearsal = usual


def _lives(world: World, work: Work, opt: Any, path: Path) -> None:
    folder = path / f"rank{world.rank}of{world.size}"
    world.report.holds("disk shards", (folder / "pages-0.bin").exists(), f"{folder} holds no pages")
    opt.step()
    for p, entry in opt._state.items():
        kept = [x for x in entry.values() if isinstance(x, torch.Tensor) and x.to_local().numel()]
        good = all(x.to_local().device.type == "meta" and x.placements == p.placements for x in kept)
        world.report.holds(
            "disk shards", good, f"{folder} {tuple(p.shape)}: a state is in memory, or sharded otherwise"
        )
    _changed(world, work, opt, folder)
    opt._home.finish()
    opt._home.vault.close(keep=False)


def _changed(world: World, work: Work, opt: Any, folder: Path) -> None:
    """A copy that somebody has changed, all of it or this rank's part, is what the next step begins with: as resident
    states."""
    params = [*opt.state]
    for write in (lambda x: x.zero_(), lambda x: x.to_local().fill_(3)):
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = work.make(twins)
        other.load_state_dict(opt.state_dict())
        for side, some in ((opt, params), (other, twins)):
            for p, first in zip(some, params, strict=True):
                with torch.no_grad():
                    write(next(x for x in side.state[p].values() if isinstance(x, torch.Tensor)))
                p.grad = first.grad
            side.step()
        for p, q in zip(params, twins, strict=True):
            kept = {"p": q, **other.state[q]}.items()
            for key, x in [(key, x) for key, x in kept if isinstance(x, torch.Tensor)]:
                mine = {"p": p, **opt.state[p]}[key]
                world.report.compare("disk shards", mine.detach().to_local(), x.detach().to_local(), f"{folder}: {key}")


def agreed(world: World, work: Work, reference: Reference, folder: Path) -> None:
    """Where the last rank is a step behind, as if it had been killed in it, all go on with the step before; where it is
    two behind, none does."""
    claim, path = "resumed shards", folder / f"resume{world.size}"
    some = on_disk(world, work, path, keep_weights=True)
    mine, last = path / f"rank{world.rank}of{world.size}", world.size > 1 and world.rank == world.size - 1
    run = Run(world, some)
    run.steps(0, SAVED)
    run.opt._home.finish()
    shutil.copytree(mine, f"{mine}-then")
    run.steps(SAVED, SAVED + (world.size > 1))
    _end(run)
    _put_back(mine, last)
    for again in range(2):  # what was gone back to is gone on with from then on
        run = Run(world, some, fresh=True)
        world.report.holds(claim, run.opt.resume() == SAVED, f"{mine} goes on elsewhere")
        run.agrees(claim, reference, SAVED, f"resumed by {world.size},")
        dist.barrier()
        if not again:
            _end(run)
    run.steps(SAVED, END)
    run.agrees(claim, reference, END, f"resumed by {world.size},")
    _end(run)
    _put_back(mine, last)
    if world.size > 1:
        refused(world, claim, Run(world, some, fresh=True))


def refused(world: World, claim: str, run: Run) -> None:
    before = [p.detach().to_local().clone() for p in run.model.w]
    try:
        run.opt.resume()
    except StateError as error:
        world.report.holds(claim, "no step that is complete on all ranks" in str(error), str(error))
    else:
        world.report.holds(claim, False, "ranks of different steps went on")
    for p, was in zip(run.model.w, before, strict=True):
        world.report.compare(claim, p.detach().to_local(), was, "refused")


def _end(run: Run) -> None:
    """The process of this optimizer ends."""
    run.opt._home.finish()
    run.opt._home.vault.close(keep=True)
    dist.barrier()


def _put_back(mine: Path, last: bool) -> None:
    """The last rank has what it had then."""
    if last:
        shutil.rmtree(mine)
        shutil.copytree(f"{mine}-then", mine)
    dist.barrier()
