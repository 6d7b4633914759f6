"""From parameters and gradients to kernels: what is stepped together, and with which pointers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch

from refopt.spec import Rule
from refopt_cuda.kernels import step_cuda, step_host
from refopt_cuda.optim import checks, settings, states
from refopt_cuda.optim.checks import NUMBERS, Pair
from refopt_cuda.optim.watched import Entries, Entry, count
from refopt_cuda.random import step_word
from refopt_cuda.rules import Form, row

address = torch.Tensor.data_ptr
contiguous = torch.Tensor.is_contiguous
size = torch.Tensor.numel
changed = attrgetter("changed")


class Row(NamedTuple):
    """What a step of one count reads: the rule's scalars, and the word that its random bits are made of."""

    scalars: np.ndarray
    random: int


Rows = Mapping[int, Row]
"""The rows of all step counts that a step reaches."""


@dataclass(eq=False)
class Slot:
    """One parameter ready to be stepped, with its state; good until one of its tensors is moved or replaced."""

    p: torch.Tensor
    kept: states.Layout
    state: Entry
    number: int

    first = 0
    """The number of the first element in its whole tensor."""

    def __post_init__(self) -> None:
        p, self.copied = self.p.detach(), not self.p.is_contiguous()
        self.dense = torch.empty_like(p, memory_format=torch.contiguous_format) if self.copied else p
        self.tensors = [[self.state[part.key] for part in parts] for parts in self.kept.parts]
        self.beside = self.state[self.kept.beside.key] if self.kept.beside else None
        self.kind, self.shape = (p.device, p.dtype, self.kept.codings, self.kept.weight), tuple(p.shape)
        self.place = p.data_ptr(), p.shape, p.stride(), p.dtype
        tensors = [(key, self.state[key]) for key in self.kept.keys]
        self.watched: list[tuple[str, torch.Tensor, int]] = [(key, x, x.data_ptr()) for key, x in tensors]

    def stale(self, state: object, number: int) -> bool:
        """Whether the parameter or a state tensor is not what and where it was; `x.data = ...` keeps the identity."""
        p = self.p
        moved = (p.data_ptr(), p.shape, p.stride(), p.dtype) != self.place
        if state is not self.state or number != self.number or moved:
            return True
        for key, x, where in self.watched:
            if self.state.get(key) is not x or x.data_ptr() != where:
                return True
        return False

    def take(self) -> None:
        """A parameter that is not row-major is stepped through a copy."""
        if self.copied:
            self.dense.copy_(self.p)

    def put(self) -> None:
        """Bring the copy back."""
        if self.copied:
            self.p.copy_(self.dense)

    @cached_property
    def arrays(self) -> tuple[np.ndarray, list[dict[str, np.ndarray]], np.ndarray | None]:
        """A CPU parameter, its states, and what lies beside it, as the compiled loops take them."""
        kept = [dict(zip(("codes", "scales"), map(words, ts), strict=False)) for ts in self.tensors]
        return words(self.dense), kept, None if self.beside is None else words(self.beside)

    @cached_property
    def pointers(self) -> step_cuda.Tensor:
        """A CUDA parameter and its states, as the kernels take them."""
        pairs = tuple((ts[0].data_ptr(), ts[1].data_ptr() if len(ts) > 1 else 0) for ts in self.tensors)
        beside = 0 if self.beside is None else self.beside.data_ptr()
        return step_cuda.Tensor(self.dense.data_ptr(), pairs, tuple(self.p.shape), beside, self.number)


class Work(NamedTuple):
    """One parameter's part in a step: the slot, the gradient, and the step count that this step reaches."""

    slot: Slot
    g: torch.Tensor
    t: int


@dataclass
class Bucket:
    """Parameters of one CUDA device and one combination of dtypes and codecs: one launch, bound to their slots."""

    launch: step_cuda.Launch
    places: dict[Slot, int] = field(default_factory=dict)

    def step(self, work: Sequence[Work], rows: Rows, stream: int) -> None:
        """Enqueue one step of these parameters: one launch, but where step counts are many."""
        self._hold([w.slot for w in work], stream)
        grads = [w.g.contiguous() for w in work]
        for w in work:
            w.slot.take()
        for some in _batches(sorted({w.t for w in work})):
            at = {t: i for i, t in enumerate(some)}
            pointers, which = [step_cuda.SKIP] * len(self.places), [0] * len(self.places)
            for w, g in zip(work, grads, strict=True):
                if w.t in at:
                    place = self.places[w.slot]
                    pointers[place], which[place] = g.data_ptr(), at[w.t]
            self.run(pointers, [rows[t] for t in some], which if len(some) > 1 else None, stream)
        for w in work:
            w.slot.put()

    def run(self, pointers: Sequence[int], rows: Sequence[Row], which: Sequence[int] | None, stream: int) -> None:
        """One launch."""
        self.launch.run(pointers, np.stack([r.scalars for r in rows]), which, stream, [r.random for r in rows])

    def _hold(self, slots: Sequence[Slot], stream: int) -> None:
        """Bind these slots if one of them is new. Those that have no gradient for once keep their place."""
        if all(slot in self.places for slot in slots):
            return
        new = {id(slot.p) for slot in slots}
        rest = [slot for slot in self.places if id(slot.p) not in new and not slot.stale(slot.state, slot.number)]
        held = [*slots, *rest][: step_cuda.SIZES[-1]]
        with step_cuda.on_stream(stream):  # the table is copied and freed in the order of the launches that read it
            self.launch.bind([slot.pointers for slot in held])
        self.places = {slot: k for k, slot in enumerate(held)}


@dataclass
class Lane:
    """The step that was just taken, ready to be taken again: parameters of one count, all in known launches.

    What could have changed is compared all at once, in lists that are made by C: where weights lie, formats of
    gradients, notes of changes in the optimizer's state and, if somebody has seen it, where its tensors lie. Only a
    step that differs in nothing but the gradients' addresses goes this way. Entries learn their step count from
    `settle`.
    """

    slots: list[Slot]
    kinds: list[torch.dtype]
    buckets: list[tuple[torch.device, Bucket, list[int] | None]]
    t: int
    every: list[int]

    def __post_init__(self) -> None:
        self.params = [slot.p for slot in self.slots]
        self.entries = [slot.state for slot in self.slots]
        self.held = [x for slot in self.slots for _, x, _ in slot.watched]
        self.places = [slot.place[0] for slot in self.slots]
        self.homes = [a for slot in self.slots for *_, a in slot.watched]
        self.sizes = [slot.p.numel() for slot in self.slots]
        for entry in self.entries:
            entry.changed = False
        self.idle = len(self.every) - len(self.params)
        self.settled = self.t

    @classmethod
    def of(cls, work: Sequence[Work], launches: Mapping[Any, Bucket], every: Sequence[torch.Tensor]) -> Lane | None:
        """The lane of a step that was taken in these launches, None where it is not so simple."""
        buckets = list(launches.values())
        index = {w.slot: k for k, w in enumerate(work)}
        simple = len({w.t for w in work}) == 1 and not any(w.slot.copied for w in work)
        if not simple or sum(len(b.places) for b in buckets) != len(work):
            return None
        orders = [[index[slot] for slot in b.places] for b in buckets]
        alone = orders == [[*range(len(work))]]
        rows = [(next(iter(b.places)).p.device, b, None if alone else o) for b, o in zip(buckets, orders, strict=True)]
        return cls([w.slot for w in work], [w.g.dtype for w in work], rows, work[0].t, [*map(id, every)])

    def gradients(
        self, params: Sequence[torch.Tensor], state: Entries, seen: bool
    ) -> tuple[list[torch.Tensor], list[int]] | None:
        """The gradients and their addresses if nothing else has changed, else None.

        seen    somebody may hold tensors of the state, and have moved them
        """
        if [*map(id, params)] != self.every or (self.idle and sum(p.grad is None for p in params) != self.idle):
            return None
        grads = [p.grad for p in self.params]
        try:
            addresses = [*map(address, grads)]  # type: ignore[arg-type]
        except (TypeError, RuntimeError):  # there is none, or it is not dense
            return None
        if [g.dtype for g in grads] != self.kinds or [*map(size, grads)] != self.sizes:  # type: ignore[arg-type, union-attr]
            return None
        if not all(map(contiguous, grads)) or [*map(address, self.params)] != self.places:  # type: ignore[arg-type]
            return None
        if state.changed or any(map(changed, self.entries)) or (seen and [*map(address, self.held)] != self.homes):
            return None
        return grads, addresses  # type: ignore[return-value]

    def step(self, addresses: Sequence[int], made: Row) -> None:
        """Enqueue the launches."""
        for device, bucket, order in self.buckets:
            with torch.cuda.device(device):
                stream = torch.cuda.current_stream(device).cuda_stream
                mine = addresses if order is None else [addresses[k] for k in order]
                bucket.run(mine, [made], None, stream)
        self.t += 1

    def settle(self) -> None:
        """Write the step count where it can be seen."""
        if self.settled != self.t:
            count(self.entries, self.t)
            self.settled = self.t


@dataclass
class Plan:
    """What one parameter group's steps reuse: a slot a parameter, a bucket a combination, the lane of the last step.

    `apart` says whether the slots' parameters are known to share no memory. `home` keeps states in another place than
    beside their parameters, and `books` are its pages.
    """

    home: Any = None
    mode: Any = None
    slots: dict[int, Slot] = field(default_factory=dict)
    buckets: dict[Any, Bucket] = field(default_factory=dict)
    apart: bool = True
    lane: Lane | None = None
    books: dict[Any, Any] = field(default_factory=dict)

    def agree(self, rule: Rule, hyper: Mapping[str, Any], group: Mapping[str, Any], call: str) -> None:
        """Begin anew where the group's settings have changed."""
        first = settings.roles(rule, hyper)
        mode = tuple(first.items()), group["codecs"], group["block"], group["min_size"]
        if mode != self.mode:
            settings.check_group(rule, group, call, first)
            self.mode, self.slots, self.buckets = (mode[0], dict(group["codecs"]), *mode[2:]), {}, {}
            self.lane = None

    def prepare(
        self,
        rule: Rule,
        hyper: Mapping[str, Any],
        group: Mapping[str, Any],
        pairs: Sequence[Pair],
        state: Entries,
        numbers: Mapping[int, int],
        call: str,
    ) -> list[Work]:
        """Everything that this step needs, checked; states that are missing are made but not yet given to `state`."""
        checks.capture(pairs, call)
        work = []
        for p, g in pairs:
            slot, number = self.slots.get(id(p)), numbers[id(p)]
            if slot is None or slot.stale(state.get(p), number):
                kept = states.layout(rule, hyper, group, p)
                entry = (self.home or states).ready(kept, state.get(p), p, call)
                slot = self.slots[id(p)] = Slot(p, kept, Entry.of(entry), number)
                self.apart = False
            work.append(Work(slot, g, slot.state["step"] + 1))
        if self.home:
            self.home.arrange(self, call)
        return work

    def run(
        self,
        form: Form,
        hyper: Mapping[str, Any],
        group: Mapping[str, Any],
        work: Sequence[Work],
        state: Entries,
    ) -> None:
        """Step what was prepared, then count the step."""
        rows = {t: self.row(form, hyper, group, t) for t in {w.t for w in work}}
        kinds: dict[Any, list[Work]] = {}
        paged = [w for w in work if self.home and self.home.holds(w.slot)]
        away = {w.slot for w in paged}
        for w in work:
            if w.slot in away:
                continue
            if w.slot.p.is_cuda:
                kinds.setdefault((*w.slot.kind, w.g.dtype), []).append(w)
            else:
                on_host(form, w, rows[w.t])
        launches = {}
        for kind, some in kinds.items():
            for k in range(0, len(some), step_cuda.SIZES[-1]):
                key = (*kind, form, k)
                launches[key] = self.launch(form, key, some[k : k + step_cuda.SIZES[-1]], rows)
        if paged:
            self.home.step(self, form, paged, rows)
        for w in work:
            count([w.slot.state], w.t)
            state.give(w.slot.p, w.slot.state)
        self.lane = Lane.of(work, launches, group["params"]) if launches and not paged else None

    @staticmethod
    def row(form: Form, hyper: Mapping[str, Any], group: Mapping[str, Any], t: int) -> Row:
        """The row of step count `t`."""
        scalars = row(form.stem, t, {**hyper, "maximize": group["maximize"]})
        return Row(scalars, step_word(group["seed"], t) if "p" in group["codecs"] else 0)

    def launch(self, form: Form, key: Any, work: Sequence[Work], rows: Rows) -> Bucket:
        """One launch, bound under `key`: (device, dtype of p, codings, format of weights, dtype of g, ...)."""
        device, p_dtype, codings, weight, g_dtype, *_ = key
        with torch.cuda.device(device):
            if key not in self.buckets:
                forms, blocks = [c.form for c in codings], [c.block or 256 for c in codings]
                launch = step_cuda.Launch(form, forms, weight or NUMBERS[p_dtype], NUMBERS[g_dtype], blocks)
                self.buckets[key] = Bucket(launch)
            self.buckets[key].step(work, rows, torch.cuda.current_stream(device).cuda_stream)
        return self.buckets[key]


def _batches(steps: list[int]) -> Iterable[list[int]]:
    """Step counts in groups that one launch can hold; nearly always one group of one."""
    for k in range(0, len(steps), step_cuda.ROWS):
        yield steps[k : k + step_cuda.ROWS]


def words(x: torch.Tensor) -> np.ndarray:
    """A CPU tensor's memory as NumPy sees it; bfloat16 as uint16 words."""
    x = x.detach()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def on_host(form: Form, work: Work, made: Row) -> None:
    """Step one parameter with the compiled loops of the CPU."""
    slot = work.slot
    slot.take()
    p, kept, beside = slot.arrays
    forms, blocks = zip(*slot.kept.codings, strict=True) if slot.kept.codings else ((), ())
    g = words(work.g.contiguous())
    more: dict[str, Any] = {"weight": slot.kept.weight, "rest": beside, "random": (made.random, slot.number)}
    more["first"] = slot.first
    step_host.step(form, forms, p, g, kept, slot.shape, tuple(b or 256 for b in blocks), made.scalars, **more)
    slot.put()
