"""Host memory for states: page-aligned slabs of exact sizes, pinned where the device allows it, freed with their owner.

An array is cut off a slab with `take`; `pin` registers what was taken since, in chunks that end at multiples of
`CHUNK`, since a copy must not cross the end of a registration. Memory that nobody has touched costs nothing.
"""

from __future__ import annotations

import mmap
import sys
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

ALIGN = 64
"""Arrays begin at multiples of so many bytes."""
PAGE = mmap.PAGESIZE
SLAB = 1 << 28
"""Bytes a slab, or one array where that is larger."""
CHUNK = 1 << 30
"""Registrations end at multiples of so many bytes: one call over hundreds of gigabytes stops other processes."""


def up(x: int, to: int) -> int:
    """The next multiple of `to` from x on."""
    return -(-x // to) * to


def parts(address: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the copies that host memory from `address` on takes: none crosses a multiple of `CHUNK`."""
    at = 0
    while at < size:
        end = min(size, up(address + at + 1, CHUNK) - address)
        yield at, end - at
        at = end


class Pins(Protocol):
    """Who can make memory known to a device."""

    def pin(self, address: int, size: int) -> None: ...

    def unpin(self, address: int) -> None: ...


class Slab:
    """Anonymous memory; `used` bytes of it are taken, those below `pinned` are registered."""

    def __init__(self, size: int, pins: Pins) -> None:
        private = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
        memory: Any = mmap.mmap(-1, size, flags=private) if private else mmap.mmap(-1, size)
        self.bytes = np.frombuffer(memory, np.uint8)
        self.address, self.used, self.pinned = self.bytes.ctypes.data, 0, 0
        self._pins = pins
        self._pinned: list[int] = []
        weakref.finalize(self, _unpin, pins, self._pinned)

    def take(self, size: int) -> np.ndarray | None:
        """The next `size` bytes, None where they do not fit."""
        start = up(max(self.used, self.pinned + ALIGN if self.pinned else 0), ALIGN)
        if start + size > self.bytes.size - ALIGN:  # a gap: a neighbouring slab is another registration
            return None
        self.used = start + size
        return self.bytes[start : self.used]

    @property
    def busy(self) -> bool:
        """Whether an array of it is alive."""
        return sys.getrefcount(self.bytes) > 2  # this attribute and the call itself

    def pin(self) -> None:
        """Register what was taken and is not registered. What is taken later begins behind a gap."""
        start, end = self.address + self.pinned, self.address + up(self.used, PAGE)
        while start < end:
            stop = min(end, up(start + 1, CHUNK))
            self._pins.pin(start, stop - start)
            self._pinned.append(start)
            start = stop
            self.pinned = start - self.address


def _unpin(pins: Pins, addresses: list[int]) -> None:
    for address in addresses:
        pins.unpin(address)


class Slabs:
    """The slabs of one device's states."""

    def __init__(self, pins: Pins) -> None:
        self._pins, self._slabs = pins, list[Slab]()
        self._pageable = False

    def take(self, size: int) -> np.ndarray:
        """`size` bytes of new memory, aligned to `ALIGN`, zero."""
        found = self._slabs[-1].take(size) if self._slabs else None
        if found is None:
            self._slabs = [slab for slab in self._slabs if slab.busy]
            room = up(size + ALIGN, SLAB if size < SLAB // 2 else PAGE)
            self._slabs.append(Slab(room, self._pins))
            found = self._slabs[-1].take(size)
        assert found is not None
        return found

    def owns(self, address: int) -> bool:
        """Whether an address lies in one of the slabs."""
        return any(0 <= address - slab.address < slab.bytes.size for slab in self._slabs)

    def pin(self, call: str) -> None:
        """Register all that was taken; where that is refused, warn once and go on with pageable memory."""
        if self._pageable:
            return
        try:
            for slab in self._slabs:
                slab.pin()
        except Exception as error:
            self._pageable = True
            warnings.warn(
                f"{call}: host memory could not be pinned ({type(error).__name__}: {error}): states stay in pageable "
                "memory, whose copies run at a fraction of the link's speed, one at a time. Raise `ulimit -l` or the "
                "container's limit of locked memory",
                stacklevel=2,
            )

    def clear(self) -> None:
        """Let go of all slabs; the memory goes when the last array of it does."""
        self._slabs = []

    @property
    def size(self) -> int:
        """Bytes that were taken."""
        return sum(slab.used for slab in self._slabs)
