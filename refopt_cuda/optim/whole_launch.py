"""Launches of rules that see whole tensors: what is bound to tensors, and which rows of scalars a step takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from refopt_cuda.kernels import rows_cuda, whole_cuda
from refopt_cuda.kernels.step_cuda import on_stream
from refopt_cuda.kernels.whole_rules import Form, Rows
from refopt_cuda.optim import live
from refopt_cuda.optim.checks import NUMBERS
from refopt_cuda.optim.whole_slots import Work

Made = Mapping[tuple[int, bool], Rows] | live.Live
"""Rows of scalars of a step: on the host by `Work.kind`, or on a device, two of each count."""
COUNTS = whole_cuda.ROWS // 2
"""Step counts whose rows on a device one launch can take."""


class Launch:
    """One bound `Whole` and the tensors that it was bound to."""

    def __init__(self, form: Form, hyper: Mapping[str, Any], kind: tuple[torch.dtype, torch.dtype]) -> None:
        self.whole = whole_cuda.Whole(form, hyper, NUMBERS[kind[0]], NUMBERS[kind[1]])
        self.bound: list[whole_cuda.Tensor] = []

    @property
    def memory(self) -> Any:
        """What the kernels were given the addresses of."""
        return self.whole.table, self.whole.scratch

    def step(self, work: Sequence[Work], made: Made, stream: int) -> None:
        """Enqueue one step of these parameters, whose weights lie row-major in their slots' `dense`."""
        tensors = [w.slot.tensor for w in work]
        with on_stream(stream):  # table and scratch are copied and freed in the order of the launches that use them
            if tensors != self.bound:
                live.refuse_in_capture("tables of tensors")
                self.whole.bind(tensors)
                self.bound = tensors
        grads = [w.g.contiguous() for w in work]
        for at, run in self._turns([w.kind for w in work], made):
            pointers = [whole_cuda.SKIP if k is None else g.data_ptr() for k, g in zip(at, grads, strict=True)]
            run(pointers, which=[k or 0 for k in at], stream=stream)

    def _turns(self, kinds: Sequence[tuple[Any, bool]], made: Made) -> Iterator[tuple[list[int | None], Any]]:
        """Launches that hold all rows, nearly always one: each tensor's row, None where another launch takes it."""
        if isinstance(made, live.Live):
            for base in range(0, len(made.at), COUNTS):
                rows = [(made.at[t] - base, vector) for t, vector in kinds]
                at = [2 * k + vector if 0 <= k < COUNTS else None for k, vector in rows]
                if any(k is not None for k in at):
                    yield at, partial(self.whole.run_live, rows=made.address + base * rows_cuda.PAIR)
            return
        known = sorted(set(kinds))
        for base in range(0, len(known), whole_cuda.ROWS):
            some = known[base : base + whole_cuda.ROWS]
            yield (
                [some.index(kind) if kind in some else None for kind in kinds],
                partial(self.whole.run, rows=[made[kind] for kind in some]),
            )
