"""Disk: states live in files and pass through a few pages of host memory: read, step, write.

    reads      1 2 3 4 5 ...
    steps          1 2 3 4 5 ...     (on a GPU: through the ring of `paged`)
    writes             1 2 3 4 5 ...

Half of the buffers are ahead of the step and half behind it. Reads and writes, and the checksums of both, are made by
threads; what is written last is on its way while the caller goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from typing import Any, NamedTuple

import numpy as np

from refopt_cuda.places.records import Record

BUFFERS = 8
"""Pages of host memory."""


class Turn(NamedTuple):
    """One page of a step: its record, and how it is stepped in a buffer; `step` returns what `done` waits for before
    the buffer holds the new page. `beside` is a record of what lies behind the page then, and is never read."""

    record: Record
    step: Callable[[np.ndarray], Any]
    beside: Record | None = None


class Desk:
    """Buffers that pages pass through.

    done   waits for what a step returned
    late   pages that are stepped after a page before it is waited for
    """

    def __init__(self, buffers: Sequence[np.ndarray], pool: Executor, done: Callable[[Any], Any], late: int) -> None:
        self.buffers, self.pool, self.done, self.late = buffers, pool, done, late
        self._writing: list[list[Future[Any]]] = [[] for _ in buffers]

    @property
    def size(self) -> int:
        """Bytes that a page may have."""
        return min((b.size for b in self.buffers), default=0)

    def run(self, turns: Sequence[Turn], writes: Callable[[], Any]) -> None:
        """All pages of a step; returns when the last is on its way. `writes` is called before the first write.

        What a read or an earlier write raised is raised here; no read is under way then.
        """
        count, ahead = len(self.buffers), len(self.buffers) // 2
        reads, events = dict[int, Future[Any]](), dict[int, Any]()

        def fetch(k: int) -> None:
            if k < len(turns):
                for before in self._writing[k % count]:
                    before.result()
                reads[k] = self.pool.submit(turns[k].record.load, self.buffers[k % count])

        def put(k: int) -> None:
            if k == 0:
                writes()
            self.done(events.pop(k))
            buffer = self.buffers[k % count]
            self._writing[k % count] = [self._store(turns[k].record, buffer)]
            if (beside := turns[k].beside) is not None:
                self._writing[k % count].append(self._store(beside, buffer[turns[k].record.room :]))

        try:
            for k in range(ahead):
                fetch(k)
            for k, turn in enumerate(turns):
                reads.pop(k).result()
                events[k] = turn.step(self.buffers[k % count])
                if k >= self.late:
                    put(k - self.late)
                fetch(k + ahead)
            for k in range(max(0, len(turns) - self.late), len(turns)):
                put(k)
        finally:
            wait(reads.values())

    def _store(self, record: Record, data: np.ndarray) -> Future[Any]:
        record.writing = self.pool.submit(record.store, data)
        return record.writing
