"""Pages of states: which blocks of which tensors travel together, and where each stored array lies in a page.

A page is a list of pieces. A piece is a run of whole blocks of every coded state of one tensor, and is stepped as a
tensor of its own: whole rows as a matrix, anything else as a vector within one row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from refopt_cuda.kernels import arguments, step_cuda
from refopt_cuda.optim.run import Slot, words
from refopt_cuda.places.paged import Copy, joined
from refopt_cuda.places.slabs import ALIGN, up

UNCODED = 256
"""Elements a block where no state has blocks."""


class Array(NamedTuple):
    """A stored array of a tensor: its words, how many of them a row takes, and how many elements share one."""

    tensor: torch.Tensor
    row: int
    step: int


class Span(NamedTuple):
    """A part of a stored array: words [start, stop), `offset` bytes into the page."""

    tensor: torch.Tensor
    start: int
    stop: int
    offset: int

    @property
    def bytes(self) -> int:
        """What it takes."""
        return (self.stop - self.start) * self.tensor.element_size()

    @property
    def copy(self) -> Copy:
        """How it travels."""
        return Copy(self.offset, self.tensor.data_ptr() + self.start * self.tensor.element_size(), self.bytes)


class Grid:
    """The blocks of one tensor in order, and where each begins in every stored array."""

    def __init__(self, slot: Slot) -> None:
        forms = tuple(c.form for c in slot.kept.codings)
        coded, shape = any(form.scaled for form in forms), slot.shape
        cut = arguments.cut(forms, shape, tuple(c.block or UNCODED for c in slot.kept.codings))
        self.slot, self.n, self.largest = slot, math.prod(shape), cut.largest if coded else UNCODED
        self.last = shape[-1] if coded and len(shape) >= 2 and shape[-1] >= 16 else 0
        whole = self.last > self.largest and self.last % self.largest == 0
        self.row = self.last if self.last and not whole else self.n
        self.per = -(-self.row // self.largest)
        self.blocks = self.n // self.row * self.per
        self.arrays = list(self._arrays(cut.blocks))
        self.bytes = sum(a.tensor.nbytes for a in self.arrays)

    def _arrays(self, blocks: Sequence[int]) -> Iterator[Array]:
        rows = self.n // self.row
        for (form, _), tensors, block in zip(self.slot.kept.codings, self.slot.tensors, blocks, strict=True):
            yield Array(tensors[0], tensors[0].numel() // rows, 2 if form.scaled and form.module.BITS == 4 else 1)
            if len(tensors) > 1:
                yield Array(tensors[1], tensors[1].numel() // rows, block)
        if self.slot.beside is not None:
            yield Array(self.slot.beside, self.row, 1)

    def pieces(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Blocks [first, last) as runs of elements (begin, end): within a row, or whole rows."""
        (r, i), (end, j) = divmod(first, self.per), divmod(last, self.per)
        if r == end or (i == 0 and j == 0):
            yield self.element(first), self.element(last)
            return
        if i:
            yield self.element(first), (r + 1) * self.row
            r += 1
        if r < end:
            yield r * self.row, end * self.row
        if j:
            yield end * self.row, self.element(last)

    def element(self, block: int) -> int:
        """The first element of a block."""
        row, at = divmod(block, self.per)
        return row * self.row + at * self.largest

    def word(self, array: Array, element: int) -> int:
        """Where the block that begins with this element begins in a stored array."""
        row, at = divmod(element, self.row)
        return row * array.row + at // array.step

    def shape(self, begin: int, end: int) -> tuple[int, ...]:
        """How elements [begin, end) are stepped."""
        rows = self.last and begin % self.last == 0 and end % self.last == 0
        return ((end - begin) // self.last, self.last) if rows else (end - begin,)


class Piece:
    """A piece of a parameter as what is stepped: it looks like a slot, and its states lie in the page's place."""

    copied = False

    def __init__(self, grid: Grid, begin: int, end: int, page: Page) -> None:
        slot = grid.slot
        self.slot, self.page, self.shape = slot, page, grid.shape(begin, end)
        self.begin, self.first = begin, slot.first + begin
        self.p, self.kept, self.kind, self.number, self.state = slot.p, slot.kept, slot.kind, slot.number, slot.state
        self.dense, self.end = slot.dense.view(-1)[begin:end], end
        self.spans = []
        for array in grid.arrays:
            ends = grid.word(array, begin), grid.word(array, end)
            self.spans.append(Span(array.tensor, *ends, up(page.size, ALIGN)))
            page.size = self.spans[-1].offset + self.spans[-1].bytes

    def stale(self, state: object, number: int) -> bool:
        """Pages are made anew where a slot is."""
        return False

    def moved(self) -> None:
        """The page has another place."""
        self.__dict__.pop("arrays", None)

    def take(self) -> None: ...

    def put(self) -> None: ...

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """This piece of a row-major tensor of the parameter's shape."""
        return whole.view(-1)[self.begin : self.end]

    def by_state(self, parts: Sequence[Any]) -> tuple[list[Sequence[Any]], Any]:
        """What belongs to each state, and what belongs to the weights."""
        out, at = [], 0
        for tensors in self.slot.tensors:
            out.append(parts[at : at + len(tensors)])
            at += len(tensors)
        return out, parts[at] if at < len(parts) else None

    @property
    def pointers(self) -> step_cuda.Tensor:
        """For the kernels."""
        states, rest = self.by_state([self.page.address + span.offset for span in self.spans])
        pairs = tuple((a[0], a[1] if len(a) > 1 else 0) for a in states)
        return step_cuda.Tensor(self.dense.data_ptr(), pairs, self.shape, rest or 0, self.number, self.first)

    @cached_property
    def arrays(self) -> tuple[np.ndarray, list[dict[str, np.ndarray]], np.ndarray | None]:
        """For the compiled loops of the CPU."""
        states, rest = self.by_state([self._view(span) for span in self.spans])
        return words(self.dense), [dict(zip(("codes", "scales"), a, strict=False)) for a in states], rest

    def _view(self, span: Span) -> np.ndarray:
        place = self.page.memory[span.offset : span.offset + span.bytes]
        return place.numpy().view(words(torch.empty(0, dtype=span.tensor.dtype)).dtype)


@dataclass(eq=False)
class Page:
    """Pieces that travel together; `number` gives them their place in the ring, `memory` is that place, and `turned`
    says that the next step has already been taken."""

    number: int
    size: int = 0
    pieces: list[Any] = field(default_factory=list)
    memory: Any = None
    turned: bool = False

    def bind(self, memory: torch.Tensor) -> None:
        """The page's place is here, from now on."""
        self.memory = memory
        for piece in self.pieces:
            piece.moved()

    @property
    def address(self) -> int:
        return int(self.memory.data_ptr())

    @cached_property
    def copies(self) -> tuple[Copy, ...]:
        """What is copied in, and then out."""
        return joined(span.copy for piece in self.pieces for span in piece.spans)


def pages(grids: Iterable[Grid], size: int, number: int) -> list[Page]:
    """Pages of about `size` bytes, one block at least, numbered from `number` on; small tensors share them."""
    out = [Page(number)]
    for grid in grids:
        each, done = max(1, -(-grid.bytes // max(grid.blocks, 1))), 0
        while done < grid.blocks:
            room = (size - out[-1].size) // each
            apart = done == 0 and room < grid.blocks <= size // each and 2 * out[-1].size >= size
            full = room <= 0 or len(out[-1].pieces) > step_cuda.SIZES[-1] - 3
            if out[-1].size and (full or apart):
                out.append(Page(number + len(out)))
                continue
            last = min(grid.blocks, done + max(room, 1))
            for begin, end in grid.pieces(done, last):
                out[-1].pieces.append(Piece(grid, begin, end, out[-1]))
            done = last
    return out if out[-1].pieces else out[:-1]
