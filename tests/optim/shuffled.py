"""Lanes on the CPU that do their work late, in any order that the events allow, and spoil what nobody may read."""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from refopt_cuda.places.lanes import IN, OUT, STEP, HostLanes

POISON = 0xFF
"""In every byte: NaN as float32, bfloat16 or float16, and no usual code."""


class Event:
    """How often it was recorded, and how many of these records are behind us."""

    def __init__(self) -> None:
        self.given = self.done = 0


class ShuffledLanes(HostLanes):
    """Three queues. Whose turn it is, is drawn; a queue whose head waits for an event stands still.

    What a copy in the lane `poisons` has read, a place that is free now, is poisoned.
    """

    def __init__(self, seed: int = 0, poisons: int = OUT) -> None:
        self.poisons = poisons
        self.draw, self.queues = random.Random(seed), [deque[Any]() for _ in range(3)]
        self.order: list[str] = []

    def copy(self, lane: int, to: int, source: int, size: int) -> None:
        self.queues[lane].append(lambda: self._copy(lane, to, source, size))

    def _copy(self, lane: int, to: int, source: int, size: int) -> None:
        self.order.append("in" if lane == IN else "out")
        ctypes.memmove(to, source, size)
        if lane == self.poisons:
            ctypes.memset(source, POISON, size)

    def run(self, call: Callable[[], Any]) -> None:
        def step() -> None:
            self.order.append("step")
            call()

        self.queues[STEP].append(step)

    def event(self) -> Event:
        return Event()

    def record(self, lane: int, event: Event) -> None:
        event.given += 1
        self.queues[lane].append(lambda: setattr(event, "done", event.done + 1))

    def wait(self, lane: int, event: Event) -> None:
        self.queues[lane].append((event, event.given))

    def _ready(self, lane: int) -> bool:
        queue = self.queues[lane]
        while queue and isinstance(queue[0], tuple):
            event, count = queue[0]
            if event.done < count:
                return False
            queue.popleft()
        return bool(queue)

    def _work(self, until: Callable[[], bool]) -> None:
        favourite = self.draw.randrange(3)
        while not until():
            ready = [lane for lane in range(3) if self._ready(lane)]
            if not ready and until():  # what was left were waits for events that are behind us
                return
            assert ready, "every lane waits for another"
            if self.draw.random() < 0.05:
                favourite = self.draw.randrange(3)
            lane = favourite if favourite in ready else self.draw.choice(ready)
            self.queues[lane].popleft()()

    def meet(self, event: Event) -> None:
        self._work(lambda: event.done >= event.given)

    def flush(self) -> None:
        """Steps are done; stores may be late by a step."""
        self._work(lambda: not self.queues[STEP])

    def finish(self) -> None:
        self._work(lambda: not any(self._ready(lane) or self.queues[lane] for lane in range(3)))


class Forgetful(ShuffledLanes):
    """One lane does not wait for events, and with `host` the host does not either: what they guard must show."""

    def __init__(self, seed: int, poisons: int, lane: int, host: bool = False) -> None:
        super().__init__(seed, poisons)
        self.lane, self.host = lane, host

    def wait(self, lane: int, event: Event) -> None:
        if lane != self.lane:
            super().wait(lane, event)

    def meet(self, event: Event) -> None:
        if not self.host:
            super().meet(event)
