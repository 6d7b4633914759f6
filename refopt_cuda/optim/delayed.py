"""`place="host", delay=1`: a step applies the gradient of the step before, whose update the host has made in backward.

    backward k        the host steps copies of the weights with gradient k - 1
    step() k          these weights go up, gradient k comes down

Between two steps a state is what the reference keeps: the states before the update, and the gradient that waits.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from refopt.spec import ShapeError, StateError
from refopt_cuda.optim import checks, live, settings, states, worker
from refopt_cuda.optim.checks import Pair
from refopt_cuda.optim.decks import Deck
from refopt_cuda.optim.paging import Paged
from refopt_cuda.optim.run import Plan, Row, Slot, Work, on_host, words
from refopt_cuda.optim.watched import Entries
from refopt_cuda.places.lanes import IN, OUT, STEP
from refopt_cuda.places.slabs import parts
from refopt_cuda.rules import Form, form_of

PENDING = states.PENDING


class Whole:
    """A parameter on the host: a copy of its weights, and its states where they live."""

    copied = False

    def __init__(self, slot: Slot, dense: torch.Tensor) -> None:
        self.slot, self.dense = slot, dense
        self.p, self.kept, self.number, self.state = slot.p, slot.kept, slot.number, slot.state
        self.first, self.shape = slot.first, slot.shape

    def take(self) -> None: ...

    def put(self) -> None: ...

    @property
    def arrays(self) -> tuple[np.ndarray, list[dict[str, np.ndarray]], np.ndarray | None]:
        """For the compiled loops."""
        kept = [dict(zip(("codes", "scales"), map(words, ts), strict=False)) for ts in self.slot.tensors]
        return words(self.dense), kept, None if self.slot.beside is None else words(self.slot.beside)


class Begun(NamedTuple):
    """An update that the thread makes, or has made: its weights, which are yet to go up, and their step count."""

    whole: Whole
    t: Any
    job: Future[None]


class Delayed(Paged):
    """Where an optimizer's states live: all in host memory, with a copy of the weights and the gradients that wait."""

    shards = False

    def __init__(self, page_bytes: int | None, resident_bytes: int | str) -> None:
        super().__init__(page_bytes, 0)
        self._copies: Any = WeakTensorKeyDictionary()
        self.begun: dict[Slot, Begun] = {}

    def _stays(self, kept: states.Layout, p: torch.Tensor) -> bool:
        return False

    def holds(self, slot: Slot) -> bool:
        """All parameters wait, those without states too."""
        return True

    def arrange(self, plan: Plan, call: str) -> None:
        """Memory for copies of the weights."""
        self._memory((slot, "p", slot.dense) for slot in plan.slots.values())
        self._pin(call)

    def _memory(self, wanted: Iterable[tuple[Slot, str, torch.Tensor]]) -> list[torch.Tensor]:
        """Host memory for tensors like these, the same in every step."""
        out = []
        for slot, role, like in wanted:
            have = self._copies.setdefault(slot.p, {})
            if role not in have or (have[role].dtype, have[role].shape) != (like.dtype, like.shape):
                part = states.Part(role, tuple(like.shape), like.dtype, 0)
                have[role] = self.deck(slot.p.device).make(part, slot.p)
            out.append(have[role])
        return out

    def _pin(self, call: str) -> None:
        for deck in self.decks.values():
            with deck.current:
                deck.slabs.pin(call)

    def hold(self, pairs: Sequence[tuple[Slot, torch.Tensor]], call: str) -> list[torch.Tensor]:
        """Bring gradients down; the memory that they lie in, when the lane of copies has got there."""
        grads = [g.contiguous() for _, g in pairs]
        held = self._memory((slot, PENDING, g) for (slot, _), g in zip(pairs, grads, strict=True))
        self._pin(call)
        for deck in self._at([slot for slot, _ in pairs]):
            deck.lanes.wait(OUT, deck.mark())
            for (slot, _), g, x in zip(pairs, grads, held, strict=True):
                if slot.p.device == deck.device:
                    _copy(deck, OUT, x, g)
                    deck.lend(g, OUT)
        return held

    def _at(self, slots: Iterable[Slot]) -> Iterator[Deck]:
        """The decks of these parameters, each with its device as the current one."""
        for device in dict.fromkeys(slot.p.device for slot in slots):
            deck = self.deck(device)
            with deck.current:
                deck.begin()
                yield deck

    def start(self, work: Sequence[Work], form: Form, rows: Mapping[torch.device, Mapping[int, Row]]) -> None:
        """Have the thread make these updates, of weights as they are now, with gradients on the host."""
        todo = [w for w in work if w.slot not in self.begun]
        copies = self._memory((w.slot, "p", w.slot.dense) for w in todo)
        for deck in self._at([w.slot for w in todo]):
            mine = [(w, x) for w, x in zip(todo, copies, strict=True) if w.slot.p.device == deck.device]
            for w, _ in mine:
                deck.lanes.run(w.slot.take)
            deck.lanes.wait(OUT, deck.mark())
            for w, x in mine:
                _copy(deck, OUT, x, w.slot.dense)
                came, whole = deck.lanes.event(), Whole(w.slot, x)
                deck.lanes.record(OUT, came)
                there = Work(whole, w.g, w.t)  # type: ignore[arg-type]
                job = worker.submit(_update, deck, came, form, there, rows[deck.device][w.t])  # type: ignore[index]
                self.begun[w.slot] = Begun(whole, w.t, job)

    def settle(self, slots: Iterable[Slot]) -> None:
        """Bring up the weights of these parameters that were begun; steps from now on find them there."""
        some = [slot for slot in slots if slot in self.begun]
        wait([self.begun[slot].job for slot in some])  # interrupted, they are still there to be waited for
        begun = [self.begun.pop(slot) for slot in some]
        for b in begun:
            b.job.result()
        for deck in self._at([b.whole.slot for b in begun]):
            mine = [b.whole for b in begun if b.whole.p.device == deck.device]
            deck.lanes.wait(IN, deck.mark())  # backward reads the old ones
            for whole in mine:
                _copy(deck, IN, whole.slot.dense, whole.dense)
            came = deck.lanes.event()
            deck.lanes.record(IN, came)
            deck.lanes.wait(STEP, came)
            for whole in mine:
                deck.lanes.run(whole.slot.put)
            deck.lanes.flush()

    def step(self, plan: Plan, form: Form, work: Sequence[Work], rows: Mapping[torch.device, Any]) -> None:
        """Step these parameters; what backward has begun is only brought up."""
        worker.heed()
        here = [(w.slot, w.g) for w in work if w.g is not w.slot.state.get(PENDING)]
        held = dict(zip((slot for slot, _ in here), self.hold(here, "step"), strict=True))
        self.start([w._replace(g=held.get(w.slot, w.g)) for w in work], form, rows)
        self.settle([w.slot for w in work])


class Late:
    """What an optimizer with a delay does before its step and instead of it."""

    def __init__(self, opt: Any, warm: int) -> None:
        self._opt, self.warm, self._handles = weakref.ref(opt), warm, list[Any]()
        self._begun = False
        weakref.finalize(self, _remove, self._handles)

    def listen(self, params: Iterable[torch.Tensor]) -> None:
        """Hear when backward begins."""
        me = weakref.ref(self)

        def arrived(_: torch.Tensor) -> None:
            late = me()
            if late is not None and not late._begun:
                late._begin()

        self._handles += [p.register_post_accumulate_grad_hook(arrived) for p in params if p.requires_grad]

    @torch.no_grad()
    def _begin(self) -> None:
        """Begin all updates whose gradients wait, under the settings that hold now."""
        self._begun, opt = True, self._opt()
        if opt is None:
            return
        call, numbers = f"{type(opt).__name__}.backward", opt._numbers()
        factor = live.scaling_of(opt, call).factor
        for k, plan in opt._plans.items():
            group = opt.param_groups[k]
            hyper = settings.hyper_of(opt.rule, group, call)
            plan.agree(opt.rule, hyper, group, call)
            slots = [plan.slots[id(p)] for p in group["params"] if id(p) in plan.slots]
            slots = [s for s in slots if PENDING in s.state and not s.stale(opt._state.get(s.p), numbers[id(s.p)])]
            work = [Work(s, s.state[PENDING], s.state["step"] + 1) for s in slots]
            form = form_of(opt.rule.stem, hyper)
            made = {w.t: plan.row(form, hyper, group, w.t, factor) for w in work}
            opt._home.start(work, form, dict.fromkeys((s.p.device for s in slots), made))

    def due(self, params: Iterable[torch.Tensor], pairs: Sequence[Pair], state: Entries) -> list[Pair]:
        """The gradients that this step is made with: those that wait, and new ones where none does."""
        new = {id(p): g for p, g in pairs}
        waits = {id(p): state[p][PENDING] for p in params if PENDING in state.get(p, ())}
        return [(p, (new | waits)[id(p)]) for p in params if id(p) in new or id(p) in waits]

    def step(self, opt: Any, runs: Sequence[tuple[Plan, Any, Any, list[Work]]], scaling: Any, call: str) -> None:
        """Apply what waits, and what is not to wait; then have the new gradients wait."""
        begun = set(opt._home.begun) - {w.slot for *_, work in runs for w in work}
        if begun:
            raise RuntimeError(f"{call}: a parameter or a state was replaced between backward() and step()")
        for plan, hyper, group, work in runs:
            late = [w._replace(g=w.slot.state[PENDING]) for w in work if PENDING in w.slot.state]
            rest = [w for w in work if PENDING not in w.slot.state]
            warm = [w for w in rest if w.slot.state["step"] < self.warm]
            first = [w for w in rest if w.slot.state["step"] >= self.warm]
            waits = [w.slot for w in late + first]
            plan.keep(first, opt._state)
            plan.run(form_of(opt.rule.stem, hyper), hyper, group, late + warm, opt._state, scaling, call)
            self._wait(opt, waits, call)
        self._begun = False

    @staticmethod
    def _wait(opt: Any, slots: Sequence[Slot], call: str) -> None:
        """Have the gradients of these parameters wait, if they have one."""
        pairs = [(slot, slot.p.grad) for slot in slots if slot.p.grad is not None]
        held = opt._home.hold(pairs, call)
        for slot in slots:
            dict.pop(slot.state, PENDING, None)
        for (slot, _), x in zip(pairs, held, strict=True):
            dict.__setitem__(slot.state, PENDING, x)

    @staticmethod
    def finish(opt: Any) -> None:
        """A step without gradients; those that are there stay."""
        held = [(p, p.grad) for group in opt.param_groups for p in group["params"]]
        try:
            for p, _ in held:
                p.grad = None
            opt.step()
        finally:
            for p, g in held:
                p.grad = g

    def settle(self, opt: Any) -> None:
        """Somebody looks at the state: what was begun is done, and no gradient waits for it any longer."""
        for slot, begun in list(opt._home.begun.items()):
            dict.pop(slot.state, PENDING, None)
            dict.__setitem__(slot.state, "step", begun.t)
        opt._home.settle(list(opt._home.begun))


def checked(saved: Mapping[str, Any], p: torch.Tensor, delay: int, where: str) -> Mapping[str, Any]:
    """A saved entry without the gradient that waits in it; StateError, ShapeError for one that cannot."""
    g = saved.get(PENDING)
    if g is None:
        return saved
    if not delay:
        raise StateError(f"{where} has a gradient that waits, and this optimizer no delay: finish() before saving")
    if not isinstance(g, torch.Tensor) or g.dtype not in checks.NUMBERS:
        raise StateError(f"{where}: {PENDING!r} must be a float32, bfloat16 or float16 tensor, got {_kind(g)}")
    if g.shape != p.shape:
        raise ShapeError(f"{where}: {PENDING!r} has shape {tuple(g.shape)}, it must have {tuple(p.shape)}")
    return {key: x for key, x in saved.items() if key != PENDING}


def _kind(x: Any) -> str:
    return str(x.dtype) if isinstance(x, torch.Tensor) else repr(x)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _copy(deck: Deck, lane: int, to: torch.Tensor, source: torch.Tensor) -> None:
    host = source if lane == IN else to
    for at, size in parts(host.data_ptr(), host.nbytes):
        deck.lanes.copy(lane, to.data_ptr() + at, source.data_ptr() + at, size)


def _update(deck: Deck, came: Any, form: Form, work: Work, row: Row) -> None:
    with deck.current:
        deck.lanes.meet(came)
    on_host(form, work, row)
