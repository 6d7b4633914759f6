"""One step of a rule that sees whole tensors, on the CPU: Numba loops over the scalar functions of the rule.

The passes are those of `whole.cu`, and so are the sums: pieces, tiles and accumulators in the canonical order. Rows,
chunks and stripes of tiles are shared by Numba's threads; no sum depends on which thread takes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np

from refopt.spec import ShapeError
from refopt_cuda.codecs import CODECS
from refopt_cuda.kernels import half
from refopt_cuda.kernels.arith import INNER, OUTER, host
from refopt_cuda.kernels.host_cache import cached
from refopt_cuda.kernels.whole_cut import CHUNK, SIDE, Cut
from refopt_cuda.kernels.whole_rules import Form, Rows

__all__ = ["step"]

NUMBERS = {"float32": "f32", "float16": "f16", "uint16": "bf16", "int16": "bf16"}
"""Dtypes of arrays of weights and gradients; bfloat16 comes as its words."""
NOTHING = np.zeros(0, np.float32)
PARALLEL_FROM = 1 << 17
"""Elements from which a tensor is worth waking threads for."""
_threads = threading.Lock()
"""Numba's own thread pool must not be entered by two threads at once."""


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
    work = _Work(form, cut, p, g, kept, rows, _loops(form, *formats))
    for name in form.passes:
        getattr(work, name[:-1])(int(name[-1]))


def square(form: Form, cut: Cut, g: np.ndarray, word: str) -> float:
    """R over one tensor of what `form` sums of a gradient alone, whose number format is `word`."""
    flat = _words(g.reshape(-1))
    work = _Work(form, cut, flat, flat, {}, Rows(np.ones(1, np.float32), np.zeros(0)), _loops(form, word, word))
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


class Loops(NamedTuple):
    """The compiled passes of one form and two formats, each over pieces or stripes [lo, hi)."""

    sums: Callable | None
    tiles: tuple[Callable, ...]
    update: Callable


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
        with _threads:
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


# ------------------------------------------------------------------------------------------------------ compiled loops

jit = numba.njit(**INNER)


@cache
def _number(word: str) -> tuple[Callable, Callable]:
    """`(load, store)` of a number format."""
    if word == "f32":
        same = jit(lambda x: x)
        return same, same
    made = (half if word == "f16" else CODECS[word]).make(host())
    return made.load, made.store


@cache
def _loops(form: Form, p_word: str, g_word: str) -> Loops:
    """Compiled when they first run, or found on disk."""
    steps, o, name = form.make(host()), host(), f"{form.name}_{p_word}_{g_word}"
    near = _nears(len(form.factors) // 2 if form.factored else 0, o.mul)
    (load_p, store_p), (load_g, _) = _number(p_word), _number(g_word)
    states = _states(len(form.elements))

    def ways(serial: Callable, what: str, arity: int) -> tuple[Callable, Callable]:
        return cached(serial, f"{name}_{what}"), cached(_parallel(serial, arity), f"{name}_{what}_parallel")

    sums = ways(_sums(steps.sums, near, states, load_p, load_g, o.mul), "sums", 8) if steps.sums else None
    tiles = tuple(ways(_tiles(tile, near, states, load_g, o.mul), f"tiles{k}", 9) for k, tile in enumerate(steps.tiles))
    update = ways(_update(steps.update, near, states, load_p, load_g, store_p, o.mul), "update", 8)
    return Loops(sums, tiles, update)  # type: ignore[arg-type]


inline = numba.njit(**INNER, inline="always")
"""For what returns a slice, which only a counted reference may do across a call."""


def _states(count: int) -> tuple[Callable, Callable, Callable]:
    """`cut(x, lo, hi)`, `take(x, i)` and `put(x, i, y)` of the states of a weight; an empty array holds none."""
    zero = np.float32(0)

    @jit
    def one(a, i):
        return a[i] if a.size else zero

    @jit
    def set_one(a, i, y):
        if a.size:
            a[i] = y

    if count == 1:
        cut = inline(lambda x, lo, hi: (x[0][lo:hi],))
        return cut, jit(lambda x, i: (one(x[0], i),)), jit(lambda x, i, y: set_one(x[0], i, y[0]))

    @jit
    def take(x, i):
        return one(x[0], i), one(x[1], i)

    @jit
    def put(x, i, y):
        set_one(x[0], i, y[0])
        set_one(x[1], i, y[1])

    return inline(lambda x, lo, hi: (x[0][lo:hi], x[1][lo:hi])), take, put


def _nears(pairs: int, mul: Callable) -> tuple[Callable, Callable, Callable]:
    """Roots of the rank-1 moments of the weights of a run, 0 where they are not known.

    `of_row(roots, row)` and `cut(columns, lo, hi)` are the run's, `near(of_row, cut, j)` is a weight's.
    """
    zero = np.float32(0)

    @jit
    def one(rows, row):
        return rows[row] if rows.size else zero

    @jit
    def product(root, columns, j):
        return mul(root, columns[j]) if columns.size else zero

    if pairs == 0:
        return jit(lambda roots, row: (zero,)), inline(lambda c, lo, hi: (c[0],)), jit(lambda r, c, j: (zero,))
    if pairs == 1:
        row_root, columns = jit(lambda roots, row: (one(roots[0], row),)), inline(lambda c, lo, hi: (c[0][lo:hi],))
        return row_root, columns, jit(lambda r, c, j: (product(r[0], c[0], j),))
    of_row = jit(lambda roots, row: (one(roots[0], row), one(roots[1], row)))
    cut = inline(lambda c, lo, hi: (c[0][lo:hi], c[1][lo:hi]))
    return of_row, cut, jit(lambda r, c, j: (product(r[0], c[0], j), product(r[1], c[1], j)))


@jit
def _tree(lanes):
    w = lanes.size
    while w > 1:
        w //= 2
        for j in range(w):
            lanes[j] = lanes[j] + lanes[j + w]
    return lanes[0]


NEVER = 1 << 62
"""The end of the one row of a tensor that is not factored."""


@jit
def _place(i, matrices, rows, columns):
    """(row of all matrices, column of all matrices, first element of the next row) of element i."""
    if matrices == 0:
        return 0, 0, NEVER
    row = i // columns
    return row, row // rows * columns + i - row * columns, (row + 1) * columns


def _sums(function, near, states, load_p, load_g, mul):
    (cut, take, _), (of_row, cut_columns, near) = states, near

    @jit
    def run(p, g, x, root, c, vector, s, u, w):
        for j in range(u.size):
            u[j], w[j] = function(load_p(p[j]), mul(load_g(g[j]), s[0]), take(x, j), near(root, c, j), vector, s)

    @numba.njit(**OUTER)
    def serial(p, g, x, roots, columns_, shape, s, parts, lo, hi):
        block, piece, per, matrices, rows, columns, _, _ = shape
        a, b, u, w = np.empty(SIDE), np.empty(SIDE), np.empty(SIDE, np.float32), np.empty(SIDE, np.float32)
        for q in range(lo, hi):
            start = q // per * block + q % per * piece
            end = min(start + piece, (q // per + 1) * block)
            a[:], b[:] = 0.0, 0.0
            for first in range(start, end, SIDE):
                count, done = min(SIDE, end - first), 0
                while done < count:  # a run does not leave its row
                    row, column, edge = _place(first + done, matrices, rows, columns)
                    stop = min(count, edge - first)
                    i, n = first + done, stop - done
                    c, y = cut_columns(columns_, column, column + n), cut(x, i, i + n)
                    out = u[done:stop], w[done:stop]
                    run(p[i : i + n], g[i : i + n], y, of_row(roots, row), c, matrices == 0, s, *out)
                    done = stop
                for j in range(count):
                    a[j] += np.float64(u[j]) * np.float64(u[j])
                    b[j] += np.float64(w[j]) * np.float64(w[j])
            parts[0, q], parts[1, q] = _tree(a), _tree(b)

    return serial


def _tiles(function, near, states, load_g, mul):
    (cut, take, _), (of_row, cut_columns, near) = states, near

    @jit
    def run(g, x, root, c, k, s, q):
        for j in range(q.size):
            q[j] = function(mul(load_g(g[j]), s[0]), take(x, j), near(root, c, j), k, s)

    @numba.njit(**OUTER)
    def serial(g, x, roots, columns_, shape, k, s, of_rows, of_columns, lo, hi):
        _, _, _, _, rows, columns, across, down = shape
        groups, strips, q, eight = np.empty(32), np.empty((8, SIDE)), np.zeros(SIDE, np.float32), np.empty(8)
        for stripe in range(lo, hi):
            matrix, below = stripe // down, stripe % down
            for right in range(across):
                strips[:] = 0.0
                column = right * SIDE
                count = min(SIDE, columns - column)
                q[count:] = 0.0
                for i in range(below * SIDE, min(rows, (below + 1) * SIDE)):
                    row = matrix * rows + i
                    at, across_all = row * columns + column, matrix * columns + column
                    c, y = cut_columns(columns_, across_all, across_all + count), cut(x, at, at + count)
                    run(g[at : at + count], y, of_row(roots, row), c, k[0], s, q[:count])
                    groups[:] = 0.0
                    for e in range(8):
                        for j in range(32):
                            groups[j] += np.float64(q[8 * j + e])
                    strip = strips[(i % SIDE) // 32]
                    for j in range(SIDE):
                        strip[j] += np.float64(q[j])
                    of_rows[row, right] = _tree(groups)
                for j in range(count):
                    eight[:] = strips[:, j]
                    of_columns[matrix * columns + column + j, below] = _tree(eight)

    return serial


def _update(function, near, states, load_p, load_g, store_p, mul):
    (cut, take, put), (of_row, cut_columns, near) = states, near

    @jit
    def run(p, g, x, root, c, k, vector, s):
        for j in range(p.size):
            y, z = function(load_p(p[j]), mul(load_g(g[j]), s[0]), take(x, j), near(root, c, j), k, vector, s)
            p[j] = store_p(y)
            put(x, j, z)

    @numba.njit(**OUTER)
    def serial(p, g, x, roots, columns_, shape, k, s, lo, hi):
        block, piece, per, matrices, rows, columns, _, _ = shape
        for q in range(lo, hi):
            start = q // per * block + q % per * piece
            end = min(start + piece, (q // per + 1) * block)
            while start < end:  # a run does not leave its row
                row, column, edge = _place(start, matrices, rows, columns)
                stop = min(end, edge)
                c, y = cut_columns(columns_, column, column + stop - start), cut(x, start, stop)
                run(p[start:stop], g[start:stop], y, of_row(roots, row), c, k[q // per], matrices == 0, s)
                start = stop

    return serial


def _parallel(serial, arity):
    """All pieces, an even share for each thread."""
    if arity == 8:

        @numba.njit(parallel=True, **OUTER)
        def parallel8(a, b, c, d, e, f, h, i, count, threads):
            for k in numba.prange(threads):
                serial(a, b, c, d, e, f, h, i, k * count // threads, (k + 1) * count // threads)

        return parallel8

    @numba.njit(parallel=True, **OUTER)
    def parallel9(a, b, c, d, e, f, h, i, j, count, threads):
        for k in numba.prange(threads):
            serial(a, b, c, d, e, f, h, i, j, k * count // threads, (k + 1) * count // threads)

    return parallel9
