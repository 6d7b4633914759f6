"""How a tensor is cut where sums over rows, blocks or all of it are taken in the canonical order (refopt/reduce.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refopt_cuda.kernels.whole_rules import Form

__all__ = ["CHUNK", "LINE", "SIDE", "Cut"]

CHUNK = 65536
"""Elements a piece where there are no long rows."""
SIDE = 256
"""Rows and columns of a tile, and accumulators of a sum."""
LINE = 32
"""Rows or columns whose factors a warp takes at once."""


@dataclass(frozen=True)
class Cut:
    """n           elements
    block       elements of a block of the rule: sums are taken of each
    piece, per  elements of a piece, and pieces a block
    by_row      whether a piece is a row
    matrices    matrices of `rows` x `columns` that are factored; 0: none
    """

    n: int
    block: int
    piece: int
    per: int
    by_row: bool
    matrices: int = 0
    rows: int = 0
    columns: int = 0

    @classmethod
    def of(cls, form: Form, shape: tuple[int, ...], hyper: Mapping[str, Any]) -> Cut:
        """A block of rows is one run of elements, as a flat tensor is; blocks of two axes or more have rows."""
        n, count = math.prod(shape), form.blocks(shape, hyper)
        if n == 0:
            return cls(0, 1, 1, 0, False)
        flat = len(shape) < 2 or hyper.get("blocks") == "rows"
        block, by_row = n // count, not flat and shape[-1] >= SIDE
        piece = shape[-1] if by_row else CHUNK
        plane = (math.prod(shape[:-2]), *shape[-2:]) if form.factored and len(shape) > 1 else (0, 0, 0)
        return cls(n, block, piece, -(-block // piece), by_row, *plane)

    @property
    def blocks(self) -> int:
        return self.n // self.block

    @property
    def pieces(self) -> int:
        return self.blocks * self.per

    @property
    def across(self) -> int:
        """Tiles a row."""
        return -(-self.columns // SIDE)

    @property
    def down(self) -> int:
        """Tiles a column."""
        return -(-self.rows // SIDE)

    @property
    def tiles(self) -> int:
        return self.matrices * self.across * self.down

    @property
    def partials(self) -> int:
        """Sums of tiles' rows and columns."""
        return self.matrices * (self.rows * self.across + self.columns * self.down)

    @property
    def lines(self) -> int:
        """Warps' worth of rows and of columns: one alone where a warp sums its many tiles."""
        along = (self.rows, self.across), (self.columns, self.down)
        return sum(-(-self.matrices * n // (LINE if tiles <= LINE else 1)) for n, tiles in along)

    def sizes(self, form: Form) -> dict[str, int]:
        """Entries of each state that the rule keeps of this tensor."""
        out = {name: self.n for name in form.elements if name != "V" or not self.matrices}
        if not form.factored:
            return out | dict.fromkeys(form.factors, self.blocks)
        along = (self.rows, self.columns) * 2
        return out | {n: self.matrices * k for n, k in zip(form.factors, along, strict=False) if self.matrices}

    @property
    def even(self) -> bool:
        """Whether eights of elements lie alike in every piece and in every row."""
        return (self.pieces <= 1 or (self.piece % 8 == 0 and self.block % 8 == 0)) and self.columns % 8 == 0
