"""Host: the update runs where the states live (ZeRO-Offload). Gradients go down, new weights come up.

The states never cross the link: for float32 Adam 8 of the 16 bytes a parameter that paging would move. The host holds
the states, what the weights' codec keeps beside the visible weights, and a copy of these; the device holds the weights
and, as gradients leave while others are made, the largest gradient. The paper hides the update behind the next
forward pass; that is the step's `delay=1`, which changes bits. This place changes none.

Schedule: per tensor, its gradient device>host, then its weights host>device.

>>> import numpy as np
>>> from refopt import Optimizer
>>> opt = Optimizer("adamw", {"p": "bf16"}, place="host")
>>> for move in opt.schedule(np.zeros(1000, np.float32)):
...     print(*move)
g device>host 4000
p host>device 2000
>>> opt.peak(np.zeros(1000, np.float32))
Peak(device=6000, host=14000, disk=0)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from refopt.spec import Load, Peak, Place


def pages(blocks: int, size: int) -> Iterator[tuple[int, int]]:
    """One page: the host steps the whole tensor."""
    if blocks:
        yield 0, blocks


def peak(loads: Sequence[Load], buffers: int) -> Peak:
    """Weights and the largest gradient on the device; weights, gradients and states on the host."""
    device = sum(load.p for load in loads) + max((load.g for load in loads), default=0)
    return Peak(device, sum(load.p + load.g + load.states for load in loads))


place = Place(
    "host",
    "states on the host, which steps them",
    "Ren et al., arXiv 2101.06840 (ZeRO-Offload)",
    pages,
    peak,
    links={"g": "device>host", "p": "host>device"},
)
