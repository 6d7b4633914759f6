"""`place="paged"`: states in pinned host memory, stepped on the device as they pass through a ring of pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from refopt_cuda.optim import sharded, states
from refopt_cuda.optim.decks import AHEAD, BUFFERS, Book, Deck, Round
from refopt_cuda.optim.pieces import Grid, Page, pages
from refopt_cuda.optim.run import Plan, Slot, Work, on_host
from refopt_cuda.rules import Form

PAGE_BYTES = 1 << 24
"""Bytes a page unless told otherwise: the link is fastest from here on."""
SPARE = 0.9
"""How much of the device's free memory `resident_bytes="auto"` takes."""


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
    during_backward whether pages are stepped within backward passes, which takes a place more in the ring

    Of sharded parameters it is each rank's shards that live here, as DTensors whose parts are host memory.
    """

    usual = PAGE_BYTES
    """Bytes a page where none are asked for."""
    shards, pair = True, 0
    """Whether it takes sharded parameters; of the streams of copies, which pair it shares with other optimizers."""

    def __init__(self, page_bytes: int | None, resident_bytes: int | str, during_backward: bool = False) -> None:
        self.page_bytes, self.resident_bytes = page_bytes or self.usual, resident_bytes
        self.buffers = BUFFERS + AHEAD * during_backward
        self.decks: dict[torch.device, Deck] = {}
        self.resident: Any = WeakTensorKeyDictionary()

    def deck(self, device: torch.device) -> Deck:
        if device not in self.decks:
            self.decks[device] = Deck(device, self.buffers, self.pair)
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
            deck.spare = max(0, int(SPARE * free) - self.buffers * self.page_bytes)
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
        fresh = [slot for slot in slots if slot not in known]
        new = self.cut(fresh, self.size(fresh), deck.numbered)
        book.slots, book.pages, book.ring = slots, book.pages + new, None
        deck.numbered += len(new)

    def size(self, slots: Sequence[Any]) -> int:
        """Bytes of states a page of these slots."""
        return self.page_bytes

    def cut(self, slots: Sequence[Slot], size: int, number: int) -> list[Page]:
        """The pages of these slots, numbered from `number` on."""
        return pages(map(Grid, slots), size, number)

    def holds(self, slot: Slot) -> bool:
        """Whether a slot's states are paged."""
        return bool(slot.kept.all) and not self.resident.get(slot.p, True)

    def step(self, plan: Plan, form: Form, work: Sequence[Work], rows: Mapping[torch.device, Any]) -> None:
        """Step these parameters, page by page."""
        for (home, device), book in plan.books.items():
            mine = [w for w in work if w.slot.p.device == device]
            if mine and home == id(self):
                deck = self.deck(device)
                with deck.current:
                    deck.begin()
                    self.turn(book, Round.of(deck, plan, form, mine, rows[device]))

    def turn(self, book: Book, now: Round) -> None:
        """Step these parameters, page by page."""
        now.rebind(book)
        now.take(now.works)
        for page in book.pages:
            if not page.turned:
                self._turn_page(page, now)
        now.put()

    def early(self, book: Book, page: Page, now: Round) -> bool:
        """Step one page, all of whose gradients are there, ahead of `step`: it is brought in now. False where it is not
        bound yet."""
        step = self.stepping(page, now) if book.ring is now.deck.ring else None
        if step is not None:
            now.deck.come(page, step)
        return step is not None

    def hear(self, p: torch.Tensor) -> None:
        """A gradient of a parameter that is stepped ahead of `step` has arrived."""
        self.deck(p.device).hear()

    def _turn_page(self, page: Page, now: Round) -> None:
        """Load, step and store one page, if one of its pieces is of these parameters."""
        step = self.stepping(page, now)
        if step is not None:
            now.deck.ring.turn(page.number, page.copies, step)

    def stepping(self, page: Page, now: Round) -> Callable[[], None] | None:
        """How a page that lies in its place is stepped; None where no piece is of these parameters."""
        todo = [(now.works[x.slot], x) for x in page.pieces if x.slot in now.works]
        kinds: dict[Any, list[Work]] = {}
        for w, piece in todo:
            some = kinds.setdefault((*piece.kind, w.g.dtype), [])
            some.append(Work(piece, piece.of(now.grads[piece.slot]), w.t))

        def step() -> None:
            for kind, some in kinds.items():
                if now.deck.device.type == "cuda":
                    now.plan.launch(now.form, (*kind, now.form, page), some, now.rows)
                else:
                    for w in some:
                        on_host(now.form, w, now.rows[w.t])

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
                if deck.coming is not None:
                    deck.rejoin()
                deck.lanes.finish()


__all__ = ["PAGE_BYTES", "Paged"]
