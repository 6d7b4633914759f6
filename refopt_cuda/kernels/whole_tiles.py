"""The passes of a rule that sees whole tensors, as Numba loops for CPU threads over the scalar functions of the rule.

Each is made for one form of a rule and two formats of numbers, and goes over pieces or stripes [lo, hi); its sums are
in the canonical order whatever the share of a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numba
import numpy as np

from refopt_cuda.codecs import CODECS
from refopt_cuda.kernels import half
from refopt_cuda.kernels.arith import INNER, OUTER, host
from refopt_cuda.kernels.host_cache import cached
from refopt_cuda.kernels.whole_cut import SIDE
from refopt_cuda.kernels.whole_rules import Form

__all__ = ["Loops", "loops"]

ZERO = np.float32(0)
jit = numba.njit(**INNER)
inline = numba.njit(**INNER, inline="always")
"""For what returns a slice, which only a counted reference may do across a call."""


class Loops(NamedTuple):
    """The compiled passes of one form and two formats, each over pieces or stripes [lo, hi)."""

    sums: Callable | None
    tiles: tuple[Callable, ...]
    update: Callable


@cache
def _number(word: str) -> tuple[Callable, Callable]:
    """`(load, store)` of a number format."""
    if word == "f32":
        same = jit(lambda x: x)
        return same, same
    made = (half if word == "f16" else CODECS[word]).make(host())
    return made.load, made.store


@cache
def loops(form: Form, p_word: str, g_word: str) -> Loops:
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


@jit
def _one(a, i):
    """An element; 0 of an empty array, which holds none."""
    return a[i] if a.size else ZERO


def _states(count: int) -> tuple[Callable, Callable, Callable]:
    """`cut(x, lo, hi)`, `take(x, i)` and `put(x, i, y)` of the states of a weight; an empty array holds none."""

    @jit
    def set_one(a, i, y):
        if a.size:
            a[i] = y

    if count == 1:
        cut = inline(lambda x, lo, hi: (x[0][lo:hi],))
        return cut, jit(lambda x, i: (_one(x[0], i),)), jit(lambda x, i, y: set_one(x[0], i, y[0]))

    @jit
    def take(x, i):
        return _one(x[0], i), _one(x[1], i)

    @jit
    def put(x, i, y):
        set_one(x[0], i, y[0])
        set_one(x[1], i, y[1])

    return inline(lambda x, lo, hi: (x[0][lo:hi], x[1][lo:hi])), take, put


def _nears(pairs: int, mul: Callable) -> tuple[Callable, Callable, Callable]:
    """Roots of the rank-1 moments of the weights of a run, 0 where they are not known.

    `of_row(roots, row)` and `cut(columns, lo, hi)` are the run's, `near(of_row, cut, j)` is a weight's.
    """

    @jit
    def product(root, columns, j):
        return mul(root, columns[j]) if columns.size else ZERO

    if pairs == 0:
        return jit(lambda roots, row: (ZERO,)), inline(lambda c, lo, hi: (c[0],)), jit(lambda r, c, j: (ZERO,))
    if pairs == 1:
        row_root, columns = jit(lambda roots, row: (_one(roots[0], row),)), inline(lambda c, lo, hi: (c[0][lo:hi],))
        return row_root, columns, jit(lambda r, c, j: (product(r[0], c[0], j),))
    of_row = jit(lambda roots, row: (_one(roots[0], row), _one(roots[1], row)))
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
