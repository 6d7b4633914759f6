"""The norm over all gradients of a step, on a CUDA device or on the CPU, and what captured graphs may still read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from refopt_cuda.kernels import norm, step_cuda
from refopt_cuda.optim.checks import NUMBERS
from refopt_cuda.optim.live import Scaling, refuse_in_capture
from refopt_cuda.optim.ranked import Ranks
from refopt_cuda.optim.run import words


@dataclass(eq=False)
class Norms:
    """The sums of squares of all gradients of a step, in the parameters' order; bound to their formats and shapes."""

    lanes: tuple[Any, ...] = ()
    kinds: list[Any] = field(default_factory=list)
    runs: list[tuple[Any, list[int]]] = field(default_factory=list)
    out: torch.Tensor | None = None
    ranks: Ranks | None = None

    def measure(
        self,
        grads: Sequence[torch.Tensor],
        scaling: Scaling,
        call: str,
        params: Sequence[torch.Tensor],
        lanes: Any = (),
    ) -> Scaling:
        """`scaling` with the sums of row-major gradients, on their device; of sharded parameters with those of all
        ranks.

        params  whose gradients, or parts of them, these are
        lanes   the lanes of this step: where they were those of the last, shapes need no comparison
        """
        devices = {g.device for g in grads}
        if len(devices) > 1:
            where = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"{call}: max_grad_norm needs all gradients on one device, got {where}")
        if not grads or not grads[0].is_cuda:
            return replace(scaling, total=self._on_host(grads, params))
        device = grads[0].device
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            if not lanes or [*map(id, lanes)] != [*map(id, self.lanes)]:
                self._bind(grads, device, stream)
                self.lanes, self.ranks = tuple(lanes), Ranks.of(params, device)
            addresses = [g.data_ptr() for g in grads]
            for launch, index in self.runs:
                launch([addresses[k] for k in index], stream)
            squares = self.out if self.ranks is None or self.out is None else self.ranks.add(self.out)
        return replace(scaling, squares=squares)

    @staticmethod
    def _on_host(grads: Sequence[torch.Tensor], params: Sequence[torch.Tensor]) -> float:
        """The sum of all squares of gradients on the CPU."""
        sums, ranks = [norm.square(words(g), tuple(g.shape)) for g in grads], Ranks.of(params, torch.device("cpu"))
        if ranks is not None:
            sums = ranks.add(torch.tensor(sums, dtype=torch.float64)).tolist()
        return sum(sums, 0.0)

    def _bind(self, grads: Sequence[torch.Tensor], device: torch.device, stream: int) -> None:
        kinds = [(device, g.dtype, g.shape) for g in grads]
        if kinds == self.kinds:
            return
        refuse_in_capture("the sums of gradients")
        self.out = out = torch.zeros(len(grads), dtype=torch.float64, device=device)
        self.kinds, self.runs = kinds, []
        for dtype in dict.fromkeys(g.dtype for g in grads):
            every = [k for k, g in enumerate(grads) if g.dtype == dtype and g.numel()]
            for k in range(0, len(every), step_cuda.SIZES[-1]):
                index = every[k : k + step_cuda.SIZES[-1]]
                kind = NUMBERS[dtype], tuple(tuple(grads[i].shape) for i in index)
                with step_cuda.on_stream(stream):
                    run = norm.squares(kind, [out.data_ptr() + 8 * i for i in index])
                self.runs.append((run, index))


@dataclass(eq=False)
class Memory:
    """What an optimizer keeps beside its plans: the norms, and what captured graphs may still read."""

    norms: Norms = field(default_factory=Norms)
    captured: list[Any] = field(default_factory=list)

    @classmethod
    def after(cls, opt: Any) -> Memory:
        """That of an optimizer which forgets its plans: graphs that it captured may still be replayed."""
        before = opt.__dict__.get("_memory")
        return cls(captured=[] if before is None else before.captured)

    def hold(self, plans: Sequence[Any]) -> None:
        """Keep all that a launch of these plans was given the address of, as long as the optimizer lives."""
        tables = [b.launch.table for plan in plans for b in plan.buckets.values()]
        slots = [slot for plan in plans for slot in plan.slots.values()]
        rooms = [dict(plan.rooms) for plan in plans]
        self.keep((tables, slots, rooms))

    def keep(self, held: Any) -> None:
        """Keep this, and what norms are measured with."""
        self.captured.append((*held, list(self.norms.runs), self.norms.out))
