"""What the lanes of an optimizer did and when: copies in, steps and copies out, measured where they are done.

On a CUDA device by events in the streams that do the work; on a CPU by the clock, where each waits for the one before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from refopt_cuda.places import lanes
from refopt_cuda.places.lanes import STEP, Lanes


class Span(NamedTuple):
    """One piece of work: `lane` is lanes.IN, STEP or OUT; milliseconds since the first began; bytes, 0 for steps."""

    lane: int
    begin: float
    end: float
    bytes: int = 0


class Watch:
    """The work of all lanes that were made while it was recording; `clear` forgets what came before."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, Any, Any, int]] = []
        self._between: Callable[[Any, Any], float] = lambda a, b: 1e3 * (b - a)

    def clear(self) -> None:
        self._seen.clear()

    def spans(self) -> list[Span]:
        """What was done, in the order in which it was given; waits for the last of it."""
        if not self._seen:
            return []
        for _, _, end, _ in self._seen:
            if hasattr(end, "synchronize"):
                end.synchronize()
        first = self._seen[0][1]
        marks = [Span(lane, self._between(first, a), self._between(first, b), size) for lane, a, b, size in self._seen]
        zero = min(span.begin for span in marks)
        return [span._replace(begin=span.begin - zero, end=span.end - zero) for span in marks]


class Watched:
    """Lanes that note their work."""

    def __init__(self, inner: Lanes, watch: Watch) -> None:
        self._inner, self._watch = inner, watch
        self._cuda = getattr(inner, "_cuda", None)
        if self._cuda is not None:
            watch._between = self._cuda.get_elapsed_time

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def copy(self, lane: int, to: int, source: int, size: int) -> None:
        begin = self._now(lane)
        self._inner.copy(lane, to, source, size)
        self._watch._seen.append((lane, begin, self._now(lane), size))

    def run(self, call: Callable[[], Any]) -> None:
        begin = self._now(STEP)
        self._inner.run(call)
        self._watch._seen.append((STEP, begin, self._now(STEP), 0))

    def _now(self, lane: int) -> Any:
        if self._cuda is None:
            return time.perf_counter()
        event = self._cuda.Event()
        self._inner.record(lane, event)
        return event


@contextmanager
def recorded() -> Iterator[Watch]:
    """Watch the optimizers whose first step is taken in here.

    >>> import torch, refopt_cuda as rc
    >>> from refopt_cuda.places import timeline
    >>> p = torch.nn.Parameter(torch.zeros(64, 64))
    >>> p.grad = torch.ones(64, 64)
    >>> with timeline.recorded() as watch:
    ...     rc.optim.PagedAdamW8bit([p], page_bytes=5000).step()
    >>> sum(span.bytes for span in watch.spans() if span.lane == 0)  # codes of two states, and their scales
    8704
    """
    made, watch = lanes.lanes_of, Watch()

    def watched(*args: Any) -> Any:
        return Watched(made(*args), watch)

    lanes.lanes_of = watched  # type: ignore[assignment]
    try:
        yield watch
    finally:
        lanes.lanes_of = made
