"""Disk: states live in plain files and stream through the host, K blocks at a time (ZeRO-Infinity).

The host steps a page while the next is read and the last is written; it holds gradients, weights and `buffers` pages,
never the states. A step reads every state byte once and writes it once: 8 bytes a parameter each way for float32 Adam.

New states go to new files, and only when the last is written do they take their names: a short read or a full disk
raises before any weight has changed, and the old states are all there. So the disk holds two copies during a step. A
file is removed when the state that it holds is dropped; to keep a state, pickle it, which reads the files. The files
are not mapped into memory: there a short read or a full disk is a signal that kills the process, not an error. Arrays
start at multiples of 4096 bytes, which padding in the file sees to; the data are never padded.

Schedule: per tensor, its gradient device>host; per page, every state disk>host, then host>disk; last its weights,
host>device.

>>> import tempfile
>>> import numpy as np
>>> from refopt import Optimizer, places
>>> opt = Optimizer("lion", place=places.disk(path=tempfile.mkdtemp(), page_blocks=2))
>>> for move in opt.schedule(np.zeros(700, np.float32)):
...     print(*move)
g device>host 2800
m disk>host 2048
m host>disk 2048
m disk>host 752
m host>disk 752
p host>device 2800
>>> opt.peak(np.zeros(700, np.float32))
Peak(device=5600, host=9696, disk=5600)
"""

from __future__ import annotations

import errno
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from refopt.spec import Array, Load, Peak, Place

ALIGN = 4096


class File:
    """One file, removed when nothing refers to it any more."""

    def __init__(self, folder: str, name: str) -> None:
        os.makedirs(folder, exist_ok=True)
        descriptor, path = tempfile.mkstemp(".new", f"{name}.", folder)
        self.path = Path(path)
        self._end = weakref.finalize(self, lambda where: where[0].unlink(missing_ok=True), where := [self.path])
        self._where = where
        os.close(descriptor)

    def reserve(self, size: int) -> None:
        """Find room before anything is computed, where the system can say so."""
        with self.path.open("r+b") as new:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(new.fileno(), 0, size)
            new.truncate(size)

    def publish(self) -> None:
        """Everything is written: take the name that says so."""
        self.path = self._where[0] = self.path.replace(self.path.with_suffix(".bin"))

    def drop(self) -> None:
        self._end()

    def read(self, offset: int, size: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            says = f"places.disk: short read: {size} bytes were asked for at {offset}, {len(data)} came"
            raise OSError(errno.EIO, says, str(self.path))
        return data

    def write(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)


class Strip:
    """An array in a file: cut flat, read and written in stretches; `np.asarray` and pickle read all of it."""

    def __init__(self, file: File, offset: int, dtype: Any, shape: tuple[int, ...]) -> None:
        self.file, self.offset, self.dtype, self.shape = file, offset, np.dtype(dtype), shape
        self.size = math.prod(shape)
        self.nbytes = self.size * self.dtype.itemsize

    def __getitem__(self, cut: slice) -> Array:
        first, last, _ = cut.indices(self.size)
        wide = self.dtype.itemsize
        data = self.file.read(self.offset + first * wide, max(last - first, 0) * wide)
        return np.frombuffer(data, self.dtype)

    def __setitem__(self, cut: slice, x: Array) -> None:
        first, last, _ = cut.indices(self.size)
        data = np.ascontiguousarray(np.broadcast_to(x, last - first), self.dtype).tobytes()
        self.file.write(self.offset + first * self.dtype.itemsize, data)

    def reshape(self, *shape: Any) -> Strip:
        wanted = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        known = -math.prod(wanted) if -1 in wanted else 0
        full = tuple(self.size // known if n == -1 else n for n in wanted)
        return Strip(self.file, self.offset, self.dtype, full)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
        whole = self[:].reshape(self.shape).copy()
        return whole if dtype is None else whole.astype(dtype)

    def __reduce__(self) -> Any:
        return np.array, (self.__array__(),)


@contextmanager
def shelf(place: Place) -> Iterator[Callable[[str, Mapping[str, tuple[Any, int]]], dict[str, Strip]]]:
    """A maker of strips, {part: (dtype, size)} at a time; they are kept if the block ends well, else removed."""
    made: list[File] = []

    def make(name: str, sizes: Mapping[str, tuple[Any, int]]) -> dict[str, Strip]:
        starts, end = {}, 0
        for part, (dtype, size) in sizes.items():
            starts[part] = end
            end += -(-size * np.dtype(dtype).itemsize // ALIGN) * ALIGN
        made.append(File(os.fspath(place.path), name))
        made[-1].reserve(end)
        return {part: Strip(made[-1], starts[part], dtype, (size,)) for part, (dtype, size) in sizes.items()}

    try:
        yield make
    except BaseException:
        for file in made:
            file.drop()
        raise
    for file in made:
        file.publish()


def pages(blocks: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, last) block of each page, ascending; the last page may be short."""
    for first in range(0, blocks, size):
        yield first, min(first + size, blocks)


def peak(loads: Sequence[Load], buffers: int) -> Peak:
    """Weights and the largest gradient on the device; weights, gradients and the ring on the host; states twice."""
    weights, ring = sum(load.p for load in loads), buffers * max((load.page for load in loads), default=0)
    device = weights + max((load.g for load in loads), default=0)
    return Peak(device, weights + sum(load.g for load in loads) + ring, 2 * sum(load.states for load in loads))


place = Place(
    "disk",
    "states in files, streamed page by page",
    "Rajbhandari et al., arXiv 2104.07857 (ZeRO-Infinity)",
    pages,
    peak,
    links={"g": "device>host", "in": "disk>host", "out": "host>disk", "p": "host>device"},
    options=("path", "page_blocks", "buffers"),
    page_blocks=4096,
    shelf=shelf,
)
