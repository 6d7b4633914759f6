"""The step that was just taken, taken again (`run.Lane`), over DTensors: what lets it, and what sends it back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

import refopt_cuda as rc
from refopt_cuda.optim import checks, run, settings
from tests.sharded.world import World

CLAIM = "the lane of sharded steps"


def made(opt: Any, launches: Any = None) -> run.Lane:
    """The lane of a CPU step; its launches do nothing."""
    call, (group,) = "step", opt.param_groups
    hyper, plan = settings.hyper_of(opt.rule, group, call), run.Plan()
    plan.agree(opt.rule, hyper, group, call)
    numbers = {id(p): k for k, p in enumerate(group["params"])}
    work = plan.prepare(opt.rule, hyper, group, checks.gather(group["params"], call), opt._state, numbers, call)
    bucket = run.Bucket(launches, {w.slot: k for k, w in enumerate(work)})
    lane = run.Lane.of(work, {"all": bucket}, group["params"])
    assert lane is not None
    opt._state.changed = False
    return lane


def checked(world: World) -> None:
    """Gradients elsewhere are taken; a moved weight, other placements, a new state tensor are not."""
    params = [world.parameter(torch.ones(shape)) for shape in ((64, 128), (5, 16), (1,))]
    opt = rc.optim.AdamW8bit(params)
    _give(world, params)
    opt.step()
    lane = made(opt)
    _give(world, params)
    found = lane.gradients(params, opt._state, True)
    mine = [p.grad.to_local() for p in params]
    good = found is not None and [g.data_ptr() for g in mine] == found[1]
    world.report.holds(CLAIM, good, "new gradients were not taken")

    params[1].grad = None
    _refused(world, lane, opt, "a gradient that is missing")
    _give(world, params)
    params[0]._local_tensor = params[0]._local_tensor.clone()
    _refused(world, lane, opt, "a weight that moved")
    opt.step()
    lane = made(opt)
    world.report.holds(CLAIM, lane.gradients(params, opt._state, True) is not None, "the new place was not learnt")
    entry = opt.state[params[0]]
    entry["m.codes"] = entry["m.codes"].clone()
    _refused(world, lane, opt, "another state tensor")
    opt._state.changed = False
    lane = made(opt)
    for p in params:
        spec = p.grad._spec
        p.grad = DTensor(p.grad._local_tensor, copy.copy(spec), requires_grad=False)  # type: ignore[call-arg]
    same = lane.gradients(params, opt._state, False) is not None
    world.report.holds(CLAIM, same, "gradients with a mesh and placements that are equal were not taken")
    params[0]._local_tensor.data = params[0]._local_tensor.clone()
    _refused(world, lane, opt, "weights that all moved", False)
    opt.step()
    lane = made(opt)
    entry["m.codes"]._local_tensor = entry["m.codes"]._local_tensor.clone()
    _refused(world, lane, opt, "a state tensor that moved")
    lane = made(opt)
    square = world.cut(torch.ones(64, 128), None, (Replicate(),))
    params[0].grad = square
    _refused(world, lane, opt, "other placements")
    before = params[0].detach().to_local().clone()
    opt.step()
    moved = bool((params[0].detach().to_local() != before).all())
    world.report.holds(CLAIM, moved, "a gradient of other placements was not redistributed")


def _give(world: World, params: Any) -> None:
    for p in params:
        p.grad = world.cut(torch.full(tuple(p.shape), 0.5))


def _refused(world: World, lane: run.Lane, opt: Any, why: str, seen: bool = True) -> None:
    found = lane.gradients(opt.param_groups[0]["params"], opt._state, seen)
    world.report.holds(CLAIM, found is None, f"{why}: went through the lane")
