"""What steps in a place are made with: pages, their ring on a device, and the round of parameters that is stepped."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from refopt_cuda.optim import sharded, states
from refopt_cuda.optim.pieces import Page
from refopt_cuda.optim.run import Plan, Slot
from refopt_cuda.places import lanes
from refopt_cuda.places.paged import Ring
from refopt_cuda.places.slabs import Slabs, up

BUFFERS = 3
"""Pages in the ring: one is loaded, one is stepped, one is stored."""
SLACK = 1 << 28
"""Bytes of gradients that nobody but steps beside backward holds any longer, before backward waits for the oldest."""


@dataclass(eq=False)
class Book:
    """The pages of one parameter group on one device, and the slots and the ring that they were made for; `home` is the
    place that they are of."""

    home: Any
    slots: list[Slot] = field(default_factory=list)
    pages: list[Page] = field(default_factory=list)
    ring: Any = None


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """A stream of steps beside the caller's; all optimizers of a device share it."""
    return torch.cuda.Stream(device)


class Deck:
    """One device's lanes, slabs and ring."""

    def __init__(self, device: torch.device, pair: int = 0) -> None:
        self.device = device
        self.lanes = lanes.lanes_of(device.type, device.index or 0, *([pair] if pair else []))
        self.slabs, self.memory = Slabs(self.lanes), torch.empty(0)
        self.ring: Any = Ring(self.lanes, 0, [0] * BUFFERS)
        self.numbered, self.spare = 0, -1
        self.beside: torch.cuda.Stream | None = None
        self.held = deque[tuple[Any, torch.Tensor, torch.Tensor]]()
        weakref.finalize(self, self.lanes.finish)  # the ring's memory is free to others afterwards

    @property
    def current(self) -> Any:
        """The device as the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def begin(self) -> None:
        """Steps go to torch's current stream."""
        self.lanes.begin(torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0)

    def mark(self) -> Any:
        """An event behind all that the lane of steps has been given."""
        event = self.lanes.event()
        self.lanes.record(lanes.STEP, event)
        return event

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Steps go to a stream of their own, behind what torch's current one has been given."""
        if self.device.type != "cuda":
            self.begin()
            yield
            return
        self.beside = _beside(self.device)
        self.beside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.beside):
            self.begin()
            yield

    def hold(self, number: int, p: torch.Tensor, g: torch.Tensor) -> None:
        """Keep a weight and its gradient until the page of this number, which went aside, is stepped."""
        self.held.append((self.ring.place(number).stepped, p, g))

    def release(self) -> None:
        """Let go of gradients that were stepped with, and of those that would be too many: what torch's current stream
        is given from now on is behind their steps."""
        while self.held and self.lanes.done(self.held[0][0]):
            self.held.popleft()
        spare = SLACK - sum(g.nbytes for _, p, g in self.held if p.grad is not g)
        if spare < 0:
            self.begin()
        while spare < 0:
            stepped, p, g = self.held.popleft()
            self.lanes.wait(lanes.STEP, stepped)
            spare += g.nbytes if p.grad is not g else 0

    def rejoin(self) -> None:
        """What torch's current stream is given from now on is behind all steps that went aside."""
        if self.beside is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.beside)
        self.lanes.flush()
        self.held.clear()

    def lend(self, x: torch.Tensor, lane: int) -> None:
        """Nobody gets the memory of `x` anew before what this lane was given is done."""
        if self.device.type == "cuda":
            x.record_stream(torch.cuda.ExternalStream(self.lanes.stream(lane), device=self.device))
        else:
            done = self.lanes.event()
            self.lanes.record(lane, done)
            self.lanes.wait(lanes.STEP, done)
            self.lanes.run(x.data_ptr)

    def make(self, part: states.Part, p: torch.Tensor) -> torch.Tensor:
        """Memory of the slabs for a part of a state, as much as this rank keeps of it."""
        shape = sharded.part_shape(part.shape, p)
        size = part.dtype.itemsize * math.prod(shape)  # an empty part of a slab would be all of it to torch.save
        x = torch.from_numpy(self.slabs.take(size)) if size else torch.empty(0, dtype=torch.uint8)
        return sharded.as_part(x.view(part.dtype).view(shape), part.shape, p)

    def owns(self, entry: Mapping[str, Any]) -> bool:
        """Whether all tensors of a state lie in the slabs."""
        return all(map(self.keeps, entry.values()))

    def keeps(self, x: Any) -> bool:
        """Whether a tensor lies in the slabs, or `x` is none."""
        return not isinstance(x, torch.Tensor) or self.slabs.owns(sharded.local(x).data_ptr())

    def widen(self, pages: Iterable[Page], to: int = 256) -> None:
        """A ring for these pages, too, each place as large as the largest page that passes through it and a multiple of
        `to` bytes; the old one goes when its last page is stored."""
        sizes = list(self.ring.sizes)
        for page in pages:
            sizes[page.number % BUFFERS] = max(sizes[page.number % BUFFERS], up(page.size, to))
        if tuple(sizes) != self.ring.sizes:
            self.lanes.finish()
            self.memory = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
            with self.current:
                self.ring = Ring(self.lanes, self.memory.data_ptr(), sizes)
                if self.device.type == "cuda":  # whoever had this memory before may still be at work
                    torch.cuda.current_stream().synchronize()

    def bind(self, book: Book) -> None:
        """Give every page its place."""
        for page in book.pages:
            place = page.number % BUFFERS
            start, size = self.ring.starts[place], self.ring.sizes[place]
            page.bind(self.memory[start : start + size])
        book.ring = self.ring


@dataclass(eq=False)
class Round:
    """The parameters of one group that are stepped now on one device; gradients are row-major, `rows` by step count."""

    deck: Deck
    plan: Plan
    form: Any
    works: Mapping[Any, Any]
    grads: Mapping[Any, torch.Tensor]
    rows: Any

    @classmethod
    def of(cls, deck: Deck, plan: Plan, form: Any, work: Iterable[Any], rows: Any) -> Round:
        """With these gradients, wherever they lie."""
        works = {w.slot: w for w in work}
        return cls(deck, plan, form, works, {slot: w.g.contiguous() for slot, w in works.items()}, rows)

    def take(self, slots: Iterable[Any]) -> None:
        """Weights that are not row-major are stepped as copies."""
        for slot in slots:
            self.deck.lanes.run(slot.take)

    def put(self) -> None:
        """The copies go back, and whoever works in the order of the caller's stream finds them."""
        for slot in self.works:
            self.deck.lanes.run(slot.put)
        self.deck.lanes.flush()

    def rebind(self, book: Book) -> None:
        """Give pages places in a ring that is new to them."""
        if book.ring is not self.deck.ring:
            self.deck.ring.settle()
            self.deck.bind(book)
            buckets = self.plan.buckets
            self.plan.buckets = {key: b for key, b in buckets.items() if not isinstance(key[-1], Page)}
