"""What happens within or around a step of shards: places, a norm over all ranks, loss scales, captured graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from refopt_cuda.optim.hosting import Hosted
from tests.sharded.cases import Reference, Work, gradients
from tests.sharded.steps import walk
from tests.sharded.world import World

PAGE_BYTES = 3000
"""Few enough that every matrix is cut."""
SCALE, OVERFLOW = 1024.0, 2
"""The loss scale, and the step in which the last rank alone has a gradient that overflows."""
GRAPH_STEPS = 4


def places(world: World, works: Sequence[Work], references: Mapping[str, Reference]) -> None:
    """States of shards in host memory, in pages of their own: the bits of one rank, and the memory of the place."""
    usual, Hosted.rehearsal = Hosted.rehearsal, world.device == "cpu"
    try:
        for place in ("paged", "host"):
            for work in works:
                some = work._replace(options=work.options | {"place": place, "page_bytes": PAGE_BYTES})
                opt = walk(world, f"{place} shards", some, references[work.label])
                _lives(world, f"{place} shards", opt, str(some))
    finally:
        Hosted.rehearsal = usual


def _lives(world: World, claim: str, opt: Any, what: str) -> None:
    """Every state of a shard that is not empty is in the place's memory, and none of it on a device."""
    for p, entry in opt.state.items():
        deck = opt._home.deck(p.device)
        kept = [x.to_local() for x in entry.values() if isinstance(x, torch.Tensor)]
        good = all(x.device.type == "cpu" and deck.keeps(x) for x in kept if x.numel())
        world.report.holds(claim, good, f"{what} {tuple(p.shape)}: a state lies elsewhere")


def norm(world: World, works: Sequence[Work], references: Mapping[str, Reference]) -> None:
    """`max_grad_norm` measures the gradients of all ranks; replicas are counted once."""
    for work in works:
        walk(world, "a norm over all ranks", work, references[work.label])
        if world.size == 4:
            mesh = init_device_mesh(world.device, (2, 2))
            for placements in ((Replicate(), Shard(0)), (Shard(0), Shard(0))):
                walk(world, "a norm over a mesh", work, references[work.label], mesh, placements)


def scaled(world: World, work: Work) -> None:
    """torch.amp.GradScaler: where one rank's gradients overflow, no rank steps."""
    claim = "a loss scale"
    whole = [torch.nn.Parameter(x.to(world.device)) for x in work.weights()]
    parts = [world.parameter(x) for x in work.weights()]
    pairs = [(work.make(params), torch.amp.GradScaler(world.device, init_scale=SCALE)) for params in (whole, parts)]
    for t in range(2 * OVERFLOW):
        for k, (p, q) in enumerate(zip(whole, parts, strict=True)):
            g = SCALE * gradients(tuple(p.shape), p.dtype, k, t)
            g[-1] = float("inf") if t == OVERFLOW and len(g) == 31 else g[-1]
            p.grad, q.grad = g.to(world.device), world.cut(g)
        for opt, scaler in pairs:
            scaler.scale(torch.ones((), device=world.device))
            scaler.step(opt)
            scaler.update()
    (one, theirs), (opt, mine) = pairs
    world.report.holds(claim, mine.get_scale() == theirs.get_scale() == SCALE / 2, f"{mine.get_scale()}")
    for p, q in zip(whole, parts, strict=True):
        what = f"{work} {tuple(p.shape)} rank {world.rank} of {world.size}"
        world.agrees(claim, q, opt.state[q], {"p": p, **one.state[p]}, what)
    steps = {int(entry["step"]) for entry in opt.state.values()}
    world.report.holds(claim, steps == {2 * OVERFLOW - 1}, f"steps {steps}")


def captured(world: World, work: Work) -> None:
    """A CUDA graph that captured one step of shards takes it again: the bits of steps that were not captured."""
    if world.device != "cuda":
        return
    some = work._replace(options=work.options | {"capturable": True})
    sides = [[world.parameter(x) for x in work.weights()] for _ in range(2)]
    for params in sides:
        for k, p in enumerate(params):
            p.grad = world.cut(gradients(tuple(p.shape), p.dtype, k, 0))
    opt, other = (some.make(params) for params in sides)
    opt.step()
    other.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for t in range(1, GRAPH_STEPS):
        for params in sides:
            for k, p in enumerate(params):
                p.grad.to_local().copy_(world.gradient(gradients(tuple(p.shape), p.dtype, k, t)).to_local())
        graph.replay()
        other.step()
    for p, q in zip(*sides, strict=True):
        what = f"{work} {tuple(p.shape)} rank {world.rank} of {world.size}"
        world.report.compare("captured", p.detach().to_local(), q.detach().to_local(), what)
        for key, x in other.state[q].items():
            mine = opt.state[p][key]
            near = [y.to_local() if hasattr(y, "to_local") else torch.as_tensor(y) for y in (mine, x)]
            world.report.compare("captured", *near, f"{what}: {key}")
