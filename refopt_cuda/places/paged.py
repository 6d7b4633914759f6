"""Paged: states live in host memory and pass through a small ring of device pages: load, step, store.

    copies in    1 2 3 4 5 ...
    steps          1 2 3 4 5 ...
    copies out       1 2 3 4 5 ...

A page is loaded as soon as its place in the ring is free, that is, stored; it is stepped when it is loaded and stored
when it is stepped. Nothing else waits, and the host waits for nothing. A page keeps its place in the ring, so that a
load also waits for the store of the same page in the step before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from refopt_cuda.places.lanes import IN, OUT, STEP, Lanes, Place
from refopt_cuda.places.slabs import ALIGN, CHUNK, up


class Copy(NamedTuple):
    """Bytes that travel together: from `address` in host memory to `offset` in the page, and back."""

    offset: int
    address: int
    size: int


def joined(copies: Iterable[Copy]) -> tuple[Copy, ...]:
    """The same bytes in as few copies as there can be: neighbours in both memories travel as one.

    Gaps that alignment leaves travel along; no copy crosses a multiple of `CHUNK`, where registrations end.
    """
    out: list[Copy] = []
    for c in copies:
        if not c.size:
            continue
        if out and _neighbours(out[-1], c):
            c = Copy(out[-1].offset, out[-1].address, c.address + c.size - out.pop().address)
        while c.address // CHUNK < (c.address + c.size - 1) // CHUNK:
            head = up(c.address + 1, CHUNK) - c.address
            out.append(Copy(c.offset, c.address, head))
            c = Copy(c.offset + head, c.address + head, c.size - head)
        out.append(c)
    return tuple(out)


def _neighbours(one: Copy, two: Copy) -> bool:
    gap = two.address - (one.address + one.size)
    return 0 <= gap < ALIGN and two.address - one.address == two.offset - one.offset


class Ring:
    """Places of these sizes in bytes, one behind the other from `address` on; pages pass through them in turn."""

    def __init__(self, lanes: Lanes, address: int, sizes: Sequence[int]) -> None:
        self.lanes, self.sizes, self.size = lanes, tuple(sizes), max(sizes, default=0)
        self.starts = [0, *accumulate(sizes)][: len(sizes)]
        self.places = [Place(address + start, lanes) for start in self.starts]

    def place(self, number: int) -> Place:
        """Where the page of this number passes."""
        return self.places[number % len(self.places)]

    def turn(self, number: int, copies: Sequence[Copy], step: Callable[[], Any]) -> None:
        """Load a page, step it, store it."""
        self.load(number, copies)
        self.step(number, copies, step)

    def load(self, number: int, copies: Sequence[Copy]) -> None:
        """Bring a page in; all pages that passed through its place before have been stepped."""
        place, lanes = self.place(number), self.lanes
        lanes.wait(IN, place.stored)
        for offset, address, size in copies:
            lanes.copy(IN, place.address + offset, address, size)
        lanes.record(IN, place.loaded)

    def step(self, number: int, copies: Sequence[Copy], step: Callable[[], Any]) -> None:
        """Step a page when it is loaded, and store it."""
        place, lanes = self.place(number), self.lanes
        lanes.wait(STEP, place.loaded)
        lanes.run(step)
        lanes.record(STEP, place.stepped)
        lanes.wait(OUT, place.stepped)
        for offset, address, size in copies:
            lanes.copy(OUT, address, place.address + offset, size)
        lanes.record(OUT, place.stored)

    def settle(self) -> None:
        """Loads from now on wait for all stores: pages may have changed places."""
        for place in self.places:
            self.lanes.wait(IN, place.stored)
