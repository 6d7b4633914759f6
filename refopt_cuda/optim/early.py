"""`during_backward=True`: pages are stepped as the gradients of their tensors arrive, while backward goes on."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from refopt_cuda.optim import live, settings
from refopt_cuda.optim.decks import Book, Round
from refopt_cuda.optim.pieces import Page
from refopt_cuda.optim.run import Plan, Row, Slot, Work
from refopt_cuda.optim.watched import count
from refopt_cuda.rules import Form, form_of


class Arrival(NamedTuple):
    """A gradient as it arrived; `slot` is what is stepped with it ahead of `step()`, if anything is."""

    p: torch.Tensor
    address: int
    version: int
    slot: Slot | None


class Group(NamedTuple):
    """One parameter group during a backward pass."""

    plan: Plan
    form: Form
    hyper: dict[str, Any]
    group: dict[str, Any]
    numbers: dict[int, int]
    factor: float
    pages: dict[Slot, list[tuple[Book, Page]]]
    works: dict[Slot, Work]
    grads: dict[Slot, torch.Tensor]
    rows: dict[Any, Row]

    def row(self, t: Any) -> Row:
        """The scalars of step count `t`, made once."""
        if t not in self.rows:
            self.rows[t] = self.plan.row(self.form, self.hyper, self.group, t, self.factor)
        return self.rows[t]

    def turned(self, slot: Slot) -> bool:
        """Whether all pages of a parameter have been stepped."""
        return all(page.turned for _, page in self.pages[slot])


class Early:
    """What an optimizer knows of a backward pass before its step."""

    def __init__(self, opt: Any) -> None:
        self._opt, self._handles = weakref.ref(opt), list[Any]()
        self.seen: dict[int, Arrival] = {}
        self.groups: dict[int, Group] = {}
        self.where: dict[int, int] = {}
        self.passing = False
        weakref.finalize(self, _remove, self._handles)

    def listen(self, params: Iterable[torch.Tensor]) -> None:
        """Hear of the gradients of these parameters."""
        me = weakref.ref(self)

        def arrived(p: torch.Tensor) -> None:
            early = me()
            if early is not None:
                early.arrive(p)

        self._handles += [p.register_post_accumulate_grad_hook(arrived) for p in params if p.requires_grad]

    def arrive(self, p: torch.Tensor) -> None:
        """Step what only waited for this gradient. RuntimeError for a second one before `step()`."""
        opt, g = self._opt(), p.grad
        if opt is None or g is None:
            return
        call = f"{type(opt).__name__}"
        if id(p) in self.seen:
            raise RuntimeError(
                f"{call}: a second gradient of a parameter of shape {tuple(p.shape)} arrived before step(): with "
                "during_backward every backward pass is a step; accumulate without it"
            )
        with torch.no_grad():
            slot = self._step(opt, p, g, f"{call}.backward")
        self.seen[id(p)] = Arrival(p, g.data_ptr(), g._version, slot)
        if slot is not None and not self.passing:
            self._hear_of_the_end()

    def _hear_of_the_end(self) -> None:
        """Have the place told when this backward pass is over."""
        self.passing, me = True, weakref.ref(self)

        def over() -> None:
            if (early := me()) is not None:
                early.passing = False
                if (opt := early._opt()) is not None:
                    opt._home.passed()

        torch.autograd.Variable._execution_engine.queue_callback(over)

    def _step(self, opt: Any, p: torch.Tensor, g: torch.Tensor, call: str) -> Slot | None:
        """What is done for a gradient now; None where `step()` is to do it: states are not made yet, not paged, or the
        parameter is stepped through a copy."""
        found = self._group(opt, p, call)
        slot = found.plan.slots.get(id(p)) if found else None
        if found is None or slot is None or slot.copied or slot not in found.pages or found.plan.counting:
            return None
        if slot.stale(opt._state.get(p), found.numbers[id(p)]) or (g.shape, g.device) != (p.shape, p.device):
            return None
        found.pages[slot][0][0].home.hear(p)
        found.works[slot] = Work(slot, g, slot.state["step"] + 1)
        found.grads[slot] = g.contiguous()
        for book, page in found.pages[slot]:
            if all(piece.slot in found.works for piece in page.pieces):
                self._turn(found, book, page)
        return slot

    @staticmethod
    def _turn(found: Group, book: Book, page: Page) -> None:
        if page.turned:
            return
        deck = book.home.deck(page.pieces[0].p.device)
        rows: Any = {t: found.row(t) for t in {found.works[piece.slot].t for piece in page.pieces}}
        with deck.current:
            now = Round(deck, found.plan, found.form, found.works, found.grads, rows)
            page.turned = book.home.early(book, page, now)
        for slot in {piece.slot for piece in page.pieces}:
            if found.turned(slot):  # the gradient's memory may be wanted
                del found.grads[slot]
                found.works[slot] = found.works[slot]._replace(g=torch.empty(0))

    def _group(self, opt: Any, p: torch.Tensor, call: str) -> Group | None:
        """The group of a parameter, looked at once a backward pass."""
        if not self.where:
            self.where = {id(p): k for k, group in enumerate(opt.param_groups) for p in group["params"]}
        at = self.where.get(id(p))
        if at is None or at not in opt._plans:
            return None
        if at not in self.groups:
            plan, group = opt._plans[at], opt.param_groups[at]
            hyper = settings.hyper_of(opt.rule, group, call)
            plan.agree(opt.rule, hyper, group, call)
            of: dict[Slot, list[tuple[Book, Page]]] = {}
            for book in plan.books.values():
                for page in book.pages:
                    for slot in dict.fromkeys(piece.slot for piece in page.pieces):
                        of.setdefault(slot, []).append((book, page))
            form = form_of(opt.rule.stem, hyper)
            self.groups[at] = Group(
                plan, form, hyper, group, opt._numbers(), live.scaling_of(opt, call).factor, of, {}, {}, {}
            )
        return self.groups[at]

    def check(self, opt: Any, call: str) -> None:
        """RuntimeError where a gradient is not what it was when it arrived."""
        scaled = opt.__dict__.pop("found_inf", None) is not None
        opt.__dict__.pop("grad_scale", None)
        for p, address, version, slot in self.seen.values():
            g = p.grad
            gone = slot is not None and self._turned(slot)
            same = gone if g is None else (g.data_ptr(), g._version) == (address, version)
            if scaled or not same:
                done = "it has been stepped with already" if slot else "nothing has been stepped yet"
                raise RuntimeError(
                    f"{call}: the gradient of a parameter of shape {tuple(p.shape)} was changed after backward(), and "
                    f"{done}: clipping, GradScaler and accumulation need during_backward=False"
                )

    def _turned(self, slot: Slot | None) -> bool:
        return all(slot not in found.works or found.turned(slot) for found in self.groups.values())

    def done(self, opt: Any) -> None:
        """Count the steps of those whose gradients are gone, and begin anew."""
        opt._home.join()
        self.passing = False  # after an error in backward nobody was told
        for p, _, _, slot in self.seen.values():
            if slot is not None and p.grad is None:
                count([slot.state], slot.state["step"] + 1)
        for found in self.groups.values():
            for _, page in (pair for pairs in found.pages.values() for pair in pairs):
                page.turned = False
        for known in (self.seen, self.groups, self.where):
            known.clear()


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
