"""Pages in files, two versions of each: a step writes the version that the last complete step does not need.

    read      version a of page 0, 1, 2 ...                  (of step t)
    written     version b of page 0, 1, 2 ...                (of step t + 1)
    stamped                                     which versions are step t + 1's, with a checksum of each

A step reads every byte once and writes it once, and not a byte more for safety. Pages are durable before the stamp that
names them is written, and the stamp is durable before a page of the next step is: at every moment one stamp names pages
that are all there. There are two stamps, too; the newest whose own checksum is right counts.
"""

from __future__ import annotations

import errno
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import numpy as np

from refopt_cuda.places import files
from refopt_cuda.places.files import ALIGN, File
from refopt_cuda.places.slabs import up


class Source(Protocol):
    """Where the bytes of one stored array come from."""

    def parts(self, start: int, out: np.ndarray) -> Iterable[Part]:
        """Copy bytes from `start` on that are in memory; what is in records is left to be read."""


class Part(NamedTuple):
    """Bytes of a record from `offset` on that go to `out`."""

    record: Record
    offset: int
    out: np.ndarray


class Constant:
    """The same word everywhere."""

    def __init__(self, word: bytes) -> None:
        self.word = np.frombuffer(word, np.uint8)

    def parts(self, start: int, out: np.ndarray) -> Iterable[Part]:
        out.reshape(-1, self.word.size)[:] = self.word
        return ()


class Dense:
    """Bytes in memory."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    def parts(self, start: int, out: np.ndarray) -> Iterable[Part]:
        out[:] = self.data[start : start + out.size]
        return ()


class Extent(NamedTuple):
    """Bytes [start, start + size) of an array: `offset` bytes into a record."""

    start: int
    size: int
    record: Record
    offset: int

    def apart_from(self, others: Iterable[Extent]) -> list[Extent]:
        """The parts of it that no other has."""
        rest = [self]
        for other in others:
            rest = [part for x in rest for part in x._without(other.start, other.start + other.size)]
        return rest

    def _without(self, start: int, stop: int) -> Iterator[Extent]:
        end = self.start + self.size
        if stop <= self.start or end <= start:
            yield self
            return
        if self.start < start:
            yield self._replace(size=start - self.start)
        if stop < end:
            yield Extent(stop, end - stop, self.record, self.offset + stop - self.start)


class Filed:
    """Bytes in records."""

    def __init__(self, extents: Iterable[Extent]) -> None:
        self.extents = sorted(extents, key=lambda e: e.start)
        self._starts = [e.start for e in self.extents]

    def covers(self, size: int) -> bool:
        """Whether every byte of an array of this size is in a record, once."""
        ends = [e.start + e.size for e in self.extents]
        return [*self._starts, size] == [0, *ends]

    def parts(self, start: int, out: np.ndarray) -> Iterable[Part]:
        done, k = 0, bisect_right(self._starts, start) - 1
        while done < out.size:
            e = self.extents[k]
            inside = start + done - e.start
            size = min(out.size - done, e.size - inside)
            yield Part(e.record, e.offset + inside, out[done : done + size])
            done, k = done + size, k + 1


def gather(wanted: Iterable[tuple[Source, int, np.ndarray]]) -> None:
    """Bring together bytes of arrays, from `start` on into an array; every record is read once."""
    of: dict[Record, list[Part]] = {}
    for source, start, out in wanted:
        for part in source.parts(start, out):
            of.setdefault(part.record, []).append(part)
    for record, parts in of.items():
        whole = files.buffer(record.room)
        record.load(whole)
        for _, offset, out in parts:
            out[:] = whole[offset : offset + out.size]


class Version(NamedTuple):
    """One of a page's two: which, and the checksum of what was written there."""

    which: int
    crc: int


class Record:
    """Room for one page in a file, and what is known of its versions.

    kept     named by the last stamp; never written to
    latest   the newest; None where the page was never written, and comes from `sources`
    what     says in errors what is kept here
    """

    def __init__(self, file: File, at: int, size: int, what: str) -> None:
        self.file, self.at, self.size, self.room, self.what = file, at, size, up(size, ALIGN), what
        self.kept: Version | None = None
        self.latest: Version | None = None
        self.sources: Sequence[tuple[int, int, Source, int]] = ()
        self.writing: Future[Any] | None = None

    @property
    def end(self) -> int:
        """Where the next record begins."""
        return self.at + 2 * self.room

    def load(self, out: np.ndarray) -> None:
        """The page, to the front of `out`, which has `room` bytes. OSError for bytes that are not those written."""
        if self.writing is not None:
            self.writing.result()
        if self.latest is None:
            gather((source, start, out[offset : offset + size]) for offset, size, source, start in self.sources)
            return
        at = self.at + self.latest.which * self.room
        self.file.read(out[: self.room], at)
        found = zlib.crc32(out[: self.size])
        if found != self.latest.crc:
            says = f"places.disk: bytes {at} to {at + self.size}, {self.what}, are not what was written: their checksum"
            raise OSError(errno.EIO, f"{says} is {found:08x}, not {self.latest.crc:08x}", str(self.file.path))

    def store(self, data: np.ndarray) -> None:
        """A new version, from the front of `data`."""
        which = 0 if self.kept is None else 1 - self.kept.which
        crc = zlib.crc32(data[: self.size])
        self.file.write(data[: self.room], self.at + which * self.room)
        self.latest, self.sources = Version(which, crc), ()
