"""Sums over the parts of sharded tensors: those of all ranks, added in the order of the ranks, in float64.

No collective adds anything: ranks exchange one number a tensor and each adds them itself, so that all have the same
bits, on every backend, and no rank waits for its device. Every rank must measure the same parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from refopt_cuda.optim import sharded
from refopt_cuda.optim.live import refuse_in_capture


@dataclass(frozen=True)
class Ranks:
    """Which ranks have parts of which tensors: (mesh, its dimensions that cut them, places among the tensors or None
    for all). Replicas are counted once."""

    groups: list[tuple[Any, tuple[int, ...], torch.Tensor | None]]

    @classmethod
    def of(cls, params: Sequence[torch.Tensor], device: torch.device) -> Ranks | None:
        """Of these parameters, whose sums lie on `device`; None where none is cut."""
        found: dict[Any, list[int]] = {}
        for k, p in enumerate(params):
            if sharded.is_sharded(p):
                spec: Any = sharded.spec_of(p)
                cut = tuple(d for d, q in enumerate(spec.placements) if not q.is_replicate())
                found.setdefault((spec.mesh, cut), []).append(k)
        whole = [*range(len(params))]
        groups = [
            (mesh, cut, None if places == whole else torch.tensor(places, device=device))
            for (mesh, cut), places in found.items()
            if cut
        ]
        return cls(groups) if groups else None

    def add(self, sums: torch.Tensor) -> torch.Tensor:
        """Those of whole tensors from those of this rank's parts. RuntimeError where a CUDA graph captures it."""
        refuse_in_capture("a norm over all ranks")
        out = sums.clone()
        for mesh, cut, places in self.groups:
            x = sums if places is None else sums[places]
            for d in reversed(cut):
                x = _added(x, mesh, d)
            out = x if places is None else out.index_copy(0, places, x)
        return out


def _added(x: torch.Tensor, mesh: Any, d: int) -> torch.Tensor:
    """The sum of the ranks along one dimension of a mesh, from the first to the last."""
    near = x.to(mesh.device_type).contiguous()
    parts = [torch.empty_like(near) for _ in range(mesh.size(d))]
    dist.all_gather(parts, near, group=mesh.get_group(d))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.to(x.device)
