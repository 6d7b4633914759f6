"""One step of a rule that sees whole tensors, on the CPU: Numba loops over the scalar functions of the rule.

The passes are those of `whole.cu`, and so are the sums: pieces, tiles and accumulators in the canonical order. Rows,
chunks and stripes of tiles are shared by Numba's threads; no sum depends on which thread takes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numba
import numpy as np

from refopt.spec import ShapeError
from refopt_cuda.kernels.host_tiles import POOL
from refopt_cuda.kernels.whole_cut import CHUNK, SIDE, Cut
from refopt_cuda.kernels.whole_rules import Form, Rows
from refopt_cuda.kernels.whole_tiles import Loops, loops

__all__ = ["step"]

NUMBERS = {"float32": "f32", "float16": "f16", "uint16": "bf16", "int16": "bf16"}
"""Dtypes of arrays of weights and gradients; bfloat16 comes as its words."""
NOTHING = np.zeros(0, np.float32)
PARALLEL_FROM = 1 << 17
"""Elements from which a tensor is worth waking threads for."""


def step(
    form: Form,
    hyper: Mapping[str, Any],
    p: np.ndarray,
    g: np.ndarray,
    states: Mapping[str, np.ndarray],
    shape: tuple[int, ...],
    rows: Rows,
) -> None:
    """Update one parameter and its states in place.

    form    a form of `whole_rules`; `hyper` decides how the tensor is cut: blocks and heads of Adam-mini
    p, g    C-contiguous, `prod(shape)` elements: float32, float16, or bfloat16 as its uint16 (or int16) words
    states  float32 arrays by name, C-contiguous: those that the rule keeps for this shape
    rows    `refopt_cuda.kernels.whole_rules.rows(stem, t, len(shape) < 2, hyper)`

    Raises TypeError for other dtypes, ShapeError for arrays that do not fit, before anything is written.
    """
    cut = Cut.of(form, shape, hyper)
    if cut.n == 0:
        return
    formats = NUMBERS.get(p.dtype.name, ""), NUMBERS.get(g.dtype.name, "")
    p, g, kept = _checked(cut, cut.sizes(form), p, g, states)
    work = _Work(form, cut, p, g, kept, rows, loops(form, *formats))
    for name in form.passes:
        getattr(work, name[:-1])(int(name[-1]))


def square(form: Form, cut: Cut, g: np.ndarray, word: str) -> float:
    """R over one tensor of what `form` sums of a gradient alone, whose number format is `word`."""
    flat = _words(g.reshape(-1))
    work = _Work(form, cut, flat, flat, {}, Rows(np.ones(1, np.float32), np.zeros(0)), loops(form, word, word))
    work.sums(0)
    return _total(work.parts[0])


def _checked(
    cut: Cut, sizes: dict[str, int], p: np.ndarray, g: np.ndarray, states: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    for name, a in (("p", p), ("g", g)):
        if a.dtype.name not in NUMBERS:
            raise TypeError(f"step: {name} must be float32, float16 or words of bfloat16, got {a.dtype}")
        if a.size != cut.n or not a.flags.c_contiguous:
            raise ShapeError(f"step: {name} must be {cut.n} elements, row-major, got {a.shape}")
    for name, a in states.items():
        if a.dtype != np.float32 or not a.flags.c_contiguous:
            raise TypeError(f"step: state {name} must be float32, row-major, got {a.dtype}")
        if sizes.get(name) != a.size:
            raise ShapeError(f"step: state {name} has {a.size} entries, it must have {sizes.get(name, 'none')}")
    if missing := sizes.keys() - states.keys():
        raise ShapeError(f"step: states {', '.join(sorted(missing))} are missing")
    flat = {name: a.reshape(-1) for name, a in states.items()}
    return _words(p.reshape(-1)), _words(g.reshape(-1)), flat


def _words(a: np.ndarray) -> np.ndarray:
    return a if a.dtype == np.float32 else a.view(np.uint16)


class _Work:
    """One tensor in one step; a method a pass."""

    def __init__(
        self,
        form: Form,
        cut: Cut,
        p: np.ndarray,
        g: np.ndarray,
        states: dict[str, np.ndarray],
        rows: Rows,
        loops: Loops,
    ) -> None:
        self.form, self.cut, self.p, self.g, self.rows = form, cut, p, g, rows
        pairs = max(len(form.factors) // 2, 1) if form.factored else 1
        self.x = tuple(states.get(name, NOTHING) for name in form.elements)
        self.f = [states.get(name, NOTHING) for name in form.factors]
        self.roots, self.columns = [NOTHING] * pairs, [NOTHING] * pairs
        self.k = np.zeros((cut.blocks, 4), np.float32)
        self.parts = np.zeros((2, cut.pieces))
        self.s = tuple(np.float32(v) for v in rows.scalars)
        self.named = dict(zip(form.scalars, self.s, strict=True))
        self.loops = loops

    def sums(self, number: int) -> None:
        """Sums of squares over each piece."""
        cut = self.cut
        _spread(
            self.loops.sums,
            cut.pieces,
            cut.n,
            (self.p, self.g, self.x, *self._inverse(), self._shape(), self.s, self.parts),
        )

    def finish(self, number: int) -> None:
        """R over the pieces of each block, and what the rule makes of it."""
        cut = self.cut
        r = self.parts[: self.form.sums].reshape(self.form.sums, cut.blocks, cut.per)
        whole = r[:, :, 0] if cut.per == 1 else np.array([[_total(block) for block in plane] for plane in r])
        factor = self.f[0] if self.f else NOTHING
        self.k[:] = self.form.module.finish(
            whole, cut.block, self.rows.scalars, self.rows.wide, factor, **self.form.options
        )

    def tiles(self, number: int) -> None:
        """Sums over rows and columns of each tile."""
        cut = self.cut
        self.of_rows = np.zeros((cut.matrices * cut.rows, cut.across))
        self.of_columns = np.zeros((cut.matrices * cut.columns, cut.down))
        if cut.matrices:
            given = (self.g, self.x, *self._inverse(), self._shape(), self.k, self.s, self.of_rows, self.of_columns)
            _spread(self.loops.tiles[number], cut.matrices * cut.down, cut.n, given)

    def lines(self, number: int) -> None:
        """The factors: running means of those sums, and the inverse roots of the columns."""
        cut = self.cut
        if not cut.matrices:
            return
        keep, gain = (self.named[name] for name in self.form.module.KEEP[number])
        for factor, parts, n in zip(
            self.f[2 * number :], (self.of_rows, self.of_columns), (cut.columns, cut.rows), strict=False
        ):
            with np.errstate(all="ignore"):
                factor[:] = keep * factor + gain * (_r256_rows(parts) / n).astype(np.float32)
        with np.errstate(all="ignore"):
            self.columns[number] = np.asarray(np.float32(1) / np.sqrt(self.f[2 * number + 1]), np.float32)

    def means(self, number: int) -> None:
        """The inverse roots of the rows, each row factor over its mean."""
        cut, least = self.cut, self.form.module.LEAST
        if not cut.matrices:
            return
        R = self.f[2 * number].reshape(cut.matrices, cut.rows)
        with np.errstate(all="ignore"):
            mean = np.maximum(_r256_rows(R) / cut.rows, self.named[least] if least else 0.0).astype(np.float32)
            self.roots[number] = np.asarray(np.float32(1) / np.sqrt(R / mean[:, None]), np.float32).reshape(-1)

    def update(self, number: int) -> None:
        """The rule's step, element by element."""
        cut = self.cut
        _spread(
            self.loops.update,
            cut.pieces,
            cut.n,
            (self.p, self.g, self.x, *self._inverse(), self._shape(), self.k, self.s),
        )

    def _inverse(self) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        return tuple(self.roots), tuple(self.columns)

    def _shape(self) -> tuple[int, ...]:
        cut = self.cut
        return cut.block, cut.piece, cut.per, cut.matrices, cut.rows, cut.columns, cut.across, cut.down


def _spread(ways: Any, count: int, size: int, given: tuple[Any, ...]) -> None:
    serial, parallel = ways
    if size < PARALLEL_FROM or count == 1:
        serial(*given, 0, count)
    else:
        with POOL:
            parallel(*given, count, numba.get_num_threads())


def _total(x: np.ndarray) -> float:
    """R of the results of pieces."""
    while x.size > CHUNK:
        chunks = [x[k : k + CHUNK] for k in range(0, x.size, CHUNK)]
        x = np.concatenate([_r256_rows(chunk[None]) for chunk in chunks])
    return float(_r256_rows(x[None])[0])


def _r256_rows(x: np.ndarray) -> np.ndarray:
    """R256 of every row, float64."""
    lanes = np.zeros((len(x), SIDE))
    for k in range(0, x.shape[1], SIDE):
        part = x[:, k : k + SIDE]
        lanes[:, : part.shape[1]] += part
    w = SIDE
    while w > 1:
        w //= 2
        lanes = lanes[:, :w] + lanes[:, w:]
    return lanes[:, 0]
