"""`place="paged"`: states in pinned host memory, stepped on the device as they pass through a ring of pages."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from refopt_cuda.optim import sharded, states
from refopt_cuda.optim.pieces import Grid, Page, Piece, pages
from refopt_cuda.optim.run import Plan, Slot, Work, on_host
from refopt_cuda.places import lanes
from refopt_cuda.places.paged import Ring
from refopt_cuda.places.slabs import Slabs, up
from refopt_cuda.rules import Form

PAGE_BYTES = 1 << 24
"""Bytes a page unless told otherwise: the link is fastest from here on."""
BUFFERS = 3
"""Pages in the ring: one is loaded, one is stepped, one is stored."""
SPARE = 0.9
"""How much of the device's free memory `resident_bytes="auto"` takes."""


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
        weakref.finalize(self, self.lanes.finish)  # the ring's memory is free to others afterwards

    @property
    def current(self) -> Any:
        """The device as the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def begin(self) -> None:
        """Steps go to torch's current stream."""
        self.lanes.begin(torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0)

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

    def rejoin(self) -> None:
        """What torch's current stream is given from now on is behind all steps that went aside."""
        if self.beside is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.beside)
        self.lanes.flush()

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


class Home:
    """What an optimizer tells the place of its states, which need not listen."""

    def begin(self, state: Mapping[Any, Any], params: Iterable[torch.Tensor], call: str) -> None:
        """A step of all groups begins, over an optimizer that has these parameters."""

    def stepped(self, plans: Iterable[Plan], state: Mapping[Any, Any], numbers: Mapping[int, int], rule: str) -> None:
        """A step of all groups was given."""

    def show(self, state: Mapping[Any, Any]) -> None:
        """Somebody looks at the states, which are the memory that they live in."""


class Paged(Home):
    """Where an optimizer's states live: in host memory, but for `resident_bytes` of them beside the weights.

    page_bytes      bytes of states that travel at a time, one block at least
    resident_bytes  states that stay on the device, parameters in their order while they fit; "auto": in 0.9 of the
                    memory that is free on it at the first step, after the ring

    Of sharded parameters it is each rank's shards that live here, as DTensors whose parts are host memory.
    """

    shards, pair = True, 0
    """Whether it takes sharded parameters; of the streams of copies, which pair it shares with other optimizers."""

    def __init__(self, page_bytes: int, resident_bytes: int | str) -> None:
        self.page_bytes, self.resident_bytes = page_bytes, resident_bytes
        self.decks: dict[torch.device, Deck] = {}
        self.resident: Any = WeakTensorKeyDictionary()

    def deck(self, device: torch.device) -> Deck:
        if device not in self.decks:
            self.decks[device] = Deck(device, self.pair)
        return self.decks[device]

    def ready(self, kept: states.Layout, have: dict[str, Any] | None, p: torch.Tensor, call: str) -> dict[str, Any]:
        """As `states.ready`; a state that somebody has moved or replaced is brought back to where it belongs."""
        new = p not in self.resident
        stays, deck = self._stays(kept, p), self.deck(p.device)
        if have is not None and states.begun(kept, have) and (new if stays else not deck.owns(have)):
            found = {key: x for key, x in have.items() if key != states.PENDING}
            states.check(kept, kept, found, f"{call}: the state of a parameter of shape {tuple(p.shape)}")
            return states.restore(kept, have, p, states.beside if stays else deck.make)
        return states.ready(kept, have, p, call, states.beside if stays else deck.make)

    def _stays(self, kept: states.Layout, p: torch.Tensor) -> bool:
        """Whether the states of `p` stay on its device. Decided once a parameter."""
        if p not in self.resident:
            sizes = [part.dtype.itemsize * math.prod(sharded.part_shape(part.shape, p)) for part in kept.all]
            size, spare = sum(sizes), self.spare(p.device)
            deck = self.deck(p.device)
            self.resident[p] = size <= spare
            deck.spare = spare - size if size <= spare else spare
        return bool(self.resident[p])

    def spare(self, device: torch.device) -> int:
        """Bytes of the budget that are left on a device."""
        deck = self.deck(device)
        if deck.spare < 0 and isinstance(self.resident_bytes, int):
            deck.spare = self.resident_bytes
        elif deck.spare < 0:
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 62
            deck.spare = max(0, int(SPARE * free) - BUFFERS * self.page_bytes)
        return deck.spare

    def restore(
        self, known: states.Layout, saved: Mapping[str, Any], p: torch.Tensor, have: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """As `states.restore`, into the memory that the parameter's states have already, if it fits and is not what is
        loaded."""
        if self._stays(known, p):
            return states.restore(known, saved, p)
        deck = self.deck(p.device)
        own = any(isinstance(x, torch.Tensor) and deck.keeps(x) for x in saved.values())

        def make(part: states.Part, p: torch.Tensor) -> torch.Tensor:
            x = None if own or have is None else have.get(part.key)
            same = isinstance(x, torch.Tensor) and (x.shape, x.dtype) == (part.shape, part.dtype)
            if same and sharded.fits(x, p) and deck.keeps(x):  # type: ignore[arg-type]
                return x  # type: ignore[return-value]
            return deck.make(part, p)

        return states.restore(known, saved, p, make)

    def arrange(self, plan: Plan, call: str) -> None:
        """Make the pages of a group whose slots have changed, and room for them; nothing is written."""
        by_device: dict[torch.device, list[Slot]] = {}
        for slot in plan.slots.values():
            if self.holds(slot):
                by_device.setdefault(slot.p.device, []).append(slot)
        for device, slots in by_device.items():
            book, deck = plan.books.setdefault((id(self), device), Book(self)), self.deck(device)
            if book.slots != slots:
                self._extend(deck, book, slots, call)
            self.room(deck, book, call)

    def room(self, deck: Deck, book: Book, call: str) -> None:
        """Memory for what passes through, and pins for what the device reads."""
        with deck.current:
            deck.widen(book.pages)
            deck.slabs.pin(call)

    def _extend(self, deck: Deck, book: Book, slots: list[Slot], call: str) -> None:
        """Pages for new slots behind those that there are, or all pages anew where a slot is gone."""
        known, have = set(book.slots), set(slots)
        if not known <= have:
            if any(page.turned for page in book.pages):
                raise RuntimeError(f"{call}: a parameter or a state was replaced between backward() and step()")
            known, book.pages = set(), []
        new = self.cut([slot for slot in slots if slot not in known], deck.numbered)
        book.slots, book.pages, book.ring = slots, book.pages + new, None
        deck.numbered += len(new)

    def cut(self, slots: Sequence[Slot], number: int) -> list[Page]:
        """The pages of these slots, numbered from `number` on."""
        return pages(map(Grid, slots), self.page_bytes, number)

    def holds(self, slot: Slot) -> bool:
        """Whether a slot's states are paged."""
        return bool(slot.kept.all) and not self.resident.get(slot.p, True)

    def step(self, plan: Plan, form: Form, work: Sequence[Work], rows: Mapping[torch.device, Any]) -> None:
        """Step these parameters, page by page."""
        for (home, device), book in plan.books.items():
            mine = {w.slot: w for w in work if w.slot.p.device == device}
            if mine and home == id(self):
                deck = self.deck(device)
                with deck.current:
                    self.turn(deck, book, plan, form, mine, rows[device])

    def turn(self, deck: Deck, book: Book, plan: Plan, form: Form, mine: Mapping[Slot, Work], rows: Any) -> None:
        """Step these parameters, page by page."""
        deck.begin()
        if book.ring is not deck.ring:
            deck.ring.settle()
            deck.bind(book)
            plan.buckets = {key: b for key, b in plan.buckets.items() if not isinstance(key[-1], Page)}
        for slot in mine:
            deck.lanes.run(slot.take)
        grads = {slot: w.g.contiguous() for slot, w in mine.items()}
        for page in book.pages:
            if not page.turned:
                self._turn_page(deck, plan, form, page, mine, grads, rows)
        for slot in mine:
            deck.lanes.run(slot.put)
        deck.lanes.flush()

    def early(
        self,
        deck: Deck,
        book: Book,
        page: Page,
        plan: Plan,
        form: Form,
        mine: Mapping[Slot, Work],
        grads: Mapping[Slot, torch.Tensor],
        rows: Any,
    ) -> bool:
        """Step one page, all of whose gradients are there, ahead of `step` and beside backward, which does not wait for
        it to be loaded. False where it is not bound yet."""
        if book.ring is not deck.ring:
            return False
        with deck.aside():
            self._turn_page(deck, plan, form, page, mine, grads, rows)
            for slot in {piece.slot for piece in page.pieces}:
                deck.lend(slot.here, lanes.STEP)
                deck.lend(grads[slot], lanes.STEP)
        return True

    def _turn_page(
        self,
        deck: Deck,
        plan: Plan,
        form: Form,
        page: Page,
        mine: Mapping[Slot, Work],
        grads: Mapping[Slot, torch.Tensor],
        rows: Any,
    ) -> None:
        """Load, step and store one page, if one of its pieces is of these parameters; `grads` are row-major."""
        step = self.stepping(deck, plan, form, page, mine, grads, rows)
        if step is not None:
            deck.ring.turn(page.number, page.copies, step)

    def stepping(
        self,
        deck: Deck,
        plan: Plan,
        form: Form,
        page: Page,
        mine: Mapping[Slot, Work],
        grads: Mapping[Slot, torch.Tensor],
        rows: Any,
    ) -> Callable[[], None] | None:
        """How a page that lies in its place is stepped; None where no piece is of these parameters."""
        todo = [(mine[x.slot], x) for x in page.pieces if x.slot in mine]
        kinds: dict[Any, list[Work]] = {}
        for w, piece in todo:
            some = kinds.setdefault((*piece.kind, w.g.dtype), [])
            some.append(Work(piece, piece.of(grads[piece.slot]), w.t))

        def step() -> None:
            for kind, some in kinds.items():
                if deck.device.type == "cuda":
                    plan.launch(form, (*kind, form, page), some, rows)
                else:
                    for w in some:
                        on_host(form, w, rows[w.t])

        return step if todo else None

    def join(self) -> None:
        """Work that is given from now on finds all weights that were stepped ahead."""
        for deck in self.decks.values():
            with deck.current:
                deck.rejoin()

    def passed(self) -> None:
        """A backward pass is over."""
        self.join()

    def finish(self) -> None:
        """Wait until every state is back in host memory."""
        for deck in self.decks.values():
            with deck.current:
                deck.lanes.finish()


__all__ = ["BUFFERS", "PAGE_BYTES", "Paged", "Piece"]
