"""From parameters and gradients to kernels: what is stepped together, and with which pointers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from refopt.spec import Rule
from refopt_cuda.kernels import step_cuda, step_host
from refopt_cuda.optim import checks, settings, states
from refopt_cuda.optim.checks import NUMBERS, Pair
from refopt_cuda.rules import Form, row

Rows = Mapping[int, np.ndarray]
"""The scalars of each step count that a step reaches."""


@dataclass(eq=False)
class Slot:
    """One parameter ready to be stepped, with its state; good until one of its tensors is moved or replaced."""

    p: torch.Tensor
    kept: states.Layout
    state: dict[str, Any]

    def __post_init__(self) -> None:
        p, self.copied = self.p.detach(), not self.p.is_contiguous()
        self.dense = torch.empty_like(p, memory_format=torch.contiguous_format) if self.copied else p
        self.tensors = [[self.state[part.key] for part in parts] for parts in self.kept.parts]
        self.kind = p.device, p.dtype, self.kept.codecs
        self.place = p.data_ptr(), p.shape, p.stride(), p.dtype
        tensors = [(key, self.state[key]) for key in self.kept.keys]
        self.watched: list[tuple[str, torch.Tensor, int]] = [(key, x, x.data_ptr()) for key, x in tensors]

    def stale(self, state: object) -> bool:
        """Whether the parameter or a state tensor is not what and where it was; `x.data = ...` keeps the identity."""
        p = self.p
        if state is not self.state or (p.data_ptr(), p.shape, p.stride(), p.dtype) != self.place:
            return True
        for key, x, address in self.watched:
            if self.state.get(key) is not x or x.data_ptr() != address:
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
    def arrays(self) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
        """A CPU parameter and its states, as the compiled loops take them."""
        kept = [dict(zip(("codes", "scales"), map(words, ts), strict=False)) for ts in self.tensors]
        return words(self.dense), kept

    @cached_property
    def pointers(self) -> step_cuda.Tensor:
        """A CUDA parameter and its states, as the kernels take them."""
        pairs = tuple((ts[0].data_ptr(), ts[1].data_ptr() if len(ts) > 1 else 0) for ts in self.tensors)
        return step_cuda.Tensor(self.dense.data_ptr(), pairs, tuple(self.p.shape))


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
            self.launch.run(pointers, np.stack([rows[t] for t in some]), which if len(some) > 1 else None, stream)
        for w in work:
            w.slot.put()

    def _hold(self, slots: Sequence[Slot], stream: int) -> None:
        """Bind these slots if one of them is new. Those that have no gradient for once keep their place."""
        if all(slot in self.places for slot in slots):
            return
        new = {id(slot.p) for slot in slots}
        rest = [slot for slot in self.places if id(slot.p) not in new and not slot.stale(slot.state)]
        held = [*slots, *rest][: step_cuda.SIZES[-1]]
        with step_cuda.on_stream(stream):  # the table is copied and freed in the order of the launches that read it
            self.launch.bind([slot.pointers for slot in held])
        self.places = {slot: k for k, slot in enumerate(held)}


@dataclass
class Plan:
    """What one parameter group's steps reuse: a slot a parameter, a bucket a combination.

    `apart` says whether the slots' parameters are known to share no memory.
    """

    mode: Any = None
    slots: dict[int, Slot] = field(default_factory=dict)
    buckets: dict[Any, Bucket] = field(default_factory=dict)
    apart: bool = True

    def prepare(
        self,
        rule: Rule,
        hyper: Mapping[str, Any],
        group: Mapping[str, Any],
        pairs: Sequence[Pair],
        state: Mapping[Any, dict[str, Any]],
        call: str,
    ) -> list[Work]:
        """Everything that this step needs, checked; states that are missing are made but not yet given to `state`."""
        checks.capture(pairs, call)
        mode = settings.roles(rule, hyper), group["codecs"], group["block"], group["min_size"]
        if mode != self.mode:
            settings.check_group(rule, group, call)
            self.mode, self.slots, self.buckets = (mode[0], dict(group["codecs"]), *mode[2:]), {}, {}
        work = []
        for p, g in pairs:
            slot = self.slots.get(id(p))
            if slot is None or slot.stale(state.get(p)):
                kept = states.layout(rule, hyper, group, p)
                slot = self.slots[id(p)] = Slot(p, kept, states.ready(kept, state.get(p), p, call))
                self.apart = False
            work.append(Work(slot, g, slot.state["step"] + 1))
        return work

    def run(
        self,
        form: Form,
        hyper: Mapping[str, Any],
        group: Mapping[str, Any],
        work: Sequence[Work],
        state: MutableMapping[Any, dict[str, Any]],
    ) -> None:
        """Step what was prepared, then count the step."""
        rows = {t: row(form.stem, t, {**hyper, "maximize": group["maximize"]}) for t in {w.t for w in work}}
        kinds: dict[Any, list[Work]] = {}
        for w in work:
            if w.slot.p.is_cuda:
                kinds.setdefault((*w.slot.kind, w.g.dtype), []).append(w)
            else:
                on_host(form, w, group["block"], rows[w.t])
        for kind, some in kinds.items():
            for k in range(0, len(some), step_cuda.SIZES[-1]):
                self._launch(form, (*kind, form, k), some[k : k + step_cuda.SIZES[-1]], group["block"], rows)
        for w in work:
            w.slot.state["step"] = w.t
            state[w.slot.p] = w.slot.state

    def _launch(self, form: Form, key: Any, work: Sequence[Work], block: int, rows: Rows) -> None:
        device, p_dtype, codecs, g_dtype, *_ = key
        with torch.cuda.device(device):
            if key not in self.buckets:
                launch = step_cuda.Launch(form, codecs, NUMBERS[p_dtype], NUMBERS[g_dtype], block)
                self.buckets[key] = Bucket(launch)
            self.buckets[key].step(work, rows, torch.cuda.current_stream(device).cuda_stream)


def _batches(steps: list[int]) -> Iterable[list[int]]:
    """Step counts in groups that one launch can hold; nearly always one group of one."""
    for k in range(0, len(steps), step_cuda.ROWS):
        yield steps[k : k + step_cuda.ROWS]


def words(x: torch.Tensor) -> np.ndarray:
    """A CPU tensor's memory as NumPy sees it; bfloat16 as uint16 words."""
    x = x.detach()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def on_host(form: Form, work: Work, block: int, scalars: np.ndarray) -> None:
    """Step one parameter with the compiled loops of the CPU."""
    slot = work.slot
    slot.take()
    p, kept = slot.arrays
    step_host.step(form, slot.kept.codecs, p, words(work.g.contiguous()), kept, tuple(slot.p.shape), block, scalars)
    slot.put()
