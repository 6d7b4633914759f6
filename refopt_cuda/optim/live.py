"""What a step multiplies gradients by, and rows of scalars that a device computes: loss scales, found_inf, clipping,
step counts and learning rates that the host does not know. Nothing here waits for a device.

A count that a device keeps is one int64 tensor for all parameters of a group that have taken the same steps; it stands
in the place of the number, `state[p]["step"]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from refopt_cuda.kernels import norm, rows_cuda, step_cuda
from refopt_cuda.optim import checks, states

Count = int | torch.Tensor
"""A step count: what a step reaches, or where a device keeps what has been reached."""


@dataclass(frozen=True)
class Scaling:
    """What one step multiplies all gradients by.

    factor      known to the host: gnorm_scale, over the loss scale where that lies on the CPU
    longest     max_grad_norm
    scale, inf  what torch.amp.GradScaler hands over, on a CUDA device
    skip        the host knows that the step is to have no effect
    squares     the sum of squares of each gradient, float64, on the parameters' CUDA device; `total`: on the host
    """

    factor: float = 1.0
    longest: float | None = None
    scale: torch.Tensor | None = None
    inf: torch.Tensor | None = None
    skip: bool = False
    squares: torch.Tensor | None = None
    total: float | None = None

    @property
    def foreign(self) -> bool:
        """Whether only a device knows if the step is skipped, or the loss scale."""
        return self.scale is not None or self.inf is not None

    @property
    def on_host(self) -> tuple[float, bool]:
        """(factor, skip) for parameters on the CPU; waits for a device that the scaler is on."""
        skip = self.skip or (self.inf is not None and bool(self.inf.item()))
        factor = self.factor / (1.0 if self.scale is None else self.scale.item())
        return norm.gradient_factor(factor, self.total, self.longest or 0.0), skip

    def on(self, device: torch.device) -> tuple[rows_cuda.Factor, list[torch.Tensor]]:
        """The same for a device's rows, and the tensors that it names."""
        given = {"scale": self.scale, "inf": self.inf}
        near = {k: x.to(device, torch.float32, non_blocking=True) for k, x in given.items() if x is not None}
        words: dict[str, Any] = {k: x.data_ptr() for k, x in near.items()}
        if self.squares is not None:
            words |= {"squares": self.squares.data_ptr(), "measured": self.squares.numel(), "longest": self.longest}
            near["squares"] = self.squares
        return rows_cuda.Factor(self.factor, **words), [*near.values()]


PLAIN = Scaling()
"""Gradients as they are."""


def scaling_of(opt: torch.optim.Optimizer, call: str) -> Scaling:
    """What this step's gradients are multiplied by. ValueError, TypeError."""
    first, *others = opt.param_groups
    factor, longest = first["gnorm_scale"], first["max_grad_norm"]
    scale, inf = opt.__dict__.get("grad_scale"), opt.__dict__.get("found_inf")
    for group in others:
        for name, value in (("gnorm_scale", factor), ("max_grad_norm", longest)):
            if group[name] != value:
                raise ValueError(f"{call}: {name} is of all groups together, got {value!r} and {group[name]!r}")
    if scale is None and inf is None and longest is None and factor == 1.0:
        return PLAIN
    check(factor, longest, call)
    for name, x in (("grad_scale", scale), ("found_inf", inf)):
        if x is not None and not (isinstance(x, torch.Tensor) and x.numel() == 1):
            raise TypeError(f"{call}: {name} must be a tensor of one element, got {x!r}")
    skip = inf is not None and not inf.is_cuda and bool(inf.item())
    if scale is not None and not scale.is_cuda:
        factor, scale = factor / scale.item(), None
    return Scaling(float(factor), longest, scale, inf if inf is not None and inf.is_cuda else None, skip)


def check(factor: Any, longest: Any, call: str) -> None:
    """ValueError, TypeError for a gnorm_scale or max_grad_norm that cannot be."""
    for name, value, low in (("gnorm_scale", factor, None), ("max_grad_norm", longest, 0.0)):
        if value is None and name == "max_grad_norm":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{call}: {name} must be a number, got {value!r}")
        if not math.isfinite(value) or (low is not None and value <= low):
            raise ValueError(f"{call}: {name} must be finite{'' if low is None else ' and above 0'}, got {value!r}")


def scheduled(hyper: Mapping[str, Any]) -> str | None:
    """The hyper-parameter, if there is one, whose schedule needs pow or exp, which only the host computes."""
    return next((name for name in ("t_alpha", "t_beta3") if hyper.get(name) is not None), None)


def refuse_schedule(hyper: Mapping[str, Any], call: str) -> None:
    """ValueError for a schedule where the device is to compute the scalars."""
    name = scheduled(hyper)
    if name is not None:
        raise ValueError(
            f"{call}: {name} schedules a scalar by a power, which is computed on the host alone: "
            "not with capturable, a loss scale on the device or max_grad_norm"
        )


def refuse_in_capture(what: str) -> None:
    """RuntimeError where a captured step would have to make what its replays only read."""
    if checks.capturing():
        raise RuntimeError(f"step: a CUDA graph that captures it cannot make {what}: step these parameters once before")


# ---------------------------------------------------------------------------------------------------- counts and rows


def kept_by(count: Any, p: torch.Tensor) -> bool:
    """Whether a device keeps this count of a parameter."""
    return isinstance(count, torch.Tensor) and count.dtype == torch.int64 and count.device == p.device and p.is_cuda


def counters(params: Sequence[torch.Tensor], counts: Sequence[Count], elsewhere: Iterable[Any]) -> list[torch.Tensor]:
    """The count of each parameter, on its device: one tensor for those that have been stepped together.

    elsewhere  counts of parameters that this step leaves alone: what they share with others is parted first
    """
    apart, made = {id(x) for x in elsewhere}, {}
    out = []
    for p, count in zip(params, counts, strict=True):
        key = id(count) if isinstance(count, torch.Tensor) else (p.device, count)
        if key not in made:
            if not isinstance(count, torch.Tensor):
                refuse_in_capture("step counts")
                count = torch.full((), count, dtype=torch.int64, device=p.device)
            elif id(count) in apart:
                refuse_in_capture("step counts")
                count = count.clone()
            made[key] = count
        out.append(made[key])
    return out


def ready(kept: states.Layout, have: Any, p: torch.Tensor, call: str, make: Any = states.ready) -> dict[str, Any]:
    """The entry to step `p` with, as `states.ready` makes it; a count that its device keeps is not read."""
    step = have.get("step") if have else None
    if not kept_by(step, p):
        return make(kept, have, p, call)
    return {**make(kept, {**have, "step": 0}, p, call), "step": step}


def counted(work: Sequence[Any], params: Sequence[torch.Tensor], state: Mapping[Any, Any]) -> list[Any]:
    """The same work, each of a parameter `p` and a count `t`, with counts that CUDA devices keep, made where there are
    none; `params` are all that share a group, those that this step leaves alone too."""
    ours = [w for w in work if w.p.is_cuda]
    taken = {id(w.p) for w in ours}
    rest = [state[p].get("step") for p in params if id(p) not in taken and p in state]
    counts = counters([w.p for w in ours], [w.t for w in ours], rest)
    place = {id(w.p): t for w, t in zip(ours, counts, strict=True)}
    return [w._replace(t=place.get(id(w.p), w.t)) for w in work]


class Live(NamedTuple):
    """Rows on a device: their address, and the place of each step count among them."""

    address: int
    at: dict[Count, int]


def rows(
    form: rows_cuda.Maker,
    hyper: Mapping[str, Any],
    group: Mapping[str, Any],
    counts: Sequence[Count],
    scaling: Scaling,
    device: torch.device,
    rooms: MutableMapping[torch.device, torch.Tensor],
) -> Live:
    """Enqueue the computation of a row for each count, and count the steps that the device counts.

    rooms  where rows lie on each device; grows as needed
    """
    need = rows_cuda.room(len(counts), form)
    if device not in rooms or rooms[device].numel() < need:
        refuse_in_capture("rows of scalars")
        rooms[device] = torch.zeros(need, dtype=torch.uint8, device=device)
    factor, near = scaling.on(device)
    more: dict[str, Any] = {"maximize": group.get("maximize", False), "seed": group.get("seed", 0)}
    if isinstance(hyper["lr"], torch.Tensor):
        rate = hyper["lr"].to(device, non_blocking=True)
        more["rate"], hyper = (rate.data_ptr(), rate.dtype == torch.float64), {**hyper, "lr": 0.0}
        near.append(rate)
    pairs = [(c.data_ptr(), 0) if isinstance(c, torch.Tensor) else (0, c) for c in counts]
    place, stream = rooms[device].data_ptr(), torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device):
        rows_cuda.run(form, hyper, pairs, place, factor, device.index or 0, stream, **more)
    return Live(place, {c: k for k, c in enumerate(counts)})


def batches(made: Any, counts: Iterable[Count]) -> Iterator[tuple[dict[Count, int], Any]]:
    """Step counts that one launch can hold, nearly always one of one: the place of each, and the rows."""
    if not isinstance(made, Live):
        steps: list[Any] = sorted(counts)
        for k in range(0, len(steps), step_cuda.ROWS):
            some = steps[k : k + step_cuda.ROWS]
            yield {t: i for i, t in enumerate(some)}, [made[t] for t in some]
        return
    wanted = {c: made.at[c] for c in counts}
    for base in range(0, len(made.at), step_cuda.ROWS):
        at = {c: i - base for c, i in wanted.items() if base <= i < base + step_cuda.ROWS}
        first = base + min(at.values(), default=0) if len(at) == 1 else base
        if at:
            yield {c: i + base - first for c, i in at.items()}, made.address + first * rows_cuda.BYTES
