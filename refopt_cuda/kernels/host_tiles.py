"""The pieces of a host kernel, as Numba functions: decode a tile, run the rule over it, encode it back.

Each piece is made for one rule and one codec a state, and is handed the tile's place as `where`: (first element,
elements, row, offset in the row, row length). A codec of None is float32, which is used where it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from numba.np.unsafe.ndarray import to_fixed_tuple

from refopt_cuda.codecs.forms import Block, Element

__all__ = ["NO_SCALES", "rule_loop", "spread", "tiles"]

MAGNITUDE = np.uint32(0x7FFFFFFF)
NO_SCALES = np.zeros(0, np.float32)
"""Stands in for the scales of a state without any."""
options: dict[str, Any] = {"error_model": "numpy", "nogil": True, "_nrt": False}
jit = numba.njit(**options)
"""Without reference counts: a slice would cost two atomic operations, a third of the time of a short block."""
inline = numba.njit(inline="always")
"""For what returns a slice, which only a counted reference may do across a call."""


def tiles(tables: Sequence, loop: Callable, p_form: Element | None, g_form: Element | None) -> Callable:
    """The loop over tiles [lo, hi). `where` is (first element, elements, row, offset in the row, row length)."""
    open_p, open_g, close_p = _open(p_form), _open(g_form), _close(p_form)
    view_p, view_g = _view(p_form), _view(g_form)
    opened, views, closed = _opened(tables), _views(tables), _closed(tables)
    allocate = _allocated(2 + len(tables))

    @jit
    def walk(p, g, codes, scales, s, blocks, row, tile, lo, hi, buffers):
        per_row = (row + tile - 1) // tile
        for k in range(lo, hi):
            r = k // per_row
            offset = (k - r * per_row) * tile
            where = (r * row + offset, min(tile, row - offset), r, offset, row)
            open_p(p, NO_SCALES, buffers[0], 1, where)
            open_g(g, NO_SCALES, buffers[1], 1, where)
            opened(codes, scales, buffers[2:], blocks, where)
            p_tile = view_p(p, buffers[0], where)
            x = views(codes, buffers[2:], where)
            loop(p_tile, view_g(g, buffers[1], where), x, s)
            closed(codes, scales, x, blocks, where)
            close_p(p, NO_SCALES, p_tile, 1, where)

    @numba.njit(error_model="numpy", nogil=True)
    def serial(p, g, codes, scales, s, blocks, row, tile, lo, hi):
        walk(p, g, codes, scales, s, blocks, row, tile, lo, hi, allocate(tile))

    return serial


def spread(serial: Callable) -> Callable:
    """All tiles, an even share for each thread; no element depends on the share it falls into."""

    @numba.njit(parallel=True, error_model="numpy")
    def parallel(p, g, codes, scales, s, blocks, row, tile, count, threads):
        for k in numba.prange(threads):
            serial(p, g, codes, scales, s, blocks, row, tile, k * count // threads, (k + 1) * count // threads)

    return parallel


def rule_loop(states: int, rule: Callable, scalars: int) -> Callable:
    """The rule over one tile, written out for each number of states so that LLVM sees plain loops over plain arrays."""

    @jit
    def loop0(p, g, x, s):
        row = to_fixed_tuple(s, scalars)
        for i in range(p.size):
            p[i], _ = rule(p[i], g[i], (), row)

    @jit
    def loop1(p, g, x, s):
        row = to_fixed_tuple(s, scalars)
        (a,) = x
        for i in range(p.size):
            p[i], (a[i],) = rule(p[i], g[i], (a[i],), row)

    @jit
    def loop2(p, g, x, s):
        row = to_fixed_tuple(s, scalars)
        a, b = x
        for i in range(p.size):
            p[i], (a[i], b[i]) = rule(p[i], g[i], (a[i], b[i]), row)

    @jit
    def loop3(p, g, x, s):
        row = to_fixed_tuple(s, scalars)
        a, b, c = x
        for i in range(p.size):
            p[i], (a[i], b[i], c[i]) = rule(p[i], g[i], (a[i], b[i], c[i]), row)

    return (loop0, loop1, loop2, loop3)[states]


def _allocated(count: int) -> Callable:
    """A tuple of float32 buffers, each an allocation of its own: LLVM cannot tell two rows of one array apart."""
    if count == 0:
        return numba.njit(lambda size: ())
    rest = _allocated(count - 1)
    return numba.njit(lambda size: (np.empty(size, np.float32),) + rest(size))


def _opened(tables: Sequence) -> Callable:
    """Decode one tile of every state into its buffer."""
    if not tables:
        return jit(lambda codes, scales, buffers, blocks, where: None)
    head, tail = _open(tables[0]), _opened(tables[1:])

    @jit
    def opened(codes, scales, buffers, blocks, where):
        head(codes[0], scales[0], buffers[0], blocks[0], where)
        tail(codes[1:], scales[1:], buffers[1:], blocks[1:], where)

    return opened


def _views(tables: Sequence) -> Callable:
    """One tile of every state as a tuple of float32 arrays."""
    if not tables:
        return inline(lambda codes, buffers, where: ())
    head, tail = _view(tables[0]), _views(tables[1:])

    @inline
    def views(codes, buffers, where):
        return (head(codes[0], buffers[0], where),) + tail(codes[1:], buffers[1:], where)

    return views


def _view(table: Block | Element | None) -> Callable:
    """Where a tile lies as float32: in the stored array itself (None), or in the buffer it was decoded into."""
    if table is None:
        return inline(lambda codes, buffer, where: codes[where[0] : where[0] + where[1]])
    return inline(lambda codes, buffer, where: buffer[: where[1]])


def _closed(tables: Sequence) -> Callable:
    """Encode one tile of every state back into its codes and scales."""
    if not tables:
        return jit(lambda codes, scales, x, blocks, where: None)
    head, tail = _close(tables[0]), _closed(tables[1:])

    @jit
    def closed(codes, scales, x, blocks, where):
        head(codes[0], scales[0], x[0], blocks[0], where)
        tail(codes[1:], scales[1:], x[1:], blocks[1:], where)

    return closed


def _open(table: Block | Element | None) -> Callable:
    """How a tile is decoded into its buffer; float32 itself (None) is used where it lies."""
    if table is None:
        return jit(lambda codes, scales, buffer, block, where: None)
    if isinstance(table, Element):
        return _open_elements(table.load)
    return _open_blocks(table.decode)


def _open_elements(load: Callable) -> Callable:
    @jit
    def elements(codes, scales, buffer, block, where):
        words, x = codes[where[0] : where[0] + where[1]], buffer[: where[1]]
        for i in range(x.size):
            x[i] = load(words[i])

    return elements


def _open_blocks(decode: Callable) -> Callable:
    @jit
    def decoded(codes, scale, x):
        for i in range(x.size):
            x[i] = decode(codes[i], scale)

    @jit
    def blocks(codes, scales, buffer, block, where):
        start, size, r, offset, row = where
        words, x = codes[start : start + size], buffer[:size]
        k = r * ((row + block - 1) // block) + offset // block
        for lo in range(0, size, block):
            hi = min(lo + block, size)
            decoded(words[lo:hi], scales[k], x[lo:hi])
            k += 1

    return blocks


def _close(table: Block | Element | None) -> Callable:
    """How a tile of fresh float32 values is stored; float32 itself (None) was updated where it lies."""
    if table is None:
        return jit(lambda codes, scales, x, block, where: None)
    if isinstance(table, Element):
        return _close_elements(table.store)
    return _close_blocks(table)


def _close_elements(store: Callable) -> Callable:
    @jit
    def elements(codes, scales, x, block, where):
        words = codes[where[0] : where[0] + where[1]]
        for i in range(x.size):
            words[i] = store(x[i])

    return elements


def _close_blocks(table: Block) -> Callable:
    encoded = _encoded(table)

    @jit
    def blocks(codes, scales, x, block, where):
        start, size, r, offset, row = where
        k = r * ((row + block - 1) // block) + offset // block
        for lo in range(0, size, block):
            hi = min(lo + block, size)
            scales[k] = encoded(codes[start + lo : start + hi], x[lo:hi])
            k += 1

    return blocks


def _encoded(table: Block) -> Callable:
    """Encode one block and return its stored scale; the maximum is one of integers, so that NaN > Inf > any number."""
    scale, encode, zero = table.scale, table.encode, table.zero

    @jit
    def encoded(codes, x):
        words = x.view(np.uint32)
        absmax = np.uint32(0)
        for i in range(words.size):
            absmax = max(absmax, np.uint32(words[i] & MAGNITUDE))
        stored, inverse, coded = scale(absmax)
        if coded:
            for i in range(x.size):
                codes[i] = encode(x[i], inverse)
        else:
            codes[:] = zero
        return stored

    return encoded
