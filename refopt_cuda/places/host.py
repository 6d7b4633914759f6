"""Host: the update runs where the states live. Gradients and weights come down, new weights go up, states stay.

    copies out   1 2 3 4 5 ...       (gradients, weights)
    host steps     1 2 3 4 5 ...
    copies in        1 2 3 4 5 ...   (weights)

While the host steps one page, the next ones are on their way down and the last one is on its way up. A place of the
staging memory is free again when its weights have gone up. Pages may be given while backward goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from refopt_cuda.places.lanes import IN, OUT, STEP, Lanes, Place
from refopt_cuda.places.slabs import parts


class Move(NamedTuple):
    """Bytes of a gradient or of weights: from `address` on the device to `offset` in the staging place; `back` if they
    also go up again."""

    offset: int
    address: int
    size: int
    back: bool


class Turn(NamedTuple):
    """One page of a step; `held` is what must not be freed before it has come down."""

    moves: Sequence[Move]
    step: Callable[[], Any]
    held: Sequence[Any] = ()


class Staging:
    """`count` places of `size` bytes of host memory from `address` on.

    Pages are given as their gradients are there, in the order of the lane of steps, and stepped in that order by
    `advance`. One thread may give while another one advances.
    """

    def __init__(self, lanes: Lanes, address: int, size: int, count: int) -> None:
        self.lanes, self.size, self.given = lanes, size, 0
        self.places = [Place(address + k * size, lanes) for k in range(count)]
        self._waiting, self._coming = deque[Any](), deque[Any]()

    def place(self, number: int) -> Place:
        """Where the page of this number passes."""
        return self.places[number % len(self.places)]

    def give(self, turn: Turn, ready: Any) -> None:
        """The next page; `ready` is recorded behind what makes its gradients and reads its weights."""
        self._waiting.append((self.given, turn, ready))
        self.given += 1

    def advance(self) -> None:
        """Step the oldest page on the host, while the next ones come down."""
        while self._waiting and len(self._coming) < len(self.places):
            self._coming.append(self._down(*self._waiting.popleft()))
        number, turn = self._coming.popleft()
        self.lanes.meet(self.place(number).loaded)
        turn.step()
        self._up(number, turn)

    def settle(self) -> None:
        """Steps from now on wait for all weights that go up."""
        for place in self.places:
            self.lanes.wait(STEP, place.stored)

    def _down(self, number: int, turn: Turn, ready: Any) -> tuple[int, Turn]:
        place, lanes = self.place(number), self.lanes
        lanes.wait(OUT, ready)
        lanes.wait(OUT, place.stored)
        for move in turn.moves:
            for at, size in parts(place.address + move.offset, move.size):
                lanes.copy(OUT, place.address + move.offset + at, move.address + at, size)
        lanes.record(OUT, place.loaded)
        return number, turn

    def _up(self, number: int, turn: Turn) -> None:
        place, lanes = self.place(number), self.lanes
        for move in turn.moves:
            for at, size in parts(place.address + move.offset, move.size) if move.back else ():
                lanes.copy(IN, move.address + at, place.address + move.offset + at, size)
        lanes.record(IN, place.stored)
