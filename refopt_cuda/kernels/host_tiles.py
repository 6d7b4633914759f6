"""The pieces of a host kernel, as Numba functions: decode a tile, run the rule over it, encode it back.

Each piece is made for one rule, one codec a state and one format of weights, and is handed the tile's place as
`where`: (first element, elements, row, offset in the row, row length). A format of None is float32, which is used
where it lies. What lies beside the codes, `beside`, are the scales of a block codec or the rests of weights. Pieces are
shared by the kernels of a process: most of a compilation is spent on them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numba
import numpy as np
from numba.extending import intrinsic
from numba.np.unsafe.ndarray import to_fixed_tuple

from refopt_cuda.codecs.forms import Block, Element, Weight
from refopt_cuda.kernels.arguments import NOTHING
from refopt_cuda.kernels.arith import INNER, OUTER, host
from refopt_cuda.random import mixer

__all__ = ["POOL", "Nibbles", "Words", "rule_loop", "spread", "tiles"]

POOL = threading.Lock()
"""Numba's own thread pool (its layer of last resort) must not be entered by two threads at once."""
LOOSE, FEW = 8, 8
"""Which part of the tiles is left to threads that are done early, as one over it; how many they take at a time."""
MAGNITUDE = np.uint32(0x7FFFFFFF)
LOW, HALF_BYTE = np.uint8(15), np.uint8(4)
NO_BITS = np.uint32(0)
jit = numba.njit(**INNER | {"_nrt": False})
"""Without reference counts: a slice would cost two atomic operations, a third of the time of a short block."""
inline = numba.njit(**INNER, inline="always")
"""For what returns a slice, which only a counted reference may do across a call."""


class Nibbles(NamedTuple):
    """A block codec of 4-bit codes: two share a byte, the earlier in its upper half, and each block begins a byte."""

    block: Block


class Words(NamedTuple):
    """A format of weights: whether something lies beside the words, and whether storing them draws random bits."""

    weight: Weight
    rest: bool
    random: bool


Table = Block | Nibbles | Words | Element | None


def tiles(tables: Sequence[Table], loop: Callable, p_form: Table, g_form: Element | None) -> Callable:
    """The loop over tiles [lo, hi) of a tensor."""
    open_p, open_g, close_p = _open(p_form), _open(g_form), _close_weights(p_form)
    view_p, view_g = _view(p_form), _view(g_form)
    opened, views, closed = _opened(tables), _views(tables), _closed(tables)
    allocate, drawn = _allocated(2 + len(tables)), isinstance(p_form, Words) and p_form.random

    @jit
    def walk(p, rest, g, codes, scales, s, blocks, row, tile, key, lo, hi, buffers, bits):
        per_row = (row + tile - 1) // tile
        for k in range(lo, hi):
            r = k // per_row
            offset = (k - r * per_row) * tile
            where = (r * row + offset, min(tile, row - offset), r, offset, row)
            open_p(p, rest, buffers[0], 1, where)
            open_g(g, NOTHING, buffers[1], 1, where)
            opened(codes, scales, buffers[2:], blocks, where)
            p_tile = view_p(p, buffers[0], where)
            x = views(codes, buffers[2:], where)
            loop(p_tile, view_g(g, buffers[1], where), x, s)
            closed(codes, scales, x, blocks, where)
            close_p(p, rest, p_tile, key, bits, where)

    @numba.njit(**OUTER)
    def serial(p, rest, g, codes, scales, s, blocks, row, tile, key, lo, hi):
        bits = np.empty(tile // 4 + 2 if drawn else 0, np.uint64)
        walk(p, rest, g, codes, scales, s, blocks, row, tile, key, lo, hi, allocate(tile), bits)

    return serial


@intrinsic
def _take(typing, counter, count):
    """Add `count` to an int64 array of one number, which other threads add to as well; returns what it was."""

    def codegen(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.atomic_rmw("add", array.data, args[1], "monotonic")

    return numba.int64(counter, numba.int64), codegen


def spread(serial: Callable) -> Callable:
    """All tiles: an even share of most for each thread, and of the last ones a few at a time for whoever is done first.
    No element depends on who takes it."""

    @numba.njit(parallel=True, **OUTER)
    def parallel(p, rest, g, codes, scales, s, blocks, row, tile, key, count, threads):
        most = count - count // LOOSE
        taken = np.full(1, most, np.int64)
        for k in numba.prange(threads):
            lo, hi = k * most // threads, (k + 1) * most // threads
            while lo < count:
                serial(p, rest, g, codes, scales, s, blocks, row, tile, key, lo, hi)
                lo = _take(taken, FEW)
                hi = min(lo + FEW, count)

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


@cache
def _allocated(count: int) -> Callable:
    """A tuple of float32 buffers, each an allocation of its own: LLVM cannot tell two rows of one array apart."""
    if count == 0:
        return numba.njit(**INNER)(lambda size: ())
    rest = _allocated(count - 1)
    return numba.njit(**INNER)(lambda size: (np.empty(size, np.float32),) + rest(size))


# ----------------------------------------------------------------------------------------------------------- all states


def _opened(tables: Sequence[Table]) -> Callable:
    """Decode one tile of every state into its buffer."""
    if not tables:
        return jit(lambda codes, scales, buffers, blocks, where: None)
    head, tail = _open(tables[0]), _opened(tables[1:])

    @jit
    def opened(codes, scales, buffers, blocks, where):
        head(codes[0], scales[0], buffers[0], blocks[0], where)
        tail(codes[1:], scales[1:], buffers[1:], blocks[1:], where)

    return opened


def _views(tables: Sequence[Table]) -> Callable:
    """One tile of every state as a tuple of float32 arrays."""
    if not tables:
        return inline(lambda codes, buffers, where: ())
    head, tail = _view(tables[0]), _views(tables[1:])

    @inline
    def views(codes, buffers, where):
        return (head(codes[0], buffers[0], where),) + tail(codes[1:], buffers[1:], where)

    return views


@cache
def _view(table: Table) -> Callable:
    """Where a tile lies as float32: in the stored array itself (None), or in the buffer it was decoded into."""
    if table is None:
        return inline(lambda codes, buffer, where: codes[where[0] : where[0] + where[1]])
    return inline(lambda codes, buffer, where: buffer[: where[1]])


def _closed(tables: Sequence[Table]) -> Callable:
    """Encode one tile of every state back into its codes and scales."""
    if not tables:
        return jit(lambda codes, scales, x, blocks, where: None)
    head, tail = _close(tables[0]), _closed(tables[1:])

    @jit
    def closed(codes, scales, x, blocks, where):
        head(codes[0], scales[0], x[0], blocks[0], where)
        tail(codes[1:], scales[1:], x[1:], blocks[1:], where)

    return closed


# ------------------------------------------------------------------------------------------------------------- decoding


@cache
def _open(table: Table) -> Callable:
    """How a tile is decoded into its buffer: `(codes, beside, buffer, block, where)`."""
    if table is None:
        return jit(lambda codes, beside, buffer, block, where: None)
    if isinstance(table, Element):
        return _open_elements(table.load)
    if isinstance(table, Words):
        return _open_words(table)
    if isinstance(table, Nibbles):
        return _open_blocks(_nibbles_decoded(table.block.decode), _packed_place)
    return _open_blocks(_decoded(table.decode), _place)


def _open_elements(load: Callable) -> Callable:
    @jit
    def elements(codes, beside, buffer, block, where):
        words, x = codes[where[0] : where[0] + where[1]], buffer[: where[1]]
        for i in range(x.size):
            x[i] = load(words[i])

    return elements


def _open_words(table: Words) -> Callable:
    load = table.weight.open

    @jit
    def alone(codes, beside, buffer, block, where):
        words, x = codes[where[0] : where[0] + where[1]], buffer[: where[1]]
        for i in range(x.size):
            x[i] = load(words[i], NO_BITS)

    @jit
    def beside_rests(codes, beside, buffer, block, where):
        lo, hi = where[0], where[0] + where[1]
        words, rests, x = codes[lo:hi], beside[lo:hi], buffer[: where[1]]
        for i in range(x.size):
            x[i] = load(words[i], rests[i])

    return beside_rests if table.rest else alone


@jit
def _place(block, where):
    """(block number, its first byte) of a tile's first element, and bytes from one block to the next."""
    start, _, r, offset, row = where
    return r * ((row + block - 1) // block) + offset // block, start, block


@jit
def _packed_place(block, where):
    """The same where two codes share a byte and every block begins one."""
    _, _, r, offset, row = where
    stride, tail = (block + 1) // 2, (row % block + 1) // 2
    first = r * (row // block * stride + tail) + offset // block * stride
    return r * ((row + block - 1) // block) + offset // block, first, stride


def _open_blocks(decoded: Callable, place: Callable) -> Callable:
    @jit
    def blocks(codes, scales, buffer, block, where):
        size = where[1]
        x, (k, at, stride) = buffer[:size], place(block, where)
        for lo in range(0, size, block):
            decoded(codes[at : at + stride], scales[k], x[lo : min(lo + block, size)])
            k, at = k + 1, at + stride

    return blocks


def _decoded(decode: Callable) -> Callable:
    @jit
    def decoded(codes, scale, x):
        for i in range(x.size):
            x[i] = decode(codes[i], scale)

    return decoded


def _nibbles_decoded(decode: Callable) -> Callable:
    @jit
    def decoded(codes, scale, x):
        for i in range(x.size // 2):
            byte = codes[i]
            x[2 * i] = decode(np.uint8(byte >> HALF_BYTE), scale)
            x[2 * i + 1] = decode(np.uint8(byte & LOW), scale)
        if x.size % 2:
            x[x.size - 1] = decode(np.uint8(codes[x.size // 2] >> HALF_BYTE), scale)

    return decoded


# ------------------------------------------------------------------------------------------------------------- encoding


@cache
def _close(table: Table) -> Callable:
    """How a tile of fresh values is stored, `(codes, scales, x, block, where)`; float32 was updated where it lies."""
    if table is None:
        return jit(lambda codes, scales, x, block, where: None)
    if isinstance(table, Element):
        return _close_elements(table.store)
    if isinstance(table, Nibbles):
        return _close_blocks(_encoded(table.block, *_nibbles_encoded(table.block)), _packed_place)
    if isinstance(table, Words):
        raise TypeError("host_tiles: weights are stored by _close_weights")
    return _close_blocks(_encoded(table, *_bytes_encoded(table)), _place)


def _close_elements(store: Callable) -> Callable:
    @jit
    def elements(codes, scales, x, block, where):
        words = codes[where[0] : where[0] + where[1]]
        for i in range(x.size):
            words[i] = store(x[i])

    return elements


def _close_blocks(encoded: Callable, place: Callable) -> Callable:
    @jit
    def blocks(codes, scales, x, block, where):
        size = where[1]
        k, at, stride = place(block, where)
        for lo in range(0, size, block):
            scales[k] = encoded(codes[at : at + stride], x[lo : min(lo + block, size)])
            k, at = k + 1, at + stride

    return blocks


def _encoded(table: Block, filled: Callable, cleared: Callable) -> Callable:
    """Encode one block and return its stored scale; the maximum is one of integers, so that NaN > Inf > any number."""
    scale = table.scale

    @jit
    def encoded(codes, x):
        words = x.view(np.uint32)
        absmax = np.uint32(0)
        for i in range(words.size):
            absmax = max(absmax, np.uint32(words[i] & MAGNITUDE))
        stored, factor, coded = scale(absmax)
        if coded:
            filled(codes, x, factor)
        else:
            cleared(codes, x.size)
        return stored

    return encoded


def _bytes_encoded(table: Block) -> tuple[Callable, Callable]:
    """`filled(codes, x, factor)`, one code a byte, and `cleared(codes, size)` for a block of zeros."""
    encode, zero = table.encode, table.zero

    @jit
    def filled(codes, x, factor):
        for i in range(x.size):
            codes[i] = encode(x[i], factor)

    @jit
    def cleared(codes, size):
        codes[:size] = zero

    return filled, cleared


def _nibbles_encoded(table: Block) -> tuple[Callable, Callable]:
    """The same with two codes a byte; a block of odd length ends with the code of zero."""
    encode, zero = table.encode, np.uint8(table.zero)
    zeros = np.uint8(zero << 4 | zero)

    @jit
    def filled(codes, x, factor):
        for i in range(x.size // 2):
            codes[i] = np.uint8(encode(x[2 * i], factor) << HALF_BYTE) | encode(x[2 * i + 1], factor)
        if x.size % 2:
            codes[x.size // 2] = np.uint8(encode(x[x.size - 1], factor) << HALF_BYTE) | zero

    @jit
    def cleared(codes, size):
        codes[: (size + 1) // 2] = zeros

    return filled, cleared


# -------------------------------------------------------------------------------------------------------------- weights


@cache
def _close_weights(table: Table) -> Callable:
    """How a tile of fresh weights is stored: `(words, rests, x, key, bits, where)`."""
    if isinstance(table, Words):
        return _close_words(table)
    close = _close(table)
    return jit(lambda p, rest, x, key, bits, where: close(p, rest, x, 1, where))


def _close_words(table: Words) -> Callable:
    store, draw = table.weight.close, _drawn()

    @jit
    def drawn(p, rest, x, key, bits, where):
        words, random = p[where[0] : where[0] + where[1]], draw(bits, key[0], where[0] + key[1], where[1])
        for i in range(x.size):
            words[i], _ = store(x[i], words[i], NO_BITS, random[i])

    @jit
    def alone(p, rest, x, key, bits, where):
        words = p[where[0] : where[0] + where[1]]
        for i in range(x.size):
            words[i], _ = store(x[i], words[i], NO_BITS, NO_BITS)

    @jit
    def beside(p, rest, x, key, bits, where):
        lo, hi = where[0], where[0] + where[1]
        words, rests = p[lo:hi], rest[lo:hi]
        for i in range(x.size):
            words[i], rests[i] = store(x[i], words[i], rests[i], NO_BITS)

    if table.rest and table.random:
        raise NotImplementedError("host_tiles: no format of weights draws bits and keeps something beside its words")
    return beside if table.rest else drawn if table.random else alone


def _drawn() -> Callable:
    """16 random bits for each element of a tile, by its number in the tensor: a word of the stream serves four."""
    mix = mixer(host().jit)

    @inline
    def draw(bits, key, start, size):
        first, skipped = start // 4, start % 4
        for q in range((skipped + size + 3) // 4):
            bits[q] = mix(key + np.uint64(first + q))
        return bits.view(np.uint16)[skipped : skipped + size]

    return draw
