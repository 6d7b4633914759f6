"""Paged: states live in host memory and pass through a small ring of device pages, K blocks at a time.

Page k is blocks [kK, (k+1)K) of the tensor's block list; each is loaded, stepped and stored in ascending order. The
result has the bits of the resident step for every K. Device memory holds the ring, not the states; weights and
gradients stay. Each step moves every state byte once in each direction, so it takes at least their bytes / link speed.
"""

from __future__ import annotations

from collections.abc import Iterator

from refopt.spec import Place


def pages(blocks: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, last) block of each page, ascending; the last page may be short."""
    for first in range(0, blocks, size):
        yield first, min(first + size, blocks)


place = Place("paged", "states on the host, streamed page by page", "Dettmers et al., arXiv 2305.14314", pages, 4096)
