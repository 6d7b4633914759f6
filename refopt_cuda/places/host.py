"""Host: the update runs where the states live. Gradients and weights come down, new weights go up, states stay.

    copies out   1 2 3 4 5 ...       (gradients, weights)
    host steps     1 2 3 4 5 ...
    copies in        1 2 3 4 5 ...   (weights)

While the host steps one page, the next ones are on their way down and the last one is on its way up. A place of the
staging memory is free again when its weights have gone up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from refopt_cuda.places.lanes import IN, OUT, STEP, Lanes, Place


class Move(NamedTuple):
    """Bytes of a gradient or of weights: from `address` on the device to `offset` in the staging place; `back` if they
    also go up again."""

    offset: int
    address: int
    size: int
    back: bool


class Turn(NamedTuple):
    """One page of a step."""

    moves: Sequence[Move]
    step: Callable[[], Any]


class Staging:
    """`count` places of `size` bytes of host memory from `address` on."""

    def __init__(self, lanes: Lanes, address: int, size: int, count: int) -> None:
        self.lanes, self.size = lanes, size
        self.places = [Place(address + k * size, lanes) for k in range(count)]

    def place(self, number: int) -> Place:
        """Where the page of this number passes."""
        return self.places[number % len(self.places)]

    def run(self, turns: Sequence[Turn]) -> None:
        """All pages of a step, numbered in order; the host waits for what it steps, and for nothing else."""
        ahead, lanes = len(self.places), self.lanes
        given = lanes.event()
        lanes.record(STEP, given)
        lanes.wait(OUT, given)  # gradients are made in the lane of steps
        for k, turn in enumerate(turns[:ahead]):
            self._down(k, turn)
        for k, turn in enumerate(turns):
            lanes.meet(self.place(k).loaded)
            turn.step()
            self._up(k, turn)
            if k + ahead < len(turns):
                self._down(k + ahead, turns[k + ahead])
        for place in self.places[: len(turns)]:
            lanes.wait(STEP, place.stored)

    def _down(self, number: int, turn: Turn) -> None:
        place, lanes = self.place(number), self.lanes
        lanes.wait(OUT, place.stored)
        for offset, address, size, _ in turn.moves:
            lanes.copy(OUT, place.address + offset, address, size)
        lanes.record(OUT, place.loaded)

    def _up(self, number: int, turn: Turn) -> None:
        place, lanes = self.place(number), self.lanes
        for offset, address, size, back in turn.moves:
            if back:
                lanes.copy(IN, address, place.address + offset, size)
        lanes.record(IN, place.stored)
