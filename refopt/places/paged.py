"""Paged: states live in host memory and pass through a small ring of device pages, K blocks at a time.

Page k is blocks [kK, (k+1)K) of the tensor's block list; each is loaded, stepped and stored in ascending order. The
result has the bits of the resident step for every K. For a rule that sees whole tensors a page is all states of one.
Device memory holds the ring (`buffers` pages), not the states; weights and gradients stay, so it still grows with the
model. Each step moves every state byte once in each direction, so it takes at least their bytes / link speed.

Schedule: per page, every state host>device, then every state device>host.

>>> import numpy as np
>>> from refopt import Optimizer, places
>>> opt = Optimizer("lion", place=places.paged(page_blocks=2))
>>> for move in opt.schedule(np.zeros(700, np.float32)):
...     print(*move)
m host>device 2048
m device>host 2048
m host>device 752
m device>host 752
>>> opt.peak(np.zeros(700, np.float32))  # weights, gradient and two pages; the states
Peak(device=9696, host=2800, disk=0)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from refopt.spec import Load, Peak, Place


def pages(blocks: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, last) block of each page, ascending; the last page may be short."""
    for first in range(0, blocks, size):
        yield first, min(first + size, blocks)


def peak(loads: Sequence[Load], buffers: int) -> Peak:
    """Weights, gradients and the ring on the device, states on the host."""
    ring = buffers * max((load.page for load in loads), default=0)
    return Peak(sum(load.p + load.g for load in loads) + ring, sum(load.states for load in loads))


place = Place(
    "paged",
    "states on the host, streamed page by page",
    "Dettmers et al., arXiv 2305.14314",
    pages,
    peak,
    links={"in": "host>device", "out": "device>host"},
    options=("page_blocks", "buffers"),
    page_blocks=4096,
)
