"""What steps in a place are made with: pages, their ring on a device, and the round of parameters that is stepped."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from refopt_cuda.optim import sharded, states
from refopt_cuda.optim.pieces import Page
from refopt_cuda.optim.run import Plan, Slot
from refopt_cuda.places import lanes
from refopt_cuda.places.paged import Ring
from refopt_cuda.places.slabs import Slabs, up

BUFFERS = 3
"""Pages in the ring: one is loaded, one is stepped, one is stored."""
AHEAD = 1
"""Places more where pages are stepped within backward passes: each is on its way in until the next one comes."""


@dataclass(eq=False)
class Book:
    """The pages of one parameter group on one device, and the slots and the ring that they were made for; `home` is the
    place that they are of."""

    home: Any
    slots: list[Slot] = field(default_factory=list)
    pages: list[Page] = field(default_factory=list)
    ring: Any = None


class Coming(NamedTuple):
    """A page on its way in, how it is stepped, and the stream on which the last of its gradients arrived."""

    page: Page
    step: Callable[[], None]
    stream: Any


class Deck:
    """One device's lanes, slabs and ring."""

    def __init__(self, device: torch.device, buffers: int, pair: int = 0) -> None:
        self.device = device
        self.lanes = lanes.lanes_of(device.type, device.index or 0, *([pair] if pair else []))
        self.slabs, self.memory = Slabs(self.lanes), torch.empty(0)
        self.ring: Any = Ring(self.lanes, 0, [0] * buffers)
        self.numbered, self.spare = 0, -1
        self.coming: Coming | None = None
        self.streams = set[Any]()
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

    def come(self, page: Page, step: Callable[[], None]) -> None:
        """Have a page brought in. It is stepped when the next one comes, on the stream of its own gradients, which need
        not wait then: the page is there."""
        self._step()
        self.ring.load(page.number, page.copies)
        self.coming = Coming(page, step, self.hear())

    def hear(self) -> torch.cuda.Stream | None:
        """The stream that a gradient has arrived on. A page's gradients may come on several."""
        if self.device.type != "cuda":
            return None
        stream = torch.cuda.current_stream(self.device)
        self.streams.add(stream)
        return stream

    def _step(self) -> None:
        """Step what is on its way in."""
        if self.coming is not None:
            page, step, stream = self.coming
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                self._gather()
                self.begin()
                self.ring.step(page.number, page.copies, step)
            self.coming = None  # now: what raises is tried again by `step()`

    def rejoin(self) -> None:
        """Step what is on its way in; torch's current stream is behind it from now on."""
        self._step()
        self._gather()
        self.streams.clear()
        self.lanes.flush()

    def _gather(self) -> None:
        """Torch's current stream goes on behind all that gradients have arrived on."""
        if self.streams:
            here = torch.cuda.current_stream(self.device)
            for stream in self.streams - {here}:
                here.wait_stream(stream)

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
            place = page.number % len(sizes)
            sizes[place] = max(sizes[place], up(page.size, to))
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
            place = page.number % len(self.ring.sizes)
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
