"""Places of rules that measure whole tensors: all states of a parameter travel together, and small ones share a page.

A step has several passes over a tensor, the first of which only measure. So that every byte still goes each way once, a
page holds whole tensors, which all passes are made over before it is stored; a place of the ring is as large as the
largest page that passes through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from refopt_cuda.kernels.whole_cuda import SIZES
from refopt_cuda.optim import placing
from refopt_cuda.optim.decks import Book, Round
from refopt_cuda.optim.filing import OnDisk
from refopt_cuda.optim.hosting import Hosted
from refopt_cuda.optim.paging import Paged
from refopt_cuda.optim.pieces import Page, Span
from refopt_cuda.optim.placing import Placed
from refopt_cuda.optim.whole_slots import Passing, Slot, Work
from refopt_cuda.places.slabs import ALIGN, up

PLACES = ("resident", "paged", "host", "disk")
OPTIONS: Mapping[str, Any] = {
    "place": None,
    "page_bytes": None,
    "resident_bytes": None,
    "path": None,
    "keep_weights": False,
}
"""Arguments by keyword that say where states live, and their defaults."""


@dataclass(eq=False)
class Shelf:
    """What the place of one parameter group knows: its slots, their pages, and what was launched over these."""

    slots: dict[int, Slot] = field(default_factory=dict)
    books: dict[Any, Book] = field(default_factory=dict)
    buckets: dict[Any, Any] = field(default_factory=dict)


class Bundle:
    """A parameter as a piece of a page: all of its states, which pass together."""

    first = 0

    def __init__(self, slot: Slot, page: Page) -> None:
        self.slot, self.page, self.dense = slot, page, slot.dense
        self.spans: list[Span] = []
        for x in held(slot):
            self.spans.append(Span(x, 0, x.numel(), up(page.size, ALIGN)))
            page.size = self.spans[-1].offset + self.spans[-1].bytes

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """What belongs to the parameter of a tensor of its shape: all."""
        return whole

    def moved(self) -> None:
        """The page has another place."""
        self.__dict__.pop("here", None)

    @cached_property
    def here(self) -> Passing:
        """The parameter with its states in the page's place."""
        return Passing(self.slot, grouped(self.slot, [self._view(span) for span in self.spans]))

    def _view(self, span: Span) -> torch.Tensor:
        place = self.page.memory[span.offset : span.offset + span.bytes]
        return place.view(span.tensor.dtype).view(span.tensor.shape)


def held(slot: Slot) -> list[torch.Tensor]:
    """The tensors that keep the states of a parameter, in order."""
    return [*slot.by_key.values()]


def grouped(slot: Slot, tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Such tensors by state."""
    rest = iter(tensors)
    return [[next(rest) for _ in xs] for _, _, xs in slot.states]


def pages(slots: Iterable[Slot], size: int, number: int) -> list[Page]:
    """Pages of whole tensors, as many as come to `size` bytes but one at least, numbered from `number` on."""
    out = [Page(number)]
    for slot in slots:
        if not slot.p.numel():
            continue
        need = sum(up(x.nbytes, ALIGN) for x in held(slot))
        full = out[-1].size + need > size or len(out[-1].pieces) == SIZES[-1]
        if out[-1].pieces and full:
            out.append(Page(number + len(out)))
        out[-1].pieces.append(Bundle(slot, out[-1]))
    return out if out[-1].pieces else []


class Wholly:
    """What places do otherwise where a page holds whole tensors. The `form` of a round is a function there:
    `form(launches, key, work, rows)` steps parameters whose states lie where they can be stepped."""

    shards = False

    def cut(self, slots: Sequence[Any], size: int, number: int) -> list[Page]:
        return pages(slots, size, number)

    def stepping(self, page: Page, now: Round) -> Callable[[], None] | None:
        todo = [(x, now.works[x.slot]._replace(g=now.grads[x.slot])) for x in page.pieces if x.slot in now.works]

        def step() -> None:
            now.form(now.plan.buckets, (page,), [w._replace(slot=x.here) for x, w in todo], now.rows)

        return step if todo else None


class WholePaged(Wholly, Paged):
    """As `Paged`."""


class WholeHosted(Wholly, Hosted):
    """As `Hosted`; the staging memory has room for the largest tensor and its gradient, four times."""

    def kept(self, slot: Any) -> int:
        return sum(x.nbytes for x in held(slot))

    def below(self, piece: Any, p: torch.Tensor, g: torch.Tensor, w: Any) -> Work:
        return w._replace(slot=Passing(piece.slot, grouped(piece.slot, held(piece.slot)), p), g=g)

    def steps(self, todo: Sequence[Any], now: Round) -> Callable[[], None]:
        return partial(now.form, now.plan.buckets, (), todo, now.rows)


class WholeOnDisk(Wholly, OnDisk):
    """As `OnDisk`."""


def check(call: str, usual: str, place: Any = None, **options: Any) -> Placed:
    """Where states are to live; ValueError names the argument."""
    place = usual if place is None else place
    if place not in PLACES:
        raise ValueError(
            f"{call}: place must be one of {', '.join(map(repr, PLACES))}, as whole tensors are measured, got {place!r}"
        )
    pages, budget = options.pop("page_bytes"), options.pop("resident_bytes")
    return placing.check(place, pages, budget, False, call, **options)


def refuse_shards(placed: Placed, call: str) -> None:
    """ValueError where states are to live in another place than beside sharded parameters."""
    if placed.place != "resident":
        raise ValueError(
            f"{call}: place={placed.place!r}: sharded parameters of this rule are put together for the step, one at a "
            "time, and their states lie beside them; a shard is all that a rank keeps"
        )


def home(placed: Placed) -> Any:
    """What keeps the states there; None where they live beside the weights."""
    if placed.place == "resident":
        return None
    if placed.path is not None:
        return WholeOnDisk(placed.page_bytes, Path(placed.path).absolute(), placed.keep_weights)
    kind = WholePaged if placed.place == "paged" else WholeHosted
    return kind(placed.page_bytes, placed.resident_bytes)
