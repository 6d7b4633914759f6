"""torch.distributed.checkpoint: what one number of ranks saved, any other loads, and goes on to the same bits."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tests.sharded.cases import Reference, Work, gradients
from tests.sharded.world import World

SAVED, END = 3, 8
LARGE = (4096, 1024)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FULL = StateDictOptions(full_state_dict=True)


class Model(torch.nn.Module):
    """Parameters and nothing else."""

    def __init__(self, params: Sequence[torch.nn.Parameter]) -> None:
        super().__init__()
        self.w = torch.nn.ParameterList(params)


class Run:
    """One optimizer over sharded parameters."""

    def __init__(self, world: World, work: Work, fresh: bool = False) -> None:
        self.world, self.work = world, work
        values = [torch.zeros_like(x) for x in work.weights()] if fresh else work.weights()
        self.model = Model([world.parameter(x) for x in values])
        self.opt = work.make(self.model.parameters())

    def steps(self, first: int, last: int) -> None:
        for t in range(first, last):
            for k, p in enumerate(self.model.w):
                p.grad = self.world.cut(gradients(tuple(p.shape), p.dtype, k, t))
            self.opt.step()

    def state(self, options: StateDictOptions | None = None) -> dict[str, Any]:
        """What is saved, or loaded into."""
        return {
            "model": get_model_state_dict(self.model),
            "optim": get_optimizer_state_dict(self.model, self.opt, options=options),
        }

    def take(self, state: Mapping[str, Any], options: StateDictOptions | None = None) -> None:
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.opt, state["optim"], options=options)

    def agrees(self, claim: str, reference: Reference, t: int, what: str) -> None:
        for p, want in zip(self.model.w, reference.at[t], strict=True):
            self.world.agrees(claim, p, self.opt.state[p], want, f"{self.work} {tuple(p.shape)} {what} step {t}")


def save(world: World, works: Sequence[Work], folder: Path) -> None:
    """Three steps of everything, then one checkpoint; the first optimizer also as flat keys and as whole tensors."""
    runs = {w.label: Run(world, w) for w in works}
    for run in runs.values():
        run.steps(0, SAVED)
    first = next(iter(runs.values()))
    parts = {label: run.state() for label, run in runs.items()} | {"flat": first.state(FLAT)}
    dcp.save(parts, checkpoint_id=folder / f"of{world.size}")
    whole = first.state(FULL)
    whole["model"] = get_model_state_dict(first.model, options=FULL)
    if world.rank == 0:
        torch.save(whole, folder / f"of{world.size}.pt")


def paged(work: Work) -> Work:
    """The same with states in host memory, in small pages."""
    return work._replace(label=f"{work}-paged", options=work.options | {"place": "paged", "page_bytes": 3000})


def save_from_the_host(world: World, work: Work, folder: Path) -> None:
    """Paged states are written from host memory, and read into it, those of a disk from files: no device has a copy."""
    if world.device != "cuda":
        return
    run, claim = Run(world, work._replace(shapes=(LARGE,))), "saved from the host"
    run.steps(0, 1)
    torch.cuda.synchronize()
    before, size = torch.cuda.memory_allocated(), 2 * LARGE[0] * LARGE[1] // world.size
    torch.cuda.reset_peak_memory_stats()
    state = {"optim": get_optimizer_state_dict(run.model, run.opt)}
    dcp.save(state, checkpoint_id=folder / f"host{world.size}")
    dcp.load(state, checkpoint_id=folder / f"host{world.size}")
    set_optimizer_state_dict(run.model, run.opt, state["optim"])
    rise = torch.cuda.max_memory_allocated() - before
    world.report.holds(claim, rise < size // 8, f"{rise} bytes on the device for {size} of states")


def load(world: World, works: Sequence[Work], references: Mapping[str, Reference], folder: Path, saved: int) -> None:
    """Load what `saved` ranks have written, look at it, and take five more steps."""
    runs = {w.label: Run(world, w, fresh=True) for w in works}
    flat, whole = (Run(world, works[0], fresh=True) for _ in range(2))
    parts = {label: run.state() for label, run in runs.items()} | {"flat": flat.state(FLAT)}
    dcp.load(parts, checkpoint_id=folder / f"of{saved}")
    for label, run in runs.items():
        run.take(parts[label])
    flat.take(parts["flat"], FLAT)
    full = torch.load(folder / f"of{saved}.pt", weights_only=True)
    set_model_state_dict(whole.model, full["model"], options=FULL)
    set_optimizer_state_dict(whole.model, whole.opt, full["optim"], options=FULL)
    what = f"saved by {saved} ranks, loaded by {world.size},"
    every = [("resharded", run, references[label]) for label, run in runs.items()]
    every += [("flat keys", flat, references[works[0].label]), ("whole tensors", whole, references[works[0].label])]
    for claim, run, reference in every:
        run.agrees(claim, reference, SAVED, what)
        run.steps(SAVED, END)
        run.agrees(claim, reference, END, what)


def fresh(world: World, work: Work, reference: Reference) -> None:
    """Asking a fresh optimizer for its state makes states of step 0 and changes nothing."""
    claim, run = "asked when fresh", Run(world, work)
    before = [p.detach().to_local().clone() for p in run.model.w]
    run.state()
    for p, was in zip(run.model.w, before, strict=True):
        world.report.compare(claim, p.detach().to_local(), was, f"{work} {tuple(p.shape)}")
        world.report.holds(claim, run.opt.state[p]["step"] == 0, f"{work}: step {run.opt.state[p]['step']}")
    run.steps(0, SAVED)
    run.agrees(claim, reference, SAVED, "asked when fresh,")


class Dying(dcp.FileSystemWriter):
    """Rank 1 is killed after it has written half a file."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        if dist.get_rank() == 1:
            (Path(self.path) / "__1_0.distcp").write_bytes(b"half")
            os.kill(os.getpid(), 9)
        return super().write_data(plan, planner)


def save_and_die(world: World, work: Work, folder: Path) -> None:
    """A whole checkpoint, then one in which a rank is killed."""
    run = Run(world, work)
    run.steps(0, SAVED)
    dcp.save(run.state(), checkpoint_id=folder / "old")
    run.steps(SAVED, SAVED + 1)
    try:
        dcp.save(run.state(), storage_writer=Dying(folder / "new"))
    except BaseException:  # whatever gloo says when a neighbour is gone
        os._exit(3)


def load_after_death(world: World, work: Work, reference: Reference, folder: Path) -> None:
    """The old checkpoint loads; the broken one says that it is none."""
    claim, run = "a rank killed", Run(world, work, fresh=True)
    state = run.state()
    logging.disable(logging.CRITICAL)  # torch logs what it raises
    try:
        dcp.load(state, checkpoint_id=folder / "new")
    except CheckpointException:
        world.report.holds(claim, True, "")
    else:
        world.report.holds(claim, False, "the broken checkpoint was loaded")
    dcp.load(state, checkpoint_id=folder / "old")
    run.take(state)
    run.agrees(claim, reference, SAVED, "after a rank was killed,")
    run.steps(SAVED, END)
    run.agrees(claim, reference, END, "after a rank was killed,")
