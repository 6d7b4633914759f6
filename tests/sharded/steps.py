"""Sharded equals unsharded: every rank's part of weights and states, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from refopt.spec import ShapeError, StateError
from tests.sharded.cases import STEPS, Reference, Work, gradients
from tests.sharded.world import World

LOOKS = (1, STEPS)
"""Steps after which everything is compared."""


def walk(world: World, claim: str, work: Work, reference: Reference, mesh: Any = None, placements: Any = None) -> Any:
    """Take the steps of the reference in shards, comparing after some of them; the optimizer."""
    params = [world.parameter(x, mesh, placements) for x in work.weights()]
    opt = work.make(params)
    for t in range(STEPS):
        for k, p in enumerate(params):
            p.grad = world.gradient(gradients(tuple(p.shape), p.dtype, k, t), mesh, placements)
        opt.step()
        if t + 1 in LOOKS:
            for p, want in zip(params, reference.at[t + 1], strict=True):
                what = f"{work} {tuple(p.shape)} step {t + 1} rank {world.rank} of {world.size}"
                world.agrees(claim, p, opt.state[p], want, what)
    return opt


def every_element_rule(world: World, works: Sequence[Work], references: Mapping[str, Reference]) -> None:
    for work in works:
        walk(world, "rows in shards", work, references[work.label])


def every_whole_rule(world: World, works: Sequence[Work], references: Mapping[str, Reference]) -> None:
    for work in works:
        walk(world, "put together", work, references[work.label])


def meshes(world: World, works: Sequence[Work], references: Mapping[str, Reference]) -> None:
    """Replicated shards (HSDP), shards of shards, and shards along the middle one of three dimensions."""
    if world.size != 4:
        return
    mesh = init_device_mesh(world.device, (2, 2))
    for work in works:
        walk(world, "replicated shards", work, references[work.label], mesh, (Replicate(), Shard(0)))
        walk(world, "shards of shards", work, references[work.label], mesh, (Shard(0), Shard(0)))
        some = work._replace(shapes=((5, 3, 320),))
        if work.options.get("codecs", {}) != "f32" and "bf16_sr" not in str(work):
            walk(world, "middle shards", some, Reference(some, world.device, LOOKS), mesh, (Shard(1), Shard(0)))


def columns(world: World, works: Sequence[Work]) -> None:
    """Rows that are cut into equal parts of whole blocks: coded, with the bits of one rank; alone and in two
    dimensions, as tensor parallel layers under fully_shard are."""
    if world.size == 1:
        return
    for work in works:
        some = work._replace(shapes=((8, 512 * world.size), (9, 256 * world.size)))
        reference = Reference(some, world.device, LOOKS)
        walk(world, "columns of whole blocks", some, reference, None, (Shard(1),))
        if world.size == 4:
            mesh = init_device_mesh(world.device, (2, 2))
            for placements in ((Shard(0), Shard(1)), (Replicate(), Shard(1)), (Shard(1), Shard(1))):
                walk(world, "columns and rows", some, reference, mesh, placements)


def last_dimension(world: World, work: Work) -> None:
    """Blocks that would be cut are not made: the states are float32 then, on every rank, and it is said once."""
    if world.size == 1:
        return
    some = work._replace(shapes=((64, 96),))
    plain = some._replace(options={"codecs": "f32"})
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        walk(world, "columns in shards", some, Reference(plain, world.device, LOOKS), None, (Shard(1),))
    said = [str(w.message) for w in heard if "last dimension" in str(w.message)]
    world.report.holds("columns in shards", len(said) == 1, f"{work}: {said}")


def refusals(world: World) -> None:
    """Every refusal names the call and comes before anything is changed."""
    import refopt_cuda as rc

    p = world.parameter(torch.ones(8, 512, dtype=torch.bfloat16))
    opt = rc.optim.AdamW8bit([p])
    p.grad = world.cut(torch.ones(8, 512, dtype=torch.bfloat16))
    opt.step()
    before = {k: x.to_local().clone() for k, x in opt.state[p].items() if k != "step"}
    entry = opt.state[p]
    entry["m.codes"], kept = entry["m.codes"].to_local(), entry["m.codes"]
    _raises(world, opt.step, "AdamW8bit.step: the state of a parameter")
    entry["m.codes"] = kept
    for key, was in before.items():
        world.report.compare("refusals", entry[key].to_local(), was, key)
    early = {"place": "paged", "during_backward": True}
    text = "AdamW8bit.add_param_group: during_backward is of parameters that are not sharded"
    _raises(world, lambda: rc.optim.AdamW8bit([p], **early), text)
    opt = rc.optim.AdamW8bit([torch.nn.Parameter(torch.ones(8, 512))], **early)
    opt.param_groups[0]["params"] = [p]  # as accelerate does
    _raises(world, opt.step, "AdamW8bit.step: during_backward is of parameters that are not sharded")
    opt = rc.optim.AdamW8bit([p], place="paged")
    opt._home.__class__ = type("Elsewhere", (type(opt._home),), {})
    _raises(world, opt.step, "AdamW8bit.step: this place does not keep states of sharded parameters")
    opt, kept = rc.optim.AdamW8bit([p]), p.grad
    p.grad = DTensor(kept._local_tensor[:, :1], kept._spec, requires_grad=False)  # type: ignore[union-attr, call-arg]
    _raises(world, opt.step, "AdamW8bit.step: this rank's part of a gradient has shape")
    p.grad = kept
    if world.size > 1:
        q = world.parameter(torch.ones(8, 6 * world.size, 16, dtype=torch.bfloat16), None, (Shard(1),))
        opt = rc.optim.AdamW([q], codecs={"p": "bf16_sr"})
        q.grad = world.cut(torch.ones(q.shape, dtype=q.dtype), None, (Shard(1),))
        _raises(world, opt.step, "AdamW.step: random bits go by an element's number")


def _raises(world: World, call: Any, text: str) -> None:
    try:
        call()
    except (ValueError, TypeError, ShapeError, StateError) as error:
        world.report.holds("refusals", str(error).startswith(text), str(error))
    else:
        world.report.holds("refusals", False, f"nothing was raised: {text}")
