"""What peers' 8-bit AdamW does with sharded matrices, beside ours, on gloo ranks of one machine.

    TORCHDYNAMO_DISABLE=1 python -m tests.sharded.peers

For every class and shape: what the states are on each of two and four ranks, whether the weights after three steps
are those of the same class over the whole matrix, and whether four ranks go on with what two have saved.
`docs/sharding.md` shows the table that this prints.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from tests.sharded.checkpoints import Model
from tests.sharded.world import World, piece, ranks

CLASSES = ("refopt_cuda.optim.AdamW8bit", "torchao.optim.AdamW8bit", "bitsandbytes.optim.AdamW8bit")
SHAPES = ((64, 512), (31, 256), (33, 384), (16, 512))
STEPS = 3


def made(name: str, params: Any) -> torch.optim.Optimizer:
    module, _, cls = name.rpartition(".")
    return getattr(importlib.import_module(module), cls)(params, lr=1e-2)


def stepped(name: str, p: torch.nn.Parameter, cut: Callable[[torch.Tensor], torch.Tensor], steps: int = STEPS) -> Any:
    """The optimizer after some steps."""
    opt = made(name, [p])
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        p.grad = cut(torch.randn(p.shape, generator=draw))
        opt.step()
    return opt


def kind(opt: Any, p: Any) -> str:
    """What a rank keeps of the first moment."""
    for x in opt.state[p].values():
        if isinstance(x, torch.Tensor) and x.ndim:
            x = x.to_local() if isinstance(x, DTensor) else x
            code = getattr(x, "codes", x)
            return "8 bits" if code.dtype == torch.uint8 else "float32"
    return "nothing"


def measure(world: World, name: str, shape: tuple[int, ...], folder: Path, load: bool) -> str:
    """One cell of the table."""
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    p = world.parameter(whole)
    if load:
        opt = made(name, [p])
        state = {"o": get_optimizer_state_dict(Model([p]), opt)}
        dcp.load(state, checkpoint_id=folder)
        set_optimizer_state_dict(Model([p]), opt, state["o"])
        return "loads, " + _kinds(opt, p)
    q = torch.nn.Parameter(whole.clone())
    opt = stepped(name, p, world.cut)
    stepped(name, q, lambda g: g)
    same = bool(torch.equal(p.detach().to_local(), piece(q.detach(), world.mesh, world.rows)))
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, same)
    text = _kinds(opt, p) + (", the bits of one rank" if all(found) else ", other bits than one rank")
    if world.size == 2:
        dcp.save({"o": get_optimizer_state_dict(Model([p]), opt)}, checkpoint_id=folder)
    return text


def _kinds(opt: Any, p: Any) -> str:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, kind(opt, p))
    return found[0] if len(set(found)) == 1 else "; ".join(f"rank {k}: {f}" for k, f in enumerate(found))


def cell(world: World, name: str, shape: tuple[int, ...], folder: Path, load: bool) -> None:
    """Print it on rank 0; what goes wrong on any rank is what it says."""
    warnings.simplefilter("ignore")
    try:
        said = measure(world, name, shape, folder, load)
    except (Exception, CheckpointException) as error:
        lines = str(error).strip().splitlines()
        said = f"raises {type(error).__name__}: {lines[-1] if isinstance(error, CheckpointException) else lines[0]}"
    if world.rank == 0:
        print(f"| {name} | {shape} | {'2 to 4' if load else world.size} | {said[:170]} |", flush=True)


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        for c, name in enumerate(CLASSES):
            importlib.import_module(name.rpartition(".")[0])
            for s, shape in enumerate(SHAPES):
                for size, load in ((2, False), (4, False), (4, True)):
                    folder = Path(scratch) / f"saved{c}{s}"
                    one = Path(scratch) / f"ranks{c}{s}{size}{load}"
                    one.mkdir()
                    ranks(size, one, lambda w, a=(name, shape, folder, load): cell(w, *a))  # type: ignore[misc]
    return 0


if __name__ == "__main__":
    sys.exit(main())
