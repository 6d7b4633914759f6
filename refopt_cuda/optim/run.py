"""From parameters and gradients to kernels: what is stepped together, and with which pointers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch

from refopt.spec import Rule
from refopt_cuda.kernels import step_cuda, step_host
from refopt_cuda.optim import checks, live, settings, sharded, states
from refopt_cuda.optim.checks import NUMBERS, Pair
from refopt_cuda.optim.live import PLAIN, Count, Live, Scaling
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
    first: int = 0
    """The number of the first element in its whole tensor."""

    def __post_init__(self) -> None:
        self.here = p = sharded.local(self.p).detach()
        self.copied = not p.is_contiguous()
        self.dense = torch.empty_like(p, memory_format=torch.contiguous_format) if self.copied else p
        self.tensors = [[sharded.local(self.state[part.key]) for part in parts] for parts in self.kept.parts]
        self.beside = sharded.local(self.state[self.kept.beside.key]) if self.kept.beside else None
        self.kind, self.shape = (p.device, p.dtype, self.kept.codings, self.kept.weight), tuple(p.shape)
        self.place = p.data_ptr(), p.shape, p.stride(), p.dtype
        tensors = [(key, self.state[key]) for key in self.kept.keys]
        self.watched: list[tuple[str, torch.Tensor, int]] = [(key, x, address(sharded.local(x))) for key, x in tensors]

    def stale(self, state: object, number: int) -> bool:
        """Whether the parameter or a state tensor is not what and where it was; `x.data = ...` keeps the identity."""
        p = sharded.local(self.p)
        moved = (p.data_ptr(), p.shape, p.stride(), p.dtype) != self.place
        if state is not self.state or number != self.number or moved:
            return True
        for key, x, where in self.watched:
            if self.state.get(key) is not x or address(sharded.local(x)) != where:
                return True
        return False

    def take(self) -> None:
        """A parameter that is not row-major is stepped through a copy."""
        if self.copied:
            self.dense.copy_(self.here)

    def put(self) -> None:
        """Bring the copy back."""
        if self.copied:
            self.here.copy_(self.dense)

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
        shape = tuple(self.here.shape)
        return step_cuda.Tensor(self.dense.data_ptr(), pairs, shape, beside, self.number, self.first)


class Work(NamedTuple):
    """One parameter's part in a step: the slot, the gradient, and the step count that this step reaches, or where a
    device keeps the one that was reached."""

    slot: Slot
    g: torch.Tensor
    t: Count

    @property
    def p(self) -> torch.Tensor:
        return self.slot.p


@dataclass
class Bucket:
    """Parameters of one CUDA device and one combination of dtypes and codecs: one launch, bound to their slots."""

    launch: step_cuda.Launch
    places: dict[Slot, int] = field(default_factory=dict)

    def step(self, work: Sequence[Work], rows: Rows | Live, stream: int) -> None:
        """Enqueue one step of these parameters: one launch, but where step counts are many."""
        self._hold([w.slot for w in work], stream)
        grads = [w.g.contiguous() for w in work]
        for w in work:
            w.slot.take()
        for at, made in live.batches(rows, {w.t for w in work}):
            pointers, which = [step_cuda.SKIP] * len(self.places), [0] * len(self.places)
            for w, g in zip(work, grads, strict=True):
                if w.t in at:
                    place = self.places[w.slot]
                    pointers[place], which[place] = g.data_ptr(), at[w.t]
            self.run(pointers, made, which if len(at) > 1 else None, stream)
        for w in work:
            w.slot.put()

    def run(self, pointers: Sequence[int], rows: Sequence[Row] | int, which: Sequence[int] | None, stream: int) -> None:
        """One launch; rows that a device has computed come as their address."""
        if isinstance(rows, int):
            self.launch.run_live(pointers, rows, which, stream)
            return
        self.launch.run(pointers, np.stack([r.scalars for r in rows]), which, stream, [r.random for r in rows])

    def _hold(self, slots: Sequence[Slot], stream: int) -> None:
        """Bind these slots if one of them is new. Those that have no gradient for once keep their place."""
        if all(slot in self.places for slot in slots):
            return
        live.refuse_in_capture("tables of parameters")
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
    gradients, notes of changes in the optimizer's state and, if somebody has seen it, where its tensors lie. Parts of
    DTensors, which nobody else moves without replacing them, are known by identity until then, the first by where it
    lies, too: to look at all would cost more than all else that is particular to them. Only a
    step that differs in nothing but the gradients' addresses goes this way. Entries learn their step count from
    `settle`.
    """

    slots: list[Slot]
    kinds: list[torch.dtype]
    buckets: list[tuple[torch.device, Bucket, list[int] | None]]
    t: Count
    every: list[int]

    def __post_init__(self) -> None:
        self.params = [slot.p for slot in self.slots]
        self.unwrap = sharded.locals_of(self.params)
        self.specs = sharded.specs([p.grad for p in self.params]) if self.unwrap else []  # type: ignore[misc]
        self.parts = [sharded.here(p) for p in self.params] if all(map(sharded.is_sharded, self.params)) else []
        self.entries = [slot.state for slot in self.slots]
        self.held = [x for slot in self.slots for _, x, _ in slot.watched]
        self.places = [slot.place[0] for slot in self.slots]
        self.homes = [a for slot in self.slots for *_, a in slot.watched]
        self.sizes = [slot.here.numel() for slot in self.slots]
        for entry in self.entries:
            entry.changed = False
        self.idle = len(self.every) - len(self.params)
        self.devices = {device for device, *_ in self.buckets}
        self.settled = self.t

    @classmethod
    def of(cls, work: Sequence[Work], launches: Mapping[Any, Bucket], every: Sequence[torch.Tensor]) -> Lane | None:
        """The lane of a step that was taken in these launches, None where it is not so simple."""
        buckets = list(launches.values())
        index = {w.slot: k for k, w in enumerate(work)}
        simple = len({w.t for w in work}) == 1 and not any(w.slot.copied for w in work)
        simple &= all(sharded.local(w.slot.p.grad) is w.g for w in work)  # type: ignore[arg-type]
        if not simple or sum(len(b.places) for b in buckets) != len(work):
            return None
        orders = [[index[slot] for slot in b.places] for b in buckets]
        alone = orders == [[*range(len(work))]]
        devices = [next(iter(b.places)).here.device for b in buckets]
        rows = [(d, b, None if alone else o) for d, b, o in zip(devices, buckets, orders, strict=True)]
        return cls([w.slot for w in work], [w.g.dtype for w in work], rows, work[0].t, [*map(id, every)])

    def gradients(
        self, params: Sequence[torch.Tensor], state: Entries, seen: bool
    ) -> tuple[list[torch.Tensor], list[int]] | None:
        """The gradients and their addresses if nothing else has changed, else None.

        seen    somebody may hold tensors of the state, and have moved them
        """
        found = self._found(params)
        if found is None:
            return None
        grads, here = found
        try:
            addresses = [*map(address, grads)]
        except (TypeError, RuntimeError):  # there is none, or it is not dense
            return None
        if [g.dtype for g in grads] != self.kinds or [*map(size, grads)] != self.sizes:
            return None
        if here is self.parts and not seen:
            here = here[:1]
        if not all(map(contiguous, grads)) or [*map(address, here)] != self.places[: len(here)]:
            return None
        if state.changed or any(map(changed, self.entries)) or (seen and self._moved()):
            return None
        return grads, addresses

    def _found(self, params: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
        """The gradients and the weights that lie here; None where there are other parameters, or others have none."""
        if self.parts and not self.idle:
            quick = sharded.gradients(params, self.params, self.parts, self.specs)
            if quick is not None:
                return quick, self.parts
        if [*map(id, params)] != self.every or (self.idle and sum(p.grad is None for p in params) != self.idle):
            return None
        if self.unwrap is None:
            return [p.grad for p in self.params], self.params  # type: ignore[misc]
        with sharded.plainly():
            grads = [p.grad for p in self.params]
            if sharded.specs(grads) != self.specs:  # type: ignore[arg-type]
                return None
            return self.unwrap(grads), self.unwrap(self.params)  # type: ignore[arg-type]

    def _moved(self) -> bool:
        held = self.held if self.unwrap is None else self.unwrap(self.held)
        return [*map(address, held)] != self.homes

    def step(self, addresses: Sequence[int], made: Callable[[torch.device], Sequence[Row] | int]) -> None:
        """Enqueue the launches."""
        for device, bucket, order in self.buckets:
            with torch.cuda.device(device):
                stream = torch.cuda.current_stream(device).cuda_stream
                mine = addresses if order is None else [addresses[k] for k in order]
                bucket.run(mine, made(device), None, stream)
        if isinstance(self.t, int):
            self.t += 1

    def settle(self) -> None:
        """Write the step count where it can be seen."""
        if self.settled is not self.t:
            count(self.entries, self.t)
            self.settled = self.t


@dataclass
class Plan:
    """What one parameter group's steps reuse: a slot a parameter, a bucket a combination, the lane of the last step.

    `apart` says whether the slots' parameters are known to share no memory, `counting` whether their devices keep
    their step counts; `rooms` is where rows lie that a device computes. `home` keeps states in another place than
    beside their parameters, and `books` are its pages.
    """

    home: Any = None
    mode: Any = None
    slots: dict[int, Slot] = field(default_factory=dict)
    buckets: dict[Any, Bucket] = field(default_factory=dict)
    apart: bool = True
    lane: Lane | None = None
    books: dict[Any, Any] = field(default_factory=dict)
    counting: bool = False
    rooms: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    def agree(
        self, rule: Rule, hyper: Mapping[str, Any], group: Mapping[str, Any], call: str, scaling: Scaling = PLAIN
    ) -> None:
        """Begin anew where the group's settings have changed. Counts that a device keeps stay there."""
        if not self.counting and (group["capturable"] or scaling.foreign):
            self.counting, self.slots, self.lane = True, {}, None
        if self.counting:
            live.refuse_schedule(hyper, call)
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
        checks.capture(pairs, group["capturable"], call)
        work = []
        for p, g in pairs:
            slot, number = self.slots.get(id(p)), numbers[id(p)]
            if slot is None or slot.stale(state.get(p), number):
                live.refuse_in_capture("states")
                kept = states.layout(rule, hyper, group, p)
                sharded.say_uncoded(p, group, call)
                drawn = kept.weight is not None and kept.weight.module.RANDOM
                where = sharded.first(p, call) if drawn else 0
                slot = self.slots[id(p)] = Slot(p, kept, self._entry(kept, state.get(p), p, call), number, where)
                self.apart = False
            counted = self.counting and p.is_cuda
            g = sharded.gradient(p, g, call)
            work.append(Work(slot, g, slot.state["step"] if counted else slot.state["step"] + 1))
        if self.home:
            self.home.arrange(self, call)
        return live.counted(work, group["params"], state) if self.counting else work

    def _entry(self, kept: states.Layout, have: Any, p: torch.Tensor, call: str) -> Entry:
        """The entry to step `p` with; a count that its device keeps is not read."""
        if self.home:
            sharded.refuse_place(p, self.home, call)
        ready = (self.home or states).ready
        return Entry.of(live.ready(kept, have, p, call, ready) if self.counting else ready(kept, have, p, call))

    def run(
        self,
        form: Form,
        hyper: Mapping[str, Any],
        group: Mapping[str, Any],
        work: Sequence[Work],
        state: Entries,
        scaling: Scaling = PLAIN,
        call: str = "step",
    ) -> None:
        """Step what was prepared, then count the step."""
        kinds: dict[Any, list[Work]] = {}
        host = [w for w in work if not w.slot.p.is_cuda]
        factor, skip = scaling.on_host if host else (1.0, False)
        if skip:  # the scaler said so
            work, host = [w for w in work if w.slot.p.is_cuda], []
        paged = [w for w in work if self.home and self.home.holds(w.slot)]
        away = {w.slot for w in paged}
        for w in work:
            if w.slot.p.is_cuda and w.slot not in away:
                kinds.setdefault((*w.slot.kind, w.g.dtype), []).append(w)
        rows: dict[torch.device, Any] = {}
        for w in host:
            made = rows.setdefault(w.slot.p.device, {})
            made[w.t] = made.get(w.t) or self.row(form, hyper, group, w.t, factor)  # type: ignore[arg-type]
            if w.slot not in away:
                on_host(form, w, made[w.t])
        for device in {w.slot.p.device for w in work if w.slot.p.is_cuda}:
            counts = [*dict.fromkeys(w.t for w in work if w.slot.p.device == device)]
            rows[device] = self._rows(form, hyper, group, counts, scaling, device, call)
        launches = {}
        for kind, some in kinds.items():
            for k in range(0, len(some), step_cuda.SIZES[-1]):
                key = (*kind, form, k)
                launches[key] = self.launch(form, key, some[k : k + step_cuda.SIZES[-1]], rows[kind[0]])
        if paged:
            self.home.step(self, form, paged, rows)
        for w in work:
            count([w.slot.state], w.t)
            state.give(w.slot.p, w.slot.state)
        self.lane = Lane.of(work, launches, group["params"]) if launches and not paged else None

    def _rows(
        self,
        form: Form,
        hyper: Mapping[str, Any],
        group: Mapping[str, Any],
        counts: Sequence[Count],
        scaling: Scaling,
        device: torch.device,
        call: str,
    ) -> Rows | Live:
        """The rows of a step on a CUDA device: computed there where the host cannot."""
        if not self.counting and scaling.squares is None:
            return {int(t): self.row(form, hyper, group, int(t), scaling.factor) for t in counts}
        live.refuse_schedule(hyper, call)
        return live.rows(form, hyper, group, counts, scaling, device, self.rooms)

    def again(
        self,
        form: Form,
        hyper: Mapping[str, Any],
        group: Mapping[str, Any],
        addresses: Sequence[int],
        scaling: Scaling,
        call: str,
    ) -> None:
        """The lane's step with new gradients."""
        lane: Any = self.lane
        if not self.counting and scaling.squares is None:
            made = [self.row(form, hyper, group, lane.t + 1, scaling.factor)]
            lane.step(addresses, lambda _: made)
            return
        count = lane.t if self.counting else lane.t + 1
        rows = {d: self._rows(form, hyper, group, [count], scaling, d, call) for d in lane.devices}
        lane.step(addresses, lambda device: rows[device].address)  # type: ignore[union-attr]

    @staticmethod
    def keep(work: Sequence[Work], state: Entries) -> None:
        """The states that a step would begin with, and no step."""
        state.update((w.slot.p, w.slot.state) for w in work)

    @staticmethod
    def row(form: Form, hyper: Mapping[str, Any], group: Mapping[str, Any], t: int, factor: float = 1.0) -> Row:
        """The row of step count `t`; gradients are multiplied by `factor`."""
        scalars = row(
            form.stem, t, {**hyper, "lr": float(hyper["lr"]), "maximize": group["maximize"], "gscale": factor}
        )
        return Row(scalars, step_word(group["seed"], t) if "p" in group["codecs"] else 0)

    def launch(self, form: Form, key: Any, work: Sequence[Work], rows: Rows | Live) -> Bucket:
        """One launch, bound under `key`: (device, dtype of p, codings, format of weights, dtype of g, ...)."""
        device, p_dtype, codings, weight, g_dtype, *_ = key
        with torch.cuda.device(device):
            if key not in self.buckets:
                live.refuse_in_capture("kernels")
                forms, blocks = [c.form for c in codings], [c.block or 256 for c in codings]
                launch = step_cuda.Launch(form, forms, weight or NUMBERS[p_dtype], NUMBERS[g_dtype], blocks)
                self.buckets[key] = Bucket(launch)
            self.buckets[key].step(work, rows, torch.cuda.current_stream(device).cuda_stream)
        return self.buckets[key]


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
