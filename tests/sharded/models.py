"""A model under `fully_shard`, trained beside a twin that is whole and is given the reduced gradients."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import refopt_cuda as rc
from refopt_cuda.train import loop, sharded, subjects
from refopt_cuda.train.plan import Plan
from tests.sharded.world import World, piece

STEPS = 3


def trained(world: World) -> None:
    """Rows in shards, replicated shards, bfloat16 weights, weights on the host, a clipped norm and a schedule."""
    one = init_device_mesh(world.device, (world.size,))
    _train(world, "fully_shard", one, rc.optim.AdamW8bit, torch.float32)
    _train(world, "fully_shard bf16", one, rc.optim.Lion4bit, torch.bfloat16, codecs={"p": "bf16_sr"})
    if world.size == 4:
        two = init_device_mesh(world.device, (2, 2), mesh_dim_names=("replicate", "shard"))
        _train(world, "fully_shard HSDP", two, rc.optim.AdamW8bit, torch.float32)
        both = init_device_mesh(world.device, (2, 2), mesh_dim_names=("shard", "tensor"))
        _train(world, "fully_shard of tensor parallel", both, rc.optim.AdamW8bit, torch.float32, max_grad_norm=0.1)
    if world.device == "cuda":
        offload = {"offload_policy": CPUOffloadPolicy(pin_memory=True)}
        _train(world, "fully_shard on the host", one, rc.optim.AdamW8bit, torch.float32, offload)
    _train(world, "fully_shard Muon", one, rc.optim.Muon, torch.float32)


def swapped(world: World) -> None:
    """accelerate builds the optimizer over whole parameters, loads its empty state, then puts sharded ones in place."""
    draw = torch.Generator().manual_seed(3)
    whole = torch.randn(33, 384, generator=draw)
    g = torch.randn(33, 384, generator=draw)
    q = torch.nn.Parameter(whole.to(world.device, copy=True))
    opt, other = (rc.optim.AdamW8bit([q], lr=1e-2) for _ in range(2))
    opt.load_state_dict(opt.state_dict())
    p = world.parameter(whole)
    opt.param_groups[0]["params"] = [p]
    p.grad, q.grad = world.cut(g), g.to(world.device)
    for _ in range(2):
        opt.step()
        other.step()
    world.report.compare("swapped", p.to_local(), piece(q.detach(), world.mesh, world.rows), f"rank {world.rank}")

    into, back = rc.optim.AdamW8bit([world.parameter(whole)]), rc.optim.AdamW8bit([torch.nn.Parameter(q.detach())])
    into.load_state_dict(other.state_dict())
    back.load_state_dict(opt.state_dict())
    for key, x in other.state[q].items():
        if isinstance(x, torch.Tensor):
            (cut,), (joined,) = (o.state.values() for o in (into, back))
            want = piece(x, world.mesh, world.rows)
            world.report.compare("whole into shards", cut[key].to_local(), want, f"{key} rank {world.rank}")
            world.report.compare("shards into whole", joined[key], x, f"{key} rank {world.rank}")

    saved = other.state_dict()
    entry = saved["state"][0]
    for key, x in entry.items():
        if isinstance(x, torch.Tensor):
            entry[key] = world.cut(x, None, (Shard(1),))
    into.load_state_dict(saved)
    (cut,) = into.state.values()
    for key, x in other.state[q].items():
        if isinstance(x, torch.Tensor):
            want = piece(x, world.mesh, world.rows)
            world.report.compare("columns into rows", cut[key].to_local(), want, f"{key} rank {world.rank}")


def _train(
    world: World, claim: str, mesh: Any, make: Any, dtype: torch.dtype, policy: Any = None, **options: Any
) -> None:
    torch.manual_seed(0)
    parallel = "tensor" in (mesh.mesh_dim_names or ())
    layers = [torch.nn.Linear(96, 128), torch.nn.LayerNorm(128), torch.nn.GELU(), torch.nn.Linear(128, 33)]
    if make is rc.optim.Muon:
        layers = [torch.nn.Linear(96, 128, bias=False), torch.nn.GELU(), torch.nn.Linear(128, 33, bias=False)]
    if parallel:
        layers = [torch.nn.Linear(96, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 33)]
    model = torch.nn.Sequential(*layers).to(world.device, dtype)
    twin = copy.deepcopy(model)
    more = policy or {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    if parallel:
        styles = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], styles)
        mesh = mesh["shard"]
    for layer in (model[0], model[-1], model):
        fully_shard(layer, mesh=mesh, **more)
    opt, other = (make(m.parameters(), lr=1e-2, **options) for m in (model, twin))
    schedule = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)) for o in (opt, other)]
    draw = torch.Generator().manual_seed(world.rank)
    for _ in range(STEPS):
        x = torch.randn(8, 96, generator=draw).to(world.device, dtype)
        model(x).float().square().mean().backward()
        if policy is None and "max_grad_norm" not in options:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = _whole(p.grad, q.device)
        for o, s in zip((opt, other), schedule, strict=True):
            o.step()
            s.step()
            o.zero_grad()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert isinstance(p, DTensor)
        what = f"{name} rank {world.rank} of {world.size}"
        world.report.compare(claim, p.to_local(), piece(q.detach(), p.device_mesh, p.placements), what)
        for key, x in other.state[q].items():
            mine = opt.state[p][key]
            if isinstance(mine, DTensor):
                expected = piece(x, p.device_mesh, p.placements)
                world.report.compare(claim, mine.to_local(), expected, f"{what}: {key}")
                world.report.holds(claim, mine.to_local().device == p.to_local().device, f"{what}: {key} elsewhere")
            else:
                world.report.holds(claim, mine == x, f"{what}: {key} {mine} for {x}")


def _whole(g: Any, device: Any) -> torch.Tensor:
    """A reduced gradient, put together; where it lies on the host, the mesh's device gathers it."""
    if g.to_local().device.type != device.type:
        g = DTensor.from_local(
            g.to_local().to(device), g.device_mesh, g.placements, run_check=False, shape=g.shape, stride=g.stride()
        )
    return g.full_tensor().to(device)


def job(world: World, folder: Path) -> None:
    """`refopt train --sharded`: on disk, stopped and gone on with, it has the bits of a run that was not; its losses
    are those of one process but for the order of sums."""
    claim, sizes = "the job", {"layers": 1, "width": 32, "heads": 2, "hidden": 64, "context": 16}
    plan = Plan(("AdamW8bit",), (0,), 6, 12, lr=5e-3, samples=0, device=world.device, ranks=world.size, **sizes)
    text = tuple(np.random.default_rng(k).integers(0, 96, 4000).astype(np.uint8) for k in (0, 1))
    (subject,) = subjects.parse_all(plan.optimizers)
    filed = replace(plan, place="disk")
    through, stopped = (sharded.Run(p, 0, subject, text, folder / p.place) for p in (plan, filed))
    through.start()
    whole = through.train(lambda r: None, lambda: False)
    stopped.start()
    try:
        stopped.train(lambda r: None, lambda: world.rank == 0 and stopped.record.step == 3)
    except loop.Stopped:
        pass
    stopped.opt._home.vault.close(keep=True)
    again = sharded.Run(filed, 0, subject, text, folder / filed.place)
    again.start()
    world.report.holds(claim, again.record.step == 3, f"gone on with at step {again.record.step}")
    parts = again.train(lambda r: None, lambda: False)
    for p, q in zip(through.params, again.params, strict=True):
        world.report.compare(claim, q.detach().to_local(), p.detach().to_local(), "stopped and gone on with")
    rows = [[row[k] for row in r.rows for k in ("train", "heldout")] for r in (whole, parts)]
    world.report.holds(claim, rows[0] == rows[1], f"losses {rows}")
    alone = loop.Run(replace(plan, ranks=0), 0, subject, text, folder / f"alone{world.rank}")
    alone.start()
    one = [row[k] for row in alone.train(lambda r: None, lambda: False).rows for k in ("train", "heldout")]
    world.report.holds(claim, bool(np.allclose(rows[0], one, rtol=0.01)), f"losses {rows[0]}, of one process {one}")
