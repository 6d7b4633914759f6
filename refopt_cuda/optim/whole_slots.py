"""One parameter of a rule that sees whole tensors, with its states: as they are kept, and as float32 for a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from refopt.memory.scratch import MOST
from refopt_cuda.kernels import whole_cuda
from refopt_cuda.optim import states
from refopt_cuda.optim.coded import Direct, Room, together
from refopt_cuda.optim.live import Count


class Slot:
    """One parameter, the `number`th of all, with its states; good until one of its tensors is moved or replaced."""

    first = 0

    def __init__(
        self,
        p: torch.Tensor,
        mode: Any,
        names: tuple[str, ...],
        kept: states.Layout,
        entry: dict[str, Any],
        number: int = 0,
    ) -> None:
        self.p, self.mode, self.kept, self.entry, self.number = p, mode, kept, entry, number
        self.states = [
            (name, coding, [entry[part.key] for part in parts])
            for name, coding, parts in zip(names, kept.codings, kept.parts, strict=True)
        ]
        self.coded = any(coding.form.stem != "f32" for _, coding, _ in self.states)
        self.values = {} if self.coded else {name: tensors[0] for name, _, tensors in self.states}
        self.watched: list[tuple[str, torch.Tensor, int]] = [(k, entry[k], entry[k].data_ptr()) for k in kept.keys]
        self.place = p.data_ptr(), p.shape, p.stride(), p.dtype
        self.dense = p if p.is_contiguous() else torch.empty_like(p, memory_format=torch.contiguous_format)
        self.tensor = self._tensor()

    @property
    def by_key(self) -> dict[str, torch.Tensor]:
        """The tensors that keep the states, under their keys in `state[p]`."""
        return dict(zip(self.kept.keys, (x for _, _, tensors in self.states for x in tensors), strict=True))

    def _tensor(self) -> whole_cuda.Tensor:
        pointers = {name: x.data_ptr() for name, x in self.values.items()}
        return whole_cuda.Tensor(self.dense.data_ptr(), pointers, tuple(self.dense.shape))

    def stale(self, mode: Any, entry: object, number: int = 0) -> bool:
        p, same = self.p, (self.mode, self.number) == (mode, number)
        if entry is not self.entry or not same or (p.data_ptr(), p.shape, p.stride(), p.dtype) != self.place:
            return True
        return any(self.entry.get(key) is not x or x.data_ptr() != where for key, x, where in self.watched)

    def opened(self, room: Room | Direct) -> Slot:
        """Itself, or with the float32 states that its codes stand for, in this memory."""
        return Opened(self, room) if self.coded else self

    def take(self) -> None:
        """A parameter that is not row-major is stepped through a copy."""
        if self.dense is not self.p:
            self.dense.copy_(self.p)

    def put(self, skip: torch.Tensor | None = None) -> None:
        """Bring the copy back."""
        if self.dense is not self.p:
            self.p.copy_(self.dense)


class Opened(Slot):
    """The same parameter with float32 states; `put` encodes them, but where a device says that the step is skipped."""

    def __init__(self, coded: Slot, room: Room | Direct) -> None:
        self.room = room
        self.p, self.entry, self.states, self.dense = coded.p, coded.entry, coded.states, coded.dense
        shape = tuple(self.p.shape)
        self.values = {name: room.decoded(coding, tensors, shape) for name, coding, tensors in self.states}
        self.tensor = self._tensor()

    def put(self, skip: torch.Tensor | None = None) -> None:
        super().put()
        for name, coding, tensors in self.states:
            self.room.store(coding, tensors, self.values[name], skip)


class Passing(Slot):
    """The same parameter with its states somewhere else for a step, in tensors like those that keep them; `dense` is
    where its weights lie, where that is elsewhere, too."""

    def __init__(
        self, slot: Slot, tensors: Sequence[Sequence[torch.Tensor]], dense: torch.Tensor | None = None
    ) -> None:
        self.kept, self.entry, self.coded = slot.kept, slot.entry, slot.coded
        self.p, self.dense = (slot.p, slot.dense) if dense is None else (dense, dense)
        self.states = [(name, coding, list(xs)) for (name, coding, _), xs in zip(slot.states, tensors, strict=True)]
        self.values = {} if self.coded else {name: xs[0] for name, _, xs in self.states}
        self.tensor = self._tensor()


class Work(NamedTuple):
    """One parameter's part in a step: the slot, the gradient, and the count that this step reaches, or where a device
    keeps the one that was reached."""

    slot: Slot
    g: torch.Tensor
    t: Count

    @property
    def p(self) -> torch.Tensor:
        return self.slot.p

    @property
    def kind(self) -> tuple[Any, bool]:
        """What the step's scalars depend on: the count, and whether there are fewer than two axes."""
        return self.t, self.slot.p.ndim < 2


def kept(work: Iterable[Work]) -> Iterator[tuple[Any, Any, tuple[int, ...]]]:
    """Every state on CUDA devices: its coding, its tensors, its shape."""
    for w in work:
        if w.p.is_cuda:
            yield from ((coding, tensors, tuple(w.p.shape)) for _, coding, tensors in w.slot.states)


def batches(work: Iterable[Work]) -> Iterator[list[Work]]:
    """What is stepped together: all, but of coded states only so many as may be decoded at a time."""
    return together(work, lambda xs: any(w.slot.coded for w in xs) and sum(w.p.numel() for w in xs) > MOST)
