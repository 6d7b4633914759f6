"""Sharded optimizers on one GPU or more, beside the peers that take DTensors: time, bytes a device, and unwrapping.

    torchrun --nproc-per-node N -m tests.bench.gpu_sharded [--only AdamW8bit] [--quick] [--commit HASH]

ms          of the device, between events, of the slowest rank
wall_ms     until step() returns
state       bytes of states a device, against the row of `refopt.memory.train(ranks=N, stage=3)`
allocated   what the first step left allocated on the device, against the same
unwrapping  wall_ms over the 448 adapters of a 7B model as DTensors, against plain tensors of the same parts: steps by
            turns, before each of which all gradients of both are new, so that the host's caches are in one state

Without torchrun it is one rank alone. Every rank measures; the first records.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from refopt import Optimizer, memory
from refopt_cuda.train.subjects import state_bytes
from tests.bench import clocks, models
from tests.bench.models import Work
from tests.bench.record import Recorder, arguments, software
from tests.bench.subjects import Missing, Subject, named

PACKAGES = ("torch", "cupy-cuda13x", "numpy", "bitsandbytes", "torchao")
NAMES = ("AdamW", "AdamW8bit", "AdamW8bit + bf16_rem16", "AdamW4bit", "Lion8bit")
PEERS = ("torch AdamW fused", "torchao AdamW8bit", "bitsandbytes AdamW8bit")
RECORDS: dict[str, tuple[str, Any]] = {
    "AdamW": ("adamw", {"p": "bf16"}),
    "torch AdamW fused": ("adamw", {"m": "bf16", "v": "bf16", "p": "bf16"}),
    "AdamW8bit": ("adamw", {"m": "dynamic8", "v": "dynamic8", "p": "bf16"}),
    "AdamW8bit + bf16_rem16": ("adamw", {"m": "dynamic8", "v": "dynamic8", "p": "bf16_rem16"}),
    "AdamW4bit": ("adamw", {"m": "q4", "v": "q4", "p": "bf16"}),
    "Lion8bit": ("lion", {"m": "dynamic8", "p": "bf16"}),
}
"""What the reference calls a subject, so that it can say its bytes."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smaller", type=int, default=1, help="divide every side, to try the script on a CPU")
    args = parser.parse_args(argv)
    if not (args.device == "cuda" and args.smaller == 1) and not args.dry:
        raise SystemExit("--device cpu and --smaller are for trying this script: add --dry")
    join(args.device)
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")  # one rank speaks
    mesh = init_device_mesh(args.device, (dist.get_world_size(),))
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU {platform.machine()}"
    rec = Recorder("gpu_sharded", f"{mesh.size()} x {device}", software(*PACKAGES), args.commit, args.out)
    if not args.dry:
        rec.check()
    work, adapters = (w.smaller(args.smaller) for w in (models.llama1b(), models.lora7b()))
    for subject in named(*(args.only or (*NAMES, *PEERS))):
        times = 5 if args.quick else 20

        def measure(s: Subject, times: int = times) -> None:
            steps(rec, mesh, work, s, args.device, times)

        if not tries(subject, measure) and subject.slow:
            torch.compiler.set_stance("force_eager")  # where no compiler works: better than nothing, and named so
            tries(replace(subject, name=f"{subject.name} eager"), partial(measure, times=5))
            torch.compiler.set_stance("default")
    for subject in named("AdamW8bit"):
        tries(subject, lambda s: unwrapping(rec, mesh, adapters, s, args.device, 10 if args.quick else 50))
    if dist.get_rank() == 0 and not args.dry:
        rec.save()
    dist.destroy_process_group()


def join(device: str) -> None:
    """The process group that torchrun describes, or one of this rank alone."""
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def tries(subject: Subject, measure: Callable[[Subject], None]) -> bool:
    """Measure; what goes wrong on this rank is printed. Whether all went well, or the subject is not there."""
    try:
        measure(subject)
    except Missing as error:
        print(f"{subject.name}: not there: {error}", flush=True)
    except Exception as error:
        print(f"{subject.name}: FAILED: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return False
    return True


def sharded(work: Work, mesh: DeviceMesh, device: str) -> list[torch.nn.Parameter]:
    """Parameters cut by rows as FSDP2 cuts them, each with a gradient; gradients have the weights' spec."""
    out = []
    draw = torch.Generator(device).manual_seed(mesh.get_local_rank())
    for shape in work.shapes:
        rows = -(-shape[0] // mesh.size())
        first = min(rows * mesh.get_local_rank(), shape[0])
        part = (min(rows, shape[0] - first), *shape[1:])
        stride = torch.empty(shape, device="meta").stride()
        mine = [torch.empty(part, dtype=work.dtype, device=device).normal_(0, s, generator=draw) for s in (1, 1e-3)]
        p, g = (DTensor.from_local(x, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride) for x in mine)
        q = torch.nn.Parameter(p)
        q.grad = g
        out.append(q)
    return out


def renew(params: Sequence[torch.nn.Parameter]) -> None:
    """Every gradient at another address, under the spec that it has: as FSDP2 makes them."""
    new = []
    for p in params:
        g: Any = p.grad
        new.append(
            DTensor(g._local_tensor.clone(), g._spec, requires_grad=False) if isinstance(g, DTensor) else g.clone()
        )
    for p, g in zip(params, new, strict=True):
        p.grad = g


def slowest(ms: float, device: str) -> float:
    """The longest of all ranks' times."""
    x = torch.tensor(ms, device=device)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return float(x)


def steps(rec: Recorder, mesh: DeviceMesh, work: Work, subject: Subject, device: str, times: int) -> None:
    """Time and bytes of one subject over a model's tensors."""
    params = sharded(work, mesh, device)
    before = clocks.allocated(device)
    opt = subject.make(params)
    opt.step()
    clocks.synchronize(device)
    left = clocks.allocated(device) - before
    wall = clocks.wall_ms(opt.step, device, times)
    ms = clocks.device_ms(opt.step, device, times, ahead=1.5 * wall)
    name, where = subject.name, f"{work.name}/{mesh.size()}"
    rec.add(where, name, "ms", slowest(ms, device), "ms")
    rec.add(where, name, "wall_ms", slowest(wall, device), "ms")
    if name in RECORDS:
        stem, codecs = RECORDS[name]
        said = memory.train(
            work.shapes,
            Optimizer(stem, codecs=codecs, min_size=0 if subject.peer else 4096, lr=1e-3),
            ranks=mesh.size(),
            stage=3,
        ).states
        kept = state_bytes(opt)
        rec.add(where, name, "state", kept / 1e6, "MB", f"refopt.memory {said / 1e6:.6g} MB", kept / said)
        if device == "cuda":
            rec.add(where, name, "allocated", left / 1e6, "MB", f"refopt.memory {said / 1e6:.6g} MB", left / said)
    elif device == "cuda":
        rec.add(where, name, "allocated", left / 1e6, "MB")
    del opt, params
    clocks.tidy(device)


def unwrapping(rec: Recorder, mesh: DeviceMesh, work: Work, subject: Subject, device: str, times: int) -> None:
    """What DTensors cost the host, over many small tensors."""
    cut = sharded(work, mesh, device)
    plain = []
    for p in cut:
        q = torch.nn.Parameter(p.detach()._local_tensor.clone())
        q.grad = p.grad._local_tensor.clone()  # type: ignore[union-attr]
        plain.append(q)
    opts = {"plain": subject.make(plain), "sharded": subject.make(cut)}
    taken = clocks.by_turns({k: o.step for k, o in opts.items()}, device, times, before=lambda: renew(plain + cut))
    wall = {kind: slowest(ms, device) for kind, ms in taken.items()}
    where = f"{work.name}/{mesh.size()}"
    rec.add(where, subject.name, "wall_ms plain", wall["plain"], "ms")
    baseline = f"plain tensors {wall['plain']:.4g} ms"
    rec.add(where, subject.name, "wall_ms sharded", wall["sharded"], "ms", baseline, wall["sharded"] / wall["plain"])


if __name__ == "__main__":
    main()
