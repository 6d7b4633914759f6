"""What scaling, clipping and counting on the device cost a step of AdamW8bit: times beside the plain step's.

    python -m tests.bench.gpu_contract [--parts lora7b] [--only clipped,captured] [--quick] [--commit HASH]

plain      the step of a loop without any of it
clipped    max_grad_norm, in the step
clip_      torch.nn.utils.clip_grad_norm_ before a plain step
scaled     grad_scale and found_inf on the device
counted    capturable, not captured
captured   a CUDA graph of the same, replayed

ms of the device between events, wall_ms until the call returns; the ratio is to the plain step of the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import refopt_cuda as rc
from tests.bench import clocks, models
from tests.bench.models import Work
from tests.bench.record import Recorder, arguments, names, software

WAYS = ("plain", "clipped", "clip_", "scaled", "counted", "captured")


def made(way: str, params: Sequence[torch.nn.Parameter], device: str) -> Callable[[], Any]:
    """The call that is timed, after two steps."""
    words: dict[str, Any] = {"clipped": {"max_grad_norm": 1.0}, "counted": {"capturable": True}}.get(way, {})
    opt = rc.optim.AdamW8bit(params, **({"capturable": True} if way == "captured" else words))
    if way == "scaled":
        opt.grad_scale = torch.ones((), device=device)
        opt.found_inf = torch.zeros((), device=device)
    opt.step()
    opt.step()
    if way == "captured":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            opt.step()
        graph.optimizer = opt  # what it launches lives as long as it does
        return graph.replay
    if way != "clip_":
        return opt.step

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=device == "cuda")
        opt.step()

    return clip_and_step


def measure(rec: Recorder, work: Work, ways: Sequence[str], device: str, times: int) -> None:
    """Every way over the same weights, in rows."""
    params, plain = models.parameters(work, device), {}
    for way in ways:
        run = made(way, params, device)
        fresh = (lambda: models.reallocate(params)) if work.fresh and way != "captured" else clocks.nothing
        found = {
            "ms": clocks.device_ms(run, device, times, before=fresh, ahead=5),
            "wall_ms": clocks.wall_ms(run, device, times, before=fresh),
        }
        for metric, value in found.items():
            plain.setdefault(metric, value)
            rec.add(work.name, f"AdamW8bit {way}", metric, value, "ms", f"AdamW8bit {ways[0]}", value / plain[metric])


def main(argv: Sequence[str] | None = None) -> Recorder:
    parser = arguments(__doc__ or "")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", type=names, default=("lora7b", "llama1b-block"), metavar="WORK,...")
    parser.add_argument("--smaller", type=int, default=1, help="divide every size, to try the script")
    args = parser.parse_args(argv)
    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    rec = Recorder("gpu_contract", name, software("torch", "cupy-cuda13x", "numpy"), args.commit, args.out)
    if not args.dry:
        rec.check()
    possible = [w for w in WAYS if args.device == "cuda" or w != "captured"]
    ways = [w for w in possible if w == "plain" or not args.only or w in args.only]
    for work in (w for w in (models.lora7b(), models.block1b()) if w.name in args.parts):
        measure(rec, work.smaller(args.smaller), ways, args.device, 5 if args.quick else 20)
        if not args.dry:
            rec.save()
    return rec


if __name__ == "__main__":
    main()
